"""How sure a mean over queries is: bootstrap intervals, numpy only, seeded.

An interval is made by resampling whatever was drawn at random: retrained models as well as
queries, at the same time and independently (Owen, "The pigeonhole bootstrap", 2007). It is a
little too wide rather than too narrow, because the chance of a single (model, query) cell counts
more than once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .metrics import (
    FEWEST_SUBSETS,
    average_ranks,
    check_finite,
    lds,
    rank_correlation,
    subset_predictions,
)

FEWEST_RESAMPLED = 8
"""Subsets below which resampling them says little about drawing others."""

CELLS = 2_000_000
"""Numbers that are ranked at once; 16 MB for each array."""


@dataclass(frozen=True)
class Estimate:
    """A mean, and the interval that bootstrap resamples of it fall in.

    Attributes:
        value: of the data themselves.
        low: lower end of the percentile interval.
        high: upper end.
        level: share of the resamples between the two.
    """

    value: float
    low: float
    high: float
    level: float = 0.95

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def bootstrap_mean(
    values: np.ndarray, *, resamples: int = 1000, level: float = 0.95, seed: int = 0
) -> Estimate:
    """Returns the mean of one value for each query, with an interval over queries only.

    For values that hold no other chance, such as average precisions or decoy shares.

    Args:
        values: [Q] float.
        resamples: of the queries.
        level: share of the resamples inside the interval.
        seed: of the resampling.

    Raises:
        ValueError: no values, or one that is not finite.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"bootstrap: values are {list(values.shape)}, not one for each query")
    check_finite("bootstrap: values", values, "query")
    picked = _generator(seed).integers(len(values), size=(_checked(resamples, level), len(values)))
    return _estimate(values.mean(), values[picked].mean(1), level)


def bootstrap_lds(
    scores: np.ndarray,
    masks: np.ndarray,
    outcomes: np.ndarray,
    *,
    sign: int = -1,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """Returns the mean LDS over queries, with an interval over subsets and queries.

    Args:
        scores: [Q, N]; see `lds` for these four.
        masks: [M, N].
        outcomes: [M, Q].
        sign: of the predictions.
        resamples: of subsets and queries; the same for every method with the same seed.
        level: share of the resamples inside the interval.
        seed: of the resampling.

    Raises:
        ValueError: see `lds`; or fewer than 8 subsets.
    """
    predictions = subset_predictions(scores, masks, outcomes, sign=sign)[None]
    value = lds(scores, masks, outcomes, sign=sign).mean()
    means = _resampled_lds(predictions, np.transpose(outcomes), _checked(resamples, level), seed)
    return _estimate(value, means[0], level)


def paired_difference(
    scores_a: np.ndarray,
    scores_b: np.ndarray,
    masks: np.ndarray,
    outcomes: np.ndarray,
    *,
    sign: int = -1,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """Returns the mean LDS of method a minus that of method b, with an interval.

    Both are scored on the same resamples of subsets and queries, so that what is hard for both
    cancels. The methods differ where the interval leaves out zero.

    Args:
        scores_a: [Q, N]; see `lds` for the arrays.
        scores_b: [Q, N].
        masks: [M, N].
        outcomes: [M, Q].
        sign: of the predictions.
        resamples: of subsets and queries.
        level: share of the resamples inside the interval.
        seed: of the resampling.

    Raises:
        ValueError: see `lds`; or fewer than 8 subsets.
    """
    both = [subset_predictions(s, masks, outcomes, sign=sign) for s in (scores_a, scores_b)]
    a, b = (lds(s, masks, outcomes, sign=sign).mean() for s in (scores_a, scores_b))
    count = _checked(resamples, level)
    means = _resampled_lds(np.stack(both), np.transpose(outcomes), count, seed)
    return _estimate(a - b, means[0] - means[1], level)


@dataclass(frozen=True)
class CounterfactualEffect:
    """What training without chosen examples does to the queries' losses.

    Attributes:
        removed: mean loss without the chosen examples, minus that of the model on all of them.
        random: the same for random removal of as many.
        excess: the first minus the second; the method finds something where this is above zero.
    """

    removed: Estimate
    random: Estimate
    excess: Estimate


def counterfactual_effect(
    loss_without: np.ndarray,
    loss_full: np.ndarray,
    loss_random: np.ndarray,
    *,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> CounterfactualEffect:
    """Compares the removal of what was attributed with random removal of the same size.

    Args:
        loss_without: [Q] float, of each query under the model trained without its own top K.
        loss_full: [Q] float, under the model trained on everything; same timesteps and noise.
        loss_random: [Q, R] float, under R models trained without K random examples each. A model
            may serve all queries: models and queries are both resampled.
        resamples: of queries and random removals.
        level: share of the resamples inside the intervals.
        seed: of the resampling.

    Raises:
        ValueError: shapes that do not fit, or a loss that is not finite.
    """
    without, full, random = (
        np.asarray(v, dtype=np.float64) for v in (loss_without, loss_full, loss_random)
    )
    if without.ndim != 1 or without.shape != full.shape or random.ndim != 2:
        raise ValueError(
            f"counterfactual: losses without are {list(without.shape)}, full {list(full.shape)}, "
            f"random {list(random.shape)}; they must be [Q], [Q] and [Q, R]"
        )
    if len(random) != len(full) or not random.size:
        raise ValueError(
            f"counterfactual: random losses are {list(random.shape)}, not of {len(full)} queries "
            "and at least one removal"
        )
    check_finite("counterfactual: losses without", without, "query")
    check_finite("counterfactual: full losses", full, "query")
    check_finite("counterfactual: random losses", random, "query", "removal")
    count, generator = _checked(resamples, level), _generator(seed)
    queries = generator.integers(len(full), size=(count, len(full)))
    models = generator.integers(random.shape[1], size=(count, random.shape[1]))
    own, other = without - full, random - full[:, None]
    removed = own[queries].mean(1)
    chance = np.array([other[np.ix_(q, m)].mean() for q, m in zip(queries, models, strict=True)])
    return CounterfactualEffect(
        _estimate(own.mean(), removed, level),
        _estimate(other.mean(), chance, level),
        _estimate(own.mean() - other.mean(), removed - chance, level),
    )


def _resampled_lds(
    predictions: np.ndarray, outcomes: np.ndarray, resamples: int, seed: int
) -> np.ndarray:
    """Returns the mean LDS of P methods in each resample, [P, R].

    Args:
        predictions: [P, Q, M].
        outcomes: [Q, M].
        resamples: R.
        seed: of the resampling.
    """
    count, (queries, subsets) = len(predictions), outcomes.shape
    if subsets < FEWEST_RESAMPLED:
        raise ValueError(f"lds: an interval needs {FEWEST_RESAMPLED} subsets, there are {subsets}")
    generator = _generator(seed)
    rows = generator.integers(subsets, size=(resamples, subsets))
    while (few := _distinct(rows) < FEWEST_SUBSETS).any():
        rows[few] = generator.integers(subsets, size=(few.sum(), subsets))
    picked = generator.integers(queries, size=(resamples, queries))
    together = np.concatenate([predictions, outcomes[None]])
    step = max(1, CELLS // together.size)
    means = np.empty((count, resamples))
    for start in range(0, resamples, step):
        part = slice(start, start + step)
        ranks = average_ranks(together[:, :, rows[part]])  # [P + 1, Q, R', M]
        values = rank_correlation(ranks[:-1], ranks[-1])  # [P, Q, R']
        if np.isnan(values).any():
            query = int(np.argwhere(np.isnan(values))[0][1])
            raise ValueError(
                f"lds: query {query} has so few different values that a resample is constant; "
                "use more subsets"
            )
        means[:, part] = np.take_along_axis(values, picked[part].T[None], 1).mean(1)
    return means


def _distinct(rows: np.ndarray) -> np.ndarray:
    return (np.diff(np.sort(rows, -1), axis=-1) != 0).sum(-1) + 1


def _generator(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(seed))


def _checked(resamples: int, level: float) -> int:
    if resamples < 1 or not 0 < level < 1:
        raise ValueError(
            f"bootstrap: resamples = {resamples} must be at least 1 and level = {level} in (0, 1)"
        )
    return resamples


def _estimate(value: float, resampled: np.ndarray, level: float) -> Estimate:
    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(float(value), float(low), float(high), level)
