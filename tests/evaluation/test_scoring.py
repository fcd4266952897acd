"""Every method by name, on a tiny pipeline and twelve pictures of which one is a decoy."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from unsee import Denoiser, Draws, encode_dataset, load_dataset
from unsee.cli import main
from unsee.evaluation import scoring
from unsee.evaluation.scoring import METHODS, Trial, check_method, score_files
from unsee.evaluation.twemoji import Benchmark
from unsee.methods.base import Scores
from unsee.methods.example_gradients import QueryExamples, example_gradients


@pytest.fixture
def benchmark(tiny_pipeline, image_folder, tmp_path, monkeypatch) -> Benchmark:
    monkeypatch.setattr(scoring, "QUERY_DRAWS", Draws(seed=1, n=8))
    monkeypatch.setattr(scoring, "RISE", 0.01)  # keys and values of no training can do little
    model = Denoiser.from_pipeline(tiny_pipeline)
    images = load_dataset("imagefolder", data_dir=image_folder)
    queries = [
        dataclasses.replace(model.generate(prompt, seed, 2, 2.0), id=name)
        for name, prompt, seed in (("member-00", "a red circle", 0), ("new-00", "a blue star", 1))
    ]
    data = encode_dataset(model, images)
    return Benchmark(model, images, data, np.arange(12) != 4, queries, tmp_path)


def narrow(benchmark: Benchmark) -> Benchmark:
    """The same with a single weight selected: small enough for formulas in its parameters."""
    name = next(iter(benchmark.model.parameters))
    model = Denoiser.from_pipeline(benchmark.model.pipeline, name)
    return dataclasses.replace(benchmark, model=model)


def scores(folder: Path, benchmark: Benchmark) -> np.ndarray:
    """[N, Q], in the order of the members."""
    loaded = [Scores.load(folder / f"{q.id}.parquet") for q in benchmark.queries]
    members = [i for i, m in zip(benchmark.data.ids, benchmark.members, strict=True) if m]
    return np.array([[s.values[s.ids.index(i)] for i in members] for s in loaded]).T


def gradients(benchmark: Benchmark, measure: str) -> tuple[np.ndarray, np.ndarray]:
    """[N, P] of the members and [Q, P] of the queries, as one matrix each."""
    examples = example_gradients(benchmark.model, benchmark.data, Draws(0, 4), measure=measure)
    queries = QueryExamples(benchmark.queries)
    asked = example_gradients(benchmark.model, queries, scoring.QUERY_DRAWS, measure=measure)
    return (np.concatenate(examples.shards)[benchmark.members].astype(np.float64),
            np.concatenate(asked.shards).astype(np.float64))  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_every_method_scores_the_members(name, benchmark, tmp_path) -> None:
    folder = score_files(benchmark, name, tmp_path, draws=4)
    assert folder.parent == tmp_path / "scores"
    assert {p.stem for p in folder.iterdir()} == {"member-00", "new-00"}
    got = scores(folder, benchmark)
    assert got.shape == (11, 2)
    assert (got.std(0) > 0).all()
    assert Scores.load(folder / "new-00.parquet").method == name
    stamps = [p.stat().st_mtime_ns for p in sorted(folder.iterdir())]
    assert score_files(benchmark, name, tmp_path, draws=4) == folder
    assert stamps == [p.stat().st_mtime_ns for p in sorted(folder.iterdir())]


@pytest.mark.parametrize(("name", "measure"), [("trak", "loss"), ("d-trak", "output_norm")])
def test_trak_is_its_formula(name, measure, benchmark, tmp_path) -> None:
    benchmark = narrow(benchmark)
    phi, asked = gradients(benchmark, measure)
    ridge = 0.5 * (phi**2).sum(1).mean()
    want = phi @ np.linalg.solve(phi.T @ phi + ridge * np.eye(phi.shape[1]), asked.T)
    got = scores(score_files(benchmark, name, tmp_path, damping=0.5, draws=4), benchmark)
    # inner products are float32
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-5 * abs(want).max())


def test_tracin_is_the_inner_product(benchmark, tmp_path) -> None:
    phi, asked = gradients(benchmark, "loss")
    want = phi @ asked.T
    got = scores(score_files(benchmark, "tracin", tmp_path, draws=4), benchmark)
    # inner products are float32
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-5 * abs(want).max())
    got = scores(score_files(benchmark, "tracin-cosine", tmp_path, draws=4), benchmark)
    want = want / np.linalg.norm(phi, axis=1)[:, None]
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-5 * abs(want).max())


def test_diagonal_is_its_formula(benchmark, tmp_path) -> None:
    phi, asked = gradients(benchmark, "loss")
    got = scores(score_files(benchmark, "diagonal", tmp_path, damping=0.5, draws=4), benchmark)
    want, first = 0.0, 0
    for parameter in benchmark.model.parameters.values():
        part = slice(first, first := first + parameter.numel())
        fisher = (phi[:, part] ** 2).mean(0)
        want = want + phi[:, part] @ (asked[:, part] / (fisher + 0.5 * fisher.mean())).T
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-5 * abs(want).max())


def test_with_much_damping_every_curvature_is_the_inner_product(benchmark, tmp_path) -> None:
    """Each layer's products are divided by that layer's damping: the layers have one here."""
    benchmark = narrow(benchmark)
    phi, asked = gradients(benchmark, "loss")
    want = phi @ asked.T
    for method in ("abu", "diagonal", "kfac", "ekfac"):
        folder = score_files(benchmark, method, tmp_path, damping=1e6, draws=4)
        got = scores(folder, benchmark)
        scale = (got * want).sum() / (want**2).sum()
        assert scale > 0
        np.testing.assert_allclose(
            got, scale * want, rtol=1e-3, atol=1e-4 * abs(scale * want).max()
        )


def test_another_setting_is_another_folder(benchmark, tmp_path) -> None:
    folders = {
        score_files(benchmark, "trak", tmp_path, damping=damping, draws=draws)
        for damping, draws in ((None, 2), (0.1, 2), (1.0, 2), (1.0, 4))
    }
    assert len(folders) == 3  # 1.0 is its own
    few, many = (score_files(benchmark, "tracin", tmp_path, draws=n) for n in (2, 4))
    assert (scores(few, benchmark) != scores(many, benchmark)).any()


def test_a_killed_trial_goes_on_with_its_gradients(benchmark, tmp_path) -> None:
    trial = Trial(benchmark, tmp_path, 2)
    first, _ = trial.gradients("loss")
    files = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("gradients/**/*.npy")}
    assert files
    again, _ = Trial(benchmark, tmp_path, 2).gradients("loss")
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("gradients/**/*.npy")} == files
    assert (np.concatenate(first.shards) == np.concatenate(again.shards)).all()


@pytest.mark.parametrize(
    ("name", "damping", "message"),
    [
        ("abc", None, "method 'abc' is not one of latent, pixel"),
        ("latent", 0.1, "method 'latent' has no damping"),
        ("trak", 0.0, r"damping = 0\.0 must be a positive number"),
        ("ekfac", float("nan"), "damping = nan must be a positive number"),
    ],
)
def test_refuses(name, damping, message) -> None:
    with pytest.raises(ValueError, match=message):
        check_method(name, damping)


def test_the_help_names_every_method(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["evaluate", "lds", "--help"])
    text = "".join(capsys.readouterr().out.split())  # lines end at hyphens too
    assert ",".join(METHODS) in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either a folder of scores or --method"),
        (["some", "--method", "latent"], "give either a folder of scores or --method"),
        (["--method", "abc"], "method 'abc' is not one of"),
        (["--method", "latent", "--data", "other"], "--method scores the queries of --benchmark"),
    ],
)
def test_bad_command_lines(arguments, message, capsys) -> None:
    assert main(["evaluate", "lds", "--benchmark", "twemoji", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow  # the autoencoder sees all pictures
def test_one_command_scores_and_judges(benchmark, tmp_path, monkeypatch, capsys) -> None:
    """On the benchmark that ships, with a method that takes no time."""
    work = tmp_path / "work"
    arguments = ["evaluate", "lds", "--benchmark", "twemoji", "--method", "random"]
    assert main([*arguments, "--work", str(work)]) == 0
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert first.endswith(str(work / "scores" / "random"))
    assert second.startswith("mean LDS of 20 queries over")
