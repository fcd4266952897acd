"""Builds and changes an index in children that are killed, and in two that race each other.

Run as `python -m tests.index.killed FOLDER`: builds FOLDER/killed/0, FOLDER/killed/1 ... until 20
builders were killed, and prints how many files each kill found finished; the same for indices in
FOLDER/changed that examples are added to and erased from; then two builders fill FOLDER/raced at
the same time.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from tests.methods.conftest import examples
from unsee.draws import Draws
from unsee.index.index import Index

from .conftest import small_model

KILLS = 20


def fill(path: Path) -> Index:
    """Builds 24 examples in shards of 2."""
    return Index.build(path, small_model(), examples(24), draws=Draws(n=2), shard_size=2)


def change(path: Path) -> Index:
    """Builds, adds 12 examples and erases 3, or what is left to do of it."""
    index, every = fill(path), examples(36)
    more = every.select(every.ids[24:])
    if more.ids[0] not in index.ids:
        index = index.append(more)
    return index.delete(["picture-3", "picture-4", "picture-30"])


def started(path: Path, work: Callable[[Path], Index] = fill) -> int:
    """Forks a process for the work and returns its id."""
    # Nothing has run in this process yet that a fork could tear apart.
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work(path)
            code = 0
        finally:
            os._exit(code)
    return child


def kill(folder: Path, work: Callable[[Path], Index]) -> None:
    begun = time.monotonic()
    wait_for(started(folder / "whole", work))
    length = time.monotonic() - begun
    chance = random.Random()
    kills = number = 0
    while True:
        child = started(folder / str(number), work)
        end = time.monotonic() + chance.uniform(0, 0.6 * length)
        while kills == KILLS or time.monotonic() < end:
            finished, status = os.waitpid(child, os.WNOHANG)
            if finished:
                if status:
                    sys.exit(f"a builder failed with status {status}")
                break
            time.sleep(0.001)
        else:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            kills += 1
            print(len(list((folder / str(number)).glob("columns/*/*.safetensors"))), flush=True)
            continue
        if kills == KILLS:
            return
        number += 1


def wait_for(child: int) -> None:
    status = os.waitpid(child, 0)[1]
    if status:
        sys.exit(f"a builder failed with status {status}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    kill(Path(sys.argv[1]) / "killed", fill)
    kill(Path(sys.argv[1]) / "changed", change)
    for child in [started(Path(sys.argv[1]) / "raced") for _ in range(2)]:
        wait_for(child)
