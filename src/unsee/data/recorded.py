"""Noise and timesteps of a recorded run, played again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .published import PublishedConfig, PublishedExamples


class RecordedDraws:
    """Plays the noise and timesteps of a recorded run. See `DrawSource`.

    Args:
        path: the .npz file; its noise is read into memory.
        query: whose unlearning draws.
        data: the training examples that they were recorded for.
        config: numbers of steps, micro-batches, captions and draws, which must be the recorded.
        num_train_timesteps: length of the noise schedule.

    Raises:
        ValueError: the file or an array is missing, or shapes disagree.
    """

    def __init__(
        self,
        path: Path,
        query: int,
        data: PublishedExamples,
        config: PublishedConfig,
        num_train_timesteps: int = 1000,
    ) -> None:
        self._row_of = {identifier: row for row, identifier in enumerate(data.ids)}
        self.n = config.time_samples
        shape = data.latent_shape
        unlearn = (config.steps, config.grad_accum, config.unlearn_batch)
        arrays = _load_archive(
            path,
            [
                "loss_timesteps",
                "loss_noise",
                f"unlearn_timesteps_{query}",
                f"unlearn_noise_{query}",
            ],
        )
        self._timesteps, self._noise, self._unlearn_timesteps, self._unlearn_noise = arrays.values()
        captions = self._noise.shape[1] if self._noise.ndim > 1 else 0
        # More captions than are used may have been recorded; the first ones count.
        captions = max(captions, config.num_captions)
        wanted = [
            (self.n,),
            (2 * len(data.ids), captions, self.n, *shape),
            unlearn,
            (*unlearn, *shape),
        ]
        for (name, array), expected in zip(arrays.items(), wanted, strict=True):
            if array.shape != expected:
                raise ValueError(
                    f"{path}: {name} has shape {array.shape}, data and configuration "
                    f"need {expected}"
                )
            if "timesteps" in name:
                inside = (array >= 0) & (array < num_train_timesteps)
                if array.dtype.kind not in "iu" or not inside.all():
                    raise ValueError(
                        f"{path}: {name} must hold whole numbers from 0 to "
                        f"{num_train_timesteps - 1}"
                    )

    def of(
        self, example_id: str, shape: tuple[int, ...], caption: int = 0, flipped: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Returns timesteps [n] int64 and noise [n, *shape] float32; flips have noise of their own.

        Raises:
            ValueError: nothing was recorded for the example.
        """
        if example_id not in self._row_of:
            raise ValueError(f"draws: none were recorded for example {example_id!r}")
        row = self._row_of[example_id] + len(self._row_of) * flipped
        timesteps = torch.from_numpy(self._timesteps.astype(np.int64))
        return timesteps, torch.from_numpy(self._noise[row, caption].astype(np.float32))

    def unlearning(self, step: int, micro_batch: int) -> tuple[Tensor, Tensor]:
        """Returns timesteps [b] int64 and noise [b, C, h, w] float32 of one micro-batch."""
        timesteps = self._unlearn_timesteps[step, micro_batch].astype(np.int64)
        noise = self._unlearn_noise[step, micro_batch].astype(np.float32)
        return torch.from_numpy(timesteps), torch.from_numpy(noise)


def _load_archive(path: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        with np.load(path, allow_pickle=False) as archive:
            missing = [name for name in names if name not in archive]
            if missing:
                raise LookupError(f"lacks {', '.join(missing)}; it has {', '.join(archive)}")
            return {name: archive[name] for name in names}
    except LookupError as error:
        raise ValueError(f"{path} {error.args[0]}") from None
    except Exception as error:  # zipfile's, zlib's and numpy's own kinds: the file is no good
        raise ValueError(f"{path}: not a whole .npz file of numbers ({error})") from None
