"""Attribution by Unlearning: forget the picture, see what else is forgotten (AbU).

Wang, Hertzmann, Efros, Zhu, Zhang: "Data Attribution for Text-to-Image Models by Unlearning
Synthesized Images", NeurIPS 2024.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ..curvature.diagonal import DiagonalFisher
from ..curvature.kfac import EKFAC, KFAC
from ..data.latents import EncodedExamples
from ..draws import Draws
from ..files import settings_key
from ..gradients import Gradients, mean_gradient, wide
from ..models.base import Denoiser
from ..models.kernels import exact_kernels
from ..query import Query
from .base import Scores
from .forward import forward_losses, noise_floor

logger = logging.getLogger(__name__)

Weights = dict[str, Tensor]

Change = Literal["difference", "ratio", "timestep"]
"""How two losses of an example on one draw are compared, before the mean over draws.

`difference`: after - before, as published. `ratio`: (after - before) / (after + before), which is
MUCS's: examples of small loss count as much as those of large loss. `timestep`: the difference,
divided by its root mean square over the examples in that draw's part of the noise schedule, so
that no part leads (after Diffusion-ReTrac, Xie et al., arXiv 2401.09031, which divides gradients).
"""

RISE = 0.25
"""How far to unlearn where nothing else is asked for: it predicts retraining better than 5%
(docs/benchmark.md)."""

GRADIENT_PASSES = 64
"""Draws of the query at once, at most, where there is a backward pass, which takes more memory."""

FLOOR_SHARE, FEWEST, MOST = 0.025, 8, 64
"""Of the scored examples: the sample that the noise floor is measured on, and its bounds."""


def query_gradient(model: Denoiser, query: Query, draws: Draws, batch_size: int = 64) -> Gradients:
    """Returns the gradient of the query's loss, averaged over its draws, in float64."""
    timesteps, noise = draws.of(query.id, tuple(query.latents.shape))
    total: Gradients = {}
    with model.gradients_on():
        for first in range(0, draws.n, batch_size):
            t, e = timesteps[first : first + batch_size], noise[first : first + batch_size]
            loss = model.loss(query.latents[None], query.text[None], t[None], e[None], query.mask)
            for name, gradient in mean_gradient(loss, model.parameters).items():
                share = gradient * (len(t) / draws.n)
                total[name] = total[name] + share if name in total else share
    return total


@torch.no_grad()
def query_loss(model: Denoiser, query: Query, draws: Draws, batch_size: int = 80) -> float:
    """Returns the query's loss, averaged over its draws (and its mask's cells, if any)."""
    timesteps, noise = draws.of(query.id, tuple(query.latents.shape))
    values = [
        wide(model.loss(query.latents[None], query.text[None], t[None], e[None], query.mask))
        for t, e in zip(timesteps.split(batch_size), noise.split(batch_size), strict=True)
    ]
    return float(torch.cat(values, 1).mean())


@dataclass(frozen=True)
class Unlearned:
    """Weights that have forgotten a query.

    Attributes:
        weights: name -> new value of each selected parameter.
        loss_before: the query's loss with the model's own weights.
        loss_after: with the new ones, on the same draws.
        step_sizes: the factor of each step's preconditioned gradient.
    """

    weights: Weights
    loss_before: float
    loss_after: float
    step_sizes: list[float]

    @property
    def rise(self) -> float:
        """Relative rise of the query's loss."""
        return self.loss_after / self.loss_before - 1


@dataclass(frozen=True)
class ForwardAbU:
    """Attribution by Unlearning, by forward re-evaluation of the training examples.

    The score of an example is the rise of its loss when the query is unlearned; captions are
    averaged, and of a picture and its mirror image the larger rise counts.

    Attributes:
        model: the model, its selected parameters being what is unlearned.
        data: the training examples.
        curvature: preconditions the ascent. The diagonal Fisher of per-draw gradients is the
            published one; with EK-FAC this is AbU+ (Wang et al., "Fast Data Attribution for
            Text-to-Image Models", 2025), up to its step size.
        rise: how far to unlearn, as a relative rise of the query's own loss. A step of fixed size
            is not portable between models, so it is found by search.
        step_size: fixed factor instead; the paper's is 0.01 / (number of training examples).
        steps: ascent steps; with `rise`, each goes an equal part of the (geometric) way.
        damping: of the curvature, relative to each parameter's mean; 0 is the published update.
        draws: the training examples' draws; the same before and after.
        query_draws: timesteps and noise that the query is unlearned with, for each step.
        change: how an example's losses before and after are compared.
        flips: also scores mirrored training pictures, and takes the larger.
        batch_size: forward passes at once; changes speed, and scores only within the noise floor.
        cache: folder for finished shards of losses; a killed run continues there.
    """

    model: Denoiser
    data: EncodedExamples
    curvature: DiagonalFisher | KFAC | EKFAC
    rise: float = RISE
    step_size: float | None = None
    steps: int = 1
    damping: float = 0.1
    draws: Draws = dataclasses.field(default_factory=Draws)
    query_draws: Draws = dataclasses.field(default_factory=lambda: Draws(seed=1, n=200))
    change: Change = "difference"
    flips: bool = False
    batch_size: int = 80
    cache: Path | None = None

    def __post_init__(self) -> None:
        if self.step_size is None and not self.rise > 0:
            raise ValueError(f"rise = {self.rise} must be positive: 0.25 raises the loss by 25%")
        if self.steps < 1:
            raise ValueError(f"steps = {self.steps} must be at least 1")
        if self.flips and not self.data.has_flips:
            raise ValueError(
                "flips = True, but flips were not encoded: use encode_dataset(flips=True)"
            )

    @exact_kernels()
    def unlearn(self, query: Query) -> Unlearned:
        """Finds weights that raise the query's loss; the model itself is left as it is."""
        model = self.model
        weights: Weights = {n: wide(p.detach()).clone() for n, p in model.parameters.items()}
        before = query_loss(model, query, self.query_draws, self.batch_size)
        if not np.isfinite(before):
            raise ValueError(
                f"the loss of the query {query.id!r} is {before}: check the model with "
                "`unsee doctor`; a float16 model may need float32"
            )
        after, sizes = before, []
        for step in range(self.steps):
            # With a fixed size, fresh draws for every step, as published; the search measures the
            # rise on the draws of the first.
            draws = dataclasses.replace(self.query_draws, seed=self.query_draws.seed + 7919 * step)
            with model.replaced(weights):
                at_once = min(GRADIENT_PASSES, self.batch_size)
                gradient = query_gradient(model, query, draws, at_once)
                direction = self.curvature.precondition(gradient, self.damping)
                if self.step_size is not None:
                    size = self.step_size
                else:
                    target = before * (1 + self.rise) ** ((step + 1) / self.steps)
                    size = self._find_size(query, weights, gradient, direction, after, target)
                weights = {n: w + size * direction[n] for n, w in weights.items()}
                with model.replaced(weights):
                    after = query_loss(model, query, self.query_draws, self.batch_size)
            sizes.append(size)
        if not np.isfinite(after):
            raise ValueError(
                f"unlearning {query.id!r}: the loss is {after} after {self.steps} steps of size "
                f"{sizes[-1]:g}; use a smaller step, or rise= which searches for one"
            )
        return Unlearned(weights, before, after, sizes)

    def _find_size(
        self, query: Query, weights: Weights, gradient: Gradients, direction: Gradients,
        before: float, target: float,
    ) -> float:  # fmt: skip
        """Returns the step size that brings the query's loss to `target`, within 1% of the way."""
        slope = sum(float((gradient[n] * direction[n]).sum()) for n in gradient)
        if not slope > 0:
            raise ValueError(
                f"unlearning {query.id!r}: its loss has no gradient in the selected parameters"
            )

        nearest = before

        def loss_at(size: float) -> float:
            nonlocal nearest
            moved = {n: w + size * direction[n] for n, w in weights.items()}
            with self.model.replaced(moved):
                value = query_loss(self.model, query, self.query_draws, self.batch_size)
            if abs(value - target) < abs(nearest - target):
                nearest = value
            return value

        low, high = 0.0, (target - before) / slope
        value = loss_at(high)
        for _ in range(40):
            if not np.isfinite(value) or value >= target:
                break
            low, high = high, 2 * high
            value = loss_at(high)
        size = high
        for _ in range(40):
            if np.isfinite(value) and abs(value - target) <= 0.01 * (target - before):
                return size
            low, high = (size, high) if np.isfinite(value) and value < target else (low, size)
            size = 0.5 * (low + high)
            value = loss_at(size)
        raise ValueError(
            f"unlearning {query.id!r}: no step raises its loss from {before:.6g} to {target:.6g}, "
            f"the nearest is {nearest:.6g}; use a smaller rise, or other parameters"
        )

    def losses(self, rows: Sequence[int], weights: Weights | None = None) -> np.ndarray:
        """Returns training losses [rows, views, draws] with the model's or with other weights."""
        cache = None
        if self.cache is not None:
            new = None if weights is None else {n: _checksum(w) for n, w in weights.items()}
            key = settings_key(
                {"data": self.data.fingerprint, "draws": dataclasses.asdict(self.draws),
                 "rows": list(rows), "flips": self.flips, "model": self.model.fingerprint(),
                 "replaced": new}
            )  # fmt: skip
            cache = self.cache / f"losses-{key}"
        with self.model.replaced(weights or {}):
            return forward_losses(
                self.model, self.data, self.draws, rows, flips=self.flips,
                batch_size=self.batch_size, cache=cache,
                description="losses before" if weights is None else "losses after",
            )  # fmt: skip

    @exact_kernels()
    def attribute(
        self,
        query: Query,
        candidates: Sequence[str] | None = None,
        unlearned: Unlearned | None = None,
        before: np.ndarray | None = None,
    ) -> Scores:
        """Scores training examples by the rise of their loss.

        Args:
            query: the picture to forget.
            candidates: ids to score; all examples by default.
            unlearned: what `unlearn` returned for this query, where it is at hand.
            before: [rows, views, draws] losses with the model's own weights, where they are.

        Returns:
            Scores in the order of the data set, or of `candidates`. `settings` holds the query's
            loss before and after, the step sizes, the noise floor, and seconds by stage.

        Raises:
            ValueError: an unknown candidate, a loss that is not finite, or a step so small that
                the scores drown in rounding.
        """
        rows = self._rows(candidates)
        started = time.monotonic()
        before = self.losses(rows) if before is None else before
        baseline_done = time.monotonic()
        unlearned = self.unlearn(query) if unlearned is None else unlearned
        unlearn_done = time.monotonic()
        after = self.losses(rows, unlearned.weights)
        floor = self._checked_floor(query, rows, before, after, unlearned)
        change = changes(before, after, self.change).mean(axis=2).max(axis=1)
        settings = {
            "parameters": list(self.model.parameters),
            "steps": self.steps,
            "damping": self.damping,
            "rise_wanted": None if self.step_size is not None else self.rise,
            "rise": unlearned.rise,
            "query_loss": [unlearned.loss_before, unlearned.loss_after],
            "step_sizes": unlearned.step_sizes,
            "draws": dataclasses.asdict(self.draws),
            "query_draws": dataclasses.asdict(self.query_draws),
            "flips": self.flips,
            "change": self.change,
            "noise_floor": floor,
            "box": query.box,
            "curvature": {
                "type": type(self.curvature).__name__,
                "count": self.curvature.count,
                **self.curvature.settings,
            },
            "seconds": {
                "losses before": baseline_done - started,
                "unlearning": unlearn_done - baseline_done,
                "losses after": time.monotonic() - unlearn_done,
            },
        }
        ids = [self.data.ids[r] for r in rows]
        return Scores(ids, change, "AbU", settings, query)

    def _checked_floor(
        self, query: Query, rows: list[int], before: np.ndarray, after: np.ndarray,
        unlearned: Unlearned,
    ) -> float:  # fmt: skip
        """Returns the noise floor of the scores; refuses scores that lie below it."""
        count = min(MOST, max(FEWEST, int(FLOOR_SHARE * len(rows))), len(rows))
        places = np.linspace(0, len(rows) - 1, count).round().astype(int)
        floor = noise_floor(
            self.model, self.data, self.draws, [rows[p] for p in places], self.batch_size,
            before[places],
        )  # fmt: skip
        typical = float(np.sqrt(np.mean((after - before).mean(axis=2) ** 2)))
        if typical <= floor:
            raise ValueError(
                f"unlearning {query.id!r}: a rise of {unlearned.rise:.2g} of its loss moves the "
                f"training losses by {typical:.2g}, less than the {floor:.2g} that rounding does; "
                "use a larger rise, or a float32 model if this one is of lower precision"
            )
        return floor

    def _rows(self, candidates: Sequence[str] | None) -> list[int]:
        if candidates is None:
            return list(range(len(self.data.ids)))
        if not len(candidates):
            raise ValueError("candidates: the list is empty; leave it out to score every example")
        at = {identifier: row for row, identifier in enumerate(self.data.ids)}
        unknown = [c for c in candidates if c not in at]
        if unknown:
            raise ValueError(f"candidates: {unknown[0]!r} is no training example")
        return [at[c] for c in candidates]


def changes(before: np.ndarray, after: np.ndarray, change: Change) -> np.ndarray:
    """Compares losses [rows, views, draws] before and after; positive where they rose."""
    rise = after - before
    if change == "difference":
        return rise
    if change == "ratio":
        return rise / np.maximum(after + before, np.finfo(np.float64).tiny)
    scale = np.sqrt(np.square(rise).mean(axis=(0, 1)))
    return rise / np.maximum(scale, np.finfo(np.float64).tiny)


def _checksum(tensor: Tensor) -> str:
    import hashlib

    data = tensor.detach().cpu().double().contiguous().numpy().tobytes()
    return hashlib.sha256(data).hexdigest()[:16]
