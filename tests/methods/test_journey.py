from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from diffusers import PNDMScheduler

from unsee.methods.journey import StepDraws, journey_gradients, recorded_predictions, travel
from unsee.models.base import Denoiser

STEPS = 4


def test_the_journey_is_the_samplers(tiny_model: Denoiser) -> None:
    """DDIM without noise: a step leads on the straight line between prediction and noise."""
    query = tiny_model.generate("a red square", seed=3, steps=STEPS, guidance_scale=2.0)
    journey = travel(tiny_model, query)
    pipeline = tiny_model.pipeline
    assert pipeline is not None
    assert journey.timesteps.tolist() == pipeline.scheduler.timesteps.tolist()
    assert journey.clean.shape == (STEPS, *query.latents.shape)
    # The last step ends at what it predicts.
    torch.testing.assert_close(journey.clean[-1], query.latents, rtol=0, atol=1e-4)
    shape = (1, *query.latents.shape)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    text, empty = (tiny_model.encode_prompts([p]) for p in (query.prompt, ""))
    alphas = pipeline.scheduler.alphas_cumprod
    for s, t in enumerate(journey.timesteps):
        with torch.no_grad():
            free, told = (tiny_model.network(x, t, c).sample for c in (empty, text))
        v = free + 2.0 * (told - free)
        signal, noise = alphas[t] ** 0.5, (1 - alphas[t]) ** 0.5
        clean, direction = signal * x - noise * v, signal * v + noise * x
        torch.testing.assert_close(clean[0], journey.clean[s], rtol=0, atol=1e-4)
        if s + 1 < STEPS:
            to = alphas[journey.timesteps[s + 1]]
            x = to**0.5 * clean + (1 - to) ** 0.5 * direction


def test_gradients_are_means_over_steps(tiny_model: Denoiser) -> None:
    query = tiny_model.generate("a red square", seed=3, steps=STEPS, guidance_scale=2.0)
    got = journey_gradients(tiny_model, [query], draws=2)
    journey = travel(tiny_model, query)
    draws = StepDraws(journey, n=2)
    total = torch.zeros(sum(p.numel() for p in tiny_model.parameters.values()))
    with tiny_model.gradients_on():
        for s, step in enumerate(journey.steps()):
            t, e = draws.of(step.id, tuple(query.latents.shape))
            assert t.tolist() == [int(journey.timesteps[s])] * 2
            for k in range(2):
                loss = tiny_model.loss(
                    step.latents[None], query.text[None], t[None, k : k + 1], e[None, k : k + 1]
                )
                parts = torch.autograd.grad(loss.mean(), list(tiny_model.parameters.values()))
                total += torch.cat([p.flatten() for p in parts]) / (2 * STEPS)
    assert got.ids == [query.id]
    # float32 sums in another order
    assert np.abs(got.shards[0][0] - total.numpy()).max() <= 1e-4 * float(total.abs().max())


def test_steps_have_noise_of_their_own(tiny_model: Denoiser) -> None:
    query = tiny_model.generate("a red square", seed=3, steps=STEPS)
    journey = travel(tiny_model, query)
    draws = StepDraws(journey, n=2)
    first, second = (draws.of(step.id, (4, 8, 8))[1] for step in journey.steps()[:2])
    assert not torch.equal(first, second)


def test_the_sampler_is_left_as_it_is(tiny_model: Denoiser) -> None:
    assert tiny_model.pipeline is not None
    scheduler = tiny_model.pipeline.scheduler
    with pytest.raises(KeyError), recorded_predictions(scheduler):
        raise KeyError
    assert "step" not in vars(scheduler)


def test_journeys_that_are_not_known_are_refused(tiny_model: Denoiser) -> None:
    query = tiny_model.generate("a red square", seed=3, steps=STEPS)
    with pytest.raises(ValueError, match="provenance has no seed, steps, guidance_scale"):
        travel(tiny_model, dataclasses.replace(query, provenance={}))
    other = dataclasses.replace(query, provenance={**query.provenance, "seed": 4})
    with pytest.raises(ValueError, match="leads elsewhere"):
        travel(tiny_model, other)
    with pytest.raises(ValueError, match="no query"):
        journey_gradients(tiny_model, [])


def test_samplers_that_do_not_tell_are_named(tiny_model: Denoiser) -> None:
    assert tiny_model.pipeline is not None
    scheduler = PNDMScheduler.from_config(tiny_model.pipeline.scheduler.config)
    tiny_model.pipeline.scheduler = scheduler
    query = tiny_model.generate("a red square", seed=3, steps=STEPS)
    with pytest.raises(ValueError, match="PNDMScheduler does not tell the clean latent"):
        travel(tiny_model, query)
