"""A scan of rows of numbers, over a copy of the same bytes and over a matrix product."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scoring import Load, matmul_peak
from torch import Tensor

from unsee.index.rows import scan_rows

LENGTH, MANY = 4096, 32
"""Numbers in a row, and queries of the scan that is held against matrix products."""

COPY_ROWS = 2**16
"""Rows that a copy writes to, over and over: far more than a cache holds."""


def made_up_rows(count: int) -> Tensor:
    """Returns rows [count, 4096] float16 of length 1, or so.

    Raises:
        SystemExit: they do not fit into the free memory.
    """
    needed = 2 * LENGTH * (count + COPY_ROWS) + 2**30
    information = Path("/proc/meminfo")
    if information.is_file():
        lines = dict(x.split(":") for x in information.read_text(encoding="utf-8").splitlines())
        free = 1024 * int(lines["MemAvailable"].split()[0])
        if free < needed:
            raise SystemExit(f"{needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} are free: make "
                             "--rows smaller")  # fmt: skip
    rows = torch.empty(count, LENGTH, dtype=torch.float16)
    generator = torch.Generator().manual_seed(0)
    for part in rows.split(4096):
        part.copy_(torch.randn(part.shape, generator=generator) / LENGTH**0.5)
    return rows


def copy_all(rows: Tensor, target: Tensor) -> None:
    """Copies every byte of the rows, to where the bytes before went."""
    for part in rows.split(len(target)):
        target[: len(part)].copy_(part)


def timed(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def scans(count: int, rounds: int, threads: int, others: bool) -> dict[str, Any]:
    """Times scans, a copy of the same bytes and square matrix products, in turn.

    With `others`, also a product in float16, which rounds its result to 11 bits, and numpy's
    product in place of torch's.
    """
    torch.set_num_threads(threads)
    rows, load = made_up_rows(count), Load()
    target = torch.empty(min(count, COPY_ROWS), LENGTH, dtype=torch.float16)
    asked = torch.nn.functional.normalize(torch.randn(MANY, LENGTH), dim=1)
    ways: dict[str, Callable[[], Any]] = {
        "copy": lambda: copy_all(rows, target),
        "one": lambda: scan_rows(rows, asked[:1]),
        "many": lambda: scan_rows(rows, asked),
    }
    if others:
        ways["one in float16"] = lambda: torch.mv(rows, asked[0].half())
        ways["one with numpy"] = lambda: numpy_scan(rows, asked[:1])
        ways["many with numpy"] = lambda: numpy_scan(rows, asked)
    times: dict[str, list[float]] = {name: [] for name in (*ways, "product")}
    flops = 2 * count * LENGTH * MANY
    for number in range(rounds + 1):
        # Every other round runs backwards: nothing is always behind the same other.
        order = list(ways) if number % 2 else list(reversed(ways))
        with load.watch(threads):
            seconds = {name: timed(ways[name]) for name in order}
            peak = matmul_peak(torch.float32, threads, sizes=(1024, 2048), seconds=0.5)
        if number:  # the first round warms up
            for name, value in (*seconds.items(), ("product", flops / peak)):
                times[name].append(value)

    def median(name: str, *bounds: str) -> float:
        bound = [max(both) for both in zip(*(times[b] for b in bounds), strict=True)]
        return statistics.median(b / t for b, t in zip(bound, times[name], strict=True))

    return {
        "rows": count, "bytes": rows.nbytes, "threads": threads, "rounds": rounds,
        "processor_share": load.share, "seconds": times,
        "of_copy": {name: median(name, "copy") for name in ways if name != "copy"},
        "of_product": {name: median(name, "product") for name in ways if "many" in name},
        "of_the_smaller": {name: median(name, "copy", "product") for name in ways
                           if "many" in name},
    }  # fmt: skip


def numpy_scan(rows: Tensor, asked: Tensor) -> np.ndarray:
    """Does what `scan_rows` does with numpy's product."""
    found = np.empty((len(rows), len(asked)), dtype=np.float32)
    size = 128 * torch.get_num_threads()
    buffer, columns = torch.empty(size, LENGTH), asked.T.numpy()
    for first in range(0, len(rows), size):
        wide = buffer[: len(rows) - first].copy_(rows[first : first + size]).numpy()
        np.matmul(wide, columns, out=found[first : first + size])
    return found
