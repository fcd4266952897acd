from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.methods.conftest import examples
from tests.reference.unlearning import training_losses
from unsee.data.batches import gather
from unsee.data.latents import EncodedDataset
from unsee.draws import Draws
from unsee.files import settings_key
from unsee.methods.forward import forward_losses, noise_floor
from unsee.models.kernels import exact_kernels

DRAWS = Draws(seed=2, n=3)
FEW = ["picture-0", "picture-1", "picture-2"]


def run(setting, data=None, rows=None, **options) -> np.ndarray:
    data = data or setting.data
    rows = range(len(data.ids)) if rows is None else rows
    return forward_losses(setting.model, data, DRAWS, rows, **options)


def test_losses_are_those_of_one_pass_at_a_time(double):
    few = double.data.select(FEW)
    found = run(double, few, flips=True)
    assert found.shape == (3, 2, 3) and found.dtype == np.float64
    network, schedule = double.model.network, double.model.schedule
    for view, flipped in enumerate((False, True)):
        expected = training_losses(network, schedule, few, DRAWS, flipped)
        np.testing.assert_allclose(found[:, view].mean(1), expected, rtol=1e-12)  # float64
    np.testing.assert_array_equal(found[:, :1], run(double, few))


@pytest.mark.parametrize("batch_size", [1, 2, 7, 64, 1000])
def test_batches_do_not_matter(single, batch_size):
    """Smaller than an example's draws, between, and larger than everything."""
    rows = range(8)
    whole = run(single, rows=rows, batch_size=30)
    parts = run(single, rows=rows, batch_size=batch_size)
    np.testing.assert_allclose(parts, whole, rtol=1e-5)  # the requirement, in float32


def test_order_and_repetition_do_not_matter(single):
    whole, rows = run(single), [7, 3, 3, 12]
    np.testing.assert_allclose(run(single, rows=rows), whole[rows], rtol=1e-5)  # as above


# -- resuming -----------------------------------------------------------------------------------


def test_a_killed_run_continues_with_the_same_bytes(single, tmp_path: Path, monkeypatch):
    options = {"shard_size": 5, "flips": True, "cache": tmp_path / "a"}
    fresh = run(single, shard_size=5, flips=True)
    calls, loss = [], single.model.loss

    def until_killed(*args, **keywords):
        if len(calls) == 5:
            raise KeyboardInterrupt
        calls.append(1)
        return loss(*args, **keywords)

    monkeypatch.setattr(single.model, "loss", until_killed)
    with pytest.raises(KeyboardInterrupt):
        run(single, **options)
    names = [p.name for p in sorted((tmp_path / "a").iterdir())]
    assert names == ["00000-of-00004.npy", "00001-of-00004.npy"]  # two passes for each view
    monkeypatch.setattr(single.model, "loss", lambda *a, **k: calls.append(1) or loss(*a, **k))
    calls.clear()
    again = run(single, **options)
    assert len(calls) == 2 * 2  # two shards were left, two views each
    assert again.tobytes() == fresh.tobytes()
    calls.clear()
    assert run(single, **options).tobytes() == fresh.tobytes()
    assert not calls


def test_any_shard_may_be_lost(single, tmp_path: Path):
    whole = run(single, shard_size=7, cache=tmp_path)
    for name in ("00002-of-00003.npy", "00000-of-00003.npy"):
        (tmp_path / name).unlink()
        assert run(single, shard_size=7, cache=tmp_path).tobytes() == whole.tobytes()


@pytest.mark.parametrize("damage", ["empty", "short", "text", "shape", "pickle"])
def test_a_damaged_shard_is_named(single, tmp_path: Path, damage):
    run(single, shard_size=10, cache=tmp_path)
    path = tmp_path / "00001-of-00002.npy"
    if damage == "empty":
        path.write_bytes(b"")
    elif damage == "short":
        path.write_bytes(path.read_bytes()[:-8])
    elif damage == "text":
        path.write_text("not an array", encoding="utf-8")
    elif damage == "shape":
        np.save(path, np.zeros((10, 1, 4)))
    else:
        np.save(path, np.array([{}]), allow_pickle=True)
    with pytest.raises(ValueError, match="delete it and run again") as error:
        run(single, shard_size=10, cache=tmp_path)
    assert str(path) in str(error.value)


def test_a_loss_that_is_not_finite_is_named_and_not_kept(single, tmp_path: Path):
    """What was computed before it is there for the next run."""
    data = examples()
    broken = data.latents(range(16)).clone()
    broken[13] = torch.nan
    bad = EncodedDataset(
        data.ids,
        broken,
        torch.cat([data.text([r], 0) for r in range(16)]),
        [[r] for r in range(16)],
    )
    with pytest.raises(ValueError, match="the loss of example 'picture-13' is not finite"):
        run(single, bad, shard_size=6, cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2  # rows 0 to 11


# -- the noise floor ----------------------------------------------------------------------------


def test_the_noise_floor_bounds_what_batches_do(single):
    rows = range(16)
    floor = noise_floor(single.model, single.data, DRAWS, rows, batch_size=64)
    losses = [run(single, batch_size=size).mean(axis=2) for size in (64, 6, 1000)]
    for other in losses[1:]:
        assert np.abs(losses[0] - other).max() <= floor
    # not so large that it would refuse everything: a few roundings of losses of size 1
    assert floor < 1e-5 * losses[0].mean()


def test_the_noise_floor_of_float64_is_far_lower(single, double):
    fine, coarse = (
        noise_floor(s.model, s.data, DRAWS, range(4), batch_size=64) for s in (double, single)
    )
    assert 0 < fine < 1e-6 * coarse


def test_the_noise_floor_is_never_zero(single):
    """One example in one batch of its own: both batch sizes do the same work."""
    assert noise_floor(single.model, single.data, DRAWS, [0], batch_size=3) > 0


# -- parts --------------------------------------------------------------------------------------


def test_gather_keeps_an_examples_things_together(double):
    jobs = [(0, 4, 0), (1, 1, 1), (2, 4, 1)]
    for flipped in (False, True):
        latents, text, timesteps, noise = gather(double.data, DRAWS, jobs, flipped)
        for b, (_, row, caption) in enumerate(jobs):
            assert torch.equal(latents[b], double.data.latents([row], flipped)[0])
            assert torch.equal(text[b], double.data.text([row], caption)[0])
            t, e = DRAWS.of(double.data.ids[row], (4, 8, 8), caption, flipped)
            assert torch.equal(timesteps[b], t) and torch.equal(noise[b], e)


def test_settings_key_follows_values_not_order():
    assert settings_key({"a": 1, "b": [2]}) == settings_key({"b": [2], "a": 1})
    assert settings_key({"a": 1}) != settings_key({"a": 2})


def test_tensorfloat_is_off_inside_and_as_before_after() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        with exact_kernels():
            assert torch.get_float32_matmul_precision() == "highest"
            assert not torch.backends.cudnn.allow_tf32
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.skipif(
    not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="torch before 2.9"
)
def test_tensorfloat_chosen_in_the_newer_words_is_off_inside_too() -> None:
    # In another process: torch cannot go back to the older words once the newer ones were used.
    code = """
import torch
from unsee.models.kernels import exact_kernels
places = torch.backends.cuda.matmul, torch.backends.cudnn.conv
for place in places:
    place.fp32_precision = "tf32"
with exact_kernels():
    print(*(place.fp32_precision for place in places))
print(*(place.fp32_precision for place in places))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["ieee ieee", "tf32 tf32"]
