"""The commands of the index, as somebody types them, on a tiny model and a dozen pictures."""

from __future__ import annotations

import dataclasses
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.conftest import write_image_folder
from tests.index.test_features import save_vision
from unsee.cli import main
from unsee.cli_index import print_top
from unsee.data.dataset import load_dataset
from unsee.index.layout import read_manifest, write_manifest
from unsee.methods.base import Scores
from unsee.methods.combine import combine
from unsee.runs import Source, read_source

COLUMNS = ("examples", "loss", "factors", "outputs")
ASKED = ["--prompt", "a red square", "--seed", "0", "--sampler-steps", "2"]
QUERY = [*ASKED, "--query-draws", "4", "--device", "cpu"]
SCORED = ["scores.parquet", "contact-sheet.png", "query.png", "report.html"]


@dataclass
class Run:
    """A run, and the folders that it is of."""

    model: Path
    data: Path
    path: Path
    index: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self.index = ["index", str(self.model), str(self.data), "--out", str(self.path), *BUILD]

    def attribute(self, out: Path, *options: str) -> int:
        return main(["attribute", str(self.path), *QUERY, "--out", str(out), *options])


BUILD = ["--draws", "4", "--shard-size", "5", "--device", "cpu"]


@pytest.fixture(scope="module")
def built(tiny_pipeline_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run, to be read only."""
    folder = tmp_path_factory.mktemp("built")
    data = write_image_folder(folder / "pictures")
    run = Run(tiny_pipeline_dir, data, folder / "run")
    assert main(run.index) == 0
    return run


@pytest.fixture
def mine(built: Run, tmp_path: Path) -> Run:
    """The same with a model, pictures and run of its own, to be changed."""
    model = shutil.copytree(built.model, tmp_path / "model")
    data = shutil.copytree(built.data, tmp_path / "pictures")
    path = shutil.copytree(built.path, tmp_path / "run")
    source = json.loads((path / "source.json").read_text())
    source |= {"model": str(model), "data": str(data)}
    (path / "source.json").write_text(json.dumps(source))
    return Run(model, data, path)


def refused(capsys: pytest.CaptureFixture, code: int, *said: str) -> None:
    """Checks that a command ended with one line which says these things."""
    error = capsys.readouterr().err
    assert code == 2, error
    (line,) = [text for text in error.splitlines() if text.startswith("unsee:")]
    for text in said:
        assert text in line
    assert "Traceback" not in error


def remove_picture(data: Path, name: str) -> None:
    """Takes a picture and its line out of an image folder."""
    (data / name).unlink()
    table = data / "metadata.jsonl"
    rows = [r for r in table.read_text().splitlines() if json.loads(r)["file_name"] != name]
    table.write_text("\n".join(rows) + "\n")


# -- index ------------------------------------------------------------------------------------


def test_index_builds_says_sizes_and_resumes(mine: Run, capsys: pytest.CaptureFixture) -> None:
    lost = sorted(mine.path.glob("columns/factors/*"))[1]
    was = lost.read_bytes()
    lost.unlink()
    refused(capsys, mine.attribute(mine.path / "asked"), "run the same `unsee index` again")
    assert main(["info", str(mine.path)]) == 0
    assert "factors: 2 of 3 shards" in capsys.readouterr().out
    assert main(mine.index) == 0
    said = capsys.readouterr().out
    assert "12 examples, 0 deleted" in said and "4 draws, 1 views, stored as int8" in said
    for column in COLUMNS:
        size = sum(f.stat().st_size for f in mine.path.glob(f"columns/{column}/*"))
        assert f"{column}: 3 of 3 shards, {size / 1e6:.1f} MB, {size / 12e3:.1f} kB" in said
    assert lost.read_bytes() == was
    assert main(["info", str(mine.path)]) == 0
    made_of = f"made of {str(mine.model)!r} and {str(mine.data)!r}\n"
    assert capsys.readouterr().out == said + made_of


def test_a_stopped_build_says_that_it_is_not_finished(
    built: Run, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("unsee.index.build._columns", stop)
    run = Run(built.model, built.data, tmp_path / "run")
    assert main(run.index) == 130
    assert "run the same command again" in capsys.readouterr().err
    refused(capsys, run.attribute(tmp_path / "out"), "again to finish it")
    monkeypatch.undo()
    assert main(run.index) == 0
    assert run.attribute(tmp_path / "out") == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--draws", "6"], "draws.n is 4 there, but 6 is asked for"),
        (["--storage", "float16"], 'storage is "int8" there, but "float16" is asked for'),
        (["--flips"], "views is 1 there, but 2 is asked for"),
        (["--method-seed", "1"], "draws.seed is 0 there, but 1 is asked for"),
        (["--columns", "factors"], 'columns[1] is "loss" there, but "factors" is asked for'),
        (["--dtype", "float64"], "dtype is"),
        (["--draws", "3"], "use an even number"),
        (["--columns", "gradients"], "no column 'gradients'"),
        (["--parameters", "all"], "--parameters cross-attn-kv"),
    ],
)
def test_other_settings_are_refused_and_named(
    built: Run, capsys: pytest.CaptureFixture, options: list[str], said: str
) -> None:
    before = {p: p.read_bytes() for p in built.path.rglob("*") if p.is_file()}
    refused(capsys, main([*built.index, *options]), said)
    assert before == {p: p.read_bytes() for p in built.path.rglob("*") if p.is_file()}


def test_other_data_is_refused_and_named(mine: Run, capsys: pytest.CaptureFixture) -> None:
    remove_picture(mine.data, "red-circle.png")
    refused(capsys, main(mine.index), "12 examples", "'pictures' (11")


def test_a_place_that_cannot_be_written_is_named(
    built: Run, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    run = Run(built.model, built.data, tmp_path / "file" / "run")
    refused(capsys, main(run.index), "cannot be written", "choose another folder")


def test_bad_pictures_are_left_out_with_a_warning(
    tiny_pipeline_dir: Path, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (image_folder / "red-circle.png").write_bytes(b"no picture")
    run = Run(tiny_pipeline_dir, image_folder, tmp_path / "run")
    refused(capsys, main(run.index), "red-circle.png", "cannot be read")
    shutil.rmtree(run.path)
    assert main([*run.index, "--skip-bad", "--columns", "factors"]) == 0
    assert "11 examples" in capsys.readouterr().out
    assert run.attribute(tmp_path / "out") == 0
    assert "1 examples" in capsys.readouterr().err
    assert len(Scores.load(tmp_path / "out" / "scores.parquet")) == 11


def test_a_shard_of_bad_pictures_alone_is_passed_over(
    tiny_pipeline_dir: Path, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (image_folder / "red-circle.png").write_bytes(b"no picture")
    run = Run(tiny_pipeline_dir, image_folder, tmp_path / "run")
    assert main([*run.index, "--skip-bad", "--shard-size", "1"]) == 0
    assert run.attribute(tmp_path / "out") == 0
    assert len(Scores.load(tmp_path / "out" / "scores.parquet")) == 11
    assert main(["influence", str(run.path), "--device", "cpu"]) == 0


def test_a_folder_of_bad_pictures_alone_is_refused(
    tiny_pipeline_dir: Path, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for file in image_folder.glob("*.png"):
        file.write_bytes(b"no picture")
    run = Run(tiny_pipeline_dir, image_folder, tmp_path / "run")
    refused(capsys, main([*run.index, "--skip-bad"]), "none of the 12 pictures can be read")


# -- attribute --------------------------------------------------------------------------------


def test_attribute_answers_from_a_run(
    built: Run, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # the run finds its model and pictures from anywhere
    assert built.attribute(tmp_path / "out", "--top", "3") == 0
    said = capsys.readouterr().out
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(SCORED)
    scores = Scores.load(tmp_path / "out" / "scores.parquet")
    assert len(scores) == 12 and scores.method == "AbU, first order"
    assert scores.settings["columns"] == ["factors", "outputs"]
    assert scores.errors is not None and (scores.errors > 0).all()
    rows = [line for line in said.splitlines() if "±" in line and "png" in line]
    assert len(rows) == 3
    for row, identifier, value, error in zip(
        rows, scores.ids, scores.values, scores.errors, strict=False
    ):
        assert identifier in row
        assert ("~" in row) == (abs(value) <= 3 * error)  # within three standard errors of zero
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "no unit" in page and "±" in page


def test_a_picture_and_a_box_are_asked_about(built: Run, tmp_path: Path) -> None:
    picture = ["--image", str(built.data / "red-square.png"), "--prompt", "a red square"]
    about = ["attribute", str(built.path), *picture, "--query-draws", "4", "--device", "cpu"]
    found = {}
    for name, options in (("whole", []), ("part", ["--box", "0,0,32,32"])):
        assert main([*about, "--out", str(tmp_path / name), *options]) == 0
        found[name] = Scores.load(tmp_path / name / "scores.parquet")
    assert found["part"].settings["box"] == [0, 0, 32, 32]
    assert found["whole"].settings["box"] is None
    assert found["part"].settings["loss_of_query"] != found["whole"].settings["loss_of_query"]


def test_columns_and_curvature_are_chosen_when_asking(built: Run, tmp_path: Path) -> None:
    options = ["--use-columns", "factors", "--curvature", "identity"]
    assert built.attribute(tmp_path / "out", *options) == 0
    settings = Scores.load(tmp_path / "out" / "scores.parquet").settings
    assert settings["columns"] == ["factors"] and settings["curvature"] == "identity"
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "when the picture is unlearned, to first order" in page


@pytest.fixture(scope="module")
def snapshot(built: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of an earlier step, as a training would have kept them."""
    path = tmp_path_factory.mktemp("training") / "snapshot-000010.safetensors"
    weights = StableDiffusionPipeline.from_pretrained(built.model).unet.state_dict()
    generator = torch.Generator().manual_seed(0)
    noise = {n: 0.1 * torch.randn(w.shape, generator=generator) for n, w in weights.items()}
    save_file({n: w + noise[n] for n, w in weights.items()}, path)
    return path


@pytest.fixture(scope="module")
def earlier(built: Run, snapshot: Path) -> Run:
    """A run of the same pictures and a snapshot of the model."""
    run = Run(built.model, built.data, snapshot.parent / "run")
    assert main([*run.index, "--weights", str(snapshot)]) == 0
    return run


def test_runs_of_snapshots_answer_together(
    built: Run, earlier: Run, snapshot: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert read_source(earlier.path).weights == str(snapshot)
    query = ["--image", str(built.data / "red-square.png"), "--prompt", "a red square"]
    about = [*query, "--query-draws", "4", "--device", "cpu", "--out"]
    found = {}
    for name, runs in (
        ("first", [str(built.path)]), ("second", [str(earlier.path)]),
        ("both", [str(built.path), "--also", str(earlier.path)]),
    ):  # fmt: skip
        assert main(["attribute", *runs, *about, str(tmp_path / name)]) == 0
        found[name] = Scores.load(tmp_path / name / "scores.parquet")
    parts = [found["first"], found["second"]]
    assert parts[0].ids != parts[1].ids  # another order: it is another model
    expected = combine(parts, "scaled")
    both = found["both"]
    assert both.method == "AbU, first order" and len(both.settings["parts"]) == 2
    place = [both.ids.index(i) for i in expected.ids]
    # stored scores are float32
    np.testing.assert_allclose(both.values[place], expected.values, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(both.errors[place], expected.errors, rtol=1e-5)
    page = (tmp_path / "both" / "report.html").read_text(encoding="utf-8")
    assert "the mean of 2 scores, each divided by its spread" in page and "±" in page


def test_a_run_of_a_snapshot_says_so(
    built: Run, earlier: Run, snapshot: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["info", str(earlier.path)]) == 0
    assert f"made of {str(built.model)!r} at {str(snapshot)!r} and" in capsys.readouterr().out
    mine = shutil.copytree(earlier.path, tmp_path / "run")
    more = ["index", str(built.model), str(built.data), "--out", str(mine), "--device", "cpu"]
    erased = ["--delete", "red-square.png"]
    refused(capsys, main([*more, *erased]), f"was built with --weights {snapshot}")
    assert main([*more, *erased, "--weights", str(snapshot)]) == 0
    moved = snapshot.rename(snapshot.with_suffix(".moved"))
    try:
        refused(capsys, main(["attribute", str(mine), *QUERY]), str(snapshot), "no such file")
    finally:
        moved.rename(snapshot)
    shutil.copytree(built.model, tmp_path / "model")
    found = examine_loss(tmp_path / "model", built.data, snapshot, capsys)
    assert "was recorded" in found[0] and "was recorded" not in found[1]


def examine_loss(model: Path, data: Path, snapshot: Path, capsys) -> list[str]:
    """Returns what the doctor says of the loss of a model with a record, and of its snapshot."""
    (model / "training.json").write_text('{"loss": 0.5}')
    found = []
    for options in ([], ["--weights", str(snapshot)]):
        main(["doctor", str(model), str(data), "--draws", "2", "--device", "cpu", *options])
        said = capsys.readouterr().out.splitlines()
        found.append(next(line for line in said if "loss:" in line))
    return found


def test_what_does_not_go_with_further_runs_is_refused(
    built: Run, earlier: Run, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    def also(*paths: Path) -> list[str]:
        return [word for path in paths for word in ("--also", str(path))]

    def ask(*options: str) -> int:
        return built.attribute(tmp_path / "out", *options)

    def changed(name: str, **settings: object) -> Path:
        path = shutil.copytree(earlier.path, tmp_path / name)
        manifest = read_manifest(path)
        of = dataclasses.replace(manifest, settings={**manifest.settings, **settings})
        write_manifest(path, of)
        return path

    refused(capsys, ask(*also(built.data)), "no run")
    refused(capsys, ask(*also(earlier.path, earlier.path)), "named twice")
    refused(capsys, ask(*also(built.path)), "named twice")
    other = changed("other", encoded_by="another")
    refused(capsys, ask(*also(other)), "other autoencoder, text encoder or dtype")
    columns = changed("columns", columns=["examples", "loss", "factors"])
    refused(capsys, ask(*also(earlier.path, columns)), "other columns", "for instance 'outputs'")
    fewer = shutil.copytree(earlier.path, tmp_path / "fewer")
    deletion = ["index", str(built.model), str(built.data), "--out", str(fewer), "--device", "cpu"]
    weights = ["--weights", read_source(fewer).weights or ""]
    assert main([*deletion, *weights, "--delete", "red-square.png"]) == 0
    refused(capsys, ask(*also(fewer)), "other examples", "for instance 'red-square.png'")
    refused(capsys, ask(*also(earlier.path), "--forward"), "leave --also out")
    similar = [*also(earlier.path), "--method", "similarity"]
    refused(capsys, ask(*similar), "--also does nothing with --method similarity")
    code = main(["attribute", str(built.model), str(built.data), *QUERY, *also(earlier.path)])
    refused(capsys, code, "--also is for a run")
    assert not (tmp_path / "out").exists()


def test_weights_that_do_not_fit_are_refused(
    built: Run, snapshot: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    def refuse(name: str, *said: str) -> None:
        index = [*built.index[:4], str(tmp_path / "run"), *BUILD]
        refused(capsys, main([*index, "--weights", str(tmp_path / name)]), *said)

    weights = load_file(snapshot)
    save_file({}, tmp_path / "empty")
    (tmp_path / "cut").write_bytes(b"short")
    save_file({**weights, "conv_in.weight": torch.zeros(2, 2)}, tmp_path / "shape")
    save_file({**weights, "a.weight": torch.zeros(2, 2)}, tmp_path / "more")
    save_file({n: w for n, w in weights.items() if n != "conv_in.weight"}, tmp_path / "fewer")
    refuse("none", "no such file")
    refuse("cut", "cannot be read")
    refuse("empty", "needs it too")
    refuse("shape", "conv_in.weight is (2, 2), and in the model (")
    refuse("more", "a.weight, and the model has no such weight")
    refuse("fewer", "conv_in.weight, and the model needs it too")
    assert not (tmp_path / "run").exists()


def test_forward_unlearns_and_scores_a_shortlist(built: Run, tmp_path: Path) -> None:
    options = ["--forward", "--shortlist", "4", "--rise", "0.02"]
    assert built.attribute(tmp_path / "first") == 0
    assert built.attribute(tmp_path / "forward", *options) == 0
    first = Scores.load(tmp_path / "first" / "scores.parquet")
    scores = Scores.load(tmp_path / "forward" / "scores.parquet")
    assert scores.method == "AbU, forward"
    assert set(scores.ids) == set(first.ids[:4])
    assert scores.settings["rise"] == pytest.approx(0.02, abs=0.001)
    assert scores.settings["losses_before"] == "stored" and scores.settings["reevaluated"] == 4
    page = (tmp_path / "forward" / "report.html").read_text(encoding="utf-8")
    assert "4 of the 12 training images" in page


def test_without_an_index_the_model_is_asked(
    built: Run, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    options = ["--draws", "2", "--rise", "0.02", "--out", str(tmp_path / "out")]
    assert main(["attribute", str(built.model), str(built.data), *QUERY, *options]) == 0
    scores = Scores.load(tmp_path / "out" / "scores.parquet")
    assert len(scores) == 12 and scores.errors is None
    # What was not given is as it always was.
    assert (scores.settings["damping"], scores.settings["steps"]) == (0.1, 1)
    assert scores.settings["draws"]["n"] == 2 and scores.settings["rise_wanted"] == 0.02
    assert "rank       score  id / caption" in capsys.readouterr().out


def test_scores_within_the_noise_are_marked(
    image_folder: Path, capsys: pytest.CaptureFixture
) -> None:
    data = load_dataset("imagefolder", data_dir=image_folder)
    values = np.array([4.0, 2.9, 1.0])
    errors = Scores(data.ids[:3], values, "AbU, first order", errors=np.ones(3))
    floor = Scores(data.ids[:3], values, "AbU", {"noise_floor": 1.5})
    unknown = Scores(data.ids[:3], values, "similarity")
    said = []
    for scores in (errors, floor, unknown):
        print_top(scores, data, 3)
        said.append(capsys.readouterr().out)
    assert ["~" in line for line in said[0].splitlines()] == [False, False, True, True, True]
    assert "~2.9 ± 1 " in said[0] and "3 standard errors of zero" in said[0]
    assert ["~" in line for line in said[1].splitlines()] == [False, False, False, True, True]
    assert "within 1.5 of zero: it may be rounding" in said[1]
    assert "~" not in said[2]


@pytest.mark.parametrize("name", ["no-such-folder", ""])
def test_attribute_without_data_needs_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture, name: str
) -> None:
    code = main(["attribute", str(tmp_path / name), *ASKED])
    refused(capsys, code, "is no run that `unsee index` made: give DATA")
    refused(capsys, main(["influence", str(tmp_path / name)]), "no run that `unsee index` made")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--step-size", "1"], "--step-size does nothing with a run"),
        (["--steps", "2"], "--steps does nothing with a run"),
        (["--flips"], "--flips does nothing with a run"),
        (["--draws", "10"], "--draws does nothing with a run"),  # also the default, where given
        (["--parameters", "all"], "--parameters does nothing with a run"),
        (["--rise", "0.1"], "--rise needs --forward"),
        (["--shortlist", "10"], "--shortlist needs --forward"),
        (["--use-columns", "loss"], "'loss' is no column of gradients"),
        (["--query-draws", "3"], "3 draws do not make two halves"),
        (["--box", "0,0,99,99"], "box"),
        (
            ["--forward", "--curvature", "identity"],
            "--curvature identity does not go with --forward",
        ),
    ],
)
def test_options_that_a_run_cannot_heed_are_refused(
    built: Run, tmp_path: Path, capsys: pytest.CaptureFixture, options: list[str], said: str
) -> None:
    refused(capsys, built.attribute(tmp_path / "out", *options), said)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options",
    [["--forward"], ["--shortlist", "9"], ["--curvature", "ekfac"], ["--use-columns", "loss"]],
)
def test_options_of_a_run_are_refused_without_one(
    built: Run, capsys: pytest.CaptureFixture, options: list[str]
) -> None:
    code = main(["attribute", str(built.model), str(built.data), *QUERY, *options])
    refused(capsys, code, f"{options[0]} is for a run")


def test_data_with_a_run_and_sampling_with_a_picture_are_refused(
    built: Run, capsys: pytest.CaptureFixture
) -> None:
    refused(capsys, main(["attribute", str(built.path), str(built.data), *QUERY]), "leave", "out")
    picture = ["--image", str(built.data / "red-square.png"), "--prompt", "a", "--guidance", "3"]
    refused(capsys, main(["attribute", str(built.path), *picture]), "--guidance says how")


# -- influence, delete, and a run whose world has changed -------------------------------------


@pytest.mark.parametrize("column", ["factors", "outputs"])
def test_influence_writes_its_files(
    built: Run, tmp_path: Path, capsys: pytest.CaptureFixture, column: str
) -> None:
    out = tmp_path / "out"
    options = ["--column", column, "--top", "2", "--out", str(out), "--device", "cpu"]
    assert main(["influence", str(built.path), *options]) == 0
    assert "rank       score ± error     id / caption" in capsys.readouterr().out
    assert sorted(p.name for p in out.iterdir()) == sorted(set(SCORED) - {"query.png"})
    scores = Scores.load(out / "scores.parquet")
    assert scores.method == "self-influence" and len(scores) == 12
    assert scores.settings["column"] == column
    assert "learnt by heart?" in (out / "report.html").read_text(encoding="utf-8")


def test_influence_takes_one_column(built: Run, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["influence", str(built.path), "--column", "factors", "outputs"])
    assert stopped.value.code == 2
    assert "outputs" in capsys.readouterr().err


def test_delete_erases(mine: Run, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    gone = "red-circle.png"
    remove_picture(mine.data, gone)
    refused(capsys, mine.attribute(tmp_path / "out"), gone, f"--delete {gone}")
    refused(capsys, main([*mine.index, "--delete", "nobody"]), "there is no example 'nobody'")
    assert main([*mine.index, "--delete", gone]) == 0
    said = capsys.readouterr().out
    assert "erased" in said and "11 examples, 1 deleted" in said
    assert mine.attribute(tmp_path / "out") == 0  # fits the curvature again, without it
    scores = Scores.load(tmp_path / "out" / "scores.parquet")
    assert len(scores) == 11 and gone not in scores.ids
    for file in mine.path.rglob("*"):
        if file.is_file() and file.name != "manifest.json":  # which keeps it from coming back
            assert gone.encode() not in file.read_bytes()


def further_pictures(folder: Path) -> Path:
    """Writes two more pictures, whose metadata has another column."""
    folder.mkdir()
    rows = []
    for name, rgb in (("grey", (120, 120, 120)), ("black", (0, 0, 0))):
        Image.new("RGB", (64, 64), rgb).save(folder / f"{name}.png")
        rows.append({"file_name": f"{name}.png", "text": f"all {name}", "author": "nobody"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


def test_append_adds(mine: Run, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    further = further_pictures(tmp_path / "further")
    command = ["index", str(mine.model), str(further), "--out", str(mine.path), "--append",
               "--device", "cpu"]  # fmt: skip
    assert main(command) == 0
    assert "14 examples, 0 deleted" in capsys.readouterr().out
    assert mine.attribute(tmp_path / "out") == 0
    scores = Scores.load(tmp_path / "out" / "scores.parquet")
    assert len(scores) == 14 and {"grey.png", "black.png"} < set(scores.ids)
    assert "all grey" in (tmp_path / "out" / "report.html").read_text()
    # Neither the first command nor this one, given again, forgets them.
    before = (mine.path / "source.json").read_text()
    for again in (mine.index, ["index", str(mine.model), str(further), *mine.index[3:]]):
        assert main(again) == 0
        assert (mine.path / "source.json").read_text() == before
    capsys.readouterr()
    refused(capsys, main(command), "is there already")
    assert mine.attribute(tmp_path / "out") == 0
    assert main([*mine.index, "--delete", "grey.png"]) == 0
    assert mine.attribute(tmp_path / "out") == 0
    assert len(Scores.load(tmp_path / "out" / "scores.parquet")) == 13


@pytest.mark.parametrize(("first", "then"), [("1999", 2000), (3, 0.5), (True, ["a"])])
def test_metadata_of_another_type_are_appended(
    mine: Run, tmp_path: Path, capsys: pytest.CaptureFixture, first: object, then: object
) -> None:
    further = further_pictures(tmp_path / "further")
    for folder, value in ((mine.data, first), (further, then)):
        table = folder / "metadata.jsonl"
        rows = [json.loads(line) | {"year": value} for line in table.read_text().splitlines()]
        table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(mine.index) == 0
    assert main(["index", str(mine.model), str(further), "--out", str(mine.path), "--append",
                 "--device", "cpu"]) == 0  # fmt: skip
    assert mine.attribute(tmp_path / "out") == 0
    assert len(Scores.load(tmp_path / "out" / "scores.parquet")) == 14


def test_a_lost_shard_of_what_was_appended_is_made_again(
    mine: Run, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    further = further_pictures(tmp_path / "further")
    build = ["index", str(mine.model), str(further), *mine.index[3:]]
    assert main([*build, "--append"]) == 0
    lost = sorted(mine.path.glob("columns/outputs/*"))[-1]
    was = lost.read_bytes()
    lost.unlink()
    capsys.readouterr()
    for command in ([*build, "--append"], [*mine.index, "--append"]):
        refused(capsys, main(command), "of further again, without --append")
    assert main(build) == 0
    assert lost.read_bytes() == was
    assert "14 examples, 0 deleted" in capsys.readouterr().out


def test_a_killed_addition_goes_on(
    mine: Run, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch
) -> None:
    further = further_pictures(tmp_path / "further")
    command = ["index", str(mine.model), str(further), "--out", str(mine.path), "--append",
               "--device", "cpu"]  # fmt: skip

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("unsee.index.index.write_table", stop)  # all that comes after the columns
        main(command)
    assert mine.attribute(tmp_path / "out") == 0
    assert len(Scores.load(tmp_path / "out" / "scores.parquet")) == 12
    assert main(command) == 0
    assert mine.attribute(tmp_path / "out") == 0
    assert len(Scores.load(tmp_path / "out" / "scores.parquet")) == 14


@pytest.mark.parametrize("way_out", ["repair", "remove", "erase another", "leave"])
def test_a_failed_addition_blocks_nothing(
    mine: Run, tmp_path: Path, capsys: pytest.CaptureFixture, way_out: str
) -> None:
    further = further_pictures(tmp_path / "further")
    whole = (further / "grey.png").read_bytes()
    (further / "grey.png").write_bytes(b"broken")
    command = ["index", str(mine.model), str(further), "--out", str(mine.path), "--append",
               "--device", "cpu"]  # fmt: skip
    refused(capsys, main(command), "grey.png", "cannot be read", "remove it")
    count = 12
    if way_out == "repair":
        (further / "grey.png").write_bytes(whole)
        assert main(command) == 0
        count = 14
    elif way_out == "remove":
        remove_picture(further, "grey.png")
        assert main(command) == 0
        count = 13
    elif way_out == "erase another":
        assert main([*mine.index, "--delete", "red-circle.png"]) == 0
        shutil.rmtree(further)
        count = 11
    else:
        shutil.rmtree(further)
    assert mine.attribute(tmp_path / "out") == 0
    assert len(Scores.load(tmp_path / "out" / "scores.parquet")) == count
    other = further_pictures(tmp_path / "other")
    if count < 13:
        command[2] = str(other)
        assert main(command) == 0
        assert mine.attribute(tmp_path / "out") == 0
        assert len(Scores.load(tmp_path / "out" / "scores.parquet")) == count + 2
        assert json.loads((mine.path / "source.json").read_text())["further"] == [str(other)]


def test_append_is_refused(mine: Run, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source = json.loads((mine.path / "source.json").read_text())
    again = shutil.copytree(mine.data, tmp_path / "again")
    command = ["index", str(mine.model), str(again), "--append", "--device", "cpu", "--out"]
    refused(capsys, main([*command, str(mine.path)]), "is there already", "ids of their own")
    assert json.loads((mine.path / "source.json").read_text()) == source
    options = ["--encoders", str(save_vision(tmp_path / "vit"))]  # none was indexed
    command[2] = str(further_pictures(tmp_path / "further"))
    refused(capsys, main([*command, str(mine.path), *options]), "encoder 'vit'")
    assert json.loads((mine.path / "source.json").read_text()) == source
    refused(capsys, main([*command, str(tmp_path / "none")]), "is no run that `unsee index` made")
    both = [*command, str(mine.path), "--delete", "red-circle.png"]
    refused(capsys, main(both), "one at a time")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--draws", "32"], "--draws: 32 is asked for, but run"),
        (["--storage", "float32"], "--storage: float32"),
        (["--flips"], "--flips: True"),
        (["--columns", "sketch"], "--columns: ['sketch']"),
        (["--columns", "loss"], "built with ['loss', 'factors', 'outputs']"),
        (["--tolerance", "0.5"], "--tolerance: 0.5"),
        (["--method-seed", "9"], "--method-seed: 9"),
        (["--shard-size", "1"], "--shard-size: 1"),
        (["--timesteps", "0", "0.5"], "--timesteps: [0.0, 0.5]"),
        (["--sketch-length", "9"], "--sketch-length: 9"),
        (["--sketch-parameters", "all"], "--sketch-parameters: all"),
        (["--sketch-measures", "loss"], "--sketch-measures: ['loss']"),
    ],
    ids=str,
)
def test_options_that_an_addition_or_a_deletion_cannot_heed_are_refused(
    built: Run, tmp_path: Path, capsys: pytest.CaptureFixture, options: list[str], said: str
) -> None:
    further = further_pictures(tmp_path / "further")
    before = {p: p.read_bytes() for p in built.path.rglob("*") if p.is_file()}
    append = ["index", str(built.model), str(further), "--out", str(built.path), "--append"]
    refused(capsys, main([*append, *options]), said, "--append does not change that: leave it")
    delete = [*append[:-1], "--delete", "red-circle.png"]
    refused(capsys, main([*delete, *options]), said, "--delete does not change that: leave it")
    for option in (["--encoders", "latent"], ["--skip-bad"]):
        refused(capsys, main([*delete, *option]), f"{option[0]}: ", "--delete does not change")
    assert before == {p: p.read_bytes() for p in built.path.rglob("*") if p.is_file()}


def test_what_the_run_was_built_with_may_be_said_again(mine: Run, tmp_path: Path) -> None:
    columns = ["--columns", "outputs", "factors", "examples", "loss"]
    again = [*mine.index[3:], *columns, "--storage", "int8", "--tolerance", "0.0003"]
    further = further_pictures(tmp_path / "further")
    assert main(["index", str(mine.model), str(further), *again, "--append"]) == 0
    assert main([*mine.index[:3], *again, "--delete", "grey.png"]) == 0


def test_bad_pictures_of_an_addition_are_left_out_for_good(
    mine: Run, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    further = further_pictures(tmp_path / "further")
    (further / "grey.png").write_bytes(b"broken")
    with (further / "metadata.jsonl").open("a") as file:
        file.write(json.dumps({"file_name": "gone.png", "text": "all gone"}) + "\n")
    command = ["index", str(mine.model), str(further), *mine.index[3:]]
    refused(capsys, main([*command, "--append"]), "gone.png: no such file")
    assert main([*command, "--append", "--skip-bad"]) == 0
    assert "13 examples, 0 deleted" in capsys.readouterr().out
    assert mine.attribute(tmp_path / "out") == 0
    assert "black.png" in Scores.load(tmp_path / "out" / "scores.parquet").ids
    # A shard of it is made again, with the same option; the first data set has none.
    lost = sorted(mine.path.glob("columns/examples/*"))[-1]
    was = lost.read_bytes()
    lost.unlink()
    refused(capsys, main([*mine.index, "--skip-bad"]), 'on_error is "raise" there')
    assert main([*command, "--skip-bad"]) == 0
    assert lost.read_bytes() == was
    assert mine.attribute(tmp_path / "out") == 0


def test_what_ships_keeps_its_name_beside_a_folder_called_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("demo", "twemoji", "twemoji-skin-tones", "mine"):
        (tmp_path / name).mkdir()
    source = Source("demo", "twemoji", further=("twemoji-skin-tones",))
    assert source.absolute() == source
    found = Source("mine", "mine", further=("mine", "elsewhere")).absolute()
    own = str(tmp_path / "mine")
    assert found == Source(own, own, further=(own, "elsewhere"))


def test_a_refused_build_leaves_the_folder_as_it_was(
    built: Run, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for options, said in ((["--draws", "3"], "even number"), (["--columns", "x"], "no column")):
        run = Run(built.model, built.data, tmp_path / "run")
        refused(capsys, main([*run.index, *options]), said)
        assert not run.path.exists()
        run.path.mkdir()
        (run.path / "source.json").write_text("precious")
        refused(capsys, main([*run.index, *options]), said)
        assert [p.name for p in run.path.iterdir()] == ["source.json"]
        assert (run.path / "source.json").read_text() == "precious"
        shutil.rmtree(run.path)


def test_pictures_that_were_added_are_named(
    mine: Run, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    shutil.copy(mine.data / "red-circle.png", mine.data / "new.png")
    with (mine.data / "metadata.jsonl").open("a") as file:
        file.write(json.dumps({"file_name": "new.png", "text": "a dog"}) + "\n")
    assert mine.attribute(tmp_path / "out") == 0
    assert "1 examples" in (warning := capsys.readouterr().err) and "'new.png'" in warning
    assert len(Scores.load(tmp_path / "out" / "scores.parquet")) == 12


def test_a_model_that_has_changed_is_refused(
    mine: Run, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(mine.model)
    with torch.no_grad():
        next(pipeline.unet.parameters()).add_(1)
    pipeline.save_pretrained(mine.model)
    said = ["is no longer the model that was indexed", "model'"]
    refused(capsys, mine.attribute(tmp_path / "out"), *said)
    refused(capsys, main(["influence", str(mine.path), "--device", "cpu"]), *said)


@pytest.mark.parametrize("what", ["model", "data"])
def test_what_is_gone_is_named(
    mine: Run, tmp_path: Path, capsys: pytest.CaptureFixture, what: str
) -> None:
    folder = getattr(mine, what)
    shutil.rmtree(folder)
    refused(capsys, mine.attribute(tmp_path / "out"), str(folder), "no such folder")


def test_a_damaged_record_is_named(
    mine: Run, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (mine.path / "source.json").write_text("{")
    refused(capsys, mine.attribute(tmp_path / "out"), "source.json is damaged")
    assert main(mine.index) == 0  # as the message says
    assert mine.attribute(tmp_path / "out") == 0
    (mine.path / "source.json").unlink()
    refused(capsys, mine.attribute(tmp_path / "out"), "was not made by `unsee index`")
    assert main(mine.index) == 0


def test_features_are_columns_too(tiny_pipeline_dir, image_folder, tmp_path, capsys) -> None:
    encoder = save_vision(tmp_path / "vit")
    index = ["index", str(tiny_pipeline_dir), str(image_folder), "--out", str(tmp_path / "run"),
             *BUILD, "--columns", "features", "--encoders"]  # fmt: skip
    assert main([*index, "latent", "nothing"]) == 2
    assert "no encoder 'nothing'; there are latent, text, pixel, and" in capsys.readouterr().err
    assert main([*index, "latent", "text", str(encoder)]) == 0
    said = capsys.readouterr().out
    assert ", encoder latent, encoder text, encoder vit\n" in said
    assert "features: 3 of 3 shards" in said
    assert main([*index, "latent"]) == 2
    assert 'encoders.text is "of unsee" there, but null is asked for' in capsys.readouterr().err
    assert main([*index[:-3], "--encoders", "latent"]) == 2
    assert "encoders are for the column `features`" in capsys.readouterr().err


# -- other methods ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(built: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with a sketch of output and loss, and what two encoders see."""
    run = Run(built.model, built.data, tmp_path_factory.mktemp("whole") / "run")
    options = ["--columns", "sketch", "features", "--sketch-length", "128", "--sketch-measures",
               "output_norm", "loss", "--encoders", "latent", "text"]  # fmt: skip
    assert main([*run.index, *options]) == 0
    return run


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (["--method", "d-trak"], "D-TRAK"),
        (["--method", "trak", "--ridge", "1", "--method-seed", "3"], "TRAK"),
        (["--method", "d-trak", "--box", "0,0,8,16"], "D-TRAK"),
    ],
)
def test_trak_answers_from_a_run(whole: Run, tmp_path: Path, options, name: str) -> None:
    assert whole.attribute(tmp_path, *options) == 0
    found = Scores.load(tmp_path / "scores.parquet")
    assert found.method == name and found.errors is not None
    assert len(found) == 12 and len(set(found.values)) == 12
    assert found.settings["length"] == 128
    assert found.settings["ridge"] == (1.0 if name == "TRAK" else 0.1)
    assert len(list((whole.path / "curvature").glob("sketch-*-kernel-*"))) == 2  # by `unsee index`


@pytest.mark.parametrize("encoder", ["latent", "text"])
def test_similarity_answers_from_a_run(whole: Run, tmp_path: Path, encoder: str) -> None:
    about = ["attribute", str(whole.path), *ASKED, "--device", "cpu", "--out", str(tmp_path)]
    options = [] if encoder == "latent" else ["--encoder", encoder]
    assert main([*about, "--method", "similarity", *options]) == 0
    found = Scores.load(tmp_path / "scores.parquet")
    assert found.method == f"similarity, {encoder}" and np.abs(found.values).max() <= 1 + 1e-5


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--method", "d-trak", "--forward"], "--forward does nothing with --method d-trak"),
        (["--method", "trak", "--damping", "1"], "--damping does nothing with --method trak"),
        (["--ridge", "1"], "--ridge does nothing with --method abu"),
        (["--method", "similarity", "--ridge", "1"], "--ridge does nothing with --method simil"),
        (["--method", "similarity"], "--query-draws does nothing with --method similarity"),
        (["--method", "d-trak", "--ridge", "0"], "ridge = 0.0 must be at least 0.0001"),
        ([], "the index has no column of gradients"),
    ],
)
def test_what_another_method_cannot_heed_is_refused(
    whole: Run, tmp_path: Path, capsys: pytest.CaptureFixture, options: list[str], said: str
) -> None:
    refused(capsys, whole.attribute(tmp_path / "out", *options), said)
    assert not (tmp_path / "out").exists()


def test_a_sketch_is_for_its_column(
    mine: Run, built: Run, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    refused(capsys, main([*mine.index, "--sketch-length", "64"]), "add it to the columns")
    refused(
        capsys, built.attribute(tmp_path / "o", "--method", "trak"), "it has no column 'sketch'"
    )


def test_probes_make_the_step_count(built: Run, tmp_path: Path, capsys) -> None:
    run = Run(built.model, built.data, tmp_path / "run")
    assert main([*run.index, "--columns", "factors", "probes"]) == 0
    found = {}
    for rise in ("0.01", "0.3"):
        assert run.attribute(tmp_path / rise, "--rise", rise) == 0
        found[rise] = Scores.load(tmp_path / rise / "scores.parquet")
        assert found[rise].method == "AbU, second order"
    assert not np.allclose(found["0.3"].values, 30 * found["0.01"].values)
    code = run.attribute(tmp_path / "out", "--use-columns", "factors", "--rise", "0.1")
    refused(capsys, code, "--rise needs --forward or the column `probes`")
    assert run.attribute(tmp_path / "out", "--use-columns", "factors") == 0
