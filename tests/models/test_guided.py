from __future__ import annotations

import pytest
import torch

from tests.models.test_unet import build
from tests.reference.denoising import denoising_losses
from unsee.draws import Draws
from unsee.models.guided import GuidedDenoiser

GENERATOR = torch.Generator().manual_seed(8)
LATENTS = torch.randn(2, 4, 8, 8, generator=GENERATOR)
TEXT = torch.randn(2, 5, 12, generator=GENERATOR)
NULL = torch.randn(5, 12, generator=GENERATOR)


def batch() -> tuple[torch.Tensor, ...]:
    made = [Draws(n=3).of(i, (4, 8, 8)) for i in "ab"]
    return LATENTS, TEXT, torch.stack([t for t, _ in made]), torch.stack([e for _, e in made])


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_loss_is_that_of_the_guided_prediction(prediction: str) -> None:
    model = build(prediction=prediction)
    latents, text, timesteps, noise = batch()
    guided = GuidedDenoiser(model, NULL, 3.0)
    outputs, target = guided.predict(latents, text, timesteps, noise)
    for b in range(2):
        for d in range(3):
            t, e = timesteps[b, d], noise[b, d][None]
            noisy = model.schedule.add_noise(latents[b][None], e, t[None])
            told, free = (model.network(noisy, t, c[None]).sample for c in (text[b], NULL))
            # float32, whose rounding is multiplied by the scale
            expected = (free + 3.0 * (told - free))[0]
            torch.testing.assert_close(outputs[b, d], expected, rtol=1e-4, atol=1e-5)
    expected = (outputs - target).square().mean((2, 3, 4))
    torch.testing.assert_close(guided.loss(*batch()), expected)


def test_a_scale_of_one_is_the_model_itself() -> None:
    model = build(prediction="v_prediction")
    plain = denoising_losses(model.network, model.schedule, *batch())
    torch.testing.assert_close(GuidedDenoiser(model, NULL, 1.0).loss(*batch()), plain,
                               rtol=1e-4, atol=1e-5)  # fmt: skip


def test_guidance_is_part_of_the_fingerprint() -> None:
    model = build()
    prints = {GuidedDenoiser(model, n, s).fingerprint() for n in (NULL, -NULL) for s in (1.0, 3.0)}
    assert len(prints | {model.fingerprint()}) == 5
    assert list(GuidedDenoiser(model, NULL, 3.0).parameters) == list(model.parameters)
