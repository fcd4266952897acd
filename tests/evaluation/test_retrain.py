import json
import os
import signal
import subprocess
import sys
import time

import pytest

from unsee.data.dataset import ImageDataset, load_dataset
from unsee.evaluation.retrain import retrain, without, without_top

IDS = ["a", "b", "c", "d é"]

COPY = "import sys, shutil, os; shutil.copy(sys.argv[1], os.path.join(sys.argv[2], 'model'))"
"""A training that learns its ids by heart."""


def command(code):
    return [sys.executable, "-c", code, "{ids}", "{out}"]


def test_trains_on_the_ids_that_are_kept(tmp_path):
    runs = {"one": ["a", "d é"], "two": ["c", "b"]}
    results = retrain(command(COPY), runs, IDS, tmp_path)
    assert [r.name for r in results] == ["one", "two"]
    assert [r.error for r in results] == [None, None]
    for result in results:
        learned = (result.model / "model").read_text(encoding="utf-8")
        assert learned.splitlines() == runs[result.name]


def test_placeholders_inside_arguments_and_other_braces(tmp_path):
    code = "import sys, pathlib; pathlib.Path(sys.argv[1][6:], 'm').write_text(sys.argv[2])"
    arguments = [sys.executable, "-c", code, "--out={out}", "{x}{ids}{{}}"]
    (result,) = retrain(arguments, {"one": ["a"]}, IDS, tmp_path)
    assert (result.model / "m").read_text() == f"{{x}}{tmp_path / 'one' / 'ids.txt'}{{{{}}}}"


def test_no_shell_sees_the_command(tmp_path):
    arguments = [*command(COPY), "$(touch hacked); `touch hacked` | * > hacked"]
    code = f"import sys; assert sys.argv[3] == {arguments[-1]!r}; {COPY}"
    arguments[2] = code
    (result,) = retrain(arguments, {"one": ["a"]}, IDS, tmp_path)
    assert result.error is None


def test_a_failure_shows_its_last_lines_and_others_go_on(tmp_path, caplog):
    fails = (
        "import sys\n"
        "if 'b' in open(sys.argv[1]).read().split():\n"
        "    print(*range(100), sep='\\n', flush=True)\n"
        "    sys.exit('out of memory')\n" + COPY
    )
    results = retrain(command(fails), {"bad": ["a", "b"], "good": ["a"]}, IDS, tmp_path)
    assert [r.error is None for r in results] == [False, True]
    assert results[0].error.startswith("run 'bad' failed: exit code 1\n")
    lines = [line.strip() for line in results[0].error.splitlines()[1:]]
    assert lines == [str(i) for i in range(81, 100)] + ["out of memory"]
    assert "out of memory" in caplog.text
    assert "\n0\n1\n" in f"\n{(tmp_path / 'bad' / 'log.txt').read_text()}"


def test_a_command_that_writes_no_model_has_failed(tmp_path):
    (result,) = retrain(command("print('all is well')"), {"one": ["a"]}, IDS, tmp_path)
    assert "wrote nothing in" in result.error
    assert result.error.endswith("\n  all is well")
    (result,) = retrain(command("pass"), {"one": ["a"]}, IDS, tmp_path)
    assert result.error.endswith("\n  (no output)")


def test_a_command_that_removes_its_folder_has_failed(tmp_path):
    code = "import sys, os; os.rmdir(sys.argv[2])"
    (result,) = retrain(command(code), {"one": ["a"]}, IDS, tmp_path)
    assert "wrote nothing in" in result.error


def test_a_command_that_is_killed_names_the_signal(tmp_path):
    code = "import os; os.kill(os.getpid(), 9)"
    (result,) = retrain(command(code), {"one": ["a"]}, IDS, tmp_path)
    assert result.error.startswith("run 'one' failed: killed by signal 9")


def test_output_that_is_no_text_and_a_progress_bar(tmp_path):
    code = "import sys; sys.stdout.buffer.write(b'1%\\r2%\\r\\xff\\n'); sys.exit(3)"
    (result,) = retrain(command(code), {"one": ["a"]}, IDS, tmp_path)
    assert result.error == "run 'one' failed: exit code 3\n  1%\n  2%\n  \N{REPLACEMENT CHARACTER}"


COUNT = (
    "import sys, pathlib\n"
    "p = pathlib.Path(sys.argv[2], 'count')\n"
    "p.write_text(str(int(p.read_text()) + 1 if p.exists() else 1))\n"
)
"""Counts how often it was run on the same folder."""


def test_finished_runs_are_not_repeated(tmp_path):
    first = retrain(command(COUNT), {"one": ["a"]}, IDS, tmp_path)
    again = retrain(command(COUNT), {"one": ["a"], "two": ["b"]}, IDS, tmp_path)
    assert again[0] == first[0]
    assert [(r.model / "count").read_text() for r in again] == ["1", "1"]
    about = json.loads((tmp_path / "one" / "finished.json").read_text())
    assert about["examples"] == 1
    assert about["command"] == command(COUNT)


def test_failed_runs_are_repeated_where_they_stopped(tmp_path):
    fails_once = COUNT + "sys.exit(p.read_text() == '1')"
    (first,) = retrain(command(fails_once), {"one": ["a"]}, IDS, tmp_path)
    (second,) = retrain(command(fails_once), {"one": ["a"]}, IDS, tmp_path)
    assert first.error is not None
    assert second.error is None
    assert (second.model / "count").read_text() == "2"


def test_a_failed_command_may_be_corrected(tmp_path):
    retrain(command("1 / 0"), {"one": ["a"]}, IDS, tmp_path)
    (result,) = retrain(command(COPY), {"one": ["a"]}, IDS, tmp_path)
    assert result.error is None


def test_a_killed_run_is_not_finished(tmp_path):
    """Killed while the command, which has written its model already, still runs."""
    waits = COUNT + "import time\nif p.read_text() == '1':\n    time.sleep(60)"
    script = (
        "from pathlib import Path\nfrom unsee.evaluation.retrain import retrain\n"
        f"retrain({command(waits)!r}, {{'one': ['a']}}, ['a'], Path({str(tmp_path)!r}))"
    )
    process = subprocess.Popen([sys.executable, "-c", script], start_new_session=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "one" / "model" / "count").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "one" / "finished.json").exists()
    (result,) = retrain(command(waits), {"one": ["a"]}, ["a"], tmp_path)
    assert result.error is None
    assert (result.model / "count").read_text() == "2"


def test_a_folder_of_another_run_is_refused(tmp_path):
    retrain(command(COPY), {"one": ["a"]}, IDS, tmp_path)
    with pytest.raises(ValueError, match="holds a run on other ids"):
        retrain(command(COPY), {"one": ["a", "b"]}, IDS, tmp_path)
    with pytest.raises(ValueError, match="was finished by the command"):
        retrain(command(COUNT), {"one": ["a"]}, IDS, tmp_path)


@pytest.mark.parametrize(
    ("arguments", "runs", "message"),
    [
        (["train", "{ids}"], {"one": ["a"]}, r"no argument of the command .* holds \{out\}"),
        (["train", "{out}"], {"one": ["a"]}, r"no argument of the command .* holds \{ids\}"),
        ("train {ids} {out}", {"one": ["a"]}, "is one string, not a list"),
        (command("pass"), {"one": ["a", "x"]}, "run 'one': 'x' is not among the 4 examples"),
        (command("pass"), {"one": ["a", "b", "a"]}, "run 'one': 'a' is given twice"),
        (command("pass"), {"one": []}, "run 'one' is to be trained on no examples"),
        (command("pass"), {"../one": ["a"]}, "'../one' cannot be the name of a folder"),
        (["/no/such/program", "{ids}", "{out}"], {"one": ["a"]}, "cannot be started"),
    ],
)
def test_refuses(arguments, runs, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        retrain(arguments, runs, IDS, tmp_path)


def test_all_runs_are_checked_before_the_first_is_trained(tmp_path):
    with pytest.raises(ValueError, match="run 'bad'"):
        retrain(command(COPY), {"good": ["a"], "bad": ["x"]}, IDS, tmp_path)
    assert not (tmp_path / "good").exists()


def test_an_id_of_two_lines_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"'a\\nb' is not one line of text"):
        retrain(command(COPY), {"one": ["a\nb"]}, ["a\nb"], tmp_path)


def test_without():
    assert without(IDS, ["c", "a"]) == ["b", "d é"]
    assert without_top(["c", "a", "b"], IDS, 1) == ["a", "b", "d é"]
    with pytest.raises(ValueError, match="removed: 'x' is not among the 4"):
        without(IDS, ["x"])
    with pytest.raises(ValueError, match="'a' is given twice"):
        without(IDS, ["a", "a"])
    with pytest.raises(ValueError, match="4 of 4 examples are removed, so none stays"):
        without(IDS, IDS)
    with pytest.raises(ValueError, match="K = 5 is not from 1 to 4"):
        without_top(IDS, IDS, 5)
    with pytest.raises(ValueError, match="K = 0 is not from 1 to 4"):
        without_top(IDS, IDS, 0)


def test_writes_the_examples_as_an_image_folder(tmp_path, image_folder):
    data = load_dataset("imagefolder", data_dir=image_folder)
    code = "import sys, shutil; shutil.copytree(sys.argv[1], sys.argv[2], dirs_exist_ok=True)"
    arguments = [sys.executable, "-c", code, "{data}", "{out}"]
    kept = data.ids[3:7]
    (result,) = retrain(arguments, {"one": kept}, data.ids, tmp_path / "runs", data=data)
    assert result.error is None
    assert load_dataset("imagefolder", data_dir=result.model).ids == kept
    assert not (tmp_path / "runs" / "one" / "data").exists()  # it has served


def test_a_folder_of_another_data_set_is_refused(tmp_path, image_folder):
    """The same ids may stand for other pictures."""
    data = load_dataset("imagefolder", data_dir=image_folder)
    captions = [["something else"]] * len(data)
    table = data.table.remove_columns("captions").add_column("captions", captions)
    other = ImageDataset(table, data.name)
    assert other.ids == data.ids and other.fingerprint != data.fingerprint
    arguments = [sys.executable, "-c", "open(__import__('sys').argv[2] + '/m', 'w')",
                 "{data}", "{out}"]  # fmt: skip
    runs = {"one": data.ids[:3]}
    (result,) = retrain(arguments, runs, data.ids, tmp_path, data=data)
    assert result.error is None
    with pytest.raises(ValueError, match=f"another data set .fingerprint {data.fingerprint}, here"):
        retrain(arguments, runs, data.ids, tmp_path, data=other)


def test_no_image_folder_without_a_data_set(tmp_path):
    arguments = [sys.executable, "-c", "pass", "{data}", "{ids}", "{out}"]
    with pytest.raises(ValueError, match=r"holds \{data\}, but no data set was given"):
        retrain(arguments, {"one": ["a"]}, IDS, tmp_path)


def test_a_model_that_is_none_is_trained_again(tmp_path):
    def check(folder):
        if (folder / "count").read_text() == "1":
            raise ValueError("it is too young")

    (first,) = retrain(command(COUNT), {"one": ["a"]}, IDS, tmp_path, check=check)
    assert "run 'one' failed: wrote no model that can be used: it is too young" in first.error
    (second,) = retrain(command(COUNT), {"one": ["a"]}, IDS, tmp_path, check=check)
    assert second.error is None
    # A finished run is not looked at again.
    (third,) = retrain(command(COUNT), {"one": ["a"]}, IDS, tmp_path, check=lambda path: 1 / 0)
    assert third == second
