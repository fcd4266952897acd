"""Losses of training examples by forward passes: the price AbU pays for every query."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ..data.batches import gather
from ..data.latents import EncodedExamples
from ..draws import DrawSource
from ..files import write_atomically
from ..models.base import Denoiser
from ..progress import Progress


@torch.no_grad()
def forward_losses(
    model: Denoiser,
    data: EncodedExamples,
    draws: DrawSource,
    rows: Sequence[int],
    *,
    flips: bool = False,
    batch_size: int = 80,
    shard_size: int = 256,
    cache: Path | None = None,
    description: str = "losses",
) -> np.ndarray:
    """Evaluates the training loss of examples on their own draws.

    Args:
        model: the network, with whatever weights it has now.
        data: the training examples.
        draws: each example's timesteps and noise.
        rows: which examples.
        flips: also evaluates the mirrored view.
        batch_size: forward passes at once (examples times draws).
        shard_size: examples per file of `cache`.
        cache: folder for finished shards; a second call with the same `cache` continues there.
            The caller names it after everything that the losses depend on.
        description: what the progress bar says.

    Returns:
        [len(rows), views, draws] float64, averaged over captions; the second view is the mirror.

    Raises:
        ValueError: a loss is not finite; names the example.
    """
    views = [False, True] if flips else [False]
    shards = [list(rows[i : i + shard_size]) for i in range(0, len(rows), shard_size)]
    passes = sum(data.caption_counts[r] for r in rows) * len(views) * draws.n
    bar = Progress(passes, description, "draw", unit_scale=True)
    parts = []
    for number, shard in enumerate(shards):
        path = cache / f"{number:05d}-of-{len(shards):05d}.npy" if cache else None
        if path is not None and path.is_file():
            part = load_array(path, (len(shard), len(views), draws.n))
            bar.skip(sum(data.caption_counts[r] for r in shard) * len(views) * draws.n)
        else:
            part = np.zeros((len(shard), len(views), draws.n))
            for v, flipped in enumerate(views):
                part[:, v] = _view_losses(model, data, draws, shard, flipped, batch_size, bar)
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(path, lambda temporary, part=part: save_array(temporary, part))
        parts.append(part)
    bar.close()
    return np.concatenate(parts)


def save_array(path: Path, array: np.ndarray) -> None:
    """Writes a shard under exactly this name, which `np.save` would append to."""
    with path.open("wb") as file:
        np.save(file, array, allow_pickle=False)


def load_array(path: Path, shape: tuple[int, ...], mapped: bool = False) -> np.ndarray:
    """Reads a shard, or maps it into memory.

    Raises:
        ValueError: it is damaged, or of another shape.
    """
    try:
        # "c", copy on write: torch warns of arrays that it cannot write to.
        part = np.load(path, mmap_mode="c" if mapped else None, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{path} is damaged ({error}): delete it and run again") from None
    if part.shape != shape:
        raise ValueError(f"{path} holds {part.shape}, not {shape}: delete it and run again")
    return part


def _view_losses(
    model: Denoiser,
    data: EncodedExamples,
    draws: DrawSource,
    rows: Sequence[int],
    flipped: bool,
    batch_size: int,
    bar: Progress,
) -> np.ndarray:
    """Returns [len(rows), draws] float64, averaged over captions."""
    jobs = [(place, r, c) for place, r in enumerate(rows) for c in range(data.caption_counts[r])]
    total = np.zeros((len(rows), draws.n))
    counts = np.array([data.caption_counts[r] for r in rows], dtype=np.float64)
    examples = max(1, batch_size // draws.n)
    chunk = min(draws.n, batch_size)
    for first in range(0, len(jobs), examples):
        batch = jobs[first : first + examples]
        latents, text, timesteps, noise = gather(data, draws, batch, flipped)
        for d in range(0, draws.n, chunk):
            losses = model.loss(latents, text, timesteps[:, d : d + chunk], noise[:, d : d + chunk])
            values = losses.cpu().double().numpy()
            if not np.isfinite(values).all():
                bad = batch[int(np.argwhere(~np.isfinite(values))[0][0])]
                raise ValueError(
                    f"the loss of example {data.ids[bad[1]]!r} is not finite: check the model with "
                    "`unsee doctor`; a float16 model may need float32"
                )
            np.add.at(total[:, d : d + chunk], [place for place, _, _ in batch], values)
            bar.update(values.size)
    return total / counts[:, None]


def noise_floor(
    model: Denoiser,
    data: EncodedExamples,
    draws: DrawSource,
    rows: Sequence[int],
    batch_size: int = 80,
    first: np.ndarray | None = None,
) -> float:
    """Bounds the error that floating point leaves in a score.

    The same losses are computed in batches of another size, with the weights unchanged: another
    order of summation, hence other rounding. What moves is no influence.

    Args:
        model: the network.
        data: the training examples.
        draws: each example's timesteps and noise.
        rows: a sample of examples.
        batch_size: the batch size that scores are computed with.
        first: losses [rows, views, draws] of these examples, where they were computed with it, or
            come from elsewhere and are to be held against it.

    Returns:
        Twice the largest change of an example's loss (mean over draws) between the two batch
        sizes: a score is the difference of two such losses.
    """
    other = max(1, draws.n * 3) if batch_size > draws.n * 3 else batch_size * 3 + 1
    sizes = (batch_size, other) if first is None else (other,)
    found = [
        forward_losses(model, data, draws, rows, batch_size=size, description="noise floor")
        for size in sizes
    ]
    first, second = (found[0] if first is None else first[:, :1]), found[-1]
    change = np.abs((first - second).mean(axis=2)).max()
    # Two runs may agree to the last bit by luck; rounding of a single float32 loss is the least.
    dtype = np.float64 if next(model.network.parameters()).dtype == torch.float64 else np.float32
    return 2 * float(max(change, np.finfo(dtype).eps * np.abs(first).mean()))
