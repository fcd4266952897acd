"""The training loop: seeded by step number, checkpointed by time, resumable to the same weights."""

from __future__ import annotations

import dataclasses
import logging
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..draws import stable_seed
from ..files import write_atomically

logger = logging.getLogger(__name__)

CHECKPOINT = "checkpoint.pt"


@dataclass(frozen=True)
class Optimization:
    """How a network is optimised; AdamW with linear warm-up and cosine decay.

    Attributes:
        steps: optimiser steps in total; the learning rate reaches its end there.
        batch_size: examples a step.
        learning_rate: peak learning rate.
        warmup: steps of linear warm-up.
        final_fraction: learning rate at the last step, as a fraction of the peak.
        weight_decay: AdamW's decoupled weight decay.
        clip_norm: gradients are scaled down to this global norm.
        ema_decay: decay of the exponential moving average of the weights, which is what is kept.
        seed: fixes initial weights, batches, timesteps and noise.
        checkpoint_seconds: longest time between two checkpoints.
    """

    steps: int
    batch_size: int = 64
    learning_rate: float = 1e-3
    warmup: int = 200
    final_fraction: float = 0.02
    weight_decay: float = 1e-4
    clip_norm: float = 1.0
    ema_decay: float = 0.999
    seed: int = 0
    checkpoint_seconds: float = 240.0

    def learning_rate_factor(self, step: int) -> float:
        """Returns the fraction of the peak learning rate used at `step` (counted from 0)."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        return self.final_fraction + (1 - self.final_fraction) * cosine


class BatchOrder:
    """Which examples a step sees: a fresh permutation every epoch, from the seed and epoch alone.

    Args:
        keep: positions of the examples to train on.
        batch_size: examples a step.
        seed: fixes the permutations.
    """

    def __init__(self, keep: Tensor, batch_size: int, seed: int) -> None:
        if keep.numel() == 0:
            raise ValueError("the keep-mask leaves no example to train on")
        self.keep, self.batch_size, self.seed = keep, batch_size, seed
        self._epochs: dict[int, Tensor] = {}

    def _permutation(self, epoch: int) -> Tensor:
        if epoch not in self._epochs:
            generator = torch.Generator().manual_seed(stable_seed(self.seed, "epoch", epoch))
            self._epochs = {k: v for k, v in self._epochs.items() if k >= epoch - 1}
            self._epochs[epoch] = self.keep[torch.randperm(len(self.keep), generator=generator)]
        return self._epochs[epoch]

    def batch(self, step: int) -> Tensor:
        """Returns positions [batch_size] of the examples of `step`, counted from 0."""
        first = step * self.batch_size
        places = range(first, first + self.batch_size)
        size = len(self.keep)
        return torch.stack([self._permutation(p // size)[p % size] for p in places])


def train(
    model: nn.Module,
    loss_of: Callable[[Tensor, torch.Generator], Tensor],
    order: BatchOrder,
    optimization: Optimization,
    directory: Path,
    description: dict[str, Any],
    parameters: list[nn.Parameter] | None = None,
) -> None:
    """Trains `model` in place and leaves it with the averaged weights, in eval mode.

    Everything random in step s comes from a generator seeded with (seed, s), so a run that was
    killed and resumed ends with the weights of one that was not, on the same machine.

    Args:
        model: the network.
        loss_of: (positions [B] int64, generator on the CPU) -> scalar loss.
        order: which examples each step sees.
        optimization: the settings.
        directory: where `checkpoint.pt` is kept.
        description: everything else that fixes the run; a checkpoint made with another
            description or other settings is refused.
        parameters: what is trained; by default all parameters that require gradients.

    Raises:
        ValueError: the checkpoint belongs to other settings, or the loss is not finite.
    """
    directory.mkdir(parents=True, exist_ok=True)
    trained = parameters or [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=optimization.learning_rate, weight_decay=optimization.weight_decay
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, optimization.learning_rate_factor)
    ema = EMAModel(trained, decay=optimization.ema_decay)
    settings = {**description, **dataclasses.asdict(optimization)}
    settings.pop("checkpoint_seconds")
    step = _resume(directory / CHECKPOINT, settings, trained, optimizer, schedule, ema)

    model.train()
    bar = tqdm(total=optimization.steps, initial=step, desc=directory.name, unit="step",
               disable=None, file=sys.stderr)  # fmt: skip
    saved = time.monotonic()
    smooth = None
    while step < optimization.steps:
        generator = torch.Generator().manual_seed(stable_seed(optimization.seed, "step", step))
        loss = loss_of(order.batch(step), generator)
        if not torch.isfinite(loss):
            raise ValueError(
                f"training loss is {loss.item()} at step {step} of {directory}: lower the learning "
                f"rate (now {optimization.learning_rate}) or look for broken pictures in the data"
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, optimization.clip_norm)
        optimizer.step()
        schedule.step()
        ema.step(trained)
        step += 1
        smooth = loss.item() if smooth is None else 0.99 * smooth + 0.01 * loss.item()
        bar.update()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{smooth:.4f}")
        if step % 500 == 0 and bar.disable:
            logger.info(
                "%s: step %d of %d, loss %.4f", directory.name, step, optimization.steps, smooth
            )
        if time.monotonic() - saved > optimization.checkpoint_seconds or step == optimization.steps:
            _save(directory / CHECKPOINT, settings, step, trained, optimizer, schedule, ema)
            saved = time.monotonic()
    bar.close()
    ema.copy_to(trained)
    model.eval()


def _save(
    path: Path,
    settings: dict[str, Any],
    step: int,
    trained: list[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    ema: EMAModel,
) -> None:
    state = {
        "settings": settings,
        "step": step,
        "parameters": [p.detach() for p in trained],
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
        "ema": ema.state_dict(),
    }
    write_atomically(path, lambda temporary: torch.save(state, temporary))


def _resume(
    path: Path,
    settings: dict[str, Any],
    trained: list[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    ema: EMAModel,
) -> int:
    if not path.is_file():
        return 0
    state = torch.load(path, map_location="cpu", weights_only=True)
    for name in sorted(set(settings) | set(state["settings"])):
        ours, theirs = settings.get(name), state["settings"].get(name)
        if ours != theirs:
            raise ValueError(
                f"{path} was made with {name} = {theirs!r}, this run has {name} = {ours!r}: "
                "use the same settings to resume, or another directory to start anew"
            )
    with torch.no_grad():
        for parameter, value in zip(trained, state["parameters"], strict=True):
            parameter.copy_(value)
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    ema.load_state_dict(state["ema"])
    ema.to(device=trained[0].device)
    return state["step"]
