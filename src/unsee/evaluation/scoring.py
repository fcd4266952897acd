"""Methods of the library on the twemoji benchmark, by name: from nothing to score files.

Cross-attention's keys and values only, the parameters that the published AbU looks at. Every
method sees the images that the model was trained on; decoys get no score.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
from torch import Tensor

from ..curvature.diagonal import DiagonalFisher
from ..curvature.kfac import EKFAC, KFAC, KroneckerCovariances, kronecker_covariances
from ..data.batches import gather
from ..data.latents import EncodedDataset
from ..draws import Draws
from ..index.fisher import fit_diagonal_fisher
from ..index.index import Index
from ..methods.base import Scores
from ..methods.example_gradients import (
    GradientMatrix,
    Measure,
    QueryExamples,
    example_gradients,
)
from ..methods.indexed import AbU
from ..methods.influence import Normalise, influence_scores
from ..methods.similarity import Feature, similarity_scores
from ..methods.trak import trak_kernel, trak_scores
from ..methods.unlearning import RISE, ForwardAbU
from .twemoji import Benchmark

LOG = logging.getLogger(__name__)

QUERY_DRAWS = Draws(seed=1, n=256)
FIT_DRAWS = Draws(seed=20, n=8)
PUBLISHED_DRAWS = Draws(seed=21, n=2)
"""Of queries and curvatures: other seeds than the examples', so that no luck is shared."""

FORWARD_DRAWS = 8
"""Of a training image, where it is evaluated for every query anew."""

FIT_EXAMPLES = 512
"""Of which the Kronecker factors of K-FAC are averaged."""


@dataclass(frozen=True)
class Trial:
    """What methods are made of, computed when the first of them asks for it.

    Attributes:
        benchmark: its model selects keys and values.
        work: folder where gradients are kept; a trial that was killed goes on there.
        draws: timesteps and noises of a training image.
    """

    benchmark: Benchmark
    work: Path
    draws: int = 32

    @cached_property
    def data(self) -> EncodedDataset:
        """The images that the model was trained on."""
        ids, members = self.benchmark.data.ids, self.benchmark.members
        return self.benchmark.data.select([ids[r] for r in np.flatnonzero(members)])

    def gradients(self, measure: Measure) -> tuple[GradientMatrix, GradientMatrix]:
        """Returns those of the images and of the queries."""
        compute = partial(
            example_gradients, self.benchmark.model, measure=measure, cache=self.work / "gradients"
        )
        queries = QueryExamples(self.benchmark.queries)
        return compute(self.data, Draws(0, self.draws)), compute(queries, QUERY_DRAWS)

    @cached_property
    def covariances(self) -> KroneckerCovariances:
        """Of averaged gradients of the loss; those of keys are centred, as softmax does."""
        model = self.benchmark.model
        LOG.info("fitting Kronecker factors")
        with model.gradients_on():
            return kronecker_covariances(
                model.network, model.parameters, self._batches(), "averaged",
                centre_inputs=[n for n in model.parameters if "to_k" in n],
            )  # fmt: skip

    def _batches(self, examples: int = 8) -> Iterator[Callable[[], Tensor]]:
        spread = np.linspace(0, len(self.data.ids) - 1, min(FIT_EXAMPLES, len(self.data.ids)))
        rows = [int(r) for r in spread]
        for first in range(0, len(rows), examples):
            jobs = [(0, r, 0) for r in rows[first : first + examples]]
            latents, text, t, e = gather(self.data, FIT_DRAWS, jobs)
            # One row for each draw: hooks need a draw's own keys and values.
            latents, text = (x.repeat_interleave(FIT_DRAWS.n, 0) for x in (latents, text))
            row = (latents, text, t.flatten()[:, None], e.flatten(0, 1)[:, None])
            yield lambda row=row: self.benchmark.model.loss(*row)[:, 0].unflatten(
                0, (-1, FIT_DRAWS.n)
            )


Method = Callable[[Trial, float], np.ndarray]
"""(trial, damping) -> scores [N, Q] of the members; higher is more influential."""


def _similarity(feature: Feature, trial: Trial, _damping: float) -> np.ndarray:
    images = trial.benchmark.images.select(trial.data.ids)
    return similarity_scores(feature, trial.data, images, trial.benchmark.queries)


def _random(trial: Trial, _damping: float) -> np.ndarray:
    generator = np.random.Generator(np.random.Philox(key=0))
    return generator.standard_normal((len(trial.data.ids), len(trial.benchmark.queries)))


def _published(trial: Trial, damping: float) -> np.ndarray:
    examples, queries = trial.gradients("loss")
    fisher = fit_diagonal_fisher(trial.benchmark.model, trial.data, PUBLISHED_DRAWS)
    return influence_scores(examples, queries, fisher, damping)


def _diagonal(trial: Trial, damping: float) -> np.ndarray:
    examples, queries = trial.gradients("loss")
    squares = {n: examples.of(n).double().square().mean(0) for n in examples.names}
    return influence_scores(examples, queries, DiagonalFisher(squares, len(examples)), damping)


def _tracin(normalise: Normalise | None, trial: Trial, _damping: float) -> np.ndarray:
    return influence_scores(*trial.gradients("loss"), None, normalise=normalise)


def _kfac(trial: Trial, damping: float) -> np.ndarray:
    return influence_scores(*trial.gradients("loss"), KFAC.fit(trial.covariances), damping)


def _ekfac(measure: Measure, trial: Trial, damping: float) -> np.ndarray:
    examples, queries = trial.gradients(measure)
    rows = ({n: examples.of(n)} for n in examples.names)
    return influence_scores(examples, queries, EKFAC.fit(trial.covariances, rows), damping)


def _unlearned(trial: Trial, damping: float) -> np.ndarray:
    """Scores by real unlearning, one query after another."""
    examples, _ = trial.gradients("loss")
    curvature = EKFAC.fit(trial.covariances, ({n: examples.of(n)} for n in examples.names))
    method = ForwardAbU(
        trial.benchmark.model, trial.data, curvature, rise=RISE, damping=damping,
        draws=Draws(0, FORWARD_DRAWS), query_draws=QUERY_DRAWS, cache=trial.work / "losses",
    )  # fmt: skip
    return np.stack([method.attribute(q).values for q in trial.benchmark.queries], axis=1)


def _trak(measure: Measure, trial: Trial, ridge: float) -> np.ndarray:
    examples, queries = trial.gradients(measure)
    return trak_scores(trak_kernel(examples), examples.products(queries), ridge)


def _indexed(columns: list[str] | None, trial: Trial, damping: float) -> np.ndarray:
    """Scores [N, Q] from an index of the images that the model was trained on."""
    index = Index.build(
        trial.work / f"index-{trial.draws}", trial.benchmark.model, trial.data,
        draws=Draws(0, trial.draws),
    )  # fmt: skip
    method = AbU(index, "ekfac", damping, columns, query_draws=QUERY_DRAWS)
    return np.stack([s.values for s in method.attribute_many(trial.benchmark.queries)], axis=1)


METHODS: dict[str, tuple[float | None, Method]] = {
    "latent": (None, partial(_similarity, "latent")),
    "pixel": (None, partial(_similarity, "pixel")),
    "text": (None, partial(_similarity, "text")),
    "random": (None, _random),
    "abu": (0.01, _published),
    "abu-unlearned": (0.1, _unlearned),
    "tracin": (None, partial(_tracin, None)),
    "tracin-cosine": (None, partial(_tracin, "gradient")),
    "diagonal": (0.001, _diagonal),
    "kfac": (0.01, _kfac),
    "ekfac": (0.1, partial(_ekfac, "loss")),
    "ekfac-output": (0.001, partial(_ekfac, "output_norm")),
    "trak": (1.0, partial(_trak, "loss")),
    "d-trak": (0.1, partial(_trak, "output_norm")),
    "index": (0.1, partial(_indexed, None)),
    "index-loss": (0.1, partial(_indexed, ["factors"])),
    "index-output": (0.1, partial(_indexed, ["outputs"])),
}
"""Name -> (damping or ridge that did best on the tuning half, method).

`latent`, `pixel`, `text`: cosine similarity. `abu`: Attribution by Unlearning as published, to
first order: a small step along the diagonal of per-draw squared gradients; `abu-unlearned`: by
real unlearning of 25% along EK-FAC. `tracin`: products of gradients at the finished model, and
`tracin-cosine` without their lengths. `diagonal`, `kfac`, `ekfac`: influence functions with a
curvature of averaged gradients; `ekfac-output` takes gradients of the network's output instead of
the loss. `trak`, `d-trak`: with the exact kernel. `index`:
what `AbU(index)` answers by default; `index-loss` and `index-output` are its two parts.
"""


WITHOUT_DRAWS = ("latent", "pixel", "text", "random")
"""What takes no gradients."""


def check_method(name: str, damping: float | None = None) -> float | None:
    """Returns the damping that a method takes: the one given, or its own; None if it has none.

    Raises:
        ValueError: no such method, or a damping that it cannot use.
    """
    if name not in METHODS:
        raise ValueError(f"method {name!r} is not one of {', '.join(METHODS)}")
    default, _ = METHODS[name]
    if damping is None:
        return default
    if default is None:
        raise ValueError(f"method {name!r} has no damping")
    if not (np.isfinite(damping) and damping > 0):
        raise ValueError(f"damping = {damping} must be a positive number")
    return damping


def score_files(
    benchmark: Benchmark, name: str, work: Path, *, damping: float | None = None, draws: int = 32
) -> Path:
    """Scores all queries of the benchmark by a method of `METHODS`, and returns their folder.

    Args:
        benchmark: with keys and values selected, as `load_benchmark` does.
        name: of the method.
        work: folder for gradients and scores; what is there is not computed again.
        damping: of the curvature, or ridge of the kernel, relative to its mean; the method's own
            by default.
        draws: timesteps and noises of a training image.

    Returns:
        Folder of QUERY.parquet, named after method, damping and draws.

    Raises:
        ValueError: see `check_method`.
    """
    value = check_method(name, damping)
    settings = {"draws": draws, **({} if value is None else {"damping": value})}
    detail = "" if value is None else f"-damping-{value:g}"
    if name not in WITHOUT_DRAWS:
        detail += f"-draws-{draws}"
    folder = work / "scores" / f"{name}{detail}"
    if not all((folder / f"{q.id}.parquet").is_file() for q in benchmark.queries):
        trial = Trial(benchmark, work, draws)
        scores = METHODS[name][1](trial, 0.0 if value is None else value)
        for column, query in enumerate(benchmark.queries):
            found = Scores(trial.data.ids, scores[:, column], name, settings, query)
            found.save(folder / f"{query.id}.parquet")
    return folder
