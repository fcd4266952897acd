"""The AbU paper's MSCOCO experiment, on the files that the paper released.

Wang, Hertzmann, Efros, Zhu, Zhang: "Data Attribution for Text-to-Image Models by Unlearning
Synthesized Images", NeurIPS 2024.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .data.published import FISHER, MODEL, file_fingerprint
from .data.recorded import RecordedDraws
from .draws import Draws, DrawSource
from .files import write_atomically
from .methods.forward import forward_losses
from .methods.published import Experiment, MicroBatches, UnlearningDraws, unlearn
from .models.kernels import exact_kernels

logger = logging.getLogger(__name__)

SHARD_PASSES = 4096
"""Forward passes in a shard of losses, about: a minute of the paper's UNet on a small machine."""


@dataclass(frozen=True)
class Reproduction:
    """The experiment's outcome for one query.

    Attributes:
        influence: [N] float64, rise of the loss of picture or mirror image, whichever is larger;
            positive means influential.
        rank: [N] int64, pictures from most to least influential.
        pretrain_loss: [2N] float64, losses of pictures, then mirror images, before.
        unlearned_loss: [2N] float64, the same after unlearning, on the same draws.
        query_loss: [2] float64, the query's before and after, on its first micro-batch.
        settings: what fixed the numbers.
    """

    influence: np.ndarray
    rank: np.ndarray
    pretrain_loss: np.ndarray
    unlearned_loss: np.ndarray
    query_loss: np.ndarray
    settings: dict[str, Any]

    def save(self, path: Path) -> None:
        """Writes every array, and the settings as JSON, to an .npz file without pickles."""
        arrays = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        arrays["settings"] = np.array(json.dumps(self.settings))

        def write(temporary: Path) -> None:
            with temporary.open("wb") as file:
                np.savez(file, **arrays)

        write_atomically(path, write)


def reproduce(
    data_dir: str | Path,
    query: int,
    out: str | Path,
    draws: str | Path | None = None,
    *,
    seed: int = 0,
    batch_size: int = 80,
    work: str | Path | None = None,
    device: str | torch.device = "cpu",
) -> Reproduction:
    """Attributes one of the paper's queries to its training pictures.

    The losses before unlearning are always computed, on the draws that the losses after it use: a
    `pretrain_loss.npy` from elsewhere has draws of its own, whose difference would drown the score.

    Args:
        data_dir: the released files; the paper's UNet and constants where it has no config.json.
        query: which synthesized picture, from 0.
        out: the .npz file to write.
        draws: recorded noise and timesteps (.npz). By default our own: grid timesteps as in the
            paper, noise keyed by picture and caption, mirrored for the mirror image.
        seed: of our own draws.
        batch_size: passes at once; changes speed, and scores within rounding only.
        work: folder of finished parts, where a killed run continues. By default `out` with
            `.work` appended, removed at the end. One folder may serve all queries of the same
            settings: the losses before unlearning are then computed once.
        device: where the network runs; one without float64 (mps) is replaced by the CPU.

    Raises:
        ValueError: files that are missing, damaged or do not fit one another, no such query, a
            work folder of other settings, a loss that is not finite, or a Fisher of zero where
            there is a gradient.
    """
    out = Path(out)
    if out.is_dir():
        raise ValueError(f"{out} is a folder: name the .npz file to write")
    if batch_size < 1:
        raise ValueError(f"batch_size = {batch_size} must be at least 1")
    if torch.device(device).type == "mps":
        logger.warning("device mps has no float64, which the published step needs: cpu is used")
        device = "cpu"
    experiment = Experiment.open(Path(data_dir), query, device)
    source, micro_batches = _draws(experiment, draws, seed)
    settings = {
        **_settings(experiment, Path(data_dir)),
        "draws": f"seed {seed}" if draws is None else file_fingerprint(Path(draws)),
        "batch_size": batch_size,
    }
    parts = Path(work) if work is not None else out.with_name(out.name + ".work")
    _claim(parts, settings)
    out.parent.mkdir(parents=True, exist_ok=True)
    with exact_kernels():
        measured = _measure(experiment, source, micro_batches, batch_size, parts)
    result = Reproduction(**measured, settings={"query": query, **settings})
    result.save(out)
    if work is None:
        shutil.rmtree(parts)
    return result


def _draws(
    experiment: Experiment, recorded: str | Path | None, seed: int
) -> tuple[DrawSource, MicroBatches]:
    config, data, length = experiment.config, experiment.data, experiment.model.num_train_timesteps
    if recorded is not None:
        played = RecordedDraws(Path(recorded), experiment.query, data, config, length)
        return played, played.unlearning
    own = Draws(seed, config.time_samples, "grid", length)
    batch, shape = config.unlearn_batch, data.latent_shape
    return own, UnlearningDraws(seed, experiment.query, batch, shape, length)


def _measure(
    experiment: Experiment,
    source: DrawSource,
    micro_batches: MicroBatches,
    batch_size: int,
    parts: Path,
) -> dict[str, np.ndarray]:
    """Returns the arrays of a `Reproduction`."""
    config, data, model = experiment.config, experiment.data, experiment.model
    rows = range(len(data.ids))
    subject = experiment.latents.numpy().tobytes() + experiment.text.numpy().tobytes()
    name = f"query-{experiment.query:05d}-{hashlib.sha256(subject).hexdigest()[:12]}"
    shard_size = max(1, SHARD_PASSES // (2 * config.num_captions * config.time_samples))

    def losses(cache: Path, description: str) -> np.ndarray:
        values = forward_losses(
            model, data, source, rows, flips=True, batch_size=batch_size, shard_size=shard_size,
            cache=cache, description=description,
        )  # fmt: skip
        return values.mean(axis=2)  # (N, views)

    before = losses(parts / "before", "losses before")
    weights = unlearn(
        experiment, micro_batches,
        batch_size=batch_size, checkpoint=parts / name / "unlearned.safetensors",
    )  # fmt: skip
    query_loss = [experiment.mean_loss(*micro_batches(0, 0), batch_size)]
    with model.replaced(weights):
        query_loss.append(experiment.mean_loss(*micro_batches(0, 0), batch_size))
        after = losses(parts / name / "after", "losses after")
    influence = (after - before).max(axis=1)
    return {
        "influence": influence,
        "rank": np.argsort(-influence, kind="stable"),
        "pretrain_loss": before.T.reshape(-1),
        "unlearned_loss": after.T.reshape(-1),
        "query_loss": np.array(query_loss),
    }


def _settings(experiment: Experiment, folder: Path) -> dict[str, Any]:
    """Returns what a part that was computed before must agree in, JSON-able and flat."""
    config = vars(experiment.config)
    settings = {f"config.{name}": value for name, value in config.items() if name != "unet"}
    settings |= {f"config.unet.{name}": value for name, value in config["unet"].items()}
    settings |= {
        "training data": experiment.data.fingerprint,
        MODEL: file_fingerprint(folder / MODEL),
        FISHER: file_fingerprint(folder / FISHER),
        "device": experiment.model.device.type,
        "shard_passes": SHARD_PASSES,
    }
    return json.loads(json.dumps(settings))


def _claim(parts: Path, settings: dict[str, Any]) -> None:
    """Makes the work folder, or checks that the one there was begun with the same settings."""
    path = parts / "settings.json"
    if not path.is_file():
        try:
            parts.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"{parts}: cannot be made a folder ({error.strerror})") from None
        if any(not entry.name.startswith(".") for entry in parts.iterdir()):
            raise ValueError(f"{parts} holds other things than parts of a run: name another folder")

        def write(temporary: Path) -> None:
            temporary.write_text(json.dumps(settings, indent=1), encoding="utf-8")

        write_atomically(path, write)
        return
    try:
        begun = dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): delete {parts} and run again") from None
    for name in [*settings, *begun]:
        old, new = begun.get(name), settings.get(name)
        if old != new:
            raise ValueError(
                f"{parts} was begun with {name} = {old!r}, this run has {new!r}: delete it to "
                "start over, or use another folder"
            )
