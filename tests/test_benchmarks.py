"""The benchmark's counts, and that the ways of running which it compares do the same work."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor, nn

from unsee.index.rows import scan_rows
from unsee.models.unet import UNetDenoiser

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def modules() -> dict[str, ModuleType]:
    """The benchmark's files, imported as they import each other when run as a script."""
    if not FOLDER.is_dir():
        pytest.skip("no benchmarks beside these tests")
    sys.path.insert(0, str(FOLDER))
    try:
        return {
            name: importlib.import_module(name)
            for name in ("flops", "scoring", "workers", "forward", "stored_rows", "texts", "index")
        }
    finally:
        sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def denoiser() -> UNetDenoiser:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=12,
        attention_head_dim=2,
    )
    return UNetDenoiser(unet, DDPMScheduler(1000))


def batch(captions: int, draws: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return (
        torch.randn(captions, 4, 8, 8, generator=generator),
        torch.randn(captions, 5, 12, generator=generator),
        torch.randint(0, 1000, (captions, draws), generator=generator),
        torch.randn(captions, draws, 4, 8, 8, generator=generator),
    )


def test_a_linear_layer_counts_two_for_each_multiply_add(modules):
    layer = nn.Linear(7, 5)
    counted = modules["flops"].by_operation(lambda: layer(torch.randn(3, 7)))
    assert counted == {"aten.addmm": 2 * 3 * 7 * 5}


def test_a_convolution_counts_every_tap_of_every_output(modules):
    layer = nn.Conv2d(3, 4, 3, padding=1)
    counted = modules["flops"].by_operation(lambda: layer(torch.randn(2, 3, 6, 5)))
    assert counted == {"aten.convolution": 2 * (2 * 4 * 6 * 5) * (3 * 3 * 3)}


@pytest.mark.parametrize("attention", ["default", "math", "explicit"])
def test_attention_counts_the_same_whatever_kernel_runs_it(modules, attention):
    query, key = torch.randn(2, 3, 11, 4), torch.randn(2, 3, 5, 4)
    scoring = modules["scoring"]
    context = {
        "default": torch.no_grad,
        "math": lambda: scoring.sdpa_kernel(scoring.SDPBackend.MATH),
        "explicit": scoring.ExplicitAttention,
    }[attention]

    def call() -> None:
        with context():
            nn.functional.scaled_dot_product_attention(query, key, key)

    # Two products, Q Kᵀ and the weights times V, each of 2*3 heads, 11 by 5 by 4.
    assert modules["flops"].count(call).get_total_flops() == 2 * 2 * (2 * 3) * 11 * 5 * 4


def test_published_unet_has_the_flops_of_its_architecture(modules):
    """6.12 GFLOP, of which 1.09 are keys and values: 7,077,888 weights times 77 tokens, twice."""
    unet = modules["scoring"]._mscoco_unet()
    flops = modules["flops"].pass_flops(unet, torch.zeros(1, 4, 16, 16), torch.zeros(1, 77, 1024))
    assert flops.text == 2 * 7_077_888 * 77
    assert round(flops.total / 1e9, 2) == 6.12


@pytest.mark.parametrize("draws", [1, 3])
def test_useful_flops_are_those_that_the_library_spends(modules, denoiser, draws):
    latents, text, timesteps, noise = batch(2, draws)
    flops = modules["flops"].pass_flops(denoiser.network, latents[:1], text[:1])
    spent = modules["flops"].by_operation(lambda: denoiser.loss(latents, text, timesteps, noise))
    assert flops.text > 0
    # Equal but for the rounding of a division by `draws`.
    assert sum(spent.values()) == pytest.approx(2 * draws * flops.useful(draws), rel=1e-12)


@pytest.mark.parametrize(
    "change",
    [
        {"layout": "channels_last"},
        {"attention": "math"},
        {"attention": "explicit"},
        {"share_text": False},
        {"inference": True},
    ],
    ids=lambda change: "-".join(map(str, *change.items())),
)
def test_every_setting_gives_the_same_losses(modules, denoiser, change):
    scoring = modules["scoring"]
    work = batch(2, 3)
    before = {name: value.clone() for name, value in denoiser.network.state_dict().items()}
    plain = scoring.score(denoiser, work, scoring.Setting(6))
    setting = scoring.Setting(6, **change)
    with scoring.laid_out(denoiser, setting.layout):
        other = scoring.score(denoiser, work, setting)
    # Other kernels sum in another order: float32 rounding, some 1e-7, through thirty layers.
    torch.testing.assert_close(other, plain, rtol=1e-5, atol=0)
    for name, value in denoiser.network.state_dict().items():
        assert torch.equal(value, before[name])
        assert value.is_contiguous()


def test_attention_kernels_are_really_different(modules, denoiser):
    """The comparison would say nothing if a setting did not reach the layers."""
    scoring, work = modules["scoring"], batch(2, 3)
    ran = {
        kernel: set(
            modules["flops"].by_operation(
                lambda kernel=kernel: scoring.score(
                    denoiser, work, scoring.Setting(6, attention=kernel)
                )
            )
        )
        for kernel in ("default", "math", "explicit")
    }
    flash = "aten._scaled_dot_product_flash_attention_for_cpu"
    assert flash in ran["default"]
    assert flash not in ran["math"]
    assert flash not in ran["explicit"]
    assert "aten.bmm" in ran["explicit"]


def test_settings_are_timed_in_turn_and_per_pass(modules, denoiser):
    scoring = modules["scoring"]
    case = scoring.Case("tiny", (4, 8, 8), (5, 12), 1, 2, (2, 4))
    settings = [scoring.Setting(2), scoring.Setting(4, layout="channels_last")]
    timings = scoring.compare(denoiser, case, settings, 1, seconds=0, slice_seconds=0)
    assert [timing.setting for timing in timings] == settings
    assert [len(timing.rounds) for timing in timings] == [2, 2]
    assert all(0 < seconds < 60 for timing in timings for seconds in timing.rounds)


def test_ratio_pairs_the_rounds(modules):
    scoring = modules["scoring"]
    # The machine was slow in the second round, and alike for both: twice as fast in every round.
    slow = scoring.Timing(scoring.Setting(2), [2.0, 20.0, 2.0])
    fast = scoring.Timing(scoring.Setting(4), [1.0, 10.0, 1.0])
    assert modules["forward"].paired_ratio(fast, slow) == 2.0


def test_product_of_a_process_of_its_own_or_none_in_time(modules):
    workers = modules["workers"]
    speeds = workers.finished(workers.start({"task": "products", "threads": 1}), 300)
    assert set(speeds) == {"float32", "bfloat16"}
    assert all(speed > 0 for speed in speeds.values())
    # A hundredth of a second does not even start Python and PyTorch.
    assert workers.finished(workers.start({"task": "products", "threads": 1}), 0.01) is None


def test_emulated_bfloat16_is_recognised(modules):
    lacks = modules["forward"].lacks_bfloat16
    assert "run at 0.033 of float32" in lacks({"float32": 9e10, "bfloat16": 3e9})
    assert "took more than" in lacks(None)
    assert lacks({"float32": 9e10, "bfloat16": 4e11}) is None


def test_ways_to_scan_rows_do_the_same_work(modules) -> None:
    rows = modules["stored_rows"].made_up_rows(300)  # more than a chunk of numpy's
    asked = torch.nn.functional.normalize(torch.randn(3, rows.shape[1]), dim=1)
    found = torch.from_numpy(modules["stored_rows"].numpy_scan(rows, asked))
    # Sums of 4,096 products in float32, in another order.
    torch.testing.assert_close(found, scan_rows(rows, asked), rtol=0, atol=1e-6)
    target = torch.zeros_like(rows[:128])
    modules["stored_rows"].copy_all(rows, target)
    assert torch.equal(target[: 300 - 256], rows[256:])
    with pytest.raises(SystemExit, match="make --rows smaller"):
        modules["stored_rows"].made_up_rows(10**12)


def test_sentences_of_a_picture_and_their_states(modules) -> None:
    texts = modules["texts"]
    some = texts.sentences(3, 5)
    assert some == texts.sentences(3, 5) and len(some) == 15
    assert all(8 <= len(s.split()) <= 30 for s in some)
    narrow, wide = (texts.text_states(some[:3], 24, width) for width in (384, 500))
    assert narrow.shape == (3, 24, 384) and wide.shape == (3, 24, 500)
    # Turned into more dimensions, and nothing else: inner products stay, to float32's rounding.
    torch.testing.assert_close(wide @ wide.mT, narrow @ narrow.mT, rtol=1e-4, atol=1e-3)
