"""How good attribution scores are: pure functions on arrays, numpy only.

Axes, everywhere: Q queries, N training examples, M models retrained on subsets of the examples.
Scores are higher where an example is more influential: without it the query's loss would be
higher. Outcomes are losses, higher is worse. Most functions return one value for each query, so
that `unsee.evaluation.intervals` can say how sure their mean is.
"""

from __future__ import annotations

import numpy as np

FEWEST_SUBSETS = 3
"""Ranks of two values say nothing."""

# -- rank correlation ---------------------------------------------------------------------------


def average_ranks(values: np.ndarray) -> np.ndarray:
    """Returns ranks from 1 along the last axis [..., M] float64; equal values share their mean."""
    values = np.asarray(values)
    order = np.argsort(values, axis=-1, kind="stable")
    ordered = np.take_along_axis(values, order, -1)
    starts, ends = np.ones(values.shape, dtype=bool), np.ones(values.shape, dtype=bool)
    starts[..., 1:] = ordered[..., 1:] != ordered[..., :-1]
    ends[..., :-1] = starts[..., 1:]
    place = np.arange(values.shape[-1])
    first = np.maximum.accumulate(np.where(starts, place, 0), -1)
    # The end of a value's run is the nearest end to the right: look from behind.
    last = np.where(ends, place, values.shape[-1])[..., ::-1]
    last = np.minimum.accumulate(last, -1)[..., ::-1]
    ranks = np.empty(values.shape)
    np.put_along_axis(ranks, order, (first + last) / 2 + 1, -1)
    return ranks


def spearman(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Returns Spearman's rank correlation along the last axis; equal values share their rank.

    Args:
        a: [..., M] float.
        b: [..., M] float; the leading axes broadcast.

    Returns:
        [...] float64, from -1 to 1.

    Raises:
        ValueError: fewer than 2 values, another length, a value that is not finite, or input that
            is constant, which has no ranks.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    lengths = [v.shape[-1] if v.ndim else 0 for v in (a, b)]
    if lengths[0] != lengths[1] or lengths[0] < 2:
        raise ValueError(
            f"spearman: a has {lengths[0]} values and b has {lengths[1]} along the last axis; "
            "they must be equally many, at least 2"
        )
    for name, values in (("a", a), ("b", b)):
        check_finite(f"spearman: {name}", values)
        constant = values.min(-1) == values.max(-1)
        if constant.any():
            where = np.argwhere(constant)[0].tolist()
            at = f" at {where}" if where else ""
            raise ValueError(f"spearman: {name} is constant{at}, so it has no ranks")
    return rank_correlation(average_ranks(a), average_ranks(b))


def rank_correlation(ranks_a: np.ndarray, ranks_b: np.ndarray) -> np.ndarray:
    """Returns the correlation of ranks along the last axis; NaN where one side is constant.

    Args:
        ranks_a: [..., M], see `average_ranks`.
        ranks_b: [..., M]; the leading axes broadcast.
    """
    # Ranks are multiples of a half, so these sums are exact and nothing exceeds 1.
    middle = (ranks_a.shape[-1] + 1) / 2
    x, y = ranks_a - middle, ranks_b - middle
    squares = np.einsum("...i,...i", x, x) * np.einsum("...i,...i", y, y)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.einsum("...i,...i", x, y) / np.sqrt(squares)


# -- linear datamodelling score -----------------------------------------------------------------


def lds(
    scores: np.ndarray, masks: np.ndarray, outcomes: np.ndarray, *, sign: int = -1
) -> np.ndarray:
    """Returns the linear datamodelling score of each query (Park et al., "TRAK", 2023).

    The prediction for a subset is `sign` times the sum of the scores of the examples in it: an
    influential example that is there lowers the loss. The score is Spearman's correlation of
    predictions and outcomes over the subsets. The LDS of a method is the mean over queries.

    Args:
        scores: [Q, N] float, higher is more influential.
        masks: [M, N] bool, which examples each subset holds.
        outcomes: [M, Q] float, of a model trained on each subset.
        sign: -1 where outcomes are losses, 1 where higher outcomes are better (log-likelihoods).

    Returns:
        [Q] float64.

    Raises:
        ValueError: shapes that do not fit, fewer than 3 subsets, values that are not finite, or
            a query whose scores, predictions or outcomes are constant.
    """
    return spearman(subset_predictions(scores, masks, outcomes, sign=sign), np.transpose(outcomes))


def subset_predictions(
    scores: np.ndarray, masks: np.ndarray, outcomes: np.ndarray, *, sign: int = -1
) -> np.ndarray:
    """Returns what scores predict for each subset, [Q, M] float64; see `lds` for arguments."""
    scores = np.asarray(scores, dtype=np.float64)
    if sign not in (-1, 1):
        raise ValueError(f"lds: sign = {sign!r} must be -1 (outcomes are losses) or 1")
    masks, outcomes = np.asarray(masks), np.asarray(outcomes, dtype=np.float64)
    check_subsets(masks, outcomes)
    if scores.shape != (outcomes.shape[1], masks.shape[1]):
        raise ValueError(
            f"lds: scores are {list(scores.shape)}, but outcomes have {outcomes.shape[1]} queries "
            f"and masks have {masks.shape[1]} examples"
        )
    check_finite("lds: scores", scores, "query", "example")
    # An example that is in all subsets or in none cannot tell them apart.
    varying = masks.any(0) & ~masks.all(0)
    if not varying.any():
        raise ValueError("lds: masks: all subsets hold the same examples")
    told = scores[:, varying]
    _check_varied("lds: scores", told, "examples that the subsets differ in")
    predictions = sign * (scores @ masks.T.astype(np.float64))
    _check_varied("lds: predictions", predictions, "subsets")
    return predictions


def noise_ceiling(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Returns how far two trainings on the same subsets, with different seeds, agree.

    This is the reliability r of the outcome of one training. What attribution can predict is the
    expected outcome, the mean over seeds. With outcomes of one training each, even a perfect
    prediction of it reaches a correlation of sqrt(r) only, and with outcomes that are the mean of
    two trainings sqrt(2r / (1 + r)) (Spearman and Brown, 1910). Both are exact for Pearson's
    correlation when the seed adds independent noise of equal size; for ranks they are close.

    Args:
        first: [M, Q] float, outcomes of the first seed.
        second: [M, Q] float, of the second seed, the same subsets in the same order.

    Returns:
        [Q] float64, Spearman's correlation over the subsets. Take the mean over queries before
        the root: a single one may be negative by chance.

    Raises:
        ValueError: shapes that differ, or see `spearman`.
    """
    first, second = np.asarray(first), np.asarray(second)
    if first.shape != second.shape or first.ndim != 2:
        raise ValueError(
            f"noise ceiling: outcomes of the first seed are {list(first.shape)}, of the second "
            f"{list(second.shape)}; both must be [subsets, queries]"
        )
    if len(first) < FEWEST_SUBSETS:
        raise ValueError(f"noise ceiling: {len(first)} subsets; at least {FEWEST_SUBSETS}")
    for name, values in (("first", first), ("second", second)):
        check_finite(f"noise ceiling: {name}", values, "subset", "query")
        _check_varied(f"noise ceiling: {name}", values.T, "subsets")
    return spearman(first.T, second.T)


# -- rankings -----------------------------------------------------------------------------------


def recall_at_k(scores: np.ndarray, positives: np.ndarray, k: int) -> np.ndarray:
    """Returns the share of each query's positives that are among its top k, [Q] float64.

    It is not capped: with more than k positives it stays below 1. Equal scores count against the
    method, here and below: an order among them would be nobody's.

    Args:
        scores: [Q, N] float.
        positives: [Q, N] bool.
        k: how many examples are looked at.

    Raises:
        ValueError: shapes that differ, k that is not a whole number from 1 to N, a score that is
            not finite, or a query without positives or whose scores are all equal.
    """
    hits = _hits("recall@k", scores, positives)
    _check_k("recall@k", k, hits.shape[1])
    return hits[:, :k].sum(1) / hits.sum(1)


def average_precision(scores: np.ndarray, positives: np.ndarray) -> np.ndarray:
    """Returns the mean, over each query's positives, of the precision at their ranks, [Q] float64.

    Args:
        scores: [Q, N] float.
        positives: [Q, N] bool.

    Raises:
        ValueError: see `recall_at_k`.
    """
    hits = _hits("average precision", scores, positives)
    precision = hits.cumsum(1) / np.arange(1, hits.shape[1] + 1)
    return (precision * hits).sum(1) / hits.sum(1)


def map_at_k(scores: np.ndarray, teacher: np.ndarray, k: int) -> np.ndarray:
    """Returns the average precision of each query, [Q]; positives are the teacher's top k.

    The mean over queries is the mAP(k) of FastGDA; a random ranking has about k / N.

    Args:
        scores: [Q, N] float, of the ranking that is judged.
        teacher: [Q, N] float, of the ranking that it should reproduce.
        k: how many of the teacher's examples are positive.

    Raises:
        ValueError: see `recall_at_k`.
    """
    positives = _top("mAP(k), teacher", teacher, k)
    return average_precision(scores, positives)


def decoy_share(scores: np.ndarray, decoys: np.ndarray, k: int) -> np.ndarray:
    """Returns the share of each query's top k that are decoys, [Q] float64.

    The model has never seen a decoy, so none belongs there. A random ranking has as large a
    share as there are decoys among the examples.

    Args:
        scores: [Q, N] float.
        decoys: [N] bool.
        k: how many examples are looked at.

    Raises:
        ValueError: see `recall_at_k`; or no decoys.
    """
    scores, decoys = np.asarray(scores), np.asarray(decoys)
    if decoys.dtype != bool or decoys.shape != scores.shape[1:]:
        raise ValueError(
            f"decoy share: decoys are {decoys.dtype} {list(decoys.shape)}, not bool, one for each "
            f"of the {scores.shape[-1]} examples"
        )
    if not decoys.any():
        raise ValueError("decoy share: no example is a decoy")
    top = _top("decoy share", scores, k, last=~decoys)
    return (top & decoys).sum(1) / k


def _ordered(what: str, scores: np.ndarray, last: np.ndarray | None = None) -> np.ndarray:
    """Returns the examples of each query, best first; those in `last` after their equals."""
    scores = np.asarray(scores, dtype=np.float64)
    if scores.ndim != 2:
        raise ValueError(f"{what}: scores are {list(scores.shape)}, not [queries, examples]")
    check_finite(f"{what}: scores", scores, "query", "example")
    if scores.shape[1] > 1:
        _check_varied(f"{what}: scores", scores, "examples")
    if last is None:
        return np.argsort(-scores, axis=1, kind="stable")
    return np.lexsort((np.broadcast_to(last, scores.shape), -scores), axis=1)


def _top(what: str, scores: np.ndarray, k: int, last: np.ndarray | None = None) -> np.ndarray:
    """Returns [Q, N] bool: which examples are among their query's top k."""
    order = _ordered(what, scores, last)
    _check_k(what, k, order.shape[1])
    top = np.zeros(order.shape, dtype=bool)
    np.put_along_axis(top, order[:, :k], True, 1)
    return top


def _hits(what: str, scores: np.ndarray, positives: np.ndarray) -> np.ndarray:
    """Returns [Q, N] bool: whether the example at each rank is positive, best rank first."""
    scores, positives = np.asarray(scores), np.asarray(positives)
    if positives.dtype != bool or positives.shape != scores.shape:
        raise ValueError(
            f"{what}: positives are {positives.dtype} {list(positives.shape)}, not bool "
            f"{list(scores.shape)} as the scores"
        )
    order = _ordered(what, scores, positives)
    if not positives.any(1).all():
        raise ValueError(f"{what}: query {int(np.argmin(positives.any(1)))} has no positives")
    return np.take_along_axis(positives, order, 1)


# -- checks -------------------------------------------------------------------------------------


def check_finite(what: str, values: np.ndarray, *axes: str) -> None:
    """Raises a ValueError that names the first value that is not finite.

    Args:
        what: begins the message.
        values: any shape.
        axes: what each axis counts; positions only if they are not given.
    """
    if np.isfinite(values).all():
        return
    index = np.argwhere(~np.isfinite(values))[0].tolist()
    named = ", ".join(f"{a} {i}" for a, i in zip(axes, index, strict=False)) or f"position {index}"
    raise ValueError(f"{what}: {values[tuple(index)]} at {named}")


def check_subsets(masks: np.ndarray, outcomes: np.ndarray) -> None:
    """Raises a ValueError unless masks [M, N] and outcomes [M, Q] fit and can be used."""
    if masks.dtype != bool or masks.ndim != 2 or outcomes.ndim != 2:
        raise ValueError(
            f"masks are {masks.dtype} {list(masks.shape)}, not bool [subsets, examples], or "
            f"outcomes {list(outcomes.shape)}, not [subsets, queries]"
        )
    if len(masks) != len(outcomes):
        raise ValueError(f"masks hold {len(masks)} subsets, outcomes {len(outcomes)}")
    if len(masks) < FEWEST_SUBSETS:
        raise ValueError(f"masks: {len(masks)} subsets; at least {FEWEST_SUBSETS} are needed")
    if not masks.any(1).all():
        raise ValueError(f"masks: subset {int(np.argmin(masks.any(1)))} holds no example")
    check_finite("outcomes", outcomes, "subset", "query")
    _check_varied("outcomes", outcomes.T, "subsets")


def _check_varied(what: str, values: np.ndarray, over: str) -> None:
    """Refuses rows [Q, ...] whose values are all equal."""
    constant = values.min(1) == values.max(1)
    if constant.any():
        raise ValueError(
            f"{what}: query {int(np.argmax(constant))} has equal values for all {over}"
        )


def _check_k(what: str, k: int, examples: int) -> None:
    if not isinstance(k, int | np.integer) or not 1 <= k <= examples:
        raise ValueError(f"{what}: k = {k} is no whole number from 1 to {examples}, the number of "
                         "examples")  # fmt: skip
