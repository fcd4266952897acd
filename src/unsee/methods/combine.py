"""Sums of scores: several methods, seeds or checkpoints as one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from .base import Scores

How = Literal["plain", "scaled", "standardised", "ranks"]
"""What is added up.

`plain`: the scores themselves, for parts of one unit (a caption and the empty caption). `scaled`:
divided by their standard deviation over the examples, for parts of different units or size
(checkpoints). `standardised`: less their mean before that. `ranks`: average ranks from 0 to 1,
where a few large scores must not lead.
"""


def combine(
    parts: Sequence[Scores],
    how: How = "standardised",
    weights: Sequence[float] | None = None,
    power: float = 1.0,
) -> Scores:
    """Adds up several scores of one query.

    Args:
        parts: scores of the same examples, in any order.
        how: what is added up. Of the standardised and of ranks, zero no longer divides
            proponents from opponents: only differences mean something.
        weights: of the parts; equal by default. The sum is divided by the sum of the weights.
        power: see `sharpened`; of the parts, before they are added up.

    Returns:
        Scores in the order of the first part. `settings` holds those of every part. Plain and
        scaled sums have standard errors where all parts have them: the mean of the parts', which
        is an upper bound, as parts may share their draws.

    Raises:
        ValueError: no part, other examples in one of them than in the first, or see
            `combined_values`.
    """
    if not parts:
        raise ValueError("combine: there are no scores")
    first = parts[0]
    rows: list[np.ndarray] = []
    errors: list[np.ndarray | None] = []
    for part in parts:
        place = {example: row for row, example in enumerate(part.ids)}
        if place.keys() != set(first.ids) or len(part) != len(first):
            raise ValueError(
                f"combine: {part.method} scores {len(part)} examples, {first.method} "
                f"{len(first)}, and they are not the same ones"
            )
        order = [place[example] for example in first.ids]
        rows.append(part.values[order])
        errors.append(None if part.errors is None else part.errors[order])
    settings = {
        "how": how,
        "weights": None if weights is None else [float(w) for w in weights],
        "power": power,
        "parts": [{"method": p.method, "settings": p.settings} for p in parts],
    }
    method = " + ".join(dict.fromkeys(p.method for p in parts))
    values = combined_values(rows, how, weights, power)
    known = None
    if how in ("plain", "scaled") and power == 1:
        known = _errors(rows, errors, how, weights)
    return Scores(first.ids, values, method, settings, first.query, known)


def _errors(
    rows: Sequence[np.ndarray], errors: Sequence[np.ndarray | None], how: How,
    weights: Sequence[float] | None,
) -> np.ndarray | None:  # fmt: skip
    """Returns an upper bound of the standard errors: all parts may err in the same direction."""
    weights = [1.0] * len(rows) if weights is None else list(weights)
    total = np.zeros(len(rows[0]))
    for values, error, weight in zip(rows, errors, weights, strict=True):
        if error is None:
            return None
        total += abs(weight) * error / (_scale(values) if how == "scaled" else 1.0)
    return total / sum(weights)


def sharpened(values: np.ndarray, power: float) -> np.ndarray:
    """Returns scores to a power, with their sign: above 1, large scores stand out more.

    Many small scores are noise, and a sum of them over a set of examples is more noise. The order
    of the examples stays; sums over sets, and sums with other scores, do not.

    Raises:
        ValueError: the power is not positive.
    """
    if not power > 0:
        raise ValueError(f"sharpened: power = {power} must be positive")
    return np.sign(values) * np.abs(values) ** power


def combined_values(
    parts: Sequence[np.ndarray],
    how: How = "standardised",
    weights: Sequence[float] | None = None,
    power: float = 1.0,
) -> np.ndarray:
    """Adds up arrays of scores [N] or [N, Q], examples first; see `combine`.

    Returns:
        The weighted mean, of the same shape, float64.

    Raises:
        ValueError: shapes or numbers do not fit, a sum of weights that is not positive, or
            scaled or standardised scores that are all the same.
    """
    if len({p.shape for p in parts}) != 1:
        raise ValueError(f"combine: scores of shapes {[p.shape for p in parts]}")
    weights = [1.0] * len(parts) if weights is None else list(weights)
    if len(weights) != len(parts) or not sum(weights) > 0:
        raise ValueError(f"combine: weights {weights} for {len(parts)} scores")
    prepared = {"plain": np.asarray, "scaled": _scaled, "standardised": _standardised,
                "ranks": _ranks}[how]  # fmt: skip
    sharp = [sharpened(p.astype(np.float64), power) for p in parts]
    total = sum(w * prepared(p) for w, p in zip(weights, sharp, strict=True))
    return np.asarray(total) / sum(weights)


def _scale(values: np.ndarray) -> np.ndarray:
    """Returns the standard deviation over the examples."""
    deviation = values.std(0)
    if not (deviation > 0).all():
        raise ValueError("combine: all examples have the same score")
    return deviation


def _scaled(values: np.ndarray) -> np.ndarray:
    return values / _scale(values)


def _standardised(values: np.ndarray) -> np.ndarray:
    return (values - values.mean(0)) / _scale(values)


def _ranks(values: np.ndarray) -> np.ndarray:
    """Returns ranks from 0 to 1 along the first axis; ties share the mean of their ranks."""
    columns = values.reshape(len(values), -1)
    ranks = np.empty(columns.shape)
    for c in range(columns.shape[1]):
        _, place, counts = np.unique(columns[:, c], return_inverse=True, return_counts=True)
        last = np.cumsum(counts) - 1
        ranks[:, c] = (last - (counts - 1) / 2)[place]
    return ranks.reshape(values.shape) / max(1, len(values) - 1)
