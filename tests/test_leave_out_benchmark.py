"""benchmarks/twemoji/leave_out.py, whole, on a tiny pipeline and twelve pictures."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

import unsee
from unsee import Denoiser, encode_dataset, load_dataset
from unsee.evaluation.twemoji import Benchmark

FOLDER = Path(__file__).parents[1] / "benchmarks" / "twemoji"


@pytest.fixture
def leave_out(monkeypatch):
    if not FOLDER.is_dir():
        pytest.skip("no benchmarks beside these tests")
    monkeypatch.syspath_prepend(str(FOLDER))
    before = set(sys.modules)
    yield importlib.import_module("leave_out")
    for name in set(sys.modules) - before:  # names as common as `train` are not left behind
        if Path(getattr(sys.modules[name], "__file__", None) or "/").parent == FOLDER:
            del sys.modules[name]


@pytest.fixture
def benchmark(tiny_pipeline, image_folder, tmp_path) -> Benchmark:
    """Eleven members, one decoy, four queries, of which the last of each kind is judged."""
    model = Denoiser.from_pipeline(tiny_pipeline, "all")
    images = load_dataset("imagefolder", data_dir=image_folder)
    data = encode_dataset(model, images)
    members = np.arange(len(data.ids)) != 4
    queries = [
        dataclasses.replace(model.generate(f"a {prompt}", seed, 2, 2.0), id=name)
        for name, prompt, seed in (
            ("member-00", "red circle", 0), ("member-01", "blue circle", 1),
            ("new-00", "red star", 2), ("new-01", "blue star", 3),
        )
    ]  # fmt: skip
    rng = np.random.default_rng(0)
    (tmp_path / "scores").mkdir()
    for method in ("one", "two"):
        scores = rng.normal(size=(4, 12))
        scores[:, 4] = 100  # the decoy leads, and cannot be removed
        np.save(tmp_path / "scores" / f"{method}.npy", scores)
    return Benchmark(model, images, data, members, queries, tmp_path)


@pytest.fixture
def trained(leave_out, benchmark, monkeypatch) -> list[tuple[str, tuple[int, ...]]]:
    """Trainings take no time: each scales the weights by another factor. Lists them."""
    done = []
    state = {k: v.clone() for k, v in benchmark.model.network.state_dict().items()}

    def train_one(run, work):
        weights = work / run.name / "unet.safetensors"
        if not weights.is_file():
            weights.parent.mkdir(parents=True)
            done.append((run.name, run.keep))
            factor = 1 + 0.01 * len(done)
            save_file({k: v.clone() * factor for k, v in state.items()}, weights)
        return run.name, 0.0

    def network(weights):
        from safetensors.torch import load_file

        unet = type(benchmark.model.network).from_config(benchmark.model.network.config)
        unet.load_state_dict(load_file(weights))
        return unet

    monkeypatch.setattr(leave_out, "train_one", train_one)
    monkeypatch.setattr(leave_out, "network", network)
    monkeypatch.setattr(leave_out, "benchmark_of", lambda work: benchmark)
    monkeypatch.setattr(leave_out, "DRAWS", leave_out.DRAWS.__class__(seed=-100, n=2))
    monkeypatch.setattr(
        leave_out, "ProcessPoolExecutor", lambda processes, mp_context: ThreadPoolExecutor(1)
    )
    return done


def run(leave_out, monkeypatch, capsys, work: Path, *options: str) -> str:
    arguments = ["leave_out.py", str(work), "--out", str(work / "left_out.parquet"), *options]
    monkeypatch.setattr(sys, "argv", arguments)
    leave_out.main()
    return capsys.readouterr().out


def test_queries_are_judged_ones_of_both_kinds_in_turn(leave_out, benchmark):
    assert leave_out.asked_queries(benchmark, 2) == [1, 3]
    assert leave_out.asked_queries(benchmark, 1) == [1]


def test_trains_measures_and_resumes(
    leave_out, benchmark, trained, monkeypatch, capsys, tmp_path
) -> None:
    options = ("--methods", "one", "two", "--k", "3", "--queries", "2", "--random", "2")
    text = run(leave_out, monkeypatch, capsys, tmp_path, *options, "--limit", "3")
    assert text.startswith("0 models are measured, 6 are to train")
    assert len(trained) == 3
    text = run(leave_out, monkeypatch, capsys, tmp_path, *options)
    assert text.startswith("4 models are measured, 3 are to train")
    assert [name.split("/")[-1].rsplit("-", 1)[0] for name, _ in trained] == [
        "random-1", "random-2", "one--member-01", "two--member-01", "one--new-01", "two--new-01",
    ]  # fmt: skip
    assert "| 3 | loss | one | 2 |" in text
    rows = pq.read_table(tmp_path / "left_out.parquet").to_pylist()
    assert len(rows) == (1 + 6) * 4  # every query under every model
    assert {r["removed_for"] for r in rows} == {"", "member-01", "new-01"}
    full = [r for r in rows if r["run"] == "none"]
    assert [r["query"] for r in full] == [q.id for q in benchmark.queries]
    assert all(r["mse"] == 0 for r in full)

    scores = np.load(tmp_path / "scores" / "one.npy")[1].copy()
    scores[4] = -np.inf
    best = set(np.argsort(-scores)[:3].tolist())
    assert trained[2][1] == tuple(sorted(set(range(12)) - {4} - best))
    assert all(len(keep) == 8 for _, keep in trained)

    text = run(leave_out, monkeypatch, capsys, tmp_path, *options)
    assert text.startswith("7 models are measured, 0 are to train")
    assert len(trained) == 6

    run(leave_out, monkeypatch, capsys, tmp_path, *options[:-1], "3")
    about = pq.read_schema(tmp_path / "left_out.parquet").metadata
    assert about[b"unsee"].decode() == unsee.__version__
    made_by = "python benchmarks/twemoji/leave_out.py WORK --methods one two --k 3 --queries 2"
    assert about[b"commands"].decode().splitlines() == [
        f"{made_by} --random 2", f"{made_by} --random 3",
    ]  # fmt: skip


def test_a_training_that_fails_does_not_stop_the_others(
    leave_out, benchmark, trained, monkeypatch, capsys, tmp_path
) -> None:
    train_one = leave_out.train_one

    def fails_once(run, work):
        if "random-1" in run.name:
            raise MemoryError("too large")
        return train_one(run, work)

    options = ("--methods", "one", "--k", "3", "--queries", "1", "--random", "2")
    monkeypatch.setattr(leave_out, "train_one", fails_once)
    text = run(leave_out, monkeypatch, capsys, tmp_path, *options)
    assert "a training failed, the others go on: MemoryError('too large')" in text
    assert len(trained) == 2
    monkeypatch.setattr(leave_out, "train_one", train_one)
    text = run(leave_out, monkeypatch, capsys, tmp_path, *options)
    assert text.startswith("3 models are measured, 1 are to train")


def test_another_ranking_is_another_run(
    leave_out, benchmark, trained, monkeypatch, capsys, tmp_path
) -> None:
    options = ("--methods", "one", "--k", "25%", "--queries", "1", "--random", "1")
    run(leave_out, monkeypatch, capsys, tmp_path, *options)
    scores = np.load(tmp_path / "scores" / "one.npy")
    np.save(tmp_path / "scores" / "one.npy", -scores)
    text = run(leave_out, monkeypatch, capsys, tmp_path, *options)
    assert text.startswith("3 models are measured, 1 are to train")
    rows = pq.read_table(tmp_path / "left_out.parquet").to_pylist()
    last = [r for r in rows if r["query"] == "member-01"]
    change = last[-1]["loss"] - last[0]["loss"]
    assert f"| 3 | loss | one | 1 | {change:+.4f} |" in text  # the newer one counts


def test_says_which_scores_there_are(
    leave_out, benchmark, trained, monkeypatch, capsys, tmp_path
) -> None:
    with pytest.raises(SystemExit, match=r"no scores of 'three' in .*; there are: one, two"):
        run(leave_out, monkeypatch, capsys, tmp_path, "--methods", "three", "--k", "3")
    scores = np.full((4, 12), np.nan)
    np.save(tmp_path / "scores" / "three.npy", scores)
    with pytest.raises(SystemExit, match="'three' has no scores of member-01"):
        run(leave_out, monkeypatch, capsys, tmp_path, "--methods", "three", "--k", "3")


def test_trains_with_the_recipe_of_the_benchmark(
    leave_out, benchmark, monkeypatch, capsys, tmp_path
) -> None:
    """The real trainer, for two steps; what is left out is not looked at."""
    train = importlib.import_module("train")
    steps = train.optimization(11, 0)
    monkeypatch.setattr(
        train, "optimization", lambda n, seed: dataclasses.replace(steps, steps=2, seed=seed)
    )
    null_text = benchmark.model.encode_prompts([""])[0]
    monkeypatch.setattr(train, "encoded", lambda work: (benchmark.data, null_text))
    name, seconds = train.train_one(
        leave_out.Run("left-out/3/random-1", tuple(range(8)), 0, 0), tmp_path
    )
    assert seconds > 0
    assert (tmp_path / name / "unet.safetensors").is_file()
    assert not (tmp_path / name / "checkpoint.pt").exists()
    assert torch.get_num_threads() == 1
