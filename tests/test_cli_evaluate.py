from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq
import pytest
from PIL import Image

from unsee.cli import main
from unsee.data.dataset import load_dataset
from unsee.evaluation.benchmark import fingerprint_of, plan
from unsee.evaluation.compare import compare
from unsee.methods.base import Scores

QUERIES = [f"query-{i}" for i in range(6)]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Twenty pictures in a folder."""
    folder = tmp_path / "data"
    folder.mkdir()
    rows = []
    for i in range(20):
        Image.new("RGB", (4, 4), (i, i, i)).save(folder / f"{i}.png")
        rows.append(json.dumps({"file_name": f"{i}.png", "text": f"grey {i}"}))
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    return folder


@pytest.fixture
def ids(data: Path) -> list[str]:
    return load_dataset("imagefolder", data_dir=data).ids


@pytest.fixture
def results(tmp_path: Path, ids: list[str]) -> list[str]:
    """Folders of a good and a bad method, and the outcomes that they are held against."""
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(len(QUERIES), len(ids)))
    rows = []
    for run in plan(ids):
        losses = 3 - truth[:, list(run.keep)].sum(1) + rng.normal(size=len(QUERIES))
        rows += [
            {"run": run.name, "subset": run.subset, "seed": run.seed, "query": q,
             "timestep_bin": 0, "loss": loss}
            for q, loss in zip(QUERIES, losses, strict=True)
        ]  # fmt: skip
    table = pa.Table.from_pylist(rows)
    table = table.replace_schema_metadata({"examples": fingerprint_of(ids)})
    pq.write_table(table, tmp_path / "outcomes.parquet")
    for name, values in (("good", truth), ("bad", rng.normal(size=truth.shape))):
        for query, row in zip(QUERIES, values, strict=True):
            Scores(ids, row, name).save(tmp_path / name / f"{query}.parquet")
    return [str(tmp_path / name) for name in ("good", "bad", "outcomes.parquet")]


def test_compare_prints_both_and_their_difference(results, data, ids, capsys) -> None:
    good, bad, outcomes = results
    arguments = ["evaluate", "compare", good, bad, "--outcomes", outcomes, "--data", str(data)]
    assert main(arguments) == 0
    want = compare([Path(good), Path(bad)], Path(outcomes), ids)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{want.lds[0]}  {good}"
    assert lines[1] == f"{want.lds[1]}  {bad}"
    assert lines[2] == f"{want.difference}  first - second, clear of zero"
    assert lines[3].startswith("mean LDS of 3 queries over 32 subsets (report), with 95% intervals")
    assert lines[3].endswith(f"two seeds on the same subset agree by {want.agreement:.3f}")


def test_lds_of_the_other_half_and_another_level(results, data, ids, capsys) -> None:
    good, _, outcomes = results
    options = ["--outcomes", outcomes, "--data", str(data), "--half", "tune", "--level", "0.8"]
    assert main(["evaluate", "lds", good, *options]) == 0
    want = compare([Path(good)], Path(outcomes), ids, half="tune", level=0.8)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{want.lds[0]}  {good}"
    assert lines[1].startswith("mean LDS of 3 queries over 32 subsets (tune), with 80% intervals")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--outcomes": "none.parquet"}, "outcomes 'none.parquet': no such file"),
        ({"--level": "95"}, "level = 95.0 must be between 0 and 1"),
        ({"--data": "twemoji"}, "are of another data set"),
    ],
)
def test_bad_input_ends_in_one_line_and_exit_code_2(
    changes, message, results, data, capsys
) -> None:
    good, bad, outcomes = results
    options = {"--outcomes": outcomes, "--data": str(data), **changes}
    flat = [part for option in options.items() for part in option]
    assert main(["evaluate", "compare", good, bad, *flat]) == 2
    *_, last = capsys.readouterr().err.splitlines()  # the data set may warn before
    assert last.startswith("unsee: ")
    assert message in last


def changed(path: Path, **columns: object) -> None:
    """Replaces columns of a Parquet file; None removes one."""
    table = pq.read_table(path)
    about = table.schema.metadata
    data = {name: table[name].to_pylist() for name in table.column_names} | columns
    kept = {name: values for name, values in data.items() if values is not None}
    pq.write_table(pa.table(kept).replace_schema_metadata(about), path)


def last_line(results: list[str], data: Path, capsys: pytest.CaptureFixture) -> str:
    good, _, outcomes = results
    assert main(["evaluate", "lds", good, "--outcomes", outcomes, "--data", str(data)]) == 2
    errors = capsys.readouterr().err
    assert "Traceback" not in errors
    *_, last = errors.splitlines()
    assert last.startswith("unsee: ")
    return last


COUNT = 20
"""Examples."""


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"score": [1.0] * COUNT}, "all are equal, so they predict nothing"),
        ({"score": [float("nan"), *range(1, COUNT)]}, "is not finite"),
        ({"score": [float("inf"), *range(1, COUNT)]}, "is not finite"),
        ({"score": None}, "not a score file"),
        ({"id": None}, "not a score file"),
        ({"score": ["high"] * COUNT}, "not a score file"),
        ({"score": [None, *range(1, COUNT)]}, "is not finite"),
        ({"id": ["0.png"] * COUNT}, "has two scores"),
        ({"id": [None, *map(str, range(1, COUNT))]}, "None is not among the 20 examples"),
    ],
)
def test_bad_scores(columns, message, results, data, capsys) -> None:
    path = Path(results[0]) / "query-1.parquet"
    changed(path, **columns)
    last = last_line(results, data, capsys)
    assert "query-1.parquet': " in last and message in last


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"loss": None}, "there is no column 'loss'"),
        ({"run": None}, "there is no column 'run'"),
        ({"query": None}, "cannot be read"),
        ({"loss": "text"}, "column 'loss' holds string, not numbers"),
        ({"loss": "none"}, "has no finite loss"),
        ({"loss": "nan"}, "has no finite loss"),
        ({"loss": "constant"}, "outcomes: query 0 has equal values for all subsets"),
        ({"query": "numbers"}, "column 'query' holds int64, not text"),
        ({"run": "other"}, "'other' is not of this benchmark"),
    ],
)
def test_bad_outcomes(columns, message, results, data, capsys) -> None:
    path = Path(results[2])
    rows = pq.read_table(path).num_rows
    losses = pq.read_table(path)["loss"].to_pylist()
    values = {
        "text": ["low"] * rows, "none": [None, *losses[1:]], "nan": [float("nan"), *losses[1:]],
        "constant": [1.0] * rows, "numbers": list(range(rows)), "other": ["other"] * rows,
    }  # fmt: skip
    changed(path, **{n: values[v] if v is not None else None for n, v in columns.items()})
    assert message in last_line(results, data, capsys)


def test_outcomes_of_few_subsets(results, data, capsys) -> None:
    path = Path(results[2])
    table = pq.read_table(path)
    names = [f"half-{n:02d}-0" for n in range(33, 37)]
    some = table.filter(pa.compute.is_in(table["run"], value_set=pa.array(names)))
    pq.write_table(some, path)
    assert "an interval needs 8 subsets, there are 4" in last_line(results, data, capsys)


def test_outcomes_without_rows(results, data, capsys) -> None:
    path = Path(results[2])
    pq.write_table(pq.read_table(path).slice(0, 0), path)
    assert "no query" in last_line(results, data, capsys)


def test_empty_files(results, data, capsys) -> None:
    Path(results[2]).write_bytes(b"")
    assert "cannot be read" in last_line(results, data, capsys)


def test_an_empty_score_file(results, data, capsys) -> None:
    (Path(results[0]) / "query-1.parquet").write_bytes(b"")
    assert "query-1.parquet': cannot be read" in last_line(results, data, capsys)
