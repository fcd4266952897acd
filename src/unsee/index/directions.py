"""Directions of queries, as they are held against stored gradients: whole, and of low rank.

A direction W [channels, width] matters by the scores that it makes. If channels and inputs of
gradients were independent, the expected square of a score would be the squared norm of G^½ W A^½,
with the second moments G and A of the two sides. Its smallest singular values can go, and what is
lost is known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..gradients import Gradients
from .components import DIFFERENCE_WEIGHT
from .factors import Layer


@dataclass(frozen=True)
class Directions:
    """Directions of Q queries, in two halves of their draws.

    Attributes:
        full: for each layer [2Q, width of the text state, channels] float32; the halves of a query
            behind one another.
        left: for each query and layer [2, rank, channels] float32, of both halves; None where
            nothing was truncated.
        right: for each query and layer [width of the text state, rank] float32.
        lost: largest share of a query's expected squared score that truncation gives up.
    """

    full: list[Tensor]
    left: list[list[Tensor]] | None = None
    right: list[list[Tensor]] | None = None
    lost: float = 0.0

    @property
    def count(self) -> int:
        """2Q."""
        return len(self.full[0])

    @property
    def rank(self) -> int:
        """Sum of the ranks over queries and layers; 0 where nothing was truncated."""
        return sum(p.shape[-1] for query in self.right or () for p in query)

    def to(self, device: torch.device) -> Directions:
        """Returns the directions on a device."""

        def moved(parts: list[list[Tensor]] | None) -> list[list[Tensor]] | None:
            return None if parts is None else [[p.to(device) for p in q] for q in parts]

        return Directions(
            [f.to(device) for f in self.full], moved(self.left), moved(self.right), self.lost
        )


@dataclass(frozen=True)
class Moments:
    """Second moments of the gradients of one weight, channels and inputs apart.

    Attributes:
        outputs: [channels] root of the mean square along each vector, up to a factor.
        inputs: [width].
        vectors: orthogonal bases [channels, channels] and [width, width], in columns; None for
            the basis that the weight has.
    """

    outputs: Tensor
    inputs: Tensor
    vectors: tuple[Tensor, Tensor] | None

    def rotate(self, directions: Tensor) -> Tensor:
        """Returns directions [..., channels, width] in the basis of the vectors."""
        if self.vectors is None:
            return directions
        return self.vectors[0].T @ directions @ self.vectors[1]

    def rotate_back(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the two sides, [..., channels, r] and [r, width], in the weight's basis."""
        if self.vectors is None:
            return left, right
        return self.vectors[0] @ left, right @ self.vectors[1].T


def moments_of(curvature: object | None) -> dict[str, Moments] | None:
    """Returns what a curvature knows of the gradients it was fitted on; None if nothing."""
    values: Gradients | None = getattr(curvature, "values", None)
    if values is None:
        return None
    outputs, inputs = (getattr(curvature, f"{side}_vectors", None) for side in ("output", "input"))
    found = {}
    for name, v in values.items():
        # What hardly ever occurs must not be divided by its rounding, nor anything by nothing.
        roots = [v.mean(1 - side).sqrt() for side in (0, 1)]
        roots = [r.clamp_min(1e-4 * (float(r.max()) or 1.0)).float() for r in roots]
        bases = None
        if outputs is not None and inputs is not None:
            bases = outputs[name].float(), inputs[name].float()
        found[name] = Moments(roots[0], roots[1], bases)
    return found


def directions(
    halves: Sequence[Mapping[str, Tensor]],
    layers: Sequence[Layer],
    weights: Mapping[str, Tensor],
    moments: Mapping[str, Moments] | None = None,
    tolerance: float = 1e-4,
) -> Directions:
    """Prepares directions for `scan`.

    Args:
        halves: for each query, weight name -> [2, channels, width].
        layers: of the index.
        weights: name -> value of the weights between text and layer (`Layer.reads`).
        moments: weight name -> moments of the examples' gradients; without them, nothing is
            truncated.
        tolerance: share of a query's expected squared score that truncation may give up.
    """

    def seen(direction: Tensor, layer: Layer) -> Tensor:
        return direction if layer.reads is None else direction @ weights[layer.reads].to(direction)

    full = [
        torch.cat([seen(q[la.name], la).mT for q in halves]).float().contiguous() for la in layers
    ]
    if moments is None or tolerance <= 0:
        return Directions(full)
    left, right, lost = [], [], 0.0
    for query in halves:
        parts = [_Decomposed.of(query[la.name], moments[la.name]) for la in layers]
        total = sum(p.expected for p in parts)
        ranks, share = _ranks([p.values for p in parts], total, tolerance)
        lost = max(lost, share)
        sides = [p.truncated(r) for p, r in zip(parts, ranks, strict=True)]
        left.append([a for a, _ in sides])
        right.append([seen(b, la).mT.contiguous()
                      for (_, b), la in zip(sides, layers, strict=True)])  # fmt: skip
    return Directions(full, left, right, lost)


@dataclass(frozen=True)
class _Decomposed:
    """A direction's mean, and below it half its difference, in singular vectors.

    Both are weighted. One right side, that of the text, serves both halves, and the text is most
    of the work.
    """

    left: Tensor
    right: Tensor
    values: Tensor
    moments: Moments
    expected: float  # square of the score

    @classmethod
    def of(cls, halves: Tensor, moments: Moments) -> _Decomposed:
        weighted = moments.rotate(halves.float()) * moments.outputs[:, None] * moments.inputs
        mean, difference = weighted.mean(0), (weighted[0] - weighted[1]) / 2
        stacked = torch.cat([mean, DIFFERENCE_WEIGHT * difference])
        # Faster than a singular value decomposition; in float64 what is kept is as exact. Scaled,
        # since squares of small gradients may underflow.
        scale = float(stacked.abs().max()) or 1.0
        wide = stacked.double() / scale
        tall = wide.shape[0] > wide.shape[1]
        squares, vectors = torch.linalg.eigh(wide.T @ wide if tall else wide @ wide.T)
        vectors = vectors.flip(1).float()
        left, right = (stacked @ vectors, vectors.T) if tall else (vectors, vectors.T @ stacked)
        values = squares.clamp_min(0).sqrt().flip(0) * scale
        return cls(left, right, values, moments, float(mean.double().square().sum()))

    def truncated(self, rank: int) -> tuple[Tensor, Tensor]:
        """Returns [2, rank, channels] and [rank, width], without the weights."""
        mean, difference = self.left[:, :rank].chunk(2)
        difference = difference / DIFFERENCE_WEIGHT
        left = torch.stack([mean + difference, mean - difference])
        left, right = self.moments.rotate_back(
            left / self.moments.outputs[:, None], self.right[:rank] / self.moments.inputs
        )
        return left.mT.contiguous(), right


def _ranks(values: Sequence[Tensor], expected: float, tolerance: float) -> tuple[list[int], float]:
    """Returns the rank of each layer, and the share of `expected` that is lost at most.

    The smallest singular values of all layers go first.
    """
    squares = [v.double().square() for v in values]
    every = torch.cat(squares).sort().values
    if float(every.sum()) == 0:
        return [1] * len(values), 0.0
    # One stays, whatever the tolerance.
    gone = min(int((every.cumsum(0) <= tolerance * expected).sum()), len(every) - 1)
    ranks = [max(1, int((s >= every[gone]).sum())) for s in squares]
    dropped = sum(float(s[r:].sum()) for s, r in zip(squares, ranks, strict=True))
    return ranks, dropped / expected if expected else 0.0
