"""Influence functions: preconditioned inner products of averaged gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

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


Normalise = Literal["gradient", "parameters", "loss"]
"""What an example's score is divided by, so that a large gradient does not lead everywhere.

With g the example's gradient and C the damped curvature: `gradient`: ‖g‖ ("renormalised"; without
a curvature, TracIn's cosine but for the query's norm). `parameters`: ‖C⁻¹g‖, how far the example
moved the weights; `loss`: (g·C⁻¹g)^½, how much it moved the losses (theta-RelatIF and l-RelatIF:
Barshan et al., "RelatIF", AISTATS 2020).
"""


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
        normalise: what an example's score is divided by; nothing if None.
    """

    model: Denoiser
    gradients: GradientMatrix
    curvature: Curvature | None
    damping: float = 0.1
    query_draws: Draws = field(default_factory=lambda: Draws(seed=1, n=200))
    query_measure: Measure = "loss"
    normalise: Normalise | None = None

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
    normalise: Normalise | None = None,
) -> np.ndarray:
    """Returns scores [N, Q] float64, see `Influence`."""
    total = np.zeros((len(examples), len(queries)))
    square = np.zeros(len(examples))
    for name in examples.names:
        rows = examples.of(name)
        asked = _divided(queries.of(name), name, curvature, damping)
        total += (rows.flatten(1) @ asked.flatten(1).T).double().numpy()
        if normalise is not None:
            moved = rows if normalise == "gradient" else _divided(rows, name, curvature, damping)
            other = rows if normalise == "loss" else moved
            square += (moved.double() * other.double()).flatten(1).sum(1).numpy()
    if normalise is not None:
        total /= np.maximum(np.sqrt(square), np.finfo(np.float64).tiny)[:, None]
    return total


def second_order_scores(
    functionals: GradientMatrix,
    queries: GradientMatrix,
    curvature: Curvature | None,
    damping: float = 0.1,
) -> np.ndarray:
    """Estimates how far a step away from the queries moves the predictions for the examples.

    For a step δ of the weights and the Jacobian J of an example's predictions of d elements, an
    unlearning step changes the example's loss by its gradient times δ, which is what
    `influence_scores` says, and by ‖Jδ‖²/d: the Gauss-Newton term, never negative, and what is
    left for an example learnt by heart, whose residual is small. It is here half the square of
    a random functional's gradient times δ: right on average, with a standard deviation of √2
    times itself for an example.

    Args:
        functionals: of the examples, `measure="gauss_newton"`.
        queries: gradients of the queries' loss or another measure; δ is one of them, divided by
            the damped curvature.
        curvature: see `Influence`.
        damping: see `Influence`.

    Returns:
        [N, Q] float64, not negative; higher is more influential.
    """
    return 0.5 * np.square(influence_scores(functionals, queries, curvature, damping))


def _divided(rows: Tensor, name: str, curvature: Curvature | None, damping: float) -> Tensor:
    """Returns gradients [n, *shape] divided by the curvature, float32."""
    if curvature is None:
        return rows
    divided = [curvature.precondition({name: g.double()}, damping)[name].float() for g in rows]
    return torch.stack(divided)


def _rows(ids: Sequence[str], candidates: Sequence[str] | None) -> list[int]:
    if candidates is None:
        return list(range(len(ids)))
    place = {i: row for row, i in enumerate(ids)}
    unknown = [c for c in candidates if c not in place]
    if unknown:
        raise ValueError(f"candidate {unknown[0]!r} has no stored gradient")
    return [place[c] for c in candidates]
