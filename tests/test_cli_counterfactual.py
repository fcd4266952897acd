"""`unsee evaluate counterfactual`: whole, with a training script that takes no time."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from unsee import load_dataset
from unsee.cli import main
from unsee.cli_evaluate import recorded_command
from unsee.evaluation.counterfactual import read_queries, read_rankings
from unsee.evaluation.leave_out import plan_removals
from unsee.evaluation.retrain import without
from unsee.methods.base import Scores

SCRIPT = """
import json, pathlib, shutil, sys
from safetensors.numpy import load_file, save_file

source, data, out = map(pathlib.Path, sys.argv[1:4])
rows = [json.loads(line) for line in (data / "metadata.jsonl").read_text().splitlines()]
assert all((data / row["file_name"]).is_file() for row in rows)
print("training on", len(rows), flush=True)
kept = {row["id"] for row in rows}
if "blue-circle.png" not in kept and len(sys.argv) > 4:
    sys.exit(sys.argv[4])
shutil.copytree(source, out, dirs_exist_ok=True)
(out / "seen.json").write_text(json.dumps(sorted(kept)))
weights = out / "unet" / "diffusion_pytorch_model.safetensors"
# The more red is gone, the further the model is away.
factor = 1 + 0.1 * (3 - sum("red" in i for i in kept))
save_file({k: v * factor for k, v in load_file(weights).items()}, weights)
"""


@pytest.fixture
def case(tmp_path: Path, image_folder: Path, tiny_pipeline_dir: Path) -> dict[str, str]:
    """Two queries; `good` names the red pictures for both, `bad` the green ones."""
    data = load_dataset("imagefolder", data_dir=image_folder)
    lines = [{"id": q, "prompt": f"a {q} circle", "seed": seed, "steps": 2, "guidance_scale": 2}
             for seed, q in enumerate(("red", "small"))]  # fmt: skip
    queries = tmp_path / "queries.jsonl"
    queries.write_text("\n".join(json.dumps(line) for line in lines))
    rng = np.random.default_rng(0)
    for name, colour in (("good", "red"), ("bad", "green")):
        for line in lines:
            values = rng.random(12) + [10.0 * (colour in i) for i in data.ids]
            path = tmp_path / name / f"{line['id']}.parquet"
            Scores(data.ids, values, name).save(path)
    (tmp_path / "train.py").write_text(SCRIPT)
    command = [sys.executable, str(tmp_path / "train.py"), str(tiny_pipeline_dir)]
    return {"model": str(tiny_pipeline_dir), "data": str(image_folder), "queries": str(queries),
            "good": str(tmp_path / "good"), "bad": str(tmp_path / "bad"),
            "command": shlex.join(command) + " {data} {out}",
            "out": str(tmp_path / "out")}  # fmt: skip


def run(case: dict[str, str], *options: str, scores: tuple[str, ...] = ("good", "bad")) -> int:
    return main([
        "evaluate", "counterfactual", case["model"], case["data"], *(case[s] for s in scores),
        "--queries", case["queries"], "--k", "3", "--train-command", case["command"],
        "--out", case["out"], "--random", "2", "--draws", "2", "--device", "cpu", *options,
    ])  # fmt: skip


def test_trains_without_the_top_k_and_compares(case, capsys) -> None:
    assert run(case) == 0
    captured = capsys.readouterr()
    table = [line.split(" | ") for line in captured.out.splitlines() if line.startswith("| 3 |")]
    assert [row[1:4] for row in table[:3]] == [
        ["loss", "random", "2"], ["loss", "good", "2"], ["loss", "bad", "2"],
    ]  # fmt: skip
    # Green pictures are nothing to this training.
    assert table[2][4] == "+0.0000 [+0.0000, +0.0000]"
    assert float(table[1][4].split()[0]) != 0
    out = Path(case["out"]) / "k3"
    names = {
        "random-1",
        "random-2",
        *(f"{m}--{q}" for m in ("good", "bad") for q in ("red", "small")),
    }
    assert {p.parent.name for p in out.glob("*/finished.json")} == names

    ids = load_dataset("imagefolder", data_dir=case["data"]).ids
    rankings = read_rankings([Path(case["good"]), Path(case["bad"])], ["red", "small"])
    for removal in plan_removals(rankings, ids, 3, random=2):
        folder = out / removal.name
        seen = json.loads((folder / "model" / "seen.json").read_text())
        assert seen == sorted(without(ids, removal.ids))
        assert not (folder / "data").exists()
    rows = pq.read_table(out / "outcomes.parquet").to_pylist()
    assert len(rows) == 2 + 2 * 2 + 4
    assert [r["mse"] for r in rows[:2]] == [0, 0]
    good = [r for r in rows if r["method"] == "good"]
    assert all(r["query"] == r["removed_for"] and r["mse"] > 0 for r in good)


def test_a_second_run_trains_nothing_and_says_the_same(case, capsys) -> None:
    assert run(case, scores=("good",)) == 0
    first = capsys.readouterr().out
    stamps = {p: p.stat().st_mtime_ns for p in Path(case["out"]).rglob("seen.json")}
    assert run(case, scores=("good",)) == 0
    captured = capsys.readouterr()
    assert captured.out == first
    assert "retrain:" not in captured.err
    assert stamps == {p: p.stat().st_mtime_ns for p in Path(case["out"]).rglob("seen.json")}
    # Other draws are another measurement of the same models.
    assert run(case, "--draws", "3", scores=("good",)) == 0
    captured = capsys.readouterr()
    assert captured.out != first and "retrain:" not in captured.err


def test_one_query_has_no_intervals(case, capsys) -> None:
    path = Path(case["queries"])
    path.write_text(path.read_text().splitlines()[0])
    assert run(case, scores=("good",)) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| 3 |")]
    assert len(rows) == 8 and not any("[" in row for row in rows)


def test_failed_runs_show_their_last_lines_and_the_others_count(case, capsys) -> None:
    path = Path(case["good"]) / "small.parquet"
    scores = Scores.load(path)
    Scores(scores.ids, np.array([i == "blue-circle.png" for i in scores.ids]) + 0.0, "good").save(
        path
    )
    ids = load_dataset("imagefolder", data_dir=case["data"]).ids
    chance = plan_removals({}, ids, 3, random=2, seed=4)
    assert not any("blue-circle.png" in removal.ids for removal in chance)
    case["command"] += " 'out of memory'"
    assert run(case, "--seed", "4", scores=("good",)) == 1
    captured = capsys.readouterr()
    assert "| 3 | loss | good | 1 |" in captured.out
    *_, line, seen, last = captured.err.splitlines()
    assert line == "unsee: run 'good--small' failed: exit code 1"
    assert (seen, last) == ("  training on 9", "  out of memory")


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("pass", "wrote nothing in"),
        ("open(sys.argv[2] + '/model.txt', 'w')", "wrote no model that can be used: model"),
    ],
)
def test_a_command_that_writes_no_model(code, message, case, capsys) -> None:
    case["command"] = shlex.join([sys.executable, "-c", f"import sys; {code}"]) + " {data} {out}"
    assert run(case, scores=("good",)) == 1
    captured = capsys.readouterr()
    assert captured.err.count(f"unsee: run 'good--red' failed: {message}") == 1
    assert not list(Path(case["out"]).rglob("finished.json"))
    assert run(case, scores=("good",)) == 1  # a corrected command may try again


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--k": "12"}, "K = 12 is 12 of 12 examples; it must be from 1 to 11"),
        ({"--k": "few"}, "K = 'few' is neither a number such as 34 nor a share such as 2%"),
        ({"--train-command": "train {data"}, "holds {data} or {ids}"),
        ({"--train-command": "train {data}"}, "holds {out}"),
        ({"--train-command": "train 'it"}, "No closing quotation"),
        ({"--train-command": "/no/such/thing {ids} {out}"}, "cannot be started"),
        ({"--queries": "none.jsonl"}, "queries 'none.jsonl': no such file"),
        ({"--level": "95"}, "level = 95.0 must be between 0 and 1"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(changes, message, case, capsys) -> None:
    options = [part for option in changes.items() for part in option]
    assert run(case, *options, scores=("good",)) == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith("unsee: ") and message in last


def test_lora_weights_have_no_command_of_their_own(case, tmp_path, capsys) -> None:
    about = [case["model"], case["data"], case["good"], "--queries", case["queries"], "--k", "3"]
    assert main(["evaluate", "counterfactual", *about, "--lora", str(tmp_path)]) == 2
    assert "give --train-command" in capsys.readouterr().err


def test_bad_scores(case, tmp_path, capsys) -> None:
    path = Path(case["good"]) / "red.parquet"
    scores = Scores.load(path)

    def message() -> str:
        assert run(case, scores=("good",)) == 2
        return capsys.readouterr().err.splitlines()[-1]

    Scores(scores.ids, np.zeros(12), "good").save(path)
    assert "good/red.parquet': all are equal, so there is no top K" in message()
    Scores(scores.ids[:2], scores.values[:2], "good").save(path)
    assert "K = 3, but 'good' ranks 2 examples for 'red'" in message()
    Scores([*scores.ids[:-1], "x"], -scores.values, "good").save(path)
    assert "'x', ranked by 'good' for 'red', is not among the 12 examples" in message()
    path.unlink()
    assert "neither red.parquet nor red/scores.parquet is there" in message()
    scores.save(Path(case["good"]) / "red" / "scores.parquet")
    assert read_rankings([Path(case["good"])], ["red"])["good"]["red"][0].startswith("red")
    assert run(case, scores=("good", "good")) == 2
    assert "a second 'good'; rename the folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "there is none"),
        ('{"id": "a", "prompt": "a cat"}', 'line 1: not like {"id": "cat"'),
        ('{"id": "a", "prompt": "a cat", "seed": 1, "size": 3}', "line 1: not like"),
        ('\n["a"]', "line 2: not like"),
        ('{"id": "a", "prompt": "a cat", "seed": "1"}', "line 1: seed is '1'"),
        ('{"id": "a", "prompt": "a cat", "seed": true}', "line 1: seed is True"),
        ('{"id": "a", "prompt": "x", "seed": 1, "steps": -3}', "line 1: steps = -3 must be"),
        ('{"id": "a", "prompt": "x", "seed": 1, "guidance_scale": "7"}', "guidance_scale is '7'"),
        ('{"id": "a", "prompt": "x", "seed": 1}\n' * 2, "line 2: id 'a' appears twice"),
    ],
)
def test_queries_that_are_none(text, message, tmp_path) -> None:
    path = tmp_path / "queries.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError) as error:
        read_queries(path)
    assert message in str(error.value)


@pytest.mark.slow
def test_lora_weights_are_loaded_on_the_model(case, tmp_path, capsys) -> None:
    pytest.importorskip("peft")
    queries = Path(case["queries"])
    queries.write_text(queries.read_text().splitlines()[0])
    options = ["--steps", "2", "--rank", "2", "--device", "cpu", "--threads", "1"]
    train = ["train", "lora", case["model"]]
    assert main([*train, case["data"], str(tmp_path / "lora"), *options]) == 0
    case["command"] = shlex.join(
        [sys.executable, "-m", "unsee.cli", *train, "{data}", "{out}", *options]
    )
    assert run(case, "--lora", str(tmp_path / "lora"), "--random", "1", scores=("good",)) == 0
    assert "| 3 | loss | good | 1 |" in capsys.readouterr().out
    rows = pq.read_table(Path(case["out"]) / "k3" / "outcomes.parquet").to_pylist()
    assert len({r["loss"] for r in rows}) == 3  # other weights, other losses


RECORD = {
    "threads": 2,
    "data": {"fingerprint": "abc"},
    "recipe": {"channels": [8, 16], "layers_per_block": 1, "heads": 2, "snr_gamma": None,
               "prediction_type": "epsilon", "beta_schedule": "linear"},
    "optimization": {"steps": 5, "batch_size": 2, "learning_rate": 0.001, "warmup": 200,
                     "final_fraction": 0.02, "weight_decay": 0.0001, "clip_norm": 1.0,
                     "ema_decay": 0.999, "seed": 3, "checkpoint_seconds": 240.0},
    "caption_dropout": 0.2, "text_encoder": "minilm", "max_tokens": 20, "left_out": 0,
}  # fmt: skip


def test_the_recorded_training_is_the_default_command(tmp_path, monkeypatch) -> None:
    from unsee import cli_train

    (tmp_path / "training.json").write_text(json.dumps(RECORD))
    command = recorded_command(tmp_path, "abc")
    assert command[:3] == [sys.executable, "-m", "unsee.cli"]
    seen = {}
    monkeypatch.setattr(cli_train, "_train_text_to_image", lambda args: seen.update(vars(args)))
    assert main(command[3:]) == 0
    assert seen["data"] == "{data}" and seen["out"] == Path("{out}")
    assert seen["autoencoder"] == (tmp_path / "vae").resolve()
    assert seen["channels"] == (8, 16)
    for name, value in (*RECORD["recipe"].items(), *RECORD["optimization"].items(),
                        *RECORD.items()):  # fmt: skip
        if name in seen and name not in ("channels", "data"):
            assert seen[name] == value, name


def test_the_demo_model_can_be_trained_again(monkeypatch) -> None:
    from unsee.demo import write_demo_model

    data = load_dataset("twemoji")
    command = recorded_command(write_demo_model(), data.fingerprint)
    assert command[command.index("--steps") + 1] == "15000"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": {"fingerprint": "other"}}, "is of other data (fingerprint other, here abc)"),
        ({"recipe": None}, "is not of a text-to-image training on all data"),
        ({"left_out": 4}, "is not of a text-to-image training on all data"),
        ({"optimization": {**RECORD["optimization"], "warmup": 1}}, "has no options for"),
    ],
)
def test_records_that_are_no_command(change, message, tmp_path) -> None:
    (tmp_path / "training.json").write_text(json.dumps({**RECORD, **change}))
    with pytest.raises(ValueError) as error:
        recorded_command(tmp_path, "abc")
    assert message in str(error.value)
    with pytest.raises(ValueError, match=r"has no training\.json.* give --train-command"):
        recorded_command(tmp_path / "none", "abc")
    for text in ("{", "[]", "{}"):
        (tmp_path / "training.json").write_text(text)
        with pytest.raises(ValueError, match=r"training.json is damaged, .*give --train-command"):
            recorded_command(tmp_path, "abc")
