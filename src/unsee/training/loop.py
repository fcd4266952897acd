"""The training loop: seeded by step number, checkpointed by time, resumable to the same weights."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from safetensors.torch import save_file
from torch import Tensor, nn

from ..draws import stable_seed
from ..files import write_atomically
from ..progress import Progress

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
        ema_decay: decay of the exponential moving average of the weights, which is what is kept;
            at step s it is at most (1 + s) / (10 + s), so that a short run forgets its start.
        seed: fixes initial weights, batches, timesteps and noise.
        checkpoint_seconds: longest time between two checkpoints.
        snapshots: steps after which the averaged weights are kept in a file of their own: methods
            may average their scores over them, as TracIn does.
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
    snapshots: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.steps < 0 or self.batch_size < 1 or self.warmup < 0:
            raise ValueError(
                f"optimization: steps = {self.steps} and warmup = {self.warmup} must not be "
                f"negative, batch_size = {self.batch_size} must be at least 1"
            )
        if not self.learning_rate > 0 or not 0 <= self.ema_decay < 1:
            raise ValueError(
                f"optimization: learning_rate = {self.learning_rate} must be positive and "
                f"ema_decay = {self.ema_decay} in [0, 1)"
            )
        if outside := [s for s in self.snapshots if not 1 <= s <= self.steps]:
            raise ValueError(
                f"optimization: there is no snapshot after step {outside[0]} of {self.steps}"
            )

    def learning_rate_factor(self, step: int) -> float:
        """Returns the fraction of the peak learning rate used at `step` (counted from 0)."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        return self.final_fraction + (1 - self.final_fraction) * cosine


def snapshot_path(directory: Path, step: int) -> Path:
    """Returns the file of the averaged weights after `step`, parameter name -> tensor."""
    return directory / f"snapshot-{step:06d}.safetensors"


class BatchOrder:
    """Which examples a step sees: a fresh permutation every epoch, from the seed and epoch alone.

    Args:
        keep: [n] int64, positions of the examples to train on.
        batch_size: examples a step.
        seed: fixes the permutations.

    Raises:
        ValueError: there is no example to train on.
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
        place, end = step * self.batch_size, (step + 1) * self.batch_size
        parts = []
        while place < end:
            epoch, first = divmod(place, len(self.keep))
            parts.append(self._permutation(epoch)[first : first + end - place])
            place += len(parts[-1])
        return torch.cat(parts)


@contextlib.contextmanager
def seeded_weights(seed: int) -> Iterator[None]:
    """Lets initial weights depend on `seed` alone; the caller's random state is as before after."""
    with torch.random.fork_rng(devices=[]):
        # The CPU's generator only: networks are made there, and moved after.
        torch.default_generator.manual_seed(seed)
        yield


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
    killed and resumed ends with the weights of one that was not, bit for bit, on the same machine
    with the same number of threads. Another number of threads adds up in another order, and may
    differ from the last bits on; so may a GPU, whose fast kernels are not all deterministic.
    A run that is finished is not repeated: it is read from its checkpoint.

    Args:
        model: the network.
        loss_of: (positions [B] int64, generator on the CPU) -> scalar loss; must draw from that
            generator only.
        order: which examples each step sees.
        optimization: the settings.
        directory: where `checkpoint.pt` is kept.
        description: everything else that fixes the run; a checkpoint made with another
            description or other settings is refused.
        parameters: what is trained; by default all parameters that require gradients.

    Raises:
        ValueError: the checkpoint is damaged or belongs to other settings, or is past a snapshot
            that is not there, the loss or its gradient is not finite, or there is nothing to train
            in float32.
    """
    directory.mkdir(parents=True, exist_ok=True)
    if parameters is None:
        parameters = [p for p in model.parameters() if p.requires_grad]
    names = {id(p): name for name, p in model.named_parameters()}
    run = _Run(parameters, [names[id(p)] for p in parameters], optimization)
    settings = {**description, **dataclasses.asdict(optimization)}
    settings.pop("checkpoint_seconds")
    settings.pop("snapshots")
    checkpoint = directory / CHECKPOINT
    run.resume(checkpoint, settings)

    model.train()
    try:
        _take_steps(run, loss_of, order, checkpoint, settings)
        run.ema.copy_to(run.trained)
    finally:
        model.eval()


def _take_steps(
    run: _Run,
    loss_of: Callable[[Tensor, torch.Generator], Tensor],
    order: BatchOrder,
    checkpoint: Path,
    settings: dict[str, Any],
) -> None:
    optimization, name = run.optimization, checkpoint.parent.name
    smooth: float | None = None
    saved = time.monotonic()
    with Progress(optimization.steps, name, "step", done=run.step) as bar:
        while run.step < optimization.steps:
            seed = stable_seed(optimization.seed, "step", run.step)
            loss = loss_of(order.batch(run.step), torch.Generator().manual_seed(seed))
            value = run.update(loss, where=checkpoint.parent)
            smooth = value if smooth is None else 0.99 * smooth + 0.01 * value
            bar.update()
            if run.step in optimization.snapshots:  # before the checkpoint that is past it
                run.save_average(snapshot_path(checkpoint.parent, run.step))
            if run.step % 20 == 0:
                bar.remark(f"loss={smooth:.4f}")
            due = time.monotonic() - saved > optimization.checkpoint_seconds
            if due or run.step == optimization.steps:
                run.save(checkpoint, settings)
                saved = time.monotonic()


class _Run:
    """What changes from step to step, and its checkpoint."""

    def __init__(
        self, trained: list[nn.Parameter], names: list[str], optimization: Optimization
    ) -> None:
        if not trained:
            raise ValueError("there is no parameter to train: none requires gradients")
        narrow = next(
            (p.dtype for p in trained if p.dtype in (torch.float16, torch.bfloat16)), None
        )
        if narrow is not None:
            raise ValueError(
                f"the parameters to train are {narrow}, where small updates vanish: load the "
                "model in float32 to train it"
            )
        self.optimization, self.trained, self.step = optimization, trained, 0
        self.names = names
        self.optimizer = torch.optim.AdamW(
            trained, lr=optimization.learning_rate, weight_decay=optimization.weight_decay
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, optimization.learning_rate_factor
        )
        self.ema = EMAModel(trained, decay=optimization.ema_decay)

    def update(self, loss: Tensor, where: Path) -> float:
        """Takes one step and returns the loss; takes none if it would make weights not finite."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.trained, self.optimization.clip_norm)
        value, length = loss.item(), norm.item()
        if not (math.isfinite(value) and math.isfinite(length)):
            raise ValueError(
                f"training loss is {value}, its gradient's norm {length}, at step {self.step} of "
                f"{where}: lower the learning rate (now {self.optimization.learning_rate}) or look "
                "for broken pictures in the data"
            )
        self.optimizer.step()
        self.schedule.step()
        self.ema.step(self.trained)
        self.step += 1
        return value

    def save(self, path: Path, settings: dict[str, Any]) -> None:
        state = {
            "settings": settings,
            "step": self.step,
            "parameters": [p.detach() for p in self.trained],
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "ema": self.ema.state_dict(),
        }
        write_atomically(path, lambda temporary: torch.save(state, temporary))

    def save_average(self, path: Path) -> None:
        average = {
            name: weights.detach().contiguous()
            for name, weights in zip(self.names, self.ema.shadow_params, strict=True)
        }
        write_atomically(path, lambda temporary: save_file(average, temporary))

    def resume(self, path: Path, settings: dict[str, Any]) -> None:
        """Continues from a checkpoint, where there is one."""
        if not path.is_file():
            return
        state = _load(path)
        _compare(path, state["settings"], settings)
        with torch.no_grad():
            for parameter, value in zip(self.trained, state["parameters"], strict=True):
                parameter.copy_(value)
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.ema.load_state_dict(state["ema"])
        self.ema.to(device=self.trained[0].device)
        self.step = state["step"]
        for step in self.optimization.snapshots:
            if step <= self.step and not (kept := snapshot_path(path.parent, step)).is_file():
                raise ValueError(
                    f"{path} is at step {self.step}, and {kept.name} was not kept on the way: "
                    "ask for later snapshots, or use another directory to start anew"
                )


def _load(path: Path) -> dict[str, Any]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        missing = {"settings", "step", "parameters", "optimizer", "schedule", "ema"} - set(state)
    except Exception as error:  # a damaged file raises whatever its reader stumbles on
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise ValueError(
            f"checkpoint {path} cannot be read, it may be cut short ({reason}): put a whole copy "
            "in its place, or delete it to start anew"
        ) from error
    if missing:
        raise ValueError(f"checkpoint {path} has no {min(missing)!r}: it is not one of this loop")
    return state


def _compare(path: Path, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    differ = []
    for name in sorted(set(ours) | set(theirs)):
        if name not in theirs and ours[name] is not None:
            # Made by a version that did not record it yet: it cannot be known to differ.
            logger.warning("%s does not say %s: taken as %r", path, name, ours[name])
        elif _plain(ours.get(name)) != _plain(theirs.get(name)):
            differ.append((name, theirs.get(name), ours.get(name)))
    if differ:
        made = ", ".join(f"{name} = {value!r}" for name, value, _ in differ)
        has = ", ".join(f"{name} = {value!r}" for name, _, value in differ)
        raise ValueError(
            f"{path} was made with {made}; this run has {has}: use the same settings to resume, "
            "or another directory to start anew"
        )


def _plain(value: Any) -> Any:
    """Returns `value` with tuples as lists: settings read from JSON equal those made in Python."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
