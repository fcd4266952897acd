import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from unsee.draws import Draws
from unsee.evaluation.deviation import measure_outcome, ssim
from unsee.methods.unlearning import query_loss

DRAWS = Draws(seed=-100, n=4)


def test_the_model_that_made_it_makes_it_again(tiny_model):
    query = tiny_model.generate("a red circle", seed=3, steps=4, guidance_scale=2.0)
    got = measure_outcome(tiny_model, query, DRAWS)
    assert got.loss == query_loss(tiny_model, query, DRAWS)
    assert got.mse == 0
    # means of products minus products of means cancel
    assert got.ssim == pytest.approx(1, abs=1e-9)
    assert got.latent_cosine == pytest.approx(1, abs=1e-6)


def test_another_model_makes_another_picture(tiny_model):
    query = tiny_model.generate("a red circle", seed=3, steps=4, guidance_scale=2.0)
    with torch.no_grad():
        for parameter in tiny_model.network.parameters():
            parameter.mul_(1.5)
    again = tiny_model.generate("a red circle", seed=3, steps=4, guidance_scale=2.0)
    got = measure_outcome(tiny_model, query, DRAWS)
    a, b = (np.asarray(p) / 255 for p in (query.image, again.image))
    assert got.mse == pytest.approx(((a - b) ** 2).mean())
    assert got.ssim == ssim(a, b) < 1
    assert got.latent_cosine < 1
    assert got.loss != query_loss(tiny_model, dataclasses.replace(query, id="x"), DRAWS)


@pytest.mark.filterwarnings("ignore:invalid value")  # of a picture that is not a number
def test_refuses_what_cannot_be_made_again(tiny_model):
    query = tiny_model.query(Image.new("RGB", (64, 64)), "a red circle")
    with pytest.raises(ValueError, match="has no seed"):
        measure_outcome(tiny_model, query, DRAWS)
    query = tiny_model.generate("a red circle", seed=3, steps=1)
    other = dataclasses.replace(query, latents=torch.zeros(4, 4, 4))
    with pytest.raises(ValueError, match="retrain with the same autoencoder"):
        measure_outcome(tiny_model, other, DRAWS)
    with torch.no_grad():
        next(tiny_model.network.parameters()).fill_(float("nan"))
    with pytest.raises(ValueError, match="the model's loss is nan"):
        measure_outcome(tiny_model, query, DRAWS)


def test_refuses_a_picture_that_is_not_finite(tiny_model, monkeypatch):
    query = tiny_model.generate("a red circle", seed=3, steps=1)
    broken = dataclasses.replace(query, latents=query.latents * float("nan"))
    monkeypatch.setattr(tiny_model, "generate", lambda *arguments: broken)
    with pytest.raises(ValueError, match="the picture that the model makes is not finite"):
        measure_outcome(tiny_model, query, DRAWS)


def test_ssim_agrees_with_a_loop():
    rng = np.random.default_rng(0)
    a, b = rng.random((9, 8, 3)), rng.random((9, 8, 3))
    found = []
    for y in range(3):
        for x in range(2):
            for c in range(3):
                p, q = a[y : y + 7, x : x + 7, c], b[y : y + 7, x : x + 7, c]
                covariance = ((p - p.mean()) * (q - q.mean())).mean()
                found.append(
                    (2 * p.mean() * q.mean() + 1e-4) * (2 * covariance + 9e-4)
                    / ((p.mean() ** 2 + q.mean() ** 2 + 1e-4) * (p.var() + q.var() + 9e-4))
                )  # fmt: skip
    # means of products minus products of means cancel
    assert ssim(a, b) == pytest.approx(np.mean(found), rel=1e-12)
    assert ssim(a, a) == pytest.approx(1, abs=1e-12)


def test_ssim_refuses():
    with pytest.raises(ValueError, match="ssim: pictures of"):
        ssim(np.zeros((9, 9, 3)), np.zeros((8, 9, 3)))
    with pytest.raises(ValueError, match="windows of 7"):
        ssim(np.zeros((6, 9, 3)), np.zeros((6, 9, 3)))
