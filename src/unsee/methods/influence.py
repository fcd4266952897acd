"""Influence functions: preconditioned inner products of averaged gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..draws import Draws
from ..models.base import Denoiser
from ..query import Query
from .base import Scores
from .example_gradients import GradientMatrix, Measure, QueryExamples, example_gradients


class Curvature(Protocol):
    """Anything that divides gradients by a damped curvature."""

    def precondition(
        self, gradients: Mapping[str, Tensor], damping: float = 0.1
    ) -> dict[str, Tensor]:
        """Returns name -> gradient of the same shape, divided by the curvature."""
        ...


@dataclass
class Influence:
    """Influence functions (Koh and Liang, ICML 2017) on stored, averaged gradients.

    The score of example i for query q is the inner product of the query's gradient, divided by
    the damped curvature, with the example's: positive where training on the example lowered the
    query's loss. To first order it is AbU's score with the same curvature, up to a factor.

    Attributes:
        model: the denoiser, for the query's gradient.
        gradients: of the training examples, of the loss or another measure.
        curvature: divides the query's gradient; None is the identity (TracIn's last checkpoint).
        damping: relative to the curvature's mean, see there.
        query_draws: timesteps and noise of the query, independent of the examples'.
        query_measure: what of the query is differentiated.
        normalise: divides an example's score by the norm of its gradient, which keeps examples
            with large gradients from leading everywhere ("renormalised").
    """

    model: Denoiser
    gradients: GradientMatrix
    curvature: Curvature | None
    damping: float = 0.1
    query_draws: Draws = field(default_factory=lambda: Draws(seed=1, n=200))
    query_measure: Measure = "loss"
    normalise: bool = False

    def attribute(self, query: Query, candidates: Sequence[str] | None = None) -> Scores:
        """See `Attributor`."""
        return self.attribute_many([query], candidates)[0]

    def attribute_many(
        self, queries: Sequence[Query], candidates: Sequence[str] | None = None
    ) -> list[Scores]:
        """Scores for several queries at once: the stored gradients are read once.

        Raises:
            ValueError: a candidate has no gradient, or there is no query.
        """
        asked = example_gradients(
            self.model, QueryExamples(queries), self.query_draws, measure=self.query_measure
        )
        values = influence_scores(
            self.gradients, asked, self.curvature, self.damping, self.normalise
        )
        rows = _rows(self.gradients.ids, candidates)
        ids = [self.gradients.ids[r] for r in rows]
        about: dict[str, Any] = {
            "curvature": type(self.curvature).__name__ if self.curvature else "identity",
            "damping": self.damping, "query_draws": repr(self.query_draws),
            "query_measure": self.query_measure, "normalise": self.normalise,
        }  # fmt: skip
        return [Scores(ids, values[rows, i], "influence", about, q) for i, q in enumerate(queries)]


def influence_scores(
    examples: GradientMatrix,
    queries: GradientMatrix,
    curvature: Curvature | None,
    damping: float = 0.1,
    normalise: bool = False,
) -> np.ndarray:
    """Returns scores [N, Q] float64, see `Influence`."""
    total = np.zeros((len(examples), len(queries)))
    square = np.zeros(len(examples))
    for name in examples.names:
        asked = queries.of(name)
        if curvature is not None:
            divided = [curvature.precondition({name: g.double()}, damping)[name] for g in asked]
            asked = torch.stack(divided).float()
        rows = examples.of(name).flatten(1)
        total += (rows @ asked.flatten(1).T).double().numpy()
        square += rows.double().square().sum(1).numpy()
    if normalise:
        total /= np.maximum(np.sqrt(square), np.finfo(np.float64).tiny)[:, None]
    return total


def _rows(ids: Sequence[str], candidates: Sequence[str] | None) -> list[int]:
    if candidates is None:
        return list(range(len(ids)))
    place = {i: row for row, i in enumerate(ids)}
    unknown = [c for c in candidates if c not in place]
    if unknown:
        raise ValueError(f"candidate {unknown[0]!r} has no stored gradient")
    return [place[c] for c in candidates]
