"""Retraining with somebody's own training script, on parts of the data."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..data.dataset import ImageDataset
from ..data.image_folder import write_image_folder
from ..draws import stable_seed
from ..files import write_atomically

LOG = logging.getLogger(__name__)

LAST_LINES = 20
"""Of a failed command's output that are shown."""

BEGUN = "begun.json"
"""Written first: of which data set the examples are."""

FINISHED = "finished.json"
"""Written last: a run whose folder holds it is not repeated."""


@dataclass(frozen=True)
class Retrained:
    """What became of one run.

    Attributes:
        name: of the run.
        model: what the command wrote is in this folder.
        error: None if it finished; else what went wrong, with the last lines of its output.
    """

    name: str
    model: Path
    error: str | None = None


def without(ids: Sequence[str], removed: Sequence[str]) -> list[str]:
    """Returns the ids that stay, in order.

    Args:
        ids: of all examples.
        removed: ids that are left out, for example `scores.top(k).ids`.

    Raises:
        ValueError: an id that is removed twice or is not there, or nothing that stays.
    """
    gone = _known(removed, ids, "removed")
    if len(gone) >= len(ids):
        raise ValueError(
            f"retrain: {len(gone)} of {len(ids)} examples are removed, so none stays; take a "
            "smaller K"
        )
    return [i for i in ids if i not in gone]


def without_top(order: Sequence[str], ids: Sequence[str], k: int) -> list[str]:
    """Returns the ids that stay when the first `k` of a ranking are removed, in order of `ids`.

    Args:
        order: ids, most influential first.
        ids: of all examples.
        k: how many are removed.

    Raises:
        ValueError: k below 1, or above what is ranked; see `without`.
    """
    if not 1 <= k <= len(order):
        raise ValueError(f"retrain: K = {k} is not from 1 to {len(order)}, the ranked examples")
    return without(ids, order[:k])


def retrain(
    command: Sequence[str],
    runs: Mapping[str, Sequence[str]],
    ids: Sequence[str],
    out: Path,
    *,
    data: ImageDataset | None = None,
    check: Callable[[Path], object] | None = None,
) -> list[Retrained]:
    """Runs a training command once for each set of ids that it is to be trained on.

    The command is an argument list; no shell sees it. In every argument `{data}` stands for an
    image folder of the examples to train on, `{ids}` for a text file with their ids, one a line,
    and `{out}` for a folder that exists, where the command leaves its model. A run is finished
    when the command ends with exit code 0, something is in that folder, and `check` is content;
    finished runs are not repeated. What a run that was stopped left in the folder stays there, so
    that the script can continue. When one run fails, the others go on. Its output is in
    `out/NAME/log.txt`. The image folder is removed when the run is finished.

    Args:
        command: for example `["python", "train.py", "--data={data}", "--save-to={out}"]`.
        runs: name -> ids to train on.
        ids: of all examples.
        out: folder of the runs.
        data: the examples, for `{data}`.
        check: is called with the folder of a model; an exception says why it is none.

    Returns:
        For each run, in order, where its model is or what went wrong.

    Raises:
        ValueError: a command without placeholders or that cannot be started, a name that is no
            folder name, no ids, unknown ids, ids given twice, or a folder that holds a run on
            other ids, of another data set or by another command.
    """
    check_command(command, folder=data is not None)
    for name, kept in runs.items():
        if name != Path(name).name or name in ("", ".", ".."):
            raise ValueError(f"retrain: run name {name!r} cannot be the name of a folder")
        if not _known(kept, ids, f"run {name!r}"):
            raise ValueError(f"retrain: run {name!r} is to be trained on no examples")
        _check_folder(out / name, command, kept, data)
    results = []
    for number, (name, kept) in enumerate(runs.items(), start=1):
        if not (out / name / FINISHED).is_file():
            LOG.info("retrain: %d of %d, %s", number, len(runs), name)
        results.append(_run(command, name, kept, out / name, data, check))
    return results


def check_command(command: Sequence[str], folder: bool = True) -> None:
    """Raises a ValueError unless a command is a list that holds `{out}`, and `{data}` or `{ids}`.

    Args:
        command: the argument list.
        folder: whether there is an image folder for `{data}`.
    """
    if isinstance(command, str):
        raise ValueError(f"retrain: the command {command!r} is one string, not a list of arguments")
    for places in (("{data}", "{ids}") if folder else ("{ids}",), ("{out}",)):
        if not any(place in argument for argument in command for place in places):
            raise ValueError(
                f"retrain: no argument of the command {list(command)} holds {' or '.join(places)}"
            )
    if not folder and any("{data}" in argument for argument in command):
        raise ValueError("retrain: the command holds {data}, but no data set was given to write")


def _known(chosen: Sequence[str], ids: Sequence[str], what: str) -> set[str]:
    """Returns the chosen ids as a set; each is among `ids` once."""
    known, seen = set(ids), set[str]()
    for identifier in chosen:
        if identifier not in known:
            raise ValueError(
                f"retrain: {what}: {identifier!r} is not among the {len(ids)} examples"
            )
        if identifier in seen:
            raise ValueError(f"retrain: {what}: {identifier!r} is given twice")
        if identifier.splitlines() != [identifier]:
            raise ValueError(f"retrain: {what}: {identifier!r} is not one line of text")
        seen.add(identifier)
    return seen


def _check_folder(
    folder: Path, command: Sequence[str], kept: Sequence[str], data: ImageDataset | None
) -> None:
    """Refuses a folder that holds, or begins, another run than this."""
    listed, begun, finished = folder / "ids.txt", folder / BEGUN, folder / FINISHED
    if listed.is_file() and listed.read_text(encoding="utf-8") != _text(kept):
        raise ValueError(
            f"retrain: {str(folder)!r} holds a run on other ids; remove it or use another folder"
        )
    here = None if data is None else data.fingerprint
    if begun.is_file() and (there := json.loads(begun.read_text(encoding="utf-8"))["data"]) != here:
        raise ValueError(
            f"retrain: {str(folder)!r} holds a run on another data set (fingerprint {there}, here "
            f"{here}); remove it or use another folder"
        )
    if finished.is_file():
        about = json.loads(finished.read_text(encoding="utf-8"))
        if about["command"] != list(command):
            raise ValueError(
                f"retrain: {str(folder)!r} was finished by the command {about['command']}, not "
                f"{list(command)}; remove it or use another folder"
            )


def _text(kept: Sequence[str]) -> str:
    return "".join(f"{i}\n" for i in kept)


def _run(
    command: Sequence[str], name: str, kept: Sequence[str], folder: Path,
    data: ImageDataset | None, check: Callable[[Path], object] | None,
) -> Retrained:  # fmt: skip
    model, listed, finished = folder / "model", folder / "ids.txt", folder / FINISHED
    if finished.is_file():
        return Retrained(name, model)
    model.mkdir(parents=True, exist_ok=True)
    write_atomically(listed, lambda path: path.write_text(_text(kept), encoding="utf-8"))
    of = json.dumps({"data": None if data is None else data.fingerprint})
    write_atomically(folder / BEGUN, lambda path: path.write_text(of, encoding="utf-8"))
    if data is not None and any("{data}" in argument for argument in command):
        write_image_folder(data.select(kept), folder / "data")
    places = {"{data}": folder / "data", "{ids}": listed, "{out}": model}
    arguments = [_filled(argument, places) for argument in command]
    started = time.monotonic()
    with (folder / "log.txt").open("wb") as log:
        try:
            code = subprocess.run(
                arguments, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            ).returncode
        except OSError as error:
            raise ValueError(
                f"retrain: the command {arguments[0]!r} cannot be started ({error})"
            ) from None
    if wrong := _wrong(code, model, check):
        last = "\n".join(f"  {line}" for line in _last_lines(folder / "log.txt"))
        error = f"run {name!r} failed: {wrong}\n{last or '  (no output)'}"
        LOG.warning("retrain: %s", error)
        return Retrained(name, model, error)
    about = {
        "command": list(command),
        "examples": len(kept),
        "ids": f"{stable_seed('examples', *kept):016x}",
        "seconds": round(time.monotonic() - started, 1),
    }
    write_atomically(finished, lambda path: path.write_text(json.dumps(about), encoding="utf-8"))
    shutil.rmtree(folder / "data", ignore_errors=True)
    return Retrained(name, model)


def _wrong(code: int, model: Path, check: Callable[[Path], object] | None) -> str | None:
    """Returns what is wrong with a command that has ended, or None."""
    if code:
        return f"killed by signal {-code}" if code < 0 else f"exit code {code}"
    if not model.is_dir() or not any(model.iterdir()):
        return f"wrote nothing in {str(model)!r}"
    try:
        if check is not None:
            check(model)
    except Exception as error:  # whatever a strange model makes the libraries below stumble on
        return f"wrote no model that can be used: {str(error) or repr(error)}"
    return None


def _filled(argument: str, places: Mapping[str, Path]) -> str:
    # Not str.format: an argument may hold other braces.
    for placeholder, path in places.items():
        argument = argument.replace(placeholder, str(path.resolve()))
    return argument


def _last_lines(path: Path, most: int = 64 * 1024) -> list[str]:
    """Returns the last lines of a log that may be long; a progress bar counts as lines."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - most))
        text = file.read().decode("utf-8", errors="replace")
    return [line for line in text.splitlines() if line.strip()][-LAST_LINES:]
