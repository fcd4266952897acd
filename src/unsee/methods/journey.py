"""Gradients along a picture's generation: what the model meant to make at every step.

Journey-TRAK (Georgiev et al., "The Journey, Not the Destination: How Data Guides Diffusion
Models", 2023) asks, at a step of the sampler, about the clean latent that the model has in mind
there, and about this step's timestep only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..draws import Draws, stable_seed
from ..models.base import Denoiser
from ..query import Query
from .example_gradients import GradientMatrix, Measure, QueryExamples, example_gradients


@dataclass(frozen=True)
class Journey:
    """The steps of a picture's generation, from noise to picture.

    Attributes:
        query: the picture.
        timesteps: [S] int64, of the training schedule.
        clean: [S, C, h, w] float32, the clean latent that the model predicts at each step, with
            the guidance it was sampled with.
    """

    query: Query
    timesteps: Tensor
    clean: Tensor

    def steps(self) -> list[Query]:
        """Returns a query for each step, of the latent that the model has in mind there."""
        return [
            dataclasses.replace(self.query, id=f"{self.query.id}#{s}", latents=latents)
            for s, latents in enumerate(self.clean)
        ]


def travel(model: Denoiser, query: Query, tolerance: float = 0.05) -> Journey:
    """Generates a picture again, and records what the model predicts on the way.

    Args:
        model: has the pipeline that made the picture.
        query: its `provenance` holds the seed, the steps and the guidance scale.
        tolerance: largest distance of the new latent from the query's, relative to its norm.

    Raises:
        ValueError: the provenance says too little, the pipeline's sampler does not tell what it
            predicts, or another picture comes out.
    """
    missing = [k for k in ("seed", "steps", "guidance_scale") if k not in query.provenance]
    if missing or model.pipeline is None:
        raise ValueError(
            f"the journey of {query.id!r} is not known: its provenance has no "
            f"{', '.join(missing) or 'pipeline'}; use a query of model.generate"
        )
    about = query.provenance
    with recorded_predictions(model.pipeline.scheduler) as seen:
        again = model.generate(query.prompt, about["seed"], about["steps"], about["guidance_scale"])
    distance = float((again.latents - query.latents).norm() / query.latents.norm())
    if not distance <= tolerance:
        raise ValueError(
            f"the journey of {query.id!r} leads elsewhere: the latent differs by {distance:.2g} of "
            "its norm; use the model, the sampler and the settings that made it"
        )
    timesteps = torch.tensor([t for t, _ in seen])
    return Journey(query, timesteps, torch.cat([x.float().cpu() for _, x in seen]))


@contextlib.contextmanager
def recorded_predictions(scheduler: Any) -> Iterator[list[tuple[int, Tensor]]]:
    """Records (timestep, predicted clean latents [B, C, h, w]) of each step in a `with` block."""
    step = scheduler.step
    seen: list[tuple[int, Tensor]] = []

    @functools.wraps(step)
    def recording(output: Any, timestep: Any, *args: Any, **options: Any) -> Any:
        as_tuple = not options.pop("return_dict", True)
        result = step(output, timestep, *args, **options)
        clean = getattr(result, "pred_original_sample", None)
        if clean is None:
            raise ValueError(
                f"{type(scheduler).__name__} does not tell the clean latent that it predicts; "
                "sample with DDIMScheduler or DDPMScheduler"
            )
        seen.append((int(timestep), clean))
        return (result.prev_sample,) if as_tuple else result

    scheduler.step = recording
    try:
        yield seen
    finally:
        del scheduler.step  # the class's own is there again


@dataclass(frozen=True)
class StepDraws:
    """Independent noise at a step's own timestep.

    Attributes:
        journey: whose steps.
        seed: two seeds give independent noise.
        n: draws for each step.
    """

    journey: Journey
    seed: int = 1
    n: int = 5

    def of(
        self, example_id: str, shape: tuple[int, ...], caption: int = 0, flipped: bool = False
    ) -> tuple[Tensor, Tensor]:
        """See `DrawSource`; `example_id` is that of one of `Journey.steps`."""
        step = int(example_id.rpartition("#")[2])
        seed = stable_seed(self.seed, "journey")
        _, noise = Draws(seed, self.n).of(example_id, shape, caption, flipped)
        return self.journey.timesteps[step].repeat(self.n), noise


def journey_gradients(
    model: Denoiser,
    queries: Sequence[Query],
    *,
    seed: int = 1,
    draws: int = 5,
    measure: Measure = "loss",
) -> GradientMatrix:
    """Differentiates each query along its journey, averaged over steps and draws.

    Args:
        model: made the pictures; its selected parameters are differentiated.
        queries: pictures that it made.
        seed: of the noise.
        draws: for each step.
        measure: what is differentiated, at the clean latent of the step with the step's noise.

    Returns:
        [Q, P] float32, to be used in place of the queries' own gradients (`example_gradients`)
        with `trak_scores` or `influence_scores`.

    Raises:
        ValueError: see `travel`.
    """
    rows = []
    first: GradientMatrix | None = None
    for query in queries:
        journey = travel(model, query)
        first = example_gradients(
            model, QueryExamples(journey.steps()), StepDraws(journey, seed, draws), measure=measure
        )
        steps = np.concatenate(first.shards)
        rows.append(steps.mean(0, keepdims=True, dtype=np.float64).astype(np.float32))
    if first is None:
        raise ValueError("there is no query")
    return dataclasses.replace(first, ids=[q.id for q in queries], shards=[np.concatenate(rows)])
