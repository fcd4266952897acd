"""Score files of one or two methods, held against the outcomes of retrained models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow.parquet as pq

from ..methods.base import Scores
from .benchmark import read_outcomes
from .intervals import Estimate, lds_interval, paired_difference
from .metrics import FEWEST_SUBSETS, noise_ceiling

Half = Literal["report", "tune", "all"]


@dataclass(frozen=True)
class Comparison:
    """How well methods predict what retrained models do.

    Attributes:
        queries: ids of the queries that all methods have scored.
        subsets: how many retrained models, of different subsets, they are held against.
        lds: mean LDS of each method.
        difference: of the first method minus the second; None for a single method.
        agreement: mean correlation of two seeds on the same subsets; None if fewer than 3
            subsets were trained twice. See `metrics.noise_ceiling`.
    """

    queries: list[str]
    subsets: int
    lds: list[Estimate]
    difference: Estimate | None
    agreement: float | None


def compare(
    directories: Sequence[Path],
    outcomes: Path,
    ids: Sequence[str],
    *,
    half: Half = "report",
    level: float = 0.95,
    seed: int = 0,
) -> Comparison:
    """Holds the score files of one or two methods against outcomes.

    Args:
        directories: one for each method; `QUERY.parquet` in it is what `Scores.save` wrote.
        outcomes: Parquet, see `read_outcomes`.
        ids: of all examples of the data set, in order.
        half: "tune" takes every other query and the first half of the subsets, "report" the
            other queries and subsets: whatever was chosen on the first half is judged fairly on
            the second. "all" takes everything.
        level: of the intervals.
        seed: of their resampling.

    Raises:
        ValueError: no such folder or file, scores of a query that the outcomes lack, an example
            without a score, equal scores, no query that all methods scored, or see `lds_interval`.
    """
    all_queries = _queries_of(outcomes)
    made = read_outcomes(outcomes, ids, all_queries)
    present = [_files(directory, all_queries) for directory in directories]
    chosen = [
        place
        for place, query in enumerate(all_queries)
        if half in ("all", "tune" if place % 2 == 0 else "report")
        and all(query in files for files in present)
    ]
    if not chosen:
        raise ValueError(
            f"compare: no query of the {half!r} part is scored in "
            f"{' and '.join(repr(str(d)) for d in directories)}"
        )
    masks, losses = (made.masks, made.losses) if half == "all" else made.half(half == "tune")
    losses = losses[:, chosen]
    queries = [all_queries[place] for place in chosen]
    needed = np.logical_or.reduce(masks)
    scores = [_scores(files, queries, ids, needed) for files in present]
    estimates = [lds_interval(s, masks, losses, level=level, seed=seed) for s in scores]
    difference = None
    if len(scores) == 2:
        first, second = scores
        difference = paired_difference(first, second, masks, losses, level=level, seed=seed)
    agreement = None
    if len(made.first) >= FEWEST_SUBSETS:
        agreement = float(noise_ceiling(made.first[:, chosen], made.second[:, chosen]).mean())
    return Comparison(queries, len(masks), estimates, difference, agreement)


def _queries_of(outcomes: Path) -> list[str]:
    """Returns the ids of the queries, in the order in which the file first names them."""
    if not outcomes.is_file():
        raise ValueError(f"outcomes {str(outcomes)!r}: no such file")
    try:
        names = pq.read_table(outcomes, columns=["query"])["query"].to_pylist()
    except (ValueError, KeyError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"outcomes {str(outcomes)!r}: cannot be read ({reason})") from None
    return list(dict.fromkeys(names))


def _files(directory: Path, queries: Sequence[str]) -> dict[str, Path]:
    """Returns query -> score file."""
    files = {path.stem: path for path in sorted(directory.glob("*.parquet"))}
    if not files:
        raise ValueError(f"scores {str(directory)!r}: no folder with QUERY.parquet files")
    for query in files:
        if query not in queries:
            raise ValueError(
                f"scores {str(files[query])!r}: the outcomes have no query {query!r}; theirs are "
                f"{', '.join(queries[:3])} ..."
            )
    return files


def _scores(
    files: dict[str, Path], queries: Sequence[str], ids: Sequence[str], needed: np.ndarray
) -> np.ndarray:
    """Returns [Q, N] float64; zero for examples that are in no subset and have no score."""
    place = {identifier: row for row, identifier in enumerate(ids)}
    values = np.full((len(queries), len(ids)), np.nan)
    for row, query in enumerate(queries):
        scores = Scores.load(files[query])
        for identifier in scores.ids:
            if identifier not in place:
                raise ValueError(
                    f"scores {str(files[query])!r}: {identifier!r} is not among the {len(ids)} "
                    "examples of the data set"
                )
        values[row, [place[i] for i in scores.ids]] = scores.values
        missing = np.isnan(values[row])
        if (missing & needed).any():
            raise ValueError(
                f"scores {str(files[query])!r}: no score of "
                f"{ids[int(np.argmax(missing & needed))]!r}, which models were trained on"
            )
        told = values[row, needed]
        if len(told) and told.min() == told.max():
            raise ValueError(
                f"scores {str(files[query])!r}: all are equal, so they predict nothing"
            )
    return np.where(np.isnan(values), 0.0, values)
