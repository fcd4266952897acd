from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from unsee.evaluation.benchmark import (
    fingerprint_of,
    members_and_decoys,
    plan,
    read_outcomes,
    subset,
)

IDS = [f"example-{i}" for i in range(100)]
QUERIES = ["a", "b"]


def write(path: Path, losses: dict[str, list[float]], ids: list[str] = IDS) -> Path:
    """Losses of both queries, in two parts of the noise schedule each, for some runs."""
    rows = [
        {"run": run, "subset": 0, "seed": 0, "query": q, "timestep_bin": b, "loss": value + b}
        for run, values in losses.items()
        for q, value in zip(QUERIES, values, strict=True)
        for b in (0, 1)
    ]
    table = pa.Table.from_pylist(rows)
    pq.write_table(table.replace_schema_metadata({"examples": fingerprint_of(ids)}), path)
    return path


def test_rows_without_a_value_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "outcomes.parquet", {"full-0": [1.0, 2.0]})
    rows = pq.read_table(path).to_pylist()
    rows[1]["timestep_bin"] = None
    table = pa.Table.from_pylist(rows)
    pq.write_table(table.replace_schema_metadata({"examples": fingerprint_of(IDS)}), path)
    with pytest.raises(ValueError, match="column 'timestep_bin' has rows without a value"):
        read_outcomes(path, IDS, QUERIES)


def test_decoys_are_a_tenth_and_follow_the_ids() -> None:
    members, decoys = members_and_decoys(IDS)
    assert len(decoys) == 10 and sorted(members + decoys) == list(range(100))
    backwards = IDS[::-1]
    _, again = members_and_decoys(backwards)
    assert {backwards[r] for r in again} == {IDS[r] for r in decoys}


def test_subsets_are_halves_of_the_members_and_differ() -> None:
    members, _ = members_and_decoys(IDS)
    halves = [subset(members, n) for n in range(1, 9)]
    assert all(len(h) == 45 and set(h) <= set(members) for h in halves)
    assert len(set(halves)) == 8
    assert subset(members, 3) == halves[2]


def test_plan_trains_every_subset_once_before_any_twice() -> None:
    runs = plan(IDS, subsets=8, twice=4)
    names = [r.name for r in runs]
    assert len(set(names)) == len(names) == 2 + 8 + 4
    singles, again = runs[2:10], runs[10:]
    assert sorted(r.subset for r in singles) == list(range(1, 9))
    # Both halves of the subsets in turn: the first tunes methods, the second judges them.
    assert [r.subset for r in again] == [1, 5, 2, 6]
    assert all(r.seed == 1 for r in again)
    by_subset = {r.subset: r.keep for r in singles}
    assert all(r.keep == by_subset[r.subset] for r in again)


def test_outcomes_are_means_over_timesteps_of_the_first_seed(tmp_path: Path) -> None:
    losses = {"full-0": [9, 9], "half-02-0": [1, 2], "half-02-1": [3, 6], "half-40-0": [5, 7]}
    got = read_outcomes(write(tmp_path / "o.parquet", losses), IDS, QUERIES)
    assert got.numbers.tolist() == [2, 40]
    assert got.losses.tolist() == [[1.5, 2.5], [5.5, 7.5]]
    assert got.first.tolist() == [[1.5, 2.5]] and got.second.tolist() == [[3.5, 6.5]]
    members, _ = members_and_decoys(IDS)
    assert np.flatnonzero(got.masks[0]).tolist() == list(subset(members, 2))
    masks, judged = got.half(tune=False)
    assert masks.shape == (1, 100) and judged.tolist() == [[5.5, 7.5]]


def test_outcomes_that_do_not_belong_are_refused(tmp_path: Path) -> None:
    good = {"half-01-0": [1.0, 2.0]}
    path = write(tmp_path / "o.parquet", good, ids=IDS[:-1])
    with pytest.raises(ValueError, match="are of another data set"):
        read_outcomes(path, IDS, QUERIES)
    path = write(tmp_path / "o.parquet", good)
    with pytest.raises(ValueError, match="'b' is not of this benchmark"):
        read_outcomes(path, IDS, ["a"])
    with pytest.raises(ValueError, match="run half-01-0 has no finite loss"):
        read_outcomes(path, IDS, [*QUERIES, "c"])
    path = write(tmp_path / "o.parquet", {"half-01-0": [float("nan"), 2.0]})
    with pytest.raises(ValueError, match="run half-01-0 has no finite loss"):
        read_outcomes(path, IDS, QUERIES)
    path = write(tmp_path / "o.parquet", good)
    whole = pq.read_table(path)
    pq.write_table(whole.slice(1), path)
    with pytest.raises(ValueError, match="no finite loss of a query in each of the 2 parts"):
        read_outcomes(path, IDS, QUERIES)
    pq.write_table(pa.concat_tables([whole, whole.slice(0, 1)]), path)
    with pytest.raises(ValueError, match="two losses of 'a' in timestep_bin 0"):
        read_outcomes(path, IDS, QUERIES)
    path = write(tmp_path / "o.parquet", {"half-99-0": [1.0, 2.0]})
    with pytest.raises(ValueError, match="'half-99-0' is not of this benchmark"):
        read_outcomes(path, IDS, QUERIES)
    with pytest.raises(ValueError, match="no such file"):
        read_outcomes(tmp_path / "absent.parquet", IDS, QUERIES)
