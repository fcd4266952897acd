from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from unsee.methods.base import Scores

IDS = ["a", "b", "c", "d", "e"]
VALUES = np.array([0.5, -1.0, 2.0, 0.5, 0.0])


@pytest.fixture
def scores() -> Scores:
    return Scores(IDS, VALUES, "AbU", {"rise": 0.05, "box": None, "step_sizes": [1e-7]})


def test_order_is_from_most_to_least_influential(scores):
    assert [IDS[i] for i in scores.order] == ["c", "a", "d", "e", "b"]  # ties keep their order
    assert len(scores) == 5


def test_top_and_bottom(scores):
    assert scores.top(2).ids == ["c", "a"] and scores.top(2).values.tolist() == [2.0, 0.5]
    assert scores.bottom(2).ids == ["b", "e"]
    assert scores.top(99).ids == ["c", "a", "d", "e", "b"]
    assert scores.top(0).ids == []
    assert scores.top(2).settings == scores.settings and scores.top(2).method == "AbU"


def test_rank(scores):
    assert [scores.rank_of(i) for i in IDS] == [2, 5, 1, 3, 4]
    with pytest.raises(ValueError, match="no example 'z'"):
        scores.rank_of("z")


def test_save_and_load(scores, tmp_path: Path):
    path = tmp_path / "deep" / "scores.parquet"
    scores.save(path)
    table = pq.read_table(path)
    assert table.column_names == ["id", "score", "rank"]
    assert table["rank"].to_pylist() == [1, 2, 3, 4, 5]
    loaded = Scores.load(path)
    assert loaded.ids == ["c", "a", "d", "e", "b"]  # a file is sorted
    at = dict(zip(IDS, VALUES, strict=True))
    assert loaded.values.tolist() == [at[i] for i in loaded.ids]
    assert loaded.method == "AbU" and loaded.settings == scores.settings
    assert [p.name for p in path.parent.iterdir()] == ["scores.parquet"]


def test_files_that_are_no_scores_are_named(scores, tmp_path: Path):
    with pytest.raises(ValueError, match=r"absent\.parquet': no such file"):
        Scores.load(tmp_path / "absent.parquet")
    path = tmp_path / "scores.parquet"
    scores.save(path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"scores\.parquet': cannot be read"):
        Scores.load(path)
    pq.write_table(pa.table({"id": ["a"]}), path)
    with pytest.raises(ValueError, match=r"scores\.parquet': not a score file"):
        Scores.load(path)


def test_scores_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="2 ids but 1 values"):
        Scores(["a", "b"], np.zeros(1), "AbU")
    for bad in (np.nan, np.inf):
        with pytest.raises(ValueError, match="the score of 'b' is not finite"):
            Scores(["a", "b"], np.array([0.0, bad]), "AbU")
