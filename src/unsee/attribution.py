"""One attribution from model, data and picture to files a person can look at."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from .curvature.diagonal import DiagonalFisher
from .data.dataset import ImageDataset, OnError
from .data.latents import EncodedDataset, encode_dataset
from .draws import Draws
from .files import settings_key
from .index.fisher import fit_diagonal_fisher
from .methods.base import Scores
from .methods.unlearning import RISE, ForwardAbU
from .models.base import Denoiser
from .progress import tracked
from .query import Query
from .report import write_report

FISHER_SEED = -1
"""Not a seed that scores use: the Fisher's draws are independent of theirs."""


@dataclass(frozen=True)
class Prepared:
    """A model and its training data, ready to be asked.

    Attributes:
        model: the denoiser.
        data: pictures and captions.
        encoded: latents and text states.
        fisher: the diagonal curvature.
        seconds: what each stage took.
        work: folder of finished intermediate results; a killed run continues there.
    """

    model: Denoiser
    data: ImageDataset
    encoded: EncodedDataset
    fisher: DiagonalFisher
    work: Path
    seconds: dict[str, float] = field(default_factory=dict)


def prepare(
    model: Denoiser,
    data: ImageDataset,
    work: Path,
    *,
    flips: bool = False,
    on_error: OnError = "raise",
    fisher_draws: int = 2,
    fisher_examples: int = 2000,
    fisher_batch: int = 64,
) -> Prepared:
    """Encodes the training data and fits the Fisher, or finds both in `work`.

    Args:
        model: the denoiser.
        data: the training set.
        work: folder for finished shards.
        flips: also encodes mirrored pictures.
        on_error: what to do with pictures that cannot be read.
        fisher_draws: draws per example of the Fisher.
        fisher_examples: the Fisher is fitted on at most this many, spread evenly by id hash.
        fisher_batch: passes at once while it is fitted.
    """
    started = time.monotonic()
    encoded = encode_dataset(model, data, cache=work, flips=flips, on_error=on_error)
    encode_done = time.monotonic()
    sample = encoded.select(_spread(encoded.ids, fisher_examples))
    draws = Draws(FISHER_SEED, fisher_draws, num_train_timesteps=model.num_train_timesteps)
    key = settings_key(
        {"model": model.fingerprint(), "data": sample.fingerprint, "draws": repr(draws),
         "parameters": list(model.parameters)}
    )  # fmt: skip
    path = work / f"fisher-{key}.safetensors"
    if path.is_file():
        fisher = DiagonalFisher.load(path)
    else:
        bar = partial(tracked, what="fisher", unit="step")
        fisher = fit_diagonal_fisher(model, sample, draws, fisher_batch, progress=bar)
        fisher.save(path)
    seconds = {
        "encode pictures": encode_done - started,
        "fit Fisher": time.monotonic() - encode_done,
    }
    return Prepared(model, data, encoded, fisher, work, seconds)


def _spread(ids: Sequence[str], most: int) -> list[str]:
    """Returns at most `most` ids, chosen by hash, in the order of the data set."""
    if len(ids) <= most:
        return list(ids)
    chosen = sorted(ids, key=lambda i: hashlib.sha256(i.encode()).digest())[:most]
    keep = set(chosen)
    return [i for i in ids if i in keep]


def attributor(
    prepared: Prepared,
    *,
    draws: int = 10,
    query_draws: int = 200,
    rise: float = RISE,
    step_size: float | None = None,
    steps: int = 1,
    damping: float = 0.1,
    flips: bool = False,
    batch_size: int = 80,
    seed: int = 0,
) -> ForwardAbU:
    """Returns AbU on prepared data; see `ForwardAbU` for the settings."""
    length = prepared.model.num_train_timesteps
    return ForwardAbU(
        prepared.model, prepared.encoded, prepared.fisher, rise=rise, step_size=step_size,
        steps=steps, damping=damping, flips=flips, batch_size=batch_size,
        draws=Draws(seed, draws, num_train_timesteps=length),
        query_draws=Draws(seed + 1, query_draws, num_train_timesteps=length),
        cache=prepared.work,
    )  # fmt: skip


def attribute_to_files(
    model: Denoiser,
    data: ImageDataset,
    query: Query,
    out: Path,
    *,
    work: Path | None = None,
    top: int = 10,
    on_error: OnError = "raise",
    flips: bool = False,
    **settings: Any,
) -> tuple[Scores, dict[str, Path]]:
    """Attributes one picture and writes scores, contact sheet and page.

    Args:
        model: the denoiser.
        data: its training set.
        query: the picture.
        out: folder of the results.
        work: folder of intermediate results, `out/work` by default; runs on the same model and
            data may share it.
        top: how many examples to show.
        on_error: what to do with training pictures that cannot be read.
        flips: also scores mirrored pictures.
        settings: see `attributor`.

    Returns:
        All scores, and the paths of what was written.
    """
    prepared = prepare(model, data, work or out / "work", flips=flips, on_error=on_error)
    scores = attributor(prepared, flips=flips, **settings).attribute(query)
    seconds = {**prepared.seconds, **scores.settings["seconds"]}
    floor = scores.settings["noise_floor"]
    paths = write_report(scores, data, out, top=top, timings=seconds, floor=floor)
    return scores, paths
