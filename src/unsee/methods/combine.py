"""Sums of scores: several methods, seeds or checkpoints as one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from .base import Scores

How = Literal["plain", "standardised", "ranks"]
"""What is added up.

`plain`: the scores themselves, for parts of one unit (checkpoints of one method, a caption and the
empty caption). `standardised`: less their mean over the examples and divided by their standard
deviation, for parts of different units. `ranks`: average ranks from 0 to 1, where a few large
scores must not lead.
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
        Scores in the order of the first part. `settings` holds those of every part.

    Raises:
        ValueError: no part, other examples in one of them than in the first, or see
            `combined_values`.
    """
    if not parts:
        raise ValueError("combine: there are no scores")
    first = parts[0]
    rows = []
    for part in parts:
        place = {example: row for row, example in enumerate(part.ids)}
        if place.keys() != set(first.ids) or len(part) != len(first):
            raise ValueError(
                f"combine: {part.method} scores {len(part)} examples, {first.method} "
                f"{len(first)}, and they are not the same ones"
            )
        rows.append(part.values[[place[example] for example in first.ids]])
    settings = {
        "how": how,
        "weights": None if weights is None else [float(w) for w in weights],
        "power": power,
        "parts": [{"method": p.method, "settings": p.settings} for p in parts],
    }
    method = " + ".join(p.method for p in parts)
    values = combined_values(rows, how, weights, power)
    return Scores(first.ids, values, method, settings, first.query)


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
            standardised scores that are all the same.
    """
    if len({p.shape for p in parts}) != 1:
        raise ValueError(f"combine: scores of shapes {[p.shape for p in parts]}")
    weights = [1.0] * len(parts) if weights is None else list(weights)
    if len(weights) != len(parts) or not sum(weights) > 0:
        raise ValueError(f"combine: weights {weights} for {len(parts)} scores")
    prepared = {"plain": np.asarray, "standardised": _standardised, "ranks": _ranks}[how]
    sharp = [sharpened(p.astype(np.float64), power) for p in parts]
    total = sum(w * prepared(p) for w, p in zip(weights, sharp, strict=True))
    return np.asarray(total) / sum(weights)


def _standardised(values: np.ndarray) -> np.ndarray:
    centred = values - values.mean(0)
    deviation = np.sqrt(np.square(centred).mean(0))
    if not (deviation > 0).all():
        raise ValueError("combine: all examples have the same score")
    return centred / deviation


def _ranks(values: np.ndarray) -> np.ndarray:
    """Returns ranks from 0 to 1 along the first axis; ties share the mean of their ranks."""
    columns = values.reshape(len(values), -1)
    ranks = np.empty(columns.shape)
    for c in range(columns.shape[1]):
        _, place, counts = np.unique(columns[:, c], return_inverse=True, return_counts=True)
        last = np.cumsum(counts) - 1
        ranks[:, c] = (last - (counts - 1) / 2)[place]
    return ranks.reshape(values.shape) / max(1, len(values) - 1)
