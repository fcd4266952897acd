from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from unsee.data.latents import EncodedDataset
from unsee.training.loop import Optimization
from unsee.training.text_to_image import (
    UNetRecipe,
    build_scheduler,
    draw_batch,
    keep_rows,
    min_snr_weight,
    train_text_to_image,
)

from .conftest import make_data
from .killed import LONG, train_in

RECIPE = UNetRecipe(channels=(32,))
SHORT = Optimization(steps=4, batch_size=4, warmup=1, learning_rate=2e-3)


def weights_after(
    data: EncodedDataset,
    null_text: Tensor,
    directory: Path,
    recipe: UNetRecipe = RECIPE,
    optimization: Optimization = SHORT,
    **options: object,
) -> list[Tensor]:
    denoiser = train_text_to_image(recipe, data, null_text, optimization, directory, **options)
    return [p.detach() for p in denoiser.network.parameters()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# -- resumable and repeatable ---------------------------------------------------------------


def test_a_run_killed_again_and_again_ends_with_the_same_weights(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    killed = subprocess.run(
        [sys.executable, "-m", "tests.training.killed", str(tmp_path / "killed")],
        capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[2], check=False,
    )  # fmt: skip
    assert killed.returncode == 0, killed.stderr
    steps = [int(line) for line in killed.stdout.split()]
    assert steps == sorted(steps)
    # The last child may have had little left to do, but somewhere a kill fell into the run.
    assert any(0 < step < LONG.steps for step in steps)
    finished = train_in(tmp_path / "killed")  # reads the finished checkpoint
    assert same(finished, train_in(tmp_path / "whole"))


def test_equal_seeds_give_equal_weights(
    data: EncodedDataset, null_text: Tensor, tmp_path: Path
) -> None:
    first = weights_after(data, null_text, tmp_path / "a")
    torch.manual_seed(1234)  # what the caller drew before does not matter
    assert same(first, weights_after(data, null_text, tmp_path / "b"))
    other = dataclasses.replace(SHORT, seed=1)
    assert not same(first, weights_after(data, null_text, tmp_path / "c", optimization=other))


def test_a_checkpoint_of_other_data_is_refused(
    data: EncodedDataset, null_text: Tensor, tmp_path: Path
) -> None:
    weights_after(data, null_text, tmp_path)
    with pytest.raises(ValueError, match=f"made with data = '{data.fingerprint}'"):
        weights_after(make_data(seed=1), null_text, tmp_path)
    with pytest.raises(ValueError, match=r"kept = 10; this run has .*kept = 9"):
        weights_after(data, null_text, tmp_path, leave_out=["example3"])
    with pytest.raises(ValueError, match=r"channels = \(32,\); this run has channels = \(64,\)"):
        weights_after(data, null_text, tmp_path, UNetRecipe(channels=(64,)))


def test_training_lowers_the_loss(data: EncodedDataset, null_text: Tensor, tmp_path: Path) -> None:
    # Noise cannot be learnt in a moment; one colour for all can.
    data._latents[:] = torch.tensor([2.0, -1.0, 0.5, -2.0])[None, :, None, None]
    noise = torch.randn((10, 5, 4, 8, 8), generator=torch.Generator().manual_seed(0))
    timesteps = torch.arange(100, 1000, 200).expand(10, 5)

    def loss(steps: int) -> float:
        optimization = Optimization(
            steps=steps, batch_size=8, warmup=5, learning_rate=3e-3, ema_decay=0.9
        )
        denoiser = train_text_to_image(RECIPE, data, null_text, optimization, tmp_path / f"{steps}")
        assert not denoiser.network.training
        assert list(denoiser.parameters) == [n for n, _ in denoiser.network.named_parameters()]
        with torch.no_grad():
            text = data.text(range(10), 0)
            return float(denoiser.loss(data.latents(range(10)), text, timesteps, noise).mean())

    # Measured: 1.77 untrained, 0.35 after 30 steps.
    before, after = loss(0), loss(30)
    assert before > 1.5
    assert after < 0.6


# -- leaving examples out -------------------------------------------------------------------


def test_what_is_left_out_is_never_looked_at(null_text: Tensor, tmp_path: Path) -> None:
    out = ["example0", "example4", "example9"]

    def broken(value: float) -> EncodedDataset:
        data = make_data()
        rows = [data.ids.index(i) for i in out]
        data._latents[rows] = value
        data._states[[0, 10, 4, 9]] = value  # their captions; the first example has two
        return data

    zeros = weights_after(broken(0.0), null_text, tmp_path / "a", leave_out=out)
    nothing = weights_after(broken(float("nan")), null_text, tmp_path / "b", leave_out=out)
    assert same(zeros, nothing)
    # It is as if they had never been there.
    kept = make_data().select([f"example{i}" for i in (1, 2, 3, 5, 6, 7, 8)])
    assert same(zeros, weights_after(kept, null_text, tmp_path / "c"))
    with pytest.raises(ValueError, match="training loss is nan"):
        weights_after(broken(float("nan")), null_text, tmp_path / "d")


def test_rows_that_are_kept(data: EncodedDataset) -> None:
    assert keep_rows(data).tolist() == list(range(10))
    assert keep_rows(data, ["example2", "example0"]).tolist() == [1, 3, 4, 5, 6, 7, 8, 9]
    with pytest.raises(ValueError, match="'example99' is not in the data set"):
        keep_rows(data, ["example99"])


def test_something_must_be_kept(data: EncodedDataset, null_text: Tensor, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="leaves no example"):
        weights_after(data, null_text, tmp_path, leave_out=data.ids)


# -- a batch --------------------------------------------------------------------------------


def test_captions_are_dropped_at_the_rate_asked_for(
    data: EncodedDataset, null_text: Tensor
) -> None:
    rows = [i % 10 for i in range(4000)]
    generator = torch.Generator().manual_seed(0)
    _, text, _ = draw_batch(data, null_text, rows, 1000, 0.1, generator)
    dropped = (text == null_text).all(dim=(1, 2))
    # Four standard deviations of a share of 4,000: 4 * sqrt(0.1 * 0.9 / 4000) = 0.019.
    assert float(dropped.float().mean()) == pytest.approx(0.1, abs=0.019)
    for row in range(2, 10):  # those with one caption
        kept = text[[i for i in range(4000) if rows[i] == row and not dropped[i]]]
        assert (kept == data.text([row], 0)).all()
    # Of two captions each is taken half of the time, 720 of 800 rows being kept: 4 * 0.5 / 27.
    first = text[[i for i in range(4000) if rows[i] < 2 and not dropped[i]]]
    captions = torch.cat([data.text([0, 1], 0)])
    share = sum((first == c).all(dim=(1, 2)).float().mean() for c in captions)
    assert float(share) == pytest.approx(0.5, abs=0.075)


def test_no_dropout_drops_nothing(data: EncodedDataset, null_text: Tensor) -> None:
    _, text, _ = draw_batch(data, null_text, [5] * 500, 1000, 0.0, torch.Generator().manual_seed(0))
    assert (text == data.text([5], 0)).all()


def test_every_part_of_the_schedule_gets_a_timestep(
    data: EncodedDataset, null_text: Tensor
) -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack(
        [draw_batch(data, null_text, [0] * 4, 1000, 0.1, generator)[2] for _ in range(2000)]
    )
    assert torch.equal(drawn // 250, torch.arange(4).expand(2000, 4))
    # Uniform in its part: a mean of 2,000 has a deviation of 72 / sqrt(2000) = 1.6.
    centres = torch.tensor([124.5, 374.5, 624.5, 874.5])
    torch.testing.assert_close(drawn.float().mean(0), centres, rtol=0, atol=6.5)


def test_the_empty_prompt_must_look_like_a_caption(
    data: EncodedDataset, null_text: Tensor, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"is \(1, 16\), the captions' are \(12, 16\)"):
        weights_after(data, null_text[:1], tmp_path)
    with pytest.raises(ValueError, match=r"caption_dropout = 1\.5"):
        weights_after(data, null_text, tmp_path, caption_dropout=1.5)
    with pytest.raises(ValueError, match=r"snr_gamma = 0\.0"):
        weights_after(data, null_text, tmp_path, UNetRecipe(channels=(32,), snr_gamma=0.0))


# -- the weighting of timesteps -------------------------------------------------------------


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_min_snr_weights_the_error_of_the_clean_latent(prediction_type: str) -> None:
    """The paper's loss is min(SNR, gamma) * |x0 - predicted x0|^2, whatever is predicted."""
    scheduler = build_scheduler(UNetRecipe(prediction_type=prediction_type))
    scheduler.set_timesteps(1000)
    alphas = scheduler.alphas_cumprod.double()
    snr = alphas / (1 - alphas)
    generator = torch.Generator().manual_seed(0)
    clean, noise, predicted = torch.randn((3, 1, 4, 8, 8), generator=generator, dtype=torch.float64)
    for t in (0, 50, 300, 600, 900, 990):
        signal, sigma = alphas[t].sqrt(), (1 - alphas[t]).sqrt()
        noisy = signal * clean + sigma * noise
        target = {
            "epsilon": noise, "sample": clean, "v_prediction": signal * noise - sigma * clean,
        }[prediction_type]  # fmt: skip
        guess = scheduler.step(predicted, t, noisy).pred_original_sample
        paper = snr[t].clamp(max=5.0) * (guess - clean).square().mean()
        weight = min_snr_weight(snr[[t]], 5.0, prediction_type)
        ours = weight[0] * (predicted - target).square().mean()
        # The scheduler keeps alpha_bar in float32 and forms 1 - alpha_bar in it: 1e-7 relative to
        # one, and at t = 0, where 1 - alpha_bar is 4e-5, up to 2e-3 of that.
        torch.testing.assert_close(ours, paper, rtol=5e-3 if t == 0 else 1e-4, atol=0)
    both_sides = min_snr_weight(torch.tensor([0.0, 5.0, 1e9]), 5.0, prediction_type)
    assert torch.isfinite(both_sides).all()


def test_the_weights_reach_the_loss(
    data: EncodedDataset, null_text: Tensor, tmp_path: Path
) -> None:
    def epsilon(name: str, gamma: float | None) -> list[Tensor]:
        recipe = UNetRecipe(channels=(32,), prediction_type="epsilon", snr_gamma=gamma)
        return weights_after(data, null_text, tmp_path / name, recipe)

    plain = epsilon("plain", None)
    # For epsilon the weight is min(gamma / SNR, 1): a gamma above every SNR changes nothing.
    assert same(plain, epsilon("huge", 1e12))
    assert not same(plain, epsilon("five", 5.0))


def test_the_scheduler_starts_sampling_at_the_last_timestep() -> None:
    scheduler = build_scheduler(UNetRecipe(prediction_type="v_prediction"))
    assert isinstance(scheduler, DDIMScheduler)
    scheduler.set_timesteps(20)
    assert int(scheduler.timesteps[0]) == 999
    assert scheduler.config["prediction_type"] == "v_prediction"
