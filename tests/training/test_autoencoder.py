from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from unsee.data.dataset import load_dataset
from unsee.training.autoencoder import (
    AutoencoderRecipe,
    build_autoencoder,
    encode,
    load_pixels,
    psnr,
    train_autoencoder,
    train_decoder,
)
from unsee.training.loop import Optimization, seeded_weights

RECIPE = AutoencoderRecipe(resolution=16, channels=(8, 16), latent_channels=4)
OPTIMIZATION = Optimization(steps=40, batch_size=8, learning_rate=4e-3, warmup=10, ema_decay=0.95)


def make_pixels(n: int = 16) -> Tensor:
    """Returns n pictures [n, 3, 16, 16]: a coloured rectangle on white."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.ones((n, 3, 16, 16))
    for picture in pixels:
        x, y, w, h = torch.randint(2, 8, (4,), generator=generator).tolist()
        colour = torch.rand((3, 1, 1), generator=generator) * 2 - 1
        picture[:, y : y + h, x : x + w] = colour
    return pixels


def test_training_improves_the_reconstruction_and_scales_latents(tmp_path: Path) -> None:
    pixels = make_pixels()
    with seeded_weights(OPTIMIZATION.seed):
        before = psnr(build_autoencoder(RECIPE).eval(), pixels)
    model = train_autoencoder(pixels, RECIPE, OPTIMIZATION, tmp_path)
    after = psnr(model, pixels)
    assert after.shape == (16,)
    # Measured: 5.5 dB untrained, 19.8 dB after; every picture gains.
    assert float(after.mean()) > float(before.mean()) + 10
    assert (after > before).all()
    assert not model.training
    scaled = encode(model, pixels, batch_size=5) * model.config["scaling_factor"]
    assert scaled.shape == (16, 4, 8, 8)
    # float32 sums over 4,096 numbers, and a batch size that is not the one it was set with
    assert float(scaled.std()) == pytest.approx(1, abs=1e-4)
    assert model.config["shift_factor"] is None


def test_equal_seeds_give_equal_weights_and_other_pixels_are_refused(tmp_path: Path) -> None:
    pixels = make_pixels(6)
    short = dataclasses.replace(OPTIMIZATION, steps=3)
    first = train_autoencoder(pixels, RECIPE, short, tmp_path / "a")
    second = train_autoencoder(pixels, RECIPE, short, tmp_path / "b")
    again = train_autoencoder(pixels, RECIPE, short, tmp_path / "a")  # from its checkpoint
    for one, two, three in zip(
        first.parameters(), second.parameters(), again.parameters(), strict=True
    ):
        assert torch.equal(one, two)
        assert torch.equal(one, three)
    assert first.config["scaling_factor"] == again.config["scaling_factor"]
    with pytest.raises(ValueError, match=r"made with pixels = '\w+'; this run has pixels = '\w+'"):
        train_autoencoder(-pixels, RECIPE, short, tmp_path / "a")


def test_a_decoder_is_trained_further_and_latents_stay_to_the_bit(tmp_path: Path) -> None:
    pixels = make_pixels()
    model = train_autoencoder(pixels, RECIPE, OPTIMIZATION, tmp_path / "whole")
    scaling, latents, before = (
        model.config["scaling_factor"],
        encode(model, pixels),
        psnr(model, pixels),
    )
    train_decoder(model, pixels, OPTIMIZATION, tmp_path / "decoder")
    assert torch.equal(encode(model, pixels), latents)
    assert model.config["scaling_factor"] == scaling
    assert float(psnr(model, pixels).mean()) > float(before.mean()) + 1  # measured: 19.8 to 21.3
    assert not model.training


def test_a_decoder_run_resumes_to_the_same_weights(tmp_path: Path) -> None:
    pixels = make_pixels(6)
    short = dataclasses.replace(OPTIMIZATION, steps=6, checkpoint_seconds=0)

    def run(directory: Path, fail_at: int | None = None) -> list[Tensor]:
        with seeded_weights(0):
            model = build_autoencoder(RECIPE).eval()
        calls = iter(range(100))

        def stop(*_: object) -> None:
            if next(calls) == fail_at:
                raise KeyboardInterrupt

        model.decoder.register_forward_pre_hook(stop)
        train_decoder(model, pixels, short, directory)
        return [p.detach() for p in model.parameters()]

    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", fail_at=3)
    resumed = run(tmp_path / "stopped")
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))
    with seeded_weights(1):
        other = build_autoencoder(RECIPE).eval()
    with pytest.raises(ValueError, match=r"made with autoencoder = '\w+'; this run has"):
        train_decoder(other, pixels, short, tmp_path / "whole")


def test_psnr_is_that_of_the_definition() -> None:
    with seeded_weights(0):
        model = build_autoencoder(RECIPE).eval()
    pixels = make_pixels(3)
    with torch.no_grad():
        decoded = model.decode(model.encode(pixels).latent_dist.mean).sample
    # Of pictures in 0..255: 10 log10(255^2 / mean squared error).
    shown = ((decoded.clamp(-1, 1) + 1) * 127.5).double().numpy()
    truth = ((pixels + 1) * 127.5).double().numpy()
    expected = 10 * np.log10(255**2 / ((shown - truth) ** 2).mean(axis=(1, 2, 3)))
    # float32 network in batches of another size
    np.testing.assert_allclose(psnr(model, pixels, batch_size=2).numpy(), expected, rtol=1e-4)


def test_pixels_are_centred_squares_from_minus_one_to_one(image_folder: Path) -> None:
    wide = Image.new("RGB", (96, 48), "red")
    wide.paste(Image.new("RGB", (48, 48), (0, 255, 0)), (24, 0))
    wide.save(image_folder / "red-square.png")
    data = load_dataset("imagefolder", data_dir=image_folder)
    pixels = load_pixels(data, 16)
    assert pixels.shape == (12, 3, 16, 16)
    assert pixels.dtype == torch.float32
    row = next(i for i, e in enumerate(data) if e.captions == ("a red square",))
    green = torch.tensor([-1.0, 1.0, -1.0])[:, None, None].expand(3, 16, 16)
    assert torch.equal(pixels[row], green)  # the red margins are cut, not squeezed
    assert float(pixels[row - 1 if row else 1].max()) == 1.0  # white


def test_pictures_that_cannot_be_read_are_left_out_where_asked(
    image_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = load_dataset("imagefolder", data_dir=image_folder)
    bad = sorted(image_folder.glob("*.png"))[0]
    bad.write_bytes(bad.read_bytes()[:40])
    with pytest.raises(ValueError, match=bad.name):
        load_pixels(data, 32)
    pixels = load_pixels(data, 32, on_error="skip")
    assert len(pixels) == len(data) - 1
    assert bad.name in caplog.text
