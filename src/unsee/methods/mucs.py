"""MUCS: forget a picture while the training data is retained, and see whose loss is skewed.

Serrà, Goswami, Morreale, Liao, Mitsufuji: "Training Data Attribution in Diffusion Models via
Mirrored Unlearning and Noise-Consistent Skew", 2026, arXiv 2605.17938. The query is unlearned up to
a bound, with ordinary training on random examples beside it; an example's score is the change of
its loss over the sum of both losses (the skew), on noise that all examples share.

What differs from the published code:

- Its models are EDM's (Karras et al., 2022), here it is `Denoiser.loss` on the model's own noise
  schedule. EDM's weighted error of the clean image is the plain error of its network's output,
  which is that of a v-prediction up to scale; for epsilon and sample prediction the weights differ.
  Timesteps are uniform in training and scoring, theirs are log-normal and those of a sampler.
- Which weights are trained is up to the model's selection. Published: the MLPs of the transformer
  blocks and the embedding of the label or text.
- The bound is the mean square of the query's own target, which is the loss of a network that
  outputs zero; theirs is measured on a freshly initialised model.
- Draws and retained examples are keyed, so that a score is reproduced; there is a limit of steps.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..data.batches import gather
from ..data.latents import EncodedExamples
from ..draws import Draws, stable_seed
from ..files import settings_key
from ..models.base import Denoiser
from ..models.kernels import exact_kernels
from ..query import Query
from .base import Scores
from .forward import forward_losses
from .unlearning import Unlearned, Weights, query_loss

EPSILON = 1e-3
"""Added to the denominator of the ratio, as published."""


@dataclass(frozen=True)
class SharedDraws:
    """The same timesteps and noise for every example, a part of the method.

    Attributes:
        seed: two seeds give independent draws.
        n: draws.
        first: the lowest timestep that is drawn; the method looks at the noisier part.
        num_train_timesteps: length of the model's training schedule.
    """

    seed: int = 0
    n: int = 100
    first: int = 0
    num_train_timesteps: int = 1000

    def of(
        self, example_id: str, shape: tuple[int, ...], caption: int = 0, flipped: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Returns timesteps [n] int64 and noise [n, *shape] float32, whatever the example."""
        draws = Draws(self.seed, self.n, num_train_timesteps=self.num_train_timesteps - self.first)
        timesteps, noise = draws.of("shared", shape, 0, flipped)
        return timesteps + self.first, noise


@dataclass(frozen=True)
class MUCS:
    """Mirrored unlearning and noise-consistent skew, as the top of this module says.

    Attributes:
        model: its selected parameters are trained, in evaluation mode as published.
        data: the examples to score.
        learning_rate: of AdamW; published: a tenth of that which the model was trained with.
        retain: the examples that the model was trained on; `data` by default.
        forget_weight: of the query's loss, against that of the retained examples.
        weight_decay: of AdamW.
        batch_size: retained examples, and draws of the query, in a step.
        stop: share of the bound that the query's clamped loss has to reach.
        max_steps: the search ends here in any case.
        seed: of the retained examples and of the noise of both.
        draws: of the scores, shared by all examples.
        query_draws: that the query's loss is reported on, and its bound.
        forward_batch: forward passes at once.
        cache: folder for finished shards of losses; a killed run continues there.
    """

    model: Denoiser
    data: EncodedExamples
    learning_rate: float
    retain: EncodedExamples | None = None
    forget_weight: float = 0.2
    weight_decay: float = 0.01
    batch_size: int = 100
    stop: float = 0.95
    max_steps: int = 1000
    seed: int = 0
    draws: SharedDraws = dataclasses.field(default_factory=SharedDraws)
    query_draws: Draws = dataclasses.field(default_factory=lambda: Draws(seed=1, n=100))
    forward_batch: int = 80
    cache: Path | None = None

    def __post_init__(self) -> None:
        if not self.learning_rate > 0 or not 0 < self.stop <= 1 or self.max_steps < 1:
            raise ValueError(
                f"MUCS: learning_rate = {self.learning_rate} must be positive, stop = {self.stop} "
                f"in (0, 1], max_steps = {self.max_steps} at least 1"
            )

    @exact_kernels()
    def unlearn(self, query: Query) -> Unlearned:
        """Trains on retained examples and away from the query; the model is left as it is.

        Returns:
            The weights; `step_sizes` holds the learning rate of each step.

        Raises:
            ValueError: a loss is not finite.
        """
        model = self.model
        before, bound = query_loss(model, query, self.query_draws), self.bound(query)
        own = {n: p.detach().clone() for n, p in model.parameters.items()}
        done = 0
        with model.replaced(own), model.gradients_on():
            chosen = list(model.parameters.values())
            optimizer = torch.optim.AdamW(
                chosen, lr=self.learning_rate, weight_decay=self.weight_decay
            )
            for step in range(self.max_steps):
                forgotten = self._forget_loss(query, step, bound)
                loss = self._retain_loss(step) - self.forget_weight * forgotten
                if not torch.isfinite(loss):
                    raise ValueError(
                        f"unlearning {query.id!r}: the loss is {loss.item()} at step {step}; use a "
                        "smaller learning rate"
                    )
                if forgotten.item() >= self.stop * bound:
                    break
                optimizer.zero_grad()
                loss.backward(inputs=chosen)
                optimizer.step()
                done = step + 1
            after = query_loss(model, query, self.query_draws)
            weights: Weights = {n: p.detach().clone() for n, p in model.parameters.items()}
            optimizer.zero_grad()
        return Unlearned(weights, before, after, [self.learning_rate] * done)

    @torch.no_grad()
    def bound(self, query: Query) -> float:
        """Returns the loss of the query where the network says nothing, the limit of forgetting."""
        timesteps, noise = self.query_draws.of(query.id, tuple(query.latents.shape))
        batch = query.latents[None], query.text[None], timesteps[None], noise[None]
        squares = self.model.predict(*batch)[1].double().square().mean(dim=(0, 1, 2))  # [h, w]
        if query.mask is None:
            return float(squares.mean())
        mask = query.mask.to(squares)
        return float((squares * mask).sum() / mask.sum())

    def _forget_loss(self, query: Query, step: int, bound: float) -> Tensor:
        draws = self._fresh(stable_seed(self.seed, "forget", step), self.batch_size)
        timesteps, noise = draws.of(query.id, tuple(query.latents.shape))
        losses = self.model.loss(
            query.latents[None], query.text[None], timesteps[None], noise[None], query.mask
        )
        return losses.clamp(max=bound).mean()

    def _retain_loss(self, step: int) -> Tensor:
        data = self.data if self.retain is None else self.retain
        key = stable_seed(self.seed, "retain", step)
        generator = np.random.Generator(np.random.Philox(key=key))
        rows = generator.permutation(len(data.ids))[: self.batch_size].tolist()
        captions = [int(generator.integers(data.caption_counts[r])) for r in rows]
        jobs = [(0, r, c) for r, c in zip(rows, captions, strict=True)]
        return self.model.loss(*gather(data, self._fresh(key, 1), jobs)).mean()

    def _fresh(self, seed: int, n: int) -> Draws:
        return Draws(seed, n, num_train_timesteps=self.model.num_train_timesteps)

    @exact_kernels()
    def losses(self, rows: Sequence[int], weights: Weights | None = None) -> np.ndarray:
        """Returns losses [rows, draws] on the shared noise, with the model's or other weights."""
        with self.model.replaced(weights or {}):
            cache = None
            if self.cache is not None:
                key = settings_key(
                    {"data": self.data.fingerprint, "draws": repr(self.draws), "rows": list(rows),
                     "model": self.model.fingerprint()}
                )  # fmt: skip
                cache = self.cache / f"losses-{key}"
            return forward_losses(
                self.model, self.data, self.draws, rows, batch_size=self.forward_batch,
                cache=cache, description="losses" if weights is None else "losses after",
            )[:, 0]  # fmt: skip

    def attribute(self, query: Query, candidates: Sequence[str] | None = None) -> Scores:
        """Scores examples by the mean over draws of (new - old) / (new + old) of their losses.

        Args:
            query: the picture to forget.
            candidates: ids to score; all examples by default.

        Returns:
            Scores in [-1, 1], in the order of the data set or of `candidates`. `settings` holds
            the query's loss before and after, its bound, the steps, and seconds by stage.

        Raises:
            ValueError: a candidate that is no example, or a loss that is not finite.
        """
        place = {example: row for row, example in enumerate(self.data.ids)}
        ids = list(self.data.ids if candidates is None else candidates)
        if unknown := [i for i in ids if i not in place]:
            raise ValueError(f"candidates: {unknown[0]!r} is no training example")
        rows = [place[i] for i in ids]
        started = time.monotonic()
        old = self.losses(rows)
        old_done = time.monotonic()
        unlearned = self.unlearn(query)
        unlearn_done = time.monotonic()
        new = self.losses(rows, unlearned.weights)
        values = ((new - old) / (new + old + EPSILON)).mean(1)
        settings = {
            "parameters": list(self.model.parameters),
            "learning_rate": self.learning_rate,
            "forget_weight": self.forget_weight,
            "weight_decay": self.weight_decay,
            "batch_size": self.batch_size,
            "steps": len(unlearned.step_sizes),
            "stop": self.stop,
            "bound": self.bound(query),
            "query_loss": [unlearned.loss_before, unlearned.loss_after],
            "seed": self.seed,
            "draws": dataclasses.asdict(self.draws),
            "seconds": {
                "losses before": old_done - started,
                "unlearning": unlearn_done - old_done,
                "losses after": time.monotonic() - unlearn_done,
            },
        }
        return Scores(ids, values, "MUCS", settings, query)
