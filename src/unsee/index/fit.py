"""Curvature of the training examples, from the gradients that an index holds."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from ..curvature.diagonal import DiagonalFisher
from ..curvature.kfac import EKFAC, KFAC, KroneckerCovariances
from ..data.latents import EncodedDataset
from ..draws import Draws, stable_seed
from ..gradients import Gradients
from ..models.base import Denoiser
from ..progress import tracked
from .components import Components, token_factors
from .factors import Layer, Quantised, dequantise
from .fisher import fit_diagonal_fisher
from .scan import at_once

if TYPE_CHECKING:
    from .index import Index
    from .layout import Shard

CurvatureName = Literal["ekfac", "kfac", "diagonal", "diagonal_per_draw", "identity"]

FIT_EXAMPLES = 2048
"""Curvature is fitted on at most this many examples, chosen by a hash of their ids."""

PER_DRAW = Draws(seed=-1, n=2)
"""Of the per-draw Fisher: a seed that scores do not use."""


def fit_curvature(index: Index, name: CurvatureName, column: str) -> DiagonalFisher | KFAC | EKFAC:
    """Fits a curvature; see `Index.curvature`.

    Raises:
        ValueError: an unknown name, or no example.
    """
    if name not in ("ekfac", "kfac", "diagonal", "diagonal_per_draw"):
        raise ValueError(f"curvature {name!r}: use ekfac, kfac, diagonal or diagonal_per_draw")
    if name == "diagonal_per_draw":
        return _per_draw(index, Sample(index, column))
    sample = Sample(index, column)
    if name == "diagonal":
        return DiagonalFisher(_second_moments(sample, None), sample.examples, sample.about)
    basis = KFAC.fit(_covariances(sample), sample.about)
    if name == "kfac":
        return basis
    values = _second_moments(sample, basis)
    return EKFAC(basis.input_vectors, basis.output_vectors, values, "averaged", sample.examples,
                 sample.about)  # fmt: skip


def check_damping(damping: float) -> None:
    """Refuses what is no damping, also where no curvature is divided by.

    Raises:
        ValueError: it is negative, or no number.
    """
    if not damping >= 0:
        raise ValueError(f"damping = {damping} must not be negative")


def chosen(ids: Sequence[str], most: int) -> list[str]:
    """Returns at most `most` ids in their order: all, or those of the smallest hashes.

    Which ones they are depends on the ids alone, not on their order or on how they are stored.
    They lie anywhere: of a large index, a fit reads most shards.
    """
    if len(ids) <= most:
        return list(ids)
    hashed = {identifier: stable_seed("curvature", identifier) for identifier in ids}
    kept = set(sorted(ids, key=hashed.__getitem__)[:most])
    return [i for i in ids if i in kept]


class Sample:
    """Stored gradients of a sample of the examples, as factors of single layers.

    Attributes:
        layers: of the index.
        rows: the shards that hold some of them, and which rows of the shard they are.
        examples: how many examples there are.
        about: what the sample is, for the record.
    """

    def __init__(self, index: Index, column: str) -> None:
        self._index, self._column = index, column
        ids = chosen(index.ids, FIT_EXAMPLES)
        if not ids:
            raise ValueError(f"index {str(index.path)!r}: there is no example to fit curvature on")
        self.layers = index.layers
        self.weights = layer_inputs(index.model, index.layers)
        self.about = {"column": column, "examples": len(ids), "ids": ids_hash(ids)}
        self.rows: list[tuple[Shard, list[int]]] = []
        wanted = set(ids)
        for shard in index.shards():
            rows = [r for r, i in enumerate(index.rows[shard.number]) if i in wanted]
            if rows:
                self.rows.append((shard, rows))
        self.examples = sum(len(rows) for _, rows in self.rows)

    def gradients(self) -> Iterator[tuple[Components, Tensor, Tensor]]:
        """Yields what is stored of the examples of one shard after another.

        With it come its factors [R, channels] and text [R, width], both float32: those of an
        example's mean loss over draws and captions; mirrored views are left out.
        """
        for shard, rows in self.rows:
            stored = self._index.components(self._column, shard)
            if len(rows) < len(stored.counts):
                stored = stored.select(_mask(rows, len(stored.counts)))
            factors = Quantised(stored.factors.values[0], stored.factors.scales[0])
            yield stored, dequantise(factors, self.layers).mean(1), stored.text[0].float()

    def tokens(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields text [r, T, width] and factors [r, T, channels] of the captions of a shard."""
        for (shard, places), (stored, factors, rows) in zip(
            self.rows, self.gradients(), strict=True
        ):
            text, captions = self._index.text(shard), self._index.examples(shard).caption_counts
            if len(places) < len(captions):
                mask = _mask(places, len(captions)).repeat_interleave(torch.tensor(captions))
                text, captions = text[mask], [captions[p] for p in places]
            yield text, token_factors(factors, rows, stored.counts, text, captions)

    def inputs(self, text: Tensor, layer: Layer) -> Tensor:
        """Returns what a layer sees of text states [..., width]."""
        return text if layer.reads is None else text @ self.weights[layer.reads].float().T


def ids_hash(ids: Sequence[str]) -> str:
    """Returns a hash of which examples a sample has, in whatever order."""
    return hashlib.sha256(json.dumps(sorted(ids)).encode()).hexdigest()[:16]


def _mask(rows: Sequence[int], count: int) -> Tensor:
    mask = torch.zeros(count, dtype=torch.bool)
    mask[list(rows)] = True
    return mask


def layer_inputs(model: Denoiser, layers: list[Layer]) -> dict[str, Tensor]:
    """Returns the weights between text and layers, on the CPU."""
    named = dict(model.network.named_parameters())
    return {la.reads: named[la.reads].detach().cpu() for la in layers if la.reads is not None}


def _covariances(sample: Sample) -> KroneckerCovariances:
    """Averages second moments of inputs and factors over tokens, in float64."""
    inputs: dict[tuple[str | None, bool], Tensor] = {}
    outputs: Gradients = {}
    tokens = 0
    for text, factors in sample.tokens():
        tokens += text.shape[0] * text.shape[1]
        done = set()
        for layer, part in zip(sample.layers, _split(factors, sample.layers), strict=True):
            g = part.flatten(0, 1).double()
            outputs[layer.name] = outputs.get(layer.name, torch.zeros(())) + g.T @ g
            # All layers that read the same share one matrix.
            kind = layer.reads, layer.centred
            if kind not in done:
                a = sample.inputs(text, layer)
                if layer.centred:
                    a = a - a.mean(1, keepdim=True)
                a = a.flatten(0, 1).double()
                inputs[kind] = inputs.get(kind, torch.zeros(())) + a.T @ a
                done.add(kind)
    means = {kind: total / tokens for kind, total in inputs.items()}
    return KroneckerCovariances(
        {la.name: means[la.reads, la.centred] for la in sample.layers},
        {name: total / tokens for name, total in outputs.items()},
        dict.fromkeys(outputs, tokens / sample.examples), "averaged", sample.examples,
    )  # fmt: skip


def _second_moments(sample: Sample, basis: KFAC | None) -> Gradients:
    """Averages squared gradients of examples, in a basis if there is one.

    The factors are rotated, not the gradients: it is the rows against the width of the text.
    """
    totals = {la.name: torch.zeros(la.channels, la.width, dtype=torch.float64)
              for la in sample.layers}  # fmt: skip
    for stored, factors, text in sample.gradients():
        rotated: dict[int, Tensor] = {}
        for layer, part in zip(sample.layers, _split(factors, sample.layers), strict=True):
            seen = sample.inputs(text, layer)
            if basis is not None:
                vectors = basis.input_vectors[layer.name]
                # Layers that read the same share their eigenvectors, and so the product.
                if id(vectors) not in rotated:
                    rotated[id(vectors)] = seen @ vectors.float()
                seen = rotated[id(vectors)]
                part = part @ basis.output_vectors[layer.name].float()
            chunk = at_once(layer.channels * layer.width)
            for _, rows, real in stored.groups(chunk):
                gradients = (part[rows] * real[..., None]).mT @ seen[rows]  # [r, channels, width]
                # Relative to the largest, so that squares of small gradients do not underflow.
                scale = gradients.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
                squares = (gradients / scale).square().sum(0).double()
                totals[layer.name] += squares * scale.double().square()
    return {name: total / sample.examples for name, total in totals.items()}


def _split(factors: Tensor, layers: list[Layer]) -> tuple[Tensor, ...]:
    return factors.split([layer.channels for layer in layers], dim=-1)


def _per_draw(index: Index, sample: Sample) -> DiagonalFisher:
    latents, states, captions, ids = [], [], [], []
    for shard, rows in sample.rows:
        examples = index.examples(shard)
        latents.append(examples.latents(rows))
        for row in rows:
            count = examples.caption_counts[row]
            ids.append(examples.ids[row])
            captions.append([len(states) + c for c in range(count)])
            states += [examples.text([row], c)[0] for c in range(count)]
    data = EncodedDataset(ids, torch.cat(latents), torch.stack(states), captions)
    length = index.draws.num_train_timesteps
    draws = dataclasses.replace(
        PER_DRAW, num_train_timesteps=length, timesteps=index.draws.timesteps
    )
    bar = partial(tracked, what="fisher", unit="step")
    fitted = fit_diagonal_fisher(index.model, data, draws, progress=bar)
    return dataclasses.replace(fitted, settings={**fitted.settings, "ids": sample.about["ids"]})
