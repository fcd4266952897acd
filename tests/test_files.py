from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from unsee.files import write_atomically


def test_content_arrives_under_the_final_name_only(tmp_path: Path):
    target = tmp_path / "result.txt"
    seen: list[Path] = []

    def write(path: Path) -> None:
        seen.append(path)
        path.write_text("whole", encoding="utf-8")
        assert not target.exists()

    write_atomically(target, write)
    assert target.read_text(encoding="utf-8") == "whole"
    assert seen[0].parent == tmp_path  # same file system, so that the rename is atomic
    assert list(tmp_path.iterdir()) == [target]


def test_a_failed_write_leaves_the_old_content_and_nothing_else(tmp_path: Path):
    target = tmp_path / "result.txt"
    target.write_text("old", encoding="utf-8")

    def write(path: Path) -> None:
        path.write_text("half", encoding="utf-8")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        write_atomically(target, write)
    assert target.read_text(encoding="utf-8") == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_it_replaces_what_was_there(tmp_path: Path):
    target = tmp_path / "result.txt"
    for text in ("first", "second"):
        write_atomically(target, lambda path, text=text: path.write_text(text, encoding="utf-8"))
    assert target.read_text(encoding="utf-8") == "second"


def test_two_threads_can_write_the_same_file(tmp_path: Path):
    target, both = tmp_path / "result.txt", Barrier(2)

    def write(text: str) -> None:
        def slowly(path: Path) -> None:
            path.write_text(text, encoding="utf-8")
            both.wait(timeout=30)  # both are half way at once

        write_atomically(target, slowly)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write, ("one", "two")))
    assert target.read_text(encoding="utf-8") in ("one", "two")
    assert list(tmp_path.iterdir()) == [target]
