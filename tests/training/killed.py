"""Trains in children that are killed at random moments, until one of them finishes.

Run as `python -m tests.training.killed DIRECTORY`; prints the steps at which it found checkpoints.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from unsee.training.loop import CHECKPOINT, Optimization
from unsee.training.text_to_image import UNetRecipe, train_text_to_image

from .conftest import make_data, make_null_text

RECIPE = UNetRecipe(channels=(32,), snr_gamma=5.0)
LONG = Optimization(steps=24, batch_size=4, warmup=5, learning_rate=2e-3, checkpoint_seconds=0)


def train_in(directory: Path) -> list[torch.Tensor]:
    denoiser = train_text_to_image(RECIPE, make_data(), make_null_text(), LONG, directory)
    return [p.detach() for p in denoiser.network.parameters()]


def main(directory: Path) -> None:
    torch.set_num_threads(1)
    chance = random.Random()
    for wait in range(1000):
        # Nothing has run in this process yet that a fork could tear apart.
        child = os.fork()
        if child == 0:
            train_in(directory)
            os._exit(0)
        # Later children get more time: also a machine that needs a second for the first step ends.
        end = time.monotonic() + chance.uniform(0, 0.5) * (1 + wait)
        while time.monotonic() < end:
            finished, status = os.waitpid(child, os.WNOHANG)
            if finished:
                sys.exit(os.waitstatus_to_exitcode(status))
            time.sleep(0.002)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        path = directory / CHECKPOINT
        step = torch.load(path, weights_only=True)["step"] if path.is_file() else 0
        print(step, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
