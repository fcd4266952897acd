"""TRAK and D-TRAK: from the sketches of an index, or with the exact kernel of few examples."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from ..draws import Draws
from ..index.factors import HALVES, Measure
from ..index.index import Index
from ..index.kernel import sketched_rows
from ..index.rows import scan_rows
from ..index.sketch import Sketcher
from ..models.kernels import exact_kernels
from ..query import Query
from .base import Scores
from .example_gradients import GradientMatrix
from .indexed import check_query_draws, query_draws_for, rows_of
from .products import with_errors

NAMES: dict[Measure, str] = {"loss": "TRAK", "output_norm": "D-TRAK"}


SMALLEST_RIDGE = 1e-4
"""Rounding of a scan in float32 is then a hundredth of the scores; at 1e-6 it is all of them."""


@dataclass(frozen=True)
class TRAK:
    """TRAK, or D-TRAK, from the column `sketch` of an index.

    The score of an example with the projected gradient ψ is ψ(ΦᵀΦ + λI)⁻¹φ, with φ the query's and
    Φ those of all other examples ("TRAK", Park et al., ICML 2023). D-TRAK differentiates the mean
    square of the output instead of the loss (Zheng et al., ICLR 2024).

    As published, ψ itself is in Φ, which makes its own score small: nothing in LDS is gained by
    it, while images that Φ does not hold come to lead the ranking (see docs/benchmark.md).
    Without it all examples have one scale, in the sample that Φ was fitted on or not.
    `trak_scores` has both.

    Every gradient is known twice, from even and from odd draws: what the halves disagree about is
    a score's standard error.

    Attributes:
        index: of the training data, with the column `sketch`.
        measure: `output_norm` (D-TRAK) or `loss` (TRAK); by default the index's first.
        ridge: λ, relative to the mean squared length of the examples' rows; at least 1e-4, since
            rows are scanned in float32.
        query_draws: timesteps and noise of the query, even in number, independent of the
            examples'; by default 64 of seed 1, in the part of the schedule that theirs are in.
        batch_size: draws of the query at once.
    """

    index: Index
    measure: Measure | None = None
    ridge: float = 0.1
    query_draws: Draws | None = None
    batch_size: int = 64

    def __post_init__(self) -> None:
        self.index.sketch_of(self.measure)
        if not self.ridge >= SMALLEST_RIDGE:
            raise ValueError(f"trak: ridge = {self.ridge} must be at least {SMALLEST_RIDGE:g}")
        check_query_draws(self.used_query_draws, self.index.model)

    @property
    def used_measure(self) -> Measure:
        """What is differentiated."""
        return self.measure or self.index.sketch_of().measures[0]

    @property
    def used_query_draws(self) -> Draws:
        """Timesteps and noise of the query."""
        return self.query_draws or query_draws_for(self.index)

    @cached_property
    def _sketcher(self) -> Sketcher:
        return Sketcher(self.index.model, self.index.sketch_of())

    def attribute(self, query: Query, candidates: Sequence[str] | None = None) -> Scores:
        """Scores every example, or the candidates; see `attribute_many`."""
        return self.attribute_many([query], candidates)[0]

    @exact_kernels()
    def attribute_many(
        self, queries: Sequence[Query], candidates: Sequence[str] | None = None
    ) -> list[Scores]:
        """Scores several queries in one pass over the index.

        Returns:
            For each query, scores in the order of `index.ids` or of the candidates, with standard
            errors. There are no mirrored views: the picture itself, which is in Φ, would make
            their products small.

        Raises:
            ValueError: there is no query, an unknown candidate, or a query whose gradient is not
                finite.
        """
        if not queries:
            raise ValueError("there is no query")
        chosen = rows_of(self.index.ids, candidates)
        index, measure, started = self.index, self.used_measure, time.monotonic()
        sketch = self._sketcher.sketch
        asked = [self._sketcher.query(q, self.used_query_draws, self.batch_size) for q in queries]
        differentiated = time.monotonic()
        kernel = index.kernel(measure)
        phi = torch.cat([found[measure] for _, found in asked])
        sketched = sketched_rows(index, measure, kernel.rows)
        directions = kernel.precondition(sketched, phi, self.ridge)
        solved = time.monotonic()
        products = without_own(
            self._products(directions, len(queries)), kernel.rows.numpy(),
            kernel.leverage(self.ridge).numpy(),
        )  # fmt: skip
        about = {
            "measure": measure, "ridge": self.ridge, "length": sketch.length,
            "parameters": sketch.parameters, "query_draws": repr(self.used_query_draws),
            "index": str(index.path), "draws": repr(index.draws),
            "seconds": {"query's gradient": differentiated - started,
                        "kernel": solved - differentiated, "scan": time.monotonic() - solved},
        }  # fmt: skip
        found = []
        for i, query in enumerate(queries):
            values, errors = (a[chosen] for a in with_errors(products[:, :, i]))
            ids = [index.ids[row] for row in chosen]
            settings = {**about, "box": query.box, "loss_of_query": asked[i][0]}
            found.append(Scores(ids, values, NAMES[measure], settings, query, errors))
        return found

    def _products(self, directions: torch.Tensor, queries: int) -> np.ndarray:
        """Returns products [N, 1, Q, 2, 2] (one view; halves of example, of query)."""
        asked = directions.float().to(self.index.model.device)
        parts = []
        for shard in self.index.shards():
            stored = self.index.sketches(self.used_measure, shard)
            found = scan_rows(stored.values.flatten(0, 1), asked).cpu().double()
            parts.append(found * stored.scales.flatten()[:, None])
        shape = -1, 1, HALVES, queries, HALVES
        return torch.cat(parts).numpy().reshape(shape).transpose(0, 1, 3, 2, 4)


def without_own(products: np.ndarray, rows: np.ndarray, leverage: np.ndarray) -> np.ndarray:
    """Takes the own term of those examples out of Φ that are in it.

    Args:
        products: [N, 1, Q, 2, 2], halves of the example and of the query.
        rows: [n] int, the examples that are in Φ, by the mean of their halves.
        leverage: [n] in [0, 1), see `SketchKernel.leverage`.

    Returns:
        [N, 1, Q, 2, 2]. Means over the example's halves grow by 1 / (1 - leverage); what the
        halves disagree about is not in Φ, and stays, nearly.
    """
    found = products.copy()
    means = products[rows, 0].mean(2, keepdims=True)  # [n, Q, 1, 2]
    factors = 1 / np.maximum(1 - leverage, np.finfo(np.float64).eps)
    found[rows, 0] += means * (factors - 1)[:, None, None, None]
    return found


def trak_scores(
    kernel: np.ndarray, cross: np.ndarray, ridge: float, trained: np.ndarray | None = None,
    own: bool = True,
) -> np.ndarray:  # fmt: skip
    """Scores a query by its gradient and the regularised kernel of the examples'.

    With Φ the gradients of the n examples that the model was trained on [n, P], φ the query's and
    ψ an example's [P], the score is ψ(ΦᵀΦ + λI)⁻¹φ. With the n by n kernel ΦΦᵀ it needs no
    projection: λ times the score is ψφ - ψΦᵀ(ΦΦᵀ + λI)⁻¹Φφ ("TRAK", Park et al., ICML 2023;
    "D-TRAK", Zheng et al., ICLR 2024, which differentiates the output's norm instead of the loss).
    The factor Q of the original is 1 for diffusion losses.

    Args:
        kernel: [N, N] float64, inner products of all examples' gradients.
        cross: [N, Q] float64, inner products of the examples' gradients with the queries'.
        ridge: λ, relative to the mean of the trained examples' squared gradients.
        trained: [N] bool, the examples that the model was trained on; all if None.
        own: whether an example that the model was trained on is itself in Φ, as published. It
            then divides its own score, and examples that are not in Φ come to lead the ranking.

    Returns:
        [N, Q] float64; higher is more influential.

    Raises:
        ValueError: shapes do not fit, or the ridge is not positive.
    """
    if kernel.shape != (len(cross), len(cross)):
        raise ValueError(f"trak: kernel {kernel.shape} for {len(cross)} examples")
    if not ridge > 0:
        raise ValueError(f"trak: ridge = {ridge} must be positive")
    seen = np.ones(len(cross), dtype=bool) if trained is None else np.asarray(trained, dtype=bool)
    if seen.shape != (len(cross),) or not seen.any():
        raise ValueError(f"trak: trained is {seen.shape}, {seen.sum()} of {len(cross)} examples")
    inner = kernel[np.ix_(seen, seen)]
    absolute = ridge * np.trace(inner) / len(inner)
    ridged = inner + absolute * np.eye(len(inner))
    solved = np.linalg.solve(ridged, cross[seen])
    scores = np.empty_like(cross)
    scores[seen] = solved
    if not own:  # the diagonal of the inverse is (1 - leverage) / λ
        scores[seen] /= (absolute * np.diag(np.linalg.inv(ridged)))[:, None]
    scores[~seen] = (cross[~seen] - kernel[np.ix_(~seen, seen)] @ solved) / absolute
    return scores


def trak_kernel(examples: GradientMatrix) -> np.ndarray:
    """Returns the inner products [N, N] float64 of the examples' gradients."""
    return examples.products(examples)
