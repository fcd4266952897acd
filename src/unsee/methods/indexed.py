"""Attribution from an index: a query's own gradient, and one pass over stored numbers."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..draws import Draws
from ..gradients import Gradients, wide
from ..index.build import MEASURES
from ..index.components import Components
from ..index.directions import Directions, directions, moments_of
from ..index.factors import Measure, example_factors
from ..index.fit import CurvatureName, check_damping, layer_inputs
from ..index.index import Index
from ..index.scan import scan
from ..models.base import Denoiser
from ..models.kernels import exact_kernels
from ..query import Query
from .base import Scores
from .products import second_order, with_errors
from .two_stage import reevaluate
from .unlearning import RISE

HALVES = 2

FIRST_RISE = 0.05
"""The step of scores that are computed rather than measured: small enough for the second order."""

PROBES = "probes"
"""The column that adds the second order to the column `factors`."""

QUERY_PASSES = 64
"""Draws of the query at once, where nothing else is asked for."""

BATCH_ROWS = 4096
"""Components that are scanned at once, or those of one shard: few would be many small products."""


@dataclass(frozen=True)
class QueryGradient:
    """What is known of a query, for one measure.

    Attributes:
        loss: of the query, averaged over draws (and the mask's cells, if any).
        halves: weight name -> gradient [2, channels, width] float32 of the averages over the draws
            with even and with odd numbers.
    """

    loss: float
    halves: Gradients

    @property
    def mean(self) -> Gradients:
        """Weight name -> gradient [channels, width] over all draws."""
        return {name: g.mean(0) for name, g in self.halves.items()}


@dataclass(frozen=True)
class AbU:
    """Attribution by Unlearning to first order, from an index.

    The score of an example is how much its loss would rise, to first order, if the query were
    unlearned along its preconditioned gradient until its own loss rose by `rise`: an influence
    function, in the units of the loss. With the column `outputs`, the same is asked of the mean
    square of the network's output (whose gradients are D-TRAK's), and the score is the sum of
    both, each divided by its standard deviation over the index (docs/benchmark.md says why).

    With the column `probes`, the rise of an example's loss counts to second order: g·δ + ½ δᵀGδ,
    with g its gradient, δ the step and G the Gauss-Newton matrix of its loss, of which the probes
    are an unbiased estimate. The part of the curvature that the residual has is left out. The size
    of the step, `rise`, then matters.

    Every gradient is known twice, from even and from odd draws, for example and query: what the
    halves disagree about is the score's standard error.

    Attributes:
        index: of the model's training data.
        curvature: divides the query's gradient, see `Index.curvature`, or `identity`.
        damping: of the curvature, relative to each layer's mean.
        columns: whose scores count; by default all that the index has of `factors`, `outputs` and
            `probes`.
        rise: of the query's loss: the size of the step; 0.25 by default with `forward`, otherwise
            0.05, to first order. Scores of the column `factors` alone are scaled to it.
        query_draws: timesteps and noise of the query, even in number, independent of the
            examples'; by default 64 of seed 1, in the part of the schedule that theirs are in.
        batch_size: passes at once; by default 64 draws of the query, and with `forward` what
            `ForwardAbU` takes.
        tolerance: share of the expected squared score that a cheaper scan may give up; 0 for none.
        forward: really unlearns the query, and scores the candidates by how much their loss rose.
            Where no candidates are given, the first order names them.
        shortlist: how many it names.
    """

    index: Index
    curvature: CurvatureName = "ekfac"
    damping: float = 0.1
    columns: Sequence[str] | None = None
    rise: float | None = None
    query_draws: Draws | None = None
    batch_size: int | None = None
    tolerance: float = 1e-4
    forward: bool = False
    shortlist: int = 200

    def __post_init__(self) -> None:
        check_query_draws(self.used_query_draws, self.index.model)
        if not self.used_rise > 0:
            raise ValueError(f"rise = {self.rise} must be positive: 0.05 raises the loss by 5%")
        check_damping(self.damping)
        for name in ("shortlist", "batch_size"):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise ValueError(f"{name} = {number} must be at least 1")
        for column in self.used_columns:
            if column not in MEASURES or column not in self.index.columns:
                raise ValueError(
                    f"columns: {column!r} is no column of gradients in the index; it has "
                    f"{', '.join(c for c in MEASURES if c in self.index.columns) or 'none'}"
                )
        if not self.used_columns:
            raise ValueError("the index has no column of gradients: build it with `factors`")
        if PROBES in self.used_columns and "factors" not in self.used_columns:
            raise ValueError("columns: 'probes' adds to what 'factors' says: name both")

    @property
    def used_columns(self) -> list[str]:
        """The columns whose scores count."""
        if self.columns is not None:
            return list(self.columns)
        return [c for c in MEASURES if c in self.index.columns]

    @property
    def used_rise(self) -> float:
        """The relative rise of the query's loss that sets the size of the step."""
        if self.rise is not None:
            return self.rise
        return RISE if self.forward else FIRST_RISE

    @property
    def used_query_draws(self) -> Draws:
        """Timesteps and noise of the query."""
        return self.query_draws or query_draws_for(self.index)

    def attribute(self, query: Query, candidates: Sequence[str] | None = None) -> Scores:
        """Scores every example, or the candidates; see `attribute_many`.

        With `forward`, candidates alone: their ids are those of the result.
        """
        if not self.forward:
            return self.attribute_many([query], candidates)[0]
        if candidates is None:
            first = dataclasses.replace(self, forward=False).attribute(query)
            candidates = first.top(self.shortlist).ids
        at_once = {} if self.batch_size is None else {"batch_size": self.batch_size}
        return reevaluate(
            self.index, query, candidates, self.curvature, rise=self.used_rise,
            damping=self.damping, query_draws=self.used_query_draws, **at_once,
        )  # fmt: skip

    @exact_kernels()
    def attribute_many(
        self, queries: Sequence[Query], candidates: Sequence[str] | None = None
    ) -> list[Scores]:
        """Scores several queries in one pass over the index; nothing is unlearned.

        Returns:
            For each query, scores in the order of `index.ids` or of the candidates, with standard
            errors.

        Raises:
            ValueError: there is no query, an unknown candidate, or a query whose loss has no
                finite gradient.
        """
        if not queries:
            raise ValueError("there is no query")
        started = time.monotonic()
        measures: dict[str, Measure] = {c: MEASURES[c] for c in self.used_columns if c != PROBES}
        asked = [
            query_gradients(self.index, q, self.used_query_draws, list(measures.values()),
                            self.batch_size or QUERY_PASSES)
            for q in queries
        ]  # fmt: skip
        seconds = {"query's gradient": time.monotonic() - started, "directions": 0.0, "scan": 0.0}
        total, sizes = 0.0, {}
        for column, measure in measures.items():
            started = time.monotonic()
            prepared, sizes[column] = self._directions(column, [a[measure] for a in asked])
            seconds["directions"] += time.monotonic() - started
            started = time.monotonic()
            products = self._products(column, prepared)
            if column == "factors" and PROBES in self.used_columns:
                products = products + second_order(self._products(PROBES, prepared))
            seconds["scan"] += time.monotonic() - started
            if len(measures) > 1:  # means over halves, original view, standard deviation over N
                spread = products[:, 0].mean((2, 3)).std(0)
                spread[spread == 0] = 1  # of a single example, say
                products = products / spread[:, None, None]
            total = total + products
        assert isinstance(total, np.ndarray)
        about = {
            "curvature": self.curvature, "damping": self.damping, "columns": self.used_columns,
            "scaled_to_rise": self.used_rise, "query_draws": repr(self.used_query_draws),
            "index": str(self.index.path), "draws": repr(self.index.draws),
            "seconds": seconds,
        }  # fmt: skip
        rows = rows_of(self.index.ids, candidates)
        found = []
        for i, query in enumerate(queries):
            loss = next(iter(asked[i].values())).loss
            settings = {
                **about, "box": query.box, "loss_of_query": loss,
                "step_sizes": {column: size[i] for column, size in sizes.items()},
            }  # fmt: skip
            values, errors = (a[rows] for a in with_errors(total[:, :, i]))
            ids = [self.index.ids[r] for r in rows]
            order = "second" if PROBES in self.used_columns else "first"
            found.append(Scores(ids, values, f"AbU, {order} order", settings, query, errors))
        return found

    def _directions(
        self, column: str, queries: Sequence[QueryGradient]
    ) -> tuple[Directions, list[float]]:
        """Returns what the examples' gradients are multiplied with, and step sizes."""
        index = self.index
        curvature = None
        if self.curvature != "identity":
            curvature = index.curvature(self.curvature, column)
        steps, sizes = [], []
        for query in queries:
            halves = query.halves
            divided = halves if curvature is None else {
                n: torch.stack([curvature.precondition({n: g}, self.damping)[n] for g in both])
                for n, both in halves.items()
            }  # fmt: skip
            slope = sum(float((g.mean(0) * divided[n].mean(0)).sum()) for n, g in halves.items())
            if not (np.isfinite(slope) and slope > 0):
                raise ValueError(
                    "the query has no finite gradient in the selected parameters: check the model "
                    "with `unsee doctor`"
                )
            sizes.append(self.used_rise * query.loss / slope)
            steps.append({n: d * sizes[-1] for n, d in divided.items()})
        weights = layer_inputs(index.model, index.layers)
        asked = directions(steps, index.layers, weights, moments_of(curvature), self.tolerance)
        return asked.to(index.model.device), sizes

    def _products(self, column: str, asked: Directions) -> np.ndarray:
        """Returns products [N, views, Q, 2, 2] (halves of example, of query)."""
        layers = self.index.layers
        parts = [scan(examples, layers, asked) for examples in _batches(self.index, column)]
        found = torch.cat(parts, dim=1).transpose(0, 1).numpy()  # [N, views, 2, 2Q]
        shape = *found.shape[:3], asked.count // HALVES, HALVES
        return found.reshape(shape).transpose(0, 1, 3, 2, 4)


def query_draws_for(index: Index, seed: int = 1, n: int = 64) -> Draws:
    """Returns draws of a query in the part of the noise schedule that the examples' are in.

    Raises:
        ValueError: there are not as many timesteps in that part.
    """
    part = index.draws.timesteps
    try:
        return dataclasses.replace(
            index.draws, seed=seed, n=n, timesteps="stratified" if isinstance(part, str) else part
        )
    except ValueError as error:
        raise ValueError(f"query_draws: {error}; ask for fewer (--query-draws)") from None


def check_query_draws(draws: Draws, model: Denoiser) -> None:
    """Refuses draws that do not make two halves, or are of another schedule.

    Raises:
        ValueError: they do not, or are.
    """
    length = model.num_train_timesteps
    if draws.n % HALVES:
        raise ValueError(f"query_draws: {draws.n} draws do not make two halves")
    if draws.num_train_timesteps != length:
        raise ValueError(
            f"query_draws: they are of {draws.num_train_timesteps} timesteps, the model has "
            f"{length}; use Draws(..., num_train_timesteps={length})"
        )


def _batches(index: Index, column: str) -> Iterator[Components]:
    """Yields the gradients of all examples, of as many shards at once as are quickly scanned."""
    if not index.ids:
        raise ValueError(f"index {str(index.path)!r}: there is no example to score")
    batch: list[Components] = []
    for shard in index.shards():
        batch.append(index.components(column, shard))
        if sum(part.text.shape[1] for part in batch) >= BATCH_ROWS:
            yield Components.joined(batch)
            batch = []
    if batch:
        yield Components.joined(batch)


def query_gradients(
    index: Index, query: Query, draws: Draws, measures: Sequence[Measure], batch_size: int = 32
) -> dict[Measure, QueryGradient]:
    """Differentiates a query's measures, by way of its token factors: exact, and cheap.

    Args:
        index: its model and layers.
        query: the picture.
        draws: its timesteps and noise.
        measures: what is differentiated; with a mask, averaged over its cells.
        batch_size: draws at once.

    Raises:
        ValueError: the loss is not finite.
    """
    model = index.model
    timesteps, noise = draws.of(query.id, tuple(query.latents.shape))
    weights = layer_inputs(model, index.layers)
    chunk = max(HALVES, batch_size // HALVES * HALVES)
    factors: dict[Measure, Tensor] = {}
    loss = 0.0
    with model.gradients_on():
        for first in range(0, draws.n, chunk):
            t, e = timesteps[None, first : first + chunk], noise[None, first : first + chunk]
            values, part = example_factors(
                model, index.layers, (query.latents[None], query.text[None], t, e), measures,
                query.mask,
            )  # fmt: skip
            share = t.shape[1] / draws.n
            loss += share * float(wide(values).mean())
            for measure, f in part.items():
                factors[measure] = factors.get(measure, torch.zeros(())) + share * f[0].cpu()
    if not np.isfinite(loss):
        raise ValueError(
            f"the loss of the query {query.id!r} is {loss}: check the model with `unsee doctor`; "
            "a float16 model may need float32"
        )
    found = {}
    for measure, f in factors.items():
        halves: Gradients = {}
        for layer, m in zip(
            index.layers, f.float().split([la.channels for la in index.layers], dim=-1), strict=True
        ):
            seen = query.text.float()
            seen = seen if layer.reads is None else seen @ weights[layer.reads].float().T
            halves[layer.name] = m.mT @ seen
        found[measure] = QueryGradient(loss, halves)
    return found


def rows_of(ids: Sequence[str], candidates: Sequence[str] | None) -> list[int]:
    """Returns the rows of the candidates, or of all.

    Raises:
        ValueError: the list is empty, or a candidate is unknown.
    """
    if candidates is None:
        return list(range(len(ids)))
    if not len(candidates):
        raise ValueError("candidates: the list is empty; leave it out to score every example")
    place = {identifier: row for row, identifier in enumerate(ids)}
    unknown = [c for c in candidates if c not in place]
    if unknown:
        raise ValueError(f"candidate {unknown[0]!r} is not in the index")
    return [place[c] for c in candidates]
