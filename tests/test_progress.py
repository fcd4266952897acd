"""What long work says of itself, on a terminal and in a log."""

from __future__ import annotations

import logging
import os
import pty
import re
import sys
import termios
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from unsee import progress
from unsee.progress import Progress, tracked


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock that stands still until it is set."""
    time = SimpleNamespace(now=0.0)
    monkeypatch.setattr(progress.time, "monotonic", lambda: time.now)
    return time


def on_terminal(monkeypatch: pytest.MonkeyPatch, work: Callable[[], None]) -> str:
    """Returns what the work writes on a terminal of 120 columns."""
    reader, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 120))
    with os.fdopen(terminal, "w") as stream, os.fdopen(reader, "rb", buffering=0) as screen:
        monkeypatch.setattr(sys, "stderr", stream)
        work()
        monkeypatch.undo()
        stream.write("the end")
        stream.flush()
        shown = ""
        while "the end" not in shown:
            shown += screen.read(4096).decode()
    return shown


def test_a_terminal_gets_a_bar_that_goes_on_where_work_was_resumed(monkeypatch) -> None:
    def work() -> None:
        with Progress(10, "index", "example", done=2) as bar:
            bar.skip(3)
            bar.update(5)
            bar.remark("loss=0.5")

    shown = on_terminal(monkeypatch, work)
    assert "5/10" in shown
    assert re.search(r"index: 100%.*10/10 \[\d\d:\d\d<\d\d:\d\d, .*example/s, loss=0.5\]", shown)


def test_what_was_done_before_does_not_count_for_the_speed(monkeypatch) -> None:
    def work() -> None:
        with Progress(2_000_000, "index", "example") as bar:
            bar.skip(1_000_000)
            bar._bar.start_t -= 10.0  # as if it had begun ten seconds ago
            bar._bar.last_print_t -= 10.0
            bar.update(100)

    speeds = re.findall(r"([\d.]+)example/s", on_terminal(monkeypatch, work))
    assert speeds
    assert all(float(speed) < 11 for speed in speeds)


def test_a_log_gets_a_line_a_minute(clock, caplog) -> None:
    caplog.set_level(logging.INFO, logger="unsee.progress")
    with Progress(1898, "index", "example") as bar:
        bar.skip(898)
        clock.now = 59.0
        bar.update(50)
        assert not caplog.records
        clock.now = 100.0
        bar.remark("loss=0.5")
        bar.update(50)
        clock.now = 101.0
        bar.update(1)
    # 100 of them took 100 seconds, and 900 are left.
    assert [r.getMessage() for r in caplog.records] == [
        "index: 998 of 1,898 examples (53%), 15:00 left, loss=0.5"
    ]


def test_nothing_done_is_no_error(clock, caplog) -> None:
    caplog.set_level(logging.INFO, logger="unsee.progress")
    with Progress(0, "index", "example") as bar:
        bar.skip(0)
        clock.now = 61.0
        bar.update(0)
    assert [r.getMessage() for r in caplog.records] == ["index: 0 of 0 examples (0%), 00:00 left"]


def test_what_is_not_to_be_shown_is_not_logged(clock, caplog) -> None:
    caplog.set_level(logging.INFO, logger="unsee.progress")
    with Progress(10, "encode", "image", shown=False) as bar:
        clock.now = 1000.0
        bar.update(5)
    assert not caplog.records


def test_tracked_yields_what_it_is_given(capsys) -> None:
    assert list(tracked([3, 1, 2], "fisher", "batch")) == [3, 1, 2]
    assert capsys.readouterr() == ("", "")
