"""Which models a benchmark of attribution methods retrains, and on which examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

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
    kept = {number: subset(members, number) for number in order}
    # Every subset once before any of them twice: a method is judged by how many there are.
    runs += [Run(f"half-{number:02d}-0", kept[number], 0, number) for number in order]
    runs += [Run(f"half-{number:02d}-1", kept[number], 1, number) for number in order[:twice]]
    return runs


@dataclass(frozen=True)
class Outcomes:
    """What models that were trained on subsets say about the queries.

    Attributes:
        masks: [M, N] bool, which examples each subset holds.
        numbers: [M], the subsets' numbers, from 1.
        losses: [M, Q] float64, loss of each query under the subset's first training, averaged
            over timesteps. A second seed is not averaged in: seeds differ by more than chance (the
            queries were made by a model of the first), and only some subsets have two.
        first: [T, Q] float64, losses of the subsets that were trained twice, first seed.
        second: [T, Q] float64, the same subsets, second seed.
    """

    masks: np.ndarray
    numbers: np.ndarray
    losses: np.ndarray
    first: np.ndarray
    second: np.ndarray

    def half(self, tune: bool, subsets: int = 64) -> tuple[np.ndarray, np.ndarray]:
        """Returns (masks, losses) of the subsets that methods are tuned on, or judged on."""
        chosen = (self.numbers <= subsets // 2) == tune
        return self.masks[chosen], self.losses[chosen]


def read_outcomes(path: Path, ids: Sequence[str], query_ids: Sequence[str]) -> Outcomes:
    """Reads the outcomes of the models that are trained so far.

    Args:
        path: Parquet with a row for each run, query and part of the noise schedule.
        ids: of all examples of the benchmark's data set, in order.
        query_ids: of the benchmark's queries, in order.

    Raises:
        ValueError: no such file, a column that is missing, outcomes of other queries or another
            data set, or a loss that is missing, not finite, or there twice.
    """
    if not path.is_file():
        raise ValueError(f"outcomes {str(path)!r}: no such file; make them with benchmarks/twemoji")
    table = pq.read_table(path)
    made_of = (table.schema.metadata or {}).get(b"examples", b"").decode()
    if made_of != (here := fingerprint_of(ids)):
        raise ValueError(
            f"outcomes {str(path)!r} are of another data set (examples {made_of or 'unknown'}, "
            f"here {here}): install the version of the data that the benchmark names"
        )
    _check_columns(table, path)
    column = {q: i for i, q in enumerate(query_ids)}
    runs = {r.name: r for r in plan(ids)}
    found: dict[str, dict[tuple[int, int], float]] = {}
    for row in table.to_pylist():
        if row["query"] not in column or row["run"] not in runs:
            what = row["query"] if row["query"] not in column else row["run"]
            raise ValueError(f"outcomes {str(path)!r}: {what!r} is not of this benchmark")
        losses = found.setdefault(row["run"], {})
        place = column[row["query"]], row["timestep_bin"]
        if place in losses:
            raise ValueError(
                f"outcomes {str(path)!r}: run {row['run']} has two losses of {row['query']!r} in "
                f"timestep_bin {row['timestep_bin']}"
            )
        losses[place] = np.nan if row["loss"] is None else row["loss"]
    bins = sorted({part for losses in found.values() for _, part in losses})
    means = {}
    for name, losses in found.items():
        cells = [[losses.get((at, part), np.nan) for part in bins] for at in range(len(column))]
        if not np.isfinite(cells).all():
            raise ValueError(
                f"outcomes {str(path)!r}: run {name} has no finite loss of a query in each of the "
                f"{len(bins)} parts of the schedule"
            )
        means[name] = np.mean(cells, axis=1)
    return _arranged(means, runs, len(ids))


def _check_columns(table: pa.Table, path: Path) -> None:
    """Refuses a table without the columns of outcomes."""
    numbers = pa.types.is_floating, pa.types.is_integer
    text = pa.types.is_string, pa.types.is_large_string
    for name, kind, fits in (
        ("run", "text", text), ("query", "text", text), ("loss", "numbers", numbers),
        ("timestep_bin", "whole numbers", (pa.types.is_integer,)),
    ):  # fmt: skip
        if name not in table.column_names:
            raise ValueError(f"outcomes {str(path)!r}: there is no column {name!r}")
        found = table.schema.field(name).type
        if not any(fit(found) for fit in fits):
            raise ValueError(f"outcomes {str(path)!r}: column {name!r} holds {found}, not {kind}")
        if name != "loss" and table.column(name).null_count:
            raise ValueError(f"outcomes {str(path)!r}: column {name!r} has rows without a value")


def _arranged(means: dict[str, np.ndarray], runs: dict[str, Run], examples: int) -> Outcomes:
    by_subset: dict[int, dict[int, str]] = {}
    for name in means:
        if runs[name].subset:
            by_subset.setdefault(runs[name].subset, {})[runs[name].seed] = name
    numbers = sorted(by_subset)
    masks = np.zeros((len(numbers), examples), dtype=bool)
    for place, number in enumerate(numbers):
        masks[place, list(runs[next(iter(by_subset[number].values()))].keep)] = True
    losses = [means[by_subset[m][min(by_subset[m])]] for m in numbers]
    both = [m for m in numbers if len(by_subset[m]) == 2]
    width = len(next(iter(means.values()))) if means else 0
    return Outcomes(
        masks,
        np.array(numbers),
        np.array(losses).reshape(len(numbers), width),
        np.array([means[by_subset[m][0]] for m in both]).reshape(len(both), width),
        np.array([means[by_subset[m][1]] for m in both]).reshape(len(both), width),
    )


def fingerprint_of(ids: Sequence[str]) -> str:
    """Returns a short hash of the ids, in order."""
    return f"{stable_seed('examples', *ids):016x}"
