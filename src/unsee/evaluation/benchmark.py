"""Which models a benchmark of attribution methods retrains, and on which examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..draws import stable_seed

DECOY_SHARE = 0.1
"""Share of the examples that no model of a benchmark is trained on."""


@dataclass(frozen=True)
class Run:
    """One training of a benchmark.

    Attributes:
        name: names the run's folder and its outcomes.
        keep: sorted rows of the data set that are trained on.
        seed: of the initial weights, batches, timesteps and noise.
        subset: number of the random subset, from 1; 0 if the run is trained on all members.
    """

    name: str
    keep: tuple[int, ...]
    seed: int
    subset: int


def _permuted(rows: Sequence[int], *key: object) -> np.ndarray:
    generator = np.random.Generator(np.random.Philox(key=stable_seed("benchmark", *key)))
    return generator.permutation(np.asarray(rows, dtype=np.int64))


def members_and_decoys(ids: Sequence[str]) -> tuple[list[int], list[int]]:
    """Divides a data set into rows that models are trained on, and rows that none ever sees.

    A decoy's score is what a method gives to an image that cannot have contributed.

    Args:
        ids: of all examples; the division depends on the ids, not on their order.

    Returns:
        sorted rows of the members, sorted rows of the decoys.
    """
    by_id = sorted(range(len(ids)), key=lambda row: stable_seed("benchmark", "decoy", ids[row]))
    count = round(DECOY_SHARE * len(ids))
    return sorted(by_id[count:]), sorted(by_id[:count])


def subset(members: Sequence[int], number: int, share: float = 0.5) -> tuple[int, ...]:
    """Returns the sorted rows of random subset `number` (from 1) of the members."""
    return tuple(sorted(_permuted(members, "subset", number)[: round(share * len(members))]))


def plan(ids: Sequence[str], subsets: int = 64, twice: int = 16) -> list[Run]:
    """Returns the trainings of a benchmark, in an order that makes a part of them useful.

    Args:
        ids: of all examples.
        subsets: half-size random subsets of the members.
        twice: how many of them are trained with a second seed: what the seed alone changes is
            the noise ceiling of every comparison. Half of them are among the first half of the
            subsets, on which methods are tuned, half among the second, on which they are judged.
    """
    members, _ = members_and_decoys(ids)
    half = subsets // 2
    # From both halves in turn, so that a benchmark that is not finished tunes and judges too.
    order = [n for pair in zip(range(1, half + 1), range(half + 1, subsets + 1), strict=True)
             for n in pair]  # fmt: skip
    runs = [Run("full-0", tuple(members), 0, 0), Run("full-1", tuple(members), 1, 0)]
    for place, number in enumerate(order):
        keep = subset(members, number)
        runs.append(Run(f"half-{number:02d}-0", keep, 0, number))
        if place < twice:
            runs.append(Run(f"half-{number:02d}-1", keep, 1, number))
    return runs
