from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.models.test_unet import TINY, build
from unsee.draws import Draws
from unsee.index import factors as factors_module
from unsee.index.factors import (
    Layer,
    Measure,
    Storage,
    dequantise,
    example_factors,
    gradient_scales,
    quantise,
    text_layers,
)
from unsee.models.unet import UNetDenoiser

B, D, T, WIDTH = 3, 4, 5, 12
MEASURES = ("loss", "output_norm")


def batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns latents, text, timesteps and noise of examples with texts of their own."""
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(B, 4, 8, 8, generator=generator)
    text = torch.randn(B, T, WIDTH, generator=generator)
    made = [Draws(n=D).of(f"{i}", (4, 8, 8)) for i in range(B)]
    return latents, text, torch.stack([t for t, _ in made]), torch.stack([e for _, e in made])


def one_at_a_time(model: UNetDenoiser, measure: str, mask: Tensor | None = None):
    """Yields (row, half, name -> gradient) from autograd, one number after another."""
    latents, text, timesteps, noise = batch()
    cells = torch.ones(8, 8) if mask is None else mask
    for row in range(B):
        for half in (0, 1):
            total: dict[str, Tensor] = {}
            for d in range(half, D, 2):
                one = (latents[[row]], text[[row]], timesteps[[row], d, None],
                       noise[[row], d, None])  # fmt: skip
                if measure == "loss":
                    value = model.loss(*one, mask)[0, 0]
                else:
                    out = model.predict(*one)[0][0, 0]
                    value = (out.square() * cells).sum() / (4 * cells.sum())
                got = torch.autograd.grad(value, list(model.parameters.values()))
                for name, g in zip(model.parameters, got, strict=True):
                    total[name] = total.get(name, 0) + g / (D / 2)
            yield row, half, total


def formed(model: UNetDenoiser, measure: str, mask: Tensor | None = None) -> dict[str, Tensor]:
    """Returns name -> gradients [B, 2, out, in] from token factors."""
    layers = text_layers(model)
    named = dict(model.network.named_parameters())
    with model.gradients_on():
        _, found = example_factors(model, layers, batch(), [measure], mask)  # type: ignore[list-item]
    gradients = {}
    parts = found[measure].split([la.channels for la in layers], dim=-1)  # type: ignore[index]
    for layer, m in zip(layers, parts, strict=True):
        c = batch()[1].to(m)
        seen = c if layer.reads is None else c @ named[layer.reads].detach().T
        gradients[layer.name] = m.mT @ seen[:, None]
    return gradients


def check(model: UNetDenoiser, tolerance: float, mask: Tensor | None = None, measures=MEASURES):
    """Compares every layer, row and half, relative to the layer's largest entry."""
    for measure in measures:
        found = formed(model, measure, mask)
        with model.gradients_on():
            for row, half, expected in one_at_a_time(model, measure, mask):
                for name, g in expected.items():
                    error = (found[name][row, half] - g).abs().max()
                    assert error <= tolerance * g.abs().max(), (measure, name, row, half)


@pytest.mark.parametrize(
    "variant", ["everywhere", "text at one level only", "two layers of transformers"]
)
def test_gradients_are_those_of_autograd(variant: str) -> None:
    model = build(variant, prediction="v_prediction")
    model.network.double()
    assert model._text_can_be_shared
    # float64: the same products in another order.
    check(model, 1e-11)


def test_in_float32_only_rounding_differs() -> None:
    # Batched kernels sum in another order; 1e-4 of the largest entry is some hundred roundings,
    # which a backward pass through the whole network adds up.
    check(build(), 1e-4)


def test_with_a_mask_only_its_cells_count() -> None:
    model = build()
    model.network.double()
    mask = torch.zeros(8, 8)
    mask[2:5, 1:4] = 1
    check(model, 1e-11, mask)


def test_a_network_that_needs_a_text_for_each_latent() -> None:
    """Its draws see copies of the text, whose factors add up."""
    model = build("attention without transformer", parameters=["*add_k_proj.weight",
                                                              "*add_v_proj.weight"])  # fmt: skip
    model.network.double()
    assert not model._text_can_be_shared
    assert not any(layer.centred for layer in text_layers(model))
    check(model, 1e-11)


def test_lora_on_keys_and_values() -> None:
    peft = pytest.importorskip("peft")
    model = build()
    torch.manual_seed(3)
    model.network.add_adapter(
        peft.LoraConfig(r=3, target_modules=["attn2.to_k", "attn2.to_v"], init_lora_weights=False)
    )
    lora = UNetDenoiser(model.network, model.schedule, parameters="lora")
    lora.network.double()
    layers = text_layers(lora)
    below = [layer for layer in layers if ".lora_A." in layer.name]
    above = [layer for layer in layers if ".lora_B." in layer.name]
    assert len(below) == len(above) == len(layers) / 2
    assert all(la.reads is None and la.channels == 3 and la.width == WIDTH for la in below)
    assert [la.reads for la in above] == [la.name for la in below] and above[0].width == 3
    assert all(layer.centred == (".to_k." in layer.name) for layer in layers)
    check(lora, 1e-11)


def test_losses_come_in_the_order_of_the_draws() -> None:
    model = build()
    model.network.double()
    with model.gradients_on():
        losses, _ = example_factors(model, text_layers(model), batch())
    torch.testing.assert_close(losses, model.loss(*batch()).detach(), rtol=1e-12, atol=0)


def test_factors_of_keys_sum_to_zero_over_tokens() -> None:
    """Softmax does not see a constant added to all keys."""
    model = build()
    model.network.double()
    layers = text_layers(model)
    assert [layer.centred for layer in layers] == [".to_k." in layer.name for layer in layers]
    with model.gradients_on():
        _, found = example_factors(model, layers, batch())
    parts = found["loss"].split([la.channels for la in layers], dim=-1)
    for layer, m in zip(layers, parts, strict=True):
        share = float(m.sum(2).abs().max() / m.abs().max())
        assert (share < 1e-12) if layer.centred else (share > 1e-3), layer.name


@pytest.mark.parametrize(
    ("selection", "named"),
    [
        ("cross-attn", "to_q.weight"),  # reads the picture
        ("attn", "attn1.to_q.weight"),
        (["*attn2.to_v.weight", "conv_in.weight"], "conv_in.weight"),
        (["*attn2.to_v.weight", "*attn2.to_out.0.bias"], "to_out.0.bias"),
    ],
)
def test_what_does_not_read_the_text_is_refused(selection, named: str) -> None:
    model = build(parameters=selection)
    with pytest.raises(ValueError, match=rf"{named} is not the weight of a linear layer") as error:
        text_layers(model)
    assert "cross-attn-kv" in str(error.value)


def test_a_projection_between_text_and_layers_is_seen() -> None:
    """The layers of such a network do not see the text state itself."""
    model = build()
    projection = torch.nn.Linear(WIDTH, WIDTH)
    attention = model.network.mid_block.attentions[0].transformer_blocks[0].attn2
    attention.register_forward_pre_hook(
        lambda _, args, kwargs: (
            args, {**kwargs, "encoder_hidden_states": projection(kwargs["encoder_hidden_states"])}
        ),
        with_kwargs=True,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"mid_block.*to_k\.weight is not the weight"):
        text_layers(model)


def test_an_odd_number_of_draws_is_refused() -> None:
    model = build()
    latents, text, timesteps, noise = batch()
    with model.gradients_on(), pytest.raises(ValueError, match="3 draws do not make two halves"):
        example_factors(model, text_layers(model), (latents, text, timesteps[:, :3], noise[:, :3]))


# -- storage -----------------------------------------------------------------------------------

LAYERS = [Layer("a", 7, 12, None, True), Layer("b", 4, 12, None, False)]


def some_factors() -> Tensor:
    """Factors [6, 5, 11] whose tokens and layers differ in size by many orders."""
    generator = torch.Generator().manual_seed(2)
    sizes = 10 ** torch.linspace(-12, 3, 30).reshape(6, 5, 1)
    factors = torch.randn(6, 5, 11, generator=generator) * sizes
    factors[..., 7:] *= 1e-4
    factors[0, 1] = 0
    factors[1, 2, :7] = 0
    return factors


# Relative to the largest entry of a token's layer: half an int8 step of 1/127; half of float16's
# last place below 1, 2^-12 (and as much again below its normal range, where steps do not shrink).
@pytest.mark.parametrize(
    ("storage", "bound"), [("int8", 0.5 / 127), ("float16", 2**-12), ("float32", 0.0)]
)
def test_rounding_is_bounded(storage: Storage, bound: float) -> None:
    factors = some_factors()
    stored = quantise(factors, LAYERS, storage)
    assert str(stored.values.dtype) == f"torch.{storage}"
    assert stored.scales.shape == (6, 5, 2) and stored.scales.dtype == torch.float32
    found = dequantise(stored, LAYERS)
    for part in (slice(0, 7), slice(7, 11)):
        largest = factors[..., part].abs().amax(-1, keepdim=True)
        error = (found - factors)[..., part].abs()
        # The products and quotients themselves are rounded to float32.
        assert (error <= (bound + 1e-6 * (bound > 0)) * largest).all()


@pytest.mark.parametrize("storage", ["int8", "float16", "float32"])
def test_zeros_stay_zeros(storage: Storage) -> None:
    factors = some_factors()
    found = dequantise(quantise(factors, LAYERS, storage), LAYERS)
    assert found.isfinite().all()
    assert (found[factors == 0] == 0).all()
    assert not found[0, 1].any() and not found[1, 2, :7].any()


def test_the_largest_entry_is_kept() -> None:
    factors = some_factors()
    found = dequantise(quantise(factors, LAYERS, "int8"), LAYERS)
    largest = factors[..., :7].abs().amax(-1)
    torch.testing.assert_close(found[..., :7].abs().amax(-1), largest, rtol=1e-6, atol=0)


def test_a_tiny_model_has_the_layers_of_its_config() -> None:
    layers = text_layers(build())
    assert {layer.width for layer in layers} == {TINY["cross_attention_dim"]}
    assert sorted({layer.channels for layer in layers}) == sorted(TINY["block_out_channels"])
    assert [layer.name for layer in layers] == list(build().parameters)


@pytest.mark.parametrize("measure", ["loss", "output_norm", "gauss_newton"])
def test_small_derivatives_do_not_underflow_in_float16(measure: Measure) -> None:
    """A mean over 16,384 elements, and a last layer of small weights."""
    size, draws = 64, 2
    generator = torch.Generator().manual_seed(2)
    latents = torch.randn(2, 4, size, size, generator=generator)
    text = torch.randn(2, T, WIDTH, generator=generator)
    made = [Draws(n=draws).of(i, (4, size, size)) for i in "ab"]
    timesteps, noise = (torch.stack(every) for every in zip(*made, strict=True))
    functionals = torch.randn(noise.shape, generator=generator)
    found = {}
    for dtype in (torch.float32, torch.float16):
        model = build("text in the middle only")
        with torch.no_grad():
            for weight in model.network.conv_out.parameters():
                weight *= 1e-2
        model.network.to(dtype)
        layers = text_layers(model)
        batch = latents, text, timesteps, noise
        with model.gradients_on():
            _, factors = example_factors(model, layers, batch, [measure], functionals=functionals)
        found[dtype] = factors[measure].double()
    # Eleven bits are 5e-4 a rounding, of which there are some dozen on the way.
    for row, expected in zip(found[torch.float16], found[torch.float32], strict=True):
        assert (row - expected).norm() <= 0.01 * expected.norm()


def test_where_scaled_derivatives_overflow_smaller_ones_are_tried(monkeypatch) -> None:
    model = build("text in the middle only")
    model.network.half()
    with model.gradients_on():
        _, expected = example_factors(model, text_layers(model), batch())
        monkeypatch.setattr(factors_module, "FLOAT16_EXPONENTS", (40, 0, -40))
        _, found = example_factors(model, text_layers(model), batch())
    assert found["loss"].dtype == torch.float32 and expected["loss"].isfinite().all()
    assert torch.equal(found["loss"], expected["loss"])


def test_scales_are_powers_of_two_of_single_rows() -> None:
    outputs = torch.randn(3, 2, 4, 8, 8) * torch.tensor([1.0, 1e-9, 0.0])[:, None, None, None, None]
    outputs.requires_grad_()
    values = outputs.square().mean((1, 2, 3, 4))
    scales = gradient_scales(values, outputs, 0)
    assert (torch.frexp(scales).mantissa == 0.5).all()
    alone = outputs.detach()[1:2].requires_grad_()
    assert gradient_scales(alone.square().mean((1, 2, 3, 4)), alone, 0) == scales[1]
    assert (gradient_scales(values, outputs, -8) == scales / 256).all()
    for row in range(2):
        slope = outputs.detach()[row].abs().max() * 2 / outputs[row].numel()
        assert 0.5 <= scales[row] * slope < 1
