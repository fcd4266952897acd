"""The unlearning of the AbU paper's MSCOCO experiment, step by step as published.

No damping, and a step of fixed size; `unlearning.AbU` is the method for other models.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMScheduler
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..curvature.diagonal import DiagonalFisher
from ..data.published import (
    FISHER,
    MODEL,
    QUERY_LATENTS,
    PublishedConfig,
    PublishedExamples,
    read_fisher,
    read_query,
    read_unet,
)
from ..draws import stable_seed
from ..files import write_atomically
from ..gradients import Gradients, mean_gradient
from ..models.unet import UNetDenoiser
from ..progress import Progress

CHECKPOINT_SECONDS = 60.0
"""A killed unlearning loses this much at most, and the micro-batch that it was at."""

MicroBatches = Callable[[int, int], tuple[Tensor, Tensor]]
"""(step, micro-batch) -> timesteps [b] int64 and noise [b, C, h, w] float32."""


@dataclass(frozen=True)
class UnlearningDraws:
    """The query's draws where none were recorded, as in the paper but seeded.

    Timesteps do not repeat inside a micro-batch; noise is fresh. Keyed by step and micro-batch, so
    a resumed run goes on with what the killed one would have had.

    Attributes:
        seed: two seeds give independent draws.
        query: number of the query.
        batch: draws in a micro-batch.
        shape: (C, h, w) of a latent.
        num_train_timesteps: length of the noise schedule.
    """

    seed: int
    query: int
    batch: int
    shape: tuple[int, ...]
    num_train_timesteps: int = 1000

    def __post_init__(self) -> None:
        if self.batch > self.num_train_timesteps:
            raise ValueError(
                f"unlearn_batch = {self.batch} is more than the {self.num_train_timesteps} "
                "timesteps there are, which do not repeat inside a micro-batch"
            )

    def __call__(self, step: int, micro_batch: int) -> tuple[Tensor, Tensor]:
        """Returns timesteps [batch] int64 and noise [batch, *shape] float32."""
        key = stable_seed(self.seed, "unlearn", self.query, step, micro_batch)
        generator = np.random.Generator(np.random.Philox(key=key))
        timesteps = generator.permutation(self.num_train_timesteps)[: self.batch]
        noise = generator.standard_normal((self.batch, *self.shape), dtype=np.float32)
        return torch.from_numpy(timesteps.astype(np.int64)), torch.from_numpy(noise)


@dataclass(frozen=True)
class Experiment:
    """One query, and everything that it is unlearned and scored with.

    Attributes:
        config: the constants; `dataset_size` is set.
        data: the training pictures.
        model: the UNet, and the weights that are unlearned.
        fisher: of these weights, as it is in the file.
        query: number of the query.
        latents: [C, h, w] float32, the synthesized picture.
        text: [T, D] float32, its prompt.
    """

    config: PublishedConfig
    data: PublishedExamples
    model: UNetDenoiser
    fisher: DiagonalFisher
    query: int
    latents: Tensor
    text: Tensor

    @classmethod
    def open(cls, folder: Path, query: int, device: str | torch.device = "cpu") -> Experiment:
        """Reads the released files.

        Raises:
            ValueError: files that are missing, damaged or do not fit one another, or no such query.
        """
        if not folder.is_dir():
            raise ValueError(f"{folder}: no such folder")
        config = PublishedConfig.load(folder)
        data = PublishedExamples(folder, config)
        if config.dataset_size is None:
            config = dataclasses.replace(config, dataset_size=len(data.ids))
        latents, text = read_query(folder, query, config, data.latent_shape)
        unet = read_unet(folder, config)
        names = [name for name, _ in unet.named_parameters() if config.selects(name)]
        if not names:
            raise ValueError(
                f"weight_selection = {config.weight_selection!r}: the UNet has no such weights"
            )
        unet.to(torch.device(device))
        model = UNetDenoiser(unet, DDPMScheduler(), names)
        shapes = {name: parameter.shape for name, parameter in model.parameters.items()}
        fisher = DiagonalFisher(read_fisher(folder, shapes), count=0)
        return cls(config, data, model, fisher, query, latents, text)

    def loss(self, timesteps: Tensor, noise: Tensor) -> Tensor:
        """Returns the query's loss on each of D draws, [D].

        Raises:
            ValueError: a loss is not finite.
        """
        rows = (self.latents, self.text, timesteps, noise)
        losses = self.model.loss(*(row[None] for row in rows))[0]
        if not torch.isfinite(losses).all():
            raise ValueError(
                f"query {self.query}: its loss is not finite; check {MODEL} and {QUERY_LATENTS}, "
                f"or unlearn with a smaller lr than {self.config.lr:g}"
            )
        return losses

    @torch.no_grad()
    def mean_loss(self, timesteps: Tensor, noise: Tensor, batch_size: int) -> float:
        """Returns the query's loss averaged over D draws."""
        batches = zip(timesteps.split(batch_size), noise.split(batch_size), strict=True)
        return float(torch.cat([self.loss(t, e).double() for t, e in batches]).mean())

    def gradient(self, timesteps: Tensor, noise: Tensor, batch_size: int) -> Gradients:
        """Returns the gradient of the query's loss averaged over D draws, float64."""
        total: Gradients = {}
        with self.model.gradients_on():
            for t, e in zip(timesteps.split(batch_size), noise.split(batch_size), strict=True):
                for name, gradient in mean_gradient(self.loss(t, e), self.model.parameters).items():
                    share = gradient * (len(t) / len(timesteps))
                    total[name] = total[name] + share if name in total else share
        return total

    def ascend(self, weights: dict[str, Tensor], gradient: Gradients) -> dict[str, Tensor]:
        """Returns the weights after a step: undamped, in float64, then in the weights' own type.

        Raises:
            ValueError: a Fisher of zero where there is a gradient, or a step out of range.
        """
        for name, value in gradient.items():
            zeros = (self.fisher.values[name].to(value) == 0) & (value != 0)
            if zeros.any():
                raise ValueError(
                    f"{FISHER}: {name} is zero at {int(zeros.sum())} of {zeros.numel()} weights "
                    "that the query has a gradient for, and the published step divides by it: "
                    "fit it on more draws, or give it a floor"
                )
        steps = self.fisher.precondition(gradient, damping=0.0)
        assert self.config.dataset_size is not None
        size = self.config.lr / self.config.dataset_size
        moved = {n: (w.double() + size * steps[n]).to(w.dtype) for n, w in weights.items()}
        broken = [name for name, weight in moved.items() if not torch.isfinite(weight).all()]
        if broken:
            raise ValueError(
                f"query {self.query}: unlearning takes {broken[0]} out of the range of its type; "
                f"the step size lr = {self.config.lr:g} is too large, or the Fisher too small"
            )
        return moved


@dataclass
class _Progress:
    """Where an unlearning is: in `step`, with the gradients of `done` micro-batches summed."""

    weights: dict[str, Tensor]
    total: Gradients
    step: int = 0
    done: int = 0

    def save(self, path: Path) -> None:
        tensors = {f"weight/{n}": w.cpu().contiguous() for n, w in self.weights.items()}
        tensors |= {f"gradient/{n}": g.cpu().contiguous() for n, g in self.total.items()}
        about = {"step": str(self.step), "done": str(self.done)}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata=about))

    @classmethod
    def load(cls, path: Path, device: torch.device) -> _Progress:
        weights: dict[str, Tensor] = {}
        total: Gradients = {}
        try:
            with safe_open(str(path), framework="pt") as file:
                about = file.metadata()
                for key in file.keys():  # noqa: SIM118
                    kind, _, name = key.partition("/")
                    place = weights if kind == "weight" else total
                    place[name] = file.get_tensor(key).to(device)
            return cls(weights, total, int(about["step"]), int(about["done"]))
        except (SafetensorError, KeyError, TypeError, OSError) as error:
            raise ValueError(f"{path} is damaged ({error}): delete it and run again") from None


def unlearn(
    experiment: Experiment,
    micro_batches: MicroBatches,
    *,
    batch_size: int = 80,
    checkpoint: Path | None = None,
) -> dict[str, Tensor]:
    """Takes the published steps up the query's loss; the model itself is left as it is.

    Gradients are computed in float64. They are a small part of the experiment's work, and where the
    Fisher is tiny, or steps follow one another, a step magnifies their rounding.

    Args:
        experiment: what is unlearned, and how far.
        micro_batches: draws of each step and micro-batch.
        batch_size: forward passes at once; a quarter as many where there are gradients, which
            need several times the memory.
        checkpoint: file that a killed run continues from, to the same bits.

    Returns:
        name -> new value of each selected parameter.

    Raises:
        ValueError: a loss that is not finite, or a step that cannot be taken.
    """
    config, model = experiment.config, experiment.model
    if checkpoint is not None and checkpoint.is_file():
        at = _Progress.load(checkpoint, model.device)
    else:
        at = _Progress({n: p.detach().clone() for n, p in model.parameters.items()}, {})
    bar = Progress(
        config.steps * config.grad_accum * config.unlearn_batch, "unlearn", "draw",
        done=(at.step * config.grad_accum + at.done) * config.unlearn_batch, unit_scale=True,
    )  # fmt: skip
    saved = time.monotonic()
    while at.step < config.steps:
        with _float64(model.network), model.replaced(at.weights):
            while at.done < config.grad_accum:
                draws = micro_batches(at.step, at.done)
                gradient = experiment.gradient(*draws, max(1, batch_size // 4))
                at.total = {n: at.total[n] + g if at.done else g for n, g in gradient.items()}
                at.done += 1
                bar.update(config.unlearn_batch)
                if checkpoint is not None and time.monotonic() - saved >= CHECKPOINT_SECONDS:
                    at.save(checkpoint)
                    saved = time.monotonic()
        mean = {name: total / config.grad_accum for name, total in at.total.items()}
        at = _Progress(experiment.ascend(at.weights, mean), {}, at.step + 1)
    bar.close()
    if checkpoint is not None:
        at.save(checkpoint)
    return at.weights


@contextlib.contextmanager
def _float64(network: nn.Module) -> Iterator[None]:
    """Turns a float32 network into a float64 one inside a `with` block."""
    network.double()
    try:
        yield
    finally:
        network.float()
