from __future__ import annotations

from pathlib import Path

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
