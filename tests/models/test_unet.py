from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from PIL import Image
from torch import Tensor

from tests.reference.denoising import denoising_losses
from unsee.draws import Draws
from unsee.models.base import Denoiser
from unsee.models.unet import UNetDenoiser

TINY: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 12,
    "attention_head_dim": 2,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
}

VARIANTS: dict[str, dict[str, Any]] = {
    "everywhere": {},
    "linear projection, heads for each level": {
        "use_linear_projection": True,
        "attention_head_dim": (2, 4),
    },
    "text at one level only": {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    },
    "text in the middle only": {
        "down_block_types": ("DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
    },
    "no middle": {"mid_block_type": None},
    "two layers of transformers": {"layers_per_block": 2, "transformer_layers_per_block": 2},
    "Stable Diffusion 2": {
        "use_linear_projection": True,
        "attention_head_dim": (1, 2),
        "upcast_attention": True,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    },
    "first attention reads the text too": {"only_cross_attention": True},
    "attention without transformer": {
        "down_block_types": ("SimpleCrossAttnDownBlock2D", "SimpleCrossAttnDownBlock2D"),
        "up_block_types": ("SimpleCrossAttnUpBlock2D", "SimpleCrossAttnUpBlock2D"),
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    },
}


def build(variant: str = "everywhere", prediction: str = "epsilon", **options: Any) -> UNetDenoiser:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**{**TINY, **VARIANTS[variant]})
    scheduler = DDPMScheduler(prediction_type=prediction)
    return UNetDenoiser(unet, scheduler, **options)


def batch(size: int = 3, draws: int = 4, tokens: int = 5, width: int = 12) -> tuple[Tensor, ...]:
    """Returns latents, text, timesteps and noise in float64."""
    generator = torch.Generator().manual_seed(size)
    latents = torch.randn(size, 4, 8, 8, generator=generator, dtype=torch.float64)
    text = torch.randn(size, tokens, width, generator=generator, dtype=torch.float64)
    made = [Draws(n=draws).of(f"{i}", (4, 8, 8)) for i in range(size)]
    return latents, text, torch.stack([t for t, _ in made]), torch.stack([e for _, e in made])


def slow(model: UNetDenoiser, inputs: tuple[Tensor, ...], mask: Tensor | None = None) -> Tensor:
    """The reference in the network's dtype."""
    dtype = next(model.network.parameters()).dtype
    latents, text, timesteps, noise = inputs
    scheduler = DDPMScheduler.from_config(model.schedule.config)
    return denoising_losses(
        model.network,
        scheduler,
        latents.to(dtype),
        text.to(dtype),
        timesteps,
        noise.to(dtype),
        mask,
    )


def gradients(model: UNetDenoiser, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss.mean(), list(model.parameters.values())))


# -- the loss against diffusers' own words -----------------------------------------------------


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("masked", [False, True])
def test_loss_of_each_prediction_type(prediction, masked):
    model = build(prediction=prediction)
    model.network.double()
    mask = None
    if masked:
        mask = torch.zeros(8, 8)
        mask[2:5, 1:4] = 1
    found = model.loss(*batch(), mask=mask)
    assert found.shape == (3, 4) and found.dtype == torch.float64
    # float64, other shapes and order of the same products
    torch.testing.assert_close(found, slow(model, batch(), mask), rtol=1e-12, atol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_shared_text_equals_repeated_text(variant):
    """Losses and gradients, in float64, of every kind of UNet."""
    model = build(variant, parameters="all")
    model.network.double()
    found, expected = model.loss(*batch()), slow(model, batch())
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    for ours, theirs in zip(gradients(model, found), gradients(model, expected), strict=True):
        # sums over draws and positions in another order; some gradients are zero but for rounding
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("variant", VARIANTS)
def test_float32_is_as_near_as_float32_allows(variant):
    model = build(variant, parameters="all")
    found = model.loss(*batch())
    assert found.dtype == torch.float32
    # some hundred roundings of 6e-8 on the way through the network, partly cancelling
    torch.testing.assert_close(found, slow(model, batch()), rtol=5e-6, atol=0)


@pytest.mark.parametrize(
    "processor", [AttnProcessor(), AttnProcessor2_0(), "slicing"], ids=["plain", "sdpa", "sliced"]
)
def test_any_attention_processor(processor):
    """People switch on attention slicing to save memory; the shared text must survive it."""
    model = build()
    model.network.double()
    if processor == "slicing":
        model.network.set_attention_slice(1)
    else:
        model.network.set_attn_processor(processor)
    torch.testing.assert_close(
        model.loss(*batch()), slow(model, batch()), rtol=1e-12, atol=0
    )  # float64 as above


def test_a_lora_is_attributed_like_any_other_weight():
    peft = pytest.importorskip("peft")
    model = build()
    config = peft.LoraConfig(
        r=2, lora_alpha=4, target_modules=["to_k", "to_v", "to_q", "to_out.0"],
        init_lora_weights=False,
    )  # fmt: skip
    model.network.add_adapter(config)
    lora = UNetDenoiser(model.network, model.schedule, parameters="lora")
    lora.network.double()
    assert lora.parameters and all("lora_" in name for name in lora.parameters)
    found, expected = lora.loss(*batch()), slow(lora, batch())
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    for ours, theirs in zip(gradients(lora, found), gradients(lora, expected), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-14)


# -- invariance ---------------------------------------------------------------------------------


def test_float32_losses_do_not_move_with_batch_size_or_order():
    model, inputs = build(), batch(64, 2)
    with torch.no_grad():
        whole = model.loss(*inputs)
        for size in (1, 7):
            parts = [
                model.loss(*(x[first : first + size] for x in inputs))
                for first in range(0, 64, size)
            ]
            # the requirement; float32 rounding through this network is some 1e-6
            torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-5, atol=0)
        order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
        shuffled = model.loss(*(x[order] for x in inputs))
        torch.testing.assert_close(shuffled, whole[order], rtol=1e-5, atol=0)


def test_float64_losses_do_not_move_with_draws_at_once():
    model, (latents, text, timesteps, noise) = build(), batch(3, 6)
    model.network.double()
    whole = model.loss(latents, text, timesteps, noise)
    for size in (1, 4):
        parts = [
            model.loss(latents, text, timesteps[:, d : d + size], noise[:, d : d + size])
            for d in range(0, 6, size)
        ]
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-12, atol=0)


def test_two_runs_are_bit_identical():
    model = build()
    assert torch.equal(model.loss(*batch()), model.loss(*batch()))


def test_a_mask_of_ones_is_no_mask():
    model = build()
    # the same sum, divided once instead of averaged
    torch.testing.assert_close(
        model.loss(*batch(), mask=torch.ones(8, 8)), model.loss(*batch()), rtol=1e-6, atol=0
    )


def test_the_training_schedule_counts_not_the_sampler():
    """Two samplers with the same training schedule, one of which spaces and scales its own way."""
    unet = build().network
    for sampler in (DDIMScheduler, EulerDiscreteScheduler):
        scheduler = sampler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
        scheduler.set_timesteps(7)
        model = UNetDenoiser(unet, scheduler)
        expected = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
        assert torch.equal(model.schedule.alphas_cumprod, expected.alphas_cumprod)
        assert model.num_train_timesteps == 1000


# -- no trace -----------------------------------------------------------------------------------


def hooks(model: UNetDenoiser) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.network.modules())


def test_hooks_leave_no_trace():
    model = build()
    model.loss(*batch())
    assert hooks(model) == 0
    with pytest.raises(RuntimeError):
        model.loss(*batch(width=11))  # the text is too narrow for the network
    assert hooks(model) == 0


def test_dropout_is_off():
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**TINY, dropout=0.5).train()
    model = UNetDenoiser(unet, DDPMScheduler())
    assert torch.equal(model.loss(*batch()), model.loss(*batch()))


# -- selections ---------------------------------------------------------------------------------


def test_presets():
    names = {
        preset: list(build(parameters=preset).parameters)
        for preset in ("cross-attn-kv", "cross-attn", "attn", "all")
    }
    everything = [name for name, _ in build().network.named_parameters()]
    assert names["all"] == everything
    assert names["attn"] == [n for n in everything if ".attn1." in n or ".attn2." in n]
    assert names["cross-attn"] == [n for n in everything if ".attn2." in n]
    assert names["cross-attn-kv"] == [
        n for n in everything if n.endswith((".attn2.to_k.weight", ".attn2.to_v.weight"))
    ]
    assert len(names["cross-attn-kv"]) == 2 * 7  # one of each in seven transformers


def test_a_model_without_lora_says_so():
    with pytest.raises(ValueError, match=r"'\*lora_\*' matches none"):
        build(parameters="lora")


# -- what is refused ----------------------------------------------------------------------------


def test_an_unknown_prediction_type_is_refused():
    with pytest.raises(ValueError, match="prediction_type 'flow' is not supported"):
        build(prediction="flow")


def test_a_schedule_without_betas_is_refused():
    with pytest.raises(ValueError, match="FlowMatchEulerDiscreteScheduler"):
        UNetDenoiser(build().network, FlowMatchEulerDiscreteScheduler())


def test_a_bare_network_neither_encodes_nor_generates():
    model = build()
    for use in (
        lambda: model.encode_prompts(["a"]),
        lambda: model.encode_images([Image.new("RGB", (8, 8))]),
        lambda: model.generate("a", seed=0),
    ):
        with pytest.raises(ValueError, match="bare network"):
            use()


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_pipeline_without_a_part_is_refused(tiny_pipeline, part):
    setattr(tiny_pipeline, part, None)
    with pytest.raises(ValueError, match=f"has no {part}:"):
        Denoiser.from_pipeline(tiny_pipeline)


def test_an_unet_that_takes_more_than_latents_is_refused(tiny_pipeline):
    """An inpainting UNet has nine input channels."""
    tiny_pipeline.unet = UNet2DConditionModel(**{**TINY, "in_channels": 9})
    with pytest.raises(ValueError, match=r"9 .* 4"):
        Denoiser.from_pipeline(tiny_pipeline)


def test_the_same_network_with_other_parameters_selected() -> None:
    model = build(prediction="v_prediction")
    before = list(model.parameters)
    other = model.selecting("*conv_in*")
    assert list(other.parameters) == ["conv_in.weight", "conv_in.bias"]
    assert list(model.parameters) == before and other.network is model.network
    assert other.fingerprint() == model.fingerprint()
    with other.gradients_on():
        assert {n for n, p in model.network.named_parameters() if p.requires_grad} == set(
            other.parameters
        )
    with pytest.raises(ValueError, match="'nothing' matches none of the model's"):
        model.selecting("nothing")
