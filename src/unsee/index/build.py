"""The pass that fills an index: shard by shard, each done when its files exist."""

from __future__ import annotations

import dataclasses
import functools
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import __version__
from ..data.batches import gather
from ..data.dataset import ImageDataset, OnError
from ..data.latents import EncodedDataset
from ..draws import Draws, random_functionals
from ..models.base import Denoiser
from ..models.kernels import exact_kernels
from ..progress import Progress
from .components import DIFFERENCE_WEIGHT, decompose
from .examples import Indexed, encode_shard, pack_examples, unpack_examples
from .factors import Layer, Measure, Storage, example_factors, text_layers
from .features import (
    Encoders,
    encoder_settings,
    example_features,
    load_encoders,
    needs_pictures,
    reload_encoders,
)
from .layout import (
    Manifest,
    Part,
    Shard,
    edition_of,
    read_header,
    read_shard,
    rows_key,
    shard_path,
    write_shard,
)
from .sketch import Sketch, Sketcher, quantise_rows, sketch_settings

COLUMNS: dict[str, str] = {
    "examples": "ids, latents and text states",
    "loss": "training loss of each view and draw: what forward re-evaluation compares with",
    "factors": "gradients of the loss: influence functions and AbU to first order",
    "outputs": "gradients of the output's norm (D-TRAK's): the output half of the default score",
    "probes": "gradients of random functionals of the output: what larger steps add",
    "sketch": "gradients in any parameters, projected at random: TRAK and D-TRAK",
    "features": "what encoders see of a picture or caption: similarity",
}
"""What a column holds and what it can answer."""

ENCODED_BY = "encoded_by"
"""The setting of an index of pictures that tells its autoencoder, text encoder and tokenizer."""

DEFAULT_ENCODERS = ("latent", "text")
"""Of the column `features`: they need nothing but what the index has."""

MEASURES: dict[str, Measure] = {
    "factors": "loss", "outputs": "output_norm", "probes": "gauss_newton"
}  # fmt: skip
"""Columns of gradients, and what is differentiated for them."""


def settings_of(
    model: Denoiser, draws: Draws, columns: Sequence[str], storage: Storage, shard_size: int,
    flips: bool, on_error: OnError, encoders: Encoders, tolerance: float, sketch: Sketch | None,
) -> dict[str, Any]:  # fmt: skip
    """Returns what fixes the numbers of an index, for its manifest.

    Raises:
        ValueError: an unknown column, an odd number of draws, encoders without their column, or a
            selection without factors, or a tolerance that is no share.
    """
    unknown = [c for c in columns if c not in COLUMNS]
    if unknown:
        raise ValueError(f"index: no column {unknown[0]!r}; there are {', '.join(COLUMNS)}")
    if draws.n % 2:
        raise ValueError(f"index: draws = {draws.n} do not make two halves; use an even number")
    if shard_size < 1:
        raise ValueError(f"index: shard_size = {shard_size} must be at least 1")
    if storage not in ("int8", "float16", "float32"):
        raise ValueError(f"index: storage {storage!r} is not int8, float16 or float32")
    if not 0 <= tolerance < 1:
        raise ValueError(f"index: tolerance = {tolerance} is no share of 1; 0.001 is a thousandth")
    if encoders and "features" not in columns:
        raise ValueError("index: encoders are for the column `features`: add it to the columns")
    if sketch is not None and "sketch" not in columns:
        raise ValueError("index: a sketch is for the column `sketch`: add it to the columns")
    parameter = next(model.network.parameters())
    factors = [c for c in columns if c in MEASURES]
    return {
        # The fingerprint differs with the dtype too: the dtype, which says more, comes first.
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "model": model.fingerprint(),
        "prediction_type": model.prediction_type,
        "columns": [c for c in COLUMNS if c == "examples" or c in columns],
        # Other columns ask nothing of the selection.
        "layers": [dataclasses.asdict(la) for la in text_layers(model)] if factors else [],
        "draws": dataclasses.asdict(draws),
        "views": 2 if flips else 1,
        "storage": storage,
        "tolerance": tolerance,
        "shard_size": shard_size,
        "on_error": on_error,
        **({"encoders": encoder_settings(encoders)} if encoders else {}),
        **({"sketch": sketch_settings(model, sketch or Sketch())} if "sketch" in columns else {}),
    }


def encoded_by(model: Denoiser, data: Indexed) -> dict[str, Any]:
    """Returns the setting that tells what made latents and texts of pictures.

    Of data that came encoded nothing is known.
    """
    pictures = isinstance(data, ImageDataset)
    return {ENCODED_BY: model.encoder_fingerprints()} if pictures else {}


def comparable(settings: dict[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """Returns settings to hold against those of an index that is there.

    Encoders count where both tell them: neither data that came encoded does, nor an index from
    before they were recorded.
    """
    if ENCODED_BY in settings and ENCODED_BY in known:
        return settings
    rest = {name: value for name, value in settings.items() if name != ENCODED_BY}
    return {**rest, ENCODED_BY: known[ENCODED_BY]} if ENCODED_BY in known else rest


def open_encoders(
    names: Sequence[str], columns: Sequence[str], model: Denoiser, data: Indexed
) -> Encoders:
    """Loads the encoders of a new index.

    Raises:
        ValueError: one needs pictures and the data set came encoded, or see `load_encoders`.
    """
    if "features" in columns and not names:
        names = DEFAULT_ENCODERS
    return _for_data(load_encoders(names, model.device), data)


def reopen_encoders(
    folders: Sequence[str], manifest: Manifest, model: Denoiser, data: Indexed
) -> Encoders:
    """Loads the encoders of an index that is there, for more data.

    Raises:
        ValueError: one needs pictures and the data set came encoded, or see `reload_encoders`.
    """
    known = manifest.settings.get("encoders", {})
    return _for_data(reload_encoders(known, folders, model.device), data)


def _for_data(encoders: Encoders, data: Indexed) -> Encoders:
    blind = [name for name in encoders if needs_pictures(name)]
    if blind and not isinstance(data, ImageDataset):
        raise ValueError(
            f"encoder {blind[0]!r} needs pictures, and this data set came encoded: give it as "
            "pictures, or leave the encoder out"
        )
    return encoders


def environment_of(model: Denoiser) -> dict[str, Any]:
    """Returns what the numbers are computed with."""
    return {
        "unsee": __version__,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(model.device) if model.device.type == "cuda"
        else f"{model.device.type} {platform.machine()}",
        "python": platform.python_version(),
    }  # fmt: skip


def layers_of(manifest: Manifest) -> list[Layer]:
    """Returns the layers whose factors an index holds."""
    return [Layer(**about) for about in manifest.settings["layers"]]


def draws_of(manifest: Manifest) -> Draws:
    """Returns the draws of the training examples."""
    return Draws(**manifest.settings["draws"])


def part_of(data: Indexed, name: str = "encoded") -> Part:
    """Returns the manifest's record of a data set.

    Raises:
        ValueError: it is empty.
    """
    part = Part(getattr(data, "name", name), data.fingerprint, len(data.ids))
    if not part.count:
        raise ValueError(f"data set {part.name!r} is empty: it has no example to index")
    return part


def plan_shards(manifest: Manifest, part: Part) -> Manifest:
    """Returns the manifest with the shards of one more data set."""
    size, number = manifest.settings["shard_size"], len(manifest.shards)
    # What is left of another addition that was given up is not taken for this one's.
    edition = edition_of([part.fingerprint, part.count]) if manifest.parts else 0
    shards = [
        Shard(number + i, len(manifest.parts), first, min(first + size, part.count), edition)
        for i, first in enumerate(range(0, part.count, size))
    ]
    return dataclasses.replace(
        manifest, parts=[*manifest.parts, part], shards=[*manifest.shards, *shards]
    )


@exact_kernels()
def fill(
    path: Path, manifest: Manifest, model: Denoiser, data: Indexed, part: int, batch_size: int,
    encoders: Encoders, on_error: OnError,
) -> None:  # fmt: skip
    """Computes the shards of one data set that are not there yet.

    Args:
        path: of the index.
        manifest: with the shards of the data set.
        model: what the index is of.
        data: the data set.
        part: its position in the manifest.
        batch_size: passes at once. Within the noise floor, numbers do not depend on it.
        encoders: of the column `features`.
        on_error: a picture that cannot be read is fatal or left out.

    Raises:
        ValueError: a picture that cannot be read, a loss that is not finite, a damaged shard.
    """
    todo = [s for s in manifest.shards if s.part == part]
    # Its places and signs take five bytes a weight: only where rows are to be made.
    sketcher = functools.cache(lambda: Sketcher(model, Sketch.of(manifest.settings["sketch"])))
    bar = Progress(sum(s.last - s.first for s in todo), "index", "example")
    for shard in todo:
        _make_examples(path, manifest, model, data, shard, on_error)
        columns = manifest.settings["columns"]
        done = all(shard_path(path, c, shard).is_file() for c in columns)
        _fill_shard(path, manifest, model, data, shard, batch_size, encoders, sketcher)
        (bar.skip if done else bar.update)(shard.last - shard.first)
    bar.close()


def _fill_shard(
    path: Path, manifest: Manifest, model: Denoiser, data: Indexed, shard: Shard, batch_size: int,
    encoders: Encoders, sketcher: Callable[[], Sketcher],
) -> None:  # fmt: skip
    columns = [c for c in manifest.settings["columns"] if not shard_path(path, c, shard).is_file()]
    if not columns:
        return
    # Read back, so that a resumed build computes on the very same numbers.
    encoded = unpack_examples(*read_shard(path, manifest, "examples", shard))
    of = {"rows": rows_key(encoded.ids)}
    if "features" in columns:
        pictures = data if isinstance(data, ImageDataset) else None
        rows = example_features(model, encoders, encoded, pictures)
        write_shard(path, manifest, "features", shard, rows, of)
    if "sketch" in columns:
        rows = _sketches(manifest, encoded, sketcher(), batch_size)
        write_shard(path, manifest, "sketch", shard, rows, of)
    columns = [c for c in columns if c not in ("features", "sketch")]
    if not columns:
        return
    for column, tensors in _columns(model, manifest, encoded, columns, batch_size).items():
        write_shard(path, manifest, column, shard, tensors, of)


def _make_examples(
    path: Path, manifest: Manifest, model: Denoiser, data: Indexed, shard: Shard, on_error: OnError
) -> None:
    """Makes the examples of a shard, if they are not there, and removes columns of other rows.

    Other rows: a picture may since have become unreadable, or readable.
    """
    others = manifest.settings["columns"][1:]
    files = {c: f for c in others if (f := shard_path(path, c, shard)).is_file()}
    heads = {c: read_header(path, manifest, c, shard) for c in files}
    lost = not shard_path(path, "examples", shard).is_file()
    if lost:
        encoded = encode_shard(model, data, shard, manifest, on_error)
        ids = [] if encoded is None else encoded.ids
    else:
        encoded, ids = None, read_header(path, manifest, "examples", shard)[0]["ids"]
    for column, (about, count) in heads.items():
        # Earlier versions did not say which rows; as many are the same only beside their examples.
        said = about.get("rows", None if lost or count != len(ids) else rows_key(ids))
        if said != rows_key(ids):
            files[column].unlink(missing_ok=True)
    if lost:  # last: until then a build that is killed does this again
        write_shard(path, manifest, "examples", shard, *pack_examples(encoded, manifest))


def _columns(
    model: Denoiser, manifest: Manifest, encoded: EncodedDataset, columns: Sequence[str],
    batch_size: int,
) -> dict[str, dict[str, Tensor]]:  # fmt: skip
    """Returns name -> tensors of the computed columns of a shard.

    `loss` is [n, views, draws] float64, averaged over captions; see `Components` for gradients.
    """
    layers, draws = layers_of(manifest), draws_of(manifest)
    wanted: dict[str, Measure] = {c: MEASURES[c] for c in columns if c in MEASURES}
    found: dict[str, list[Tensor]] = {name: [] for name in wanted}
    losses = []
    for flipped in (False, True)[: manifest.settings["views"]]:
        loss, factors = _view(model, encoded, layers, draws, list(wanted.values()), flipped,
                              batch_size)  # fmt: skip
        losses.append(loss)
        for name, measure in wanted.items():
            found[name].append(factors[measure])
    tensors: dict[str, dict[str, Tensor]] = {}
    if "loss" in columns:
        tensors["loss"] = {"values": torch.stack(losses, dim=1)}
    states = [encoded.text([r], c) for r in range(len(encoded.ids))
              for c in range(encoded.caption_counts[r])]  # fmt: skip
    text = torch.cat(states) if states else torch.empty(0, 0, 0)
    for name, views in found.items():
        factors, weight = torch.stack(views), DIFFERENCE_WEIGHT
        if name == "probes":  # squares are averaged: over captions too, and halves count alike
            counts = torch.tensor(encoded.caption_counts, dtype=torch.long)
            roots = counts.double().sqrt().repeat_interleave(counts)
            factors, weight = factors * roots[:, None, None, None].float(), 1.0
        tensors[name] = decompose(
            factors, text, encoded.caption_counts, layers, manifest.settings["tolerance"],
            manifest.settings["storage"], weight,
        ).tensors  # fmt: skip
    return tensors


def _sketches(
    manifest: Manifest, encoded: EncodedDataset, sketcher: Sketcher, batch_size: int
) -> dict[str, Tensor]:
    """Returns rows [n, 2, length] and scales [n, 2] for each measure; none of mirrored views."""
    tensors: dict[str, Tensor] = {}
    for measure, rows in sketcher.examples(encoded, draws_of(manifest), batch_size).items():
        stored = quantise_rows(rows, manifest.settings["storage"])
        tensors |= {measure: stored.values, f"{measure}.scales": stored.scales}
    return tensors


def _view(
    model: Denoiser, encoded: EncodedDataset, layers: list[Layer], draws: Draws,
    measures: list[Measure], flipped: bool, batch_size: int,
) -> tuple[Tensor, dict[Measure, Tensor]]:  # fmt: skip
    """Returns losses [n, draws] float64 and measure -> factors [captions, 2, T, channels]."""
    jobs = [(row, row, c) for row in range(len(encoded.ids))
            for c in range(encoded.caption_counts[row])]  # fmt: skip
    total = torch.zeros(len(encoded.ids), draws.n, dtype=torch.float64)
    parts: dict[Measure, list[Tensor]] = {measure: [] for measure in measures}
    examples = max(1, batch_size // draws.n)
    if not jobs:  # none of the pictures could be read
        channels = sum(layer.channels for layer in layers)
        return total, {m: torch.zeros(0, 2, 0, channels) for m in measures}
    for first in range(0, len(jobs), examples):
        batch = jobs[first : first + examples]
        gathered = gather(encoded, draws, batch, flipped)
        shape = tuple(gathered[3].shape[1:])
        functionals = None
        if "gauss_newton" in measures:
            functionals = torch.stack(
                [random_functionals(encoded.ids[row], c, shape) for _, row, c in batch]
            )
        with model.gradients_on():
            losses, factors = example_factors(
                model, layers, gathered, measures, functionals=functionals
            )
        _check_finite(losses, factors, [encoded.ids[row] for _, row, _ in batch])
        total.index_add_(0, torch.tensor([row for row, _, _ in batch]), losses.cpu().double())
        for measure in measures:
            parts[measure].append(factors[measure].float().cpu())
    captions = torch.tensor(encoded.caption_counts, dtype=torch.float64)
    return total / captions[:, None], {m: torch.cat(p) for m, p in parts.items()}


def _check_finite(losses: Tensor, factors: dict[Measure, Tensor], ids: list[str]) -> None:
    good = losses.isfinite().flatten(1).all(1)
    for part in factors.values():
        good &= part.isfinite().flatten(1).all(1)
    if not good.all():
        bad = ids[int((~good).nonzero()[0])]
        raise ValueError(
            f"the loss or gradient of example {bad!r} is not finite: check the model with "
            "`unsee doctor`; a float16 model may need float32"
        )
