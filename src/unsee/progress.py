"""Progress of long work: a bar on a terminal or in a notebook, now and then a line elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Self, TypeVar

from tqdm.auto import tqdm

logger = logging.getLogger(__name__)

T = TypeVar("T")

LINE_SECONDS = 60.0
"""Between two lines where there is no terminal to draw a bar on: a log file, a cluster's queue."""


class Progress:
    """Says how far work has come and how long the rest will take.

    On a terminal it draws a bar on stderr. Elsewhere it logs a line at level INFO once a minute.
    Close it, or use it as a context manager.

    Args:
        total: units of work.
        what: is being done.
        unit: one of them, in the singular.
        done: units that an earlier run has finished.
        shown: or nothing is said.
        unit_scale: thousands are written as k.
    """

    def __init__(
        self, total: int, what: str, unit: str, done: int = 0, shown: bool = True,
        unit_scale: bool = False,
    ) -> None:  # fmt: skip
        self.total, self.what, self.unit, self.shown = total, what, unit, shown
        self.count = self._before = done
        self._remark = ""
        self._started = self._said = time.monotonic()
        self._bar = tqdm(
            total=total, initial=done, desc=what, unit=unit, unit_scale=unit_scale,
            disable=None if shown else True, file=sys.stderr,
        )  # fmt: skip

    def update(self, count: int = 1) -> None:
        """Counts units that were done now."""
        self.count += count
        self._bar.update(count)
        now = time.monotonic()
        if self._bar.disable and self.shown and now - self._said >= LINE_SECONDS:
            self._said = now
            logger.info("%s", self._line(now))

    def skip(self, count: int) -> None:
        """Counts units that were done before: they do not say how fast the rest will be."""
        self.count += count
        self._before += count
        if not self._bar.disable:
            self._bar.initial += count
            self._bar.n += count
            self._bar.last_print_n += count
            self._bar.refresh()

    def remark(self, text: str) -> None:
        """Shows a few words behind the numbers."""
        self._remark = text
        if not self._bar.disable:
            self._bar.set_postfix_str(text)

    def close(self) -> None:
        """Leaves the bar as it is now."""
        self._bar.close()

    def _line(self, now: float) -> str:
        """Returns how far it is."""
        each = (now - self._started) / max(1, self.count - self._before)
        left = tqdm.format_interval(each * max(0, self.total - self.count))
        return (
            f"{self.what}: {self.count:,} of {self.total:,} {self.unit}s "
            f"({self.count / max(1, self.total):.0%}), {left} left"
            + (f", {self._remark}" if self._remark else "")
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self.close()


def tracked(items: Sequence[T], what: str, unit: str) -> Iterator[T]:
    """Yields the items and shows the progress through them."""
    with Progress(len(items), what, unit) as bar:
        for item in items:
            yield item
            bar.update()
