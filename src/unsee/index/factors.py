"""Token factors: the whole gradient of a layer that reads text, in tokens x channels numbers.

In cross-attention K = W_k c and V = W_v c, where c (tokens x width) is a caption's text state,
which depends on neither timestep nor noise. An example's gradient, averaged over any draws, is then
exactly (mean over draws of dL/dK)ᵀ c: the mean is its token factor M, and the gradient Mᵀc.
Nothing is projected away.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..gradients import linear_owners, recorded
from ..models.base import Denoiser

Measure = Literal["loss", "output_norm", "gauss_newton"]
"""What is differentiated.

`loss`: the denoising loss. `output_norm`: the mean square of the network's output, D-TRAK's
("Intriguing Properties of Data Attribution on Diffusion Models", Zheng et al., ICLR 2024).
`gauss_newton`: a random linear functional of the outputs, whose gradients have the generalised
Gauss-Newton matrix of the loss as their second moment (Mlodozeniec et al., ICLR 2025).
"""

Storage = Literal["int8", "float16", "float32"]
"""How factors are kept; int8 and float16 with a scale for each token of each layer."""

HALVES = 2
"""Even and odd draws are averaged apart: their difference tells how sure a score is."""


FLOAT16_EXPONENTS = (0, -8, -16)
"""Powers of two of the largest derivative that enters a float16 network: 2^24 of the smallest
number, and sums of 2^16 fit in. Where they do not, the next is tried."""


@dataclass(frozen=True)
class Layer:
    """A linear layer whose input is a fixed linear function of the text state.

    Attributes:
        name: of its weight [out, in].
        channels: out.
        width: in.
        reads: name of the weight A that stands between text and layer (the lower half of a
            LoRA: the layer sees c·Aᵀ); None where the layer sees the text state c itself.
        centred: a key layer. Softmax does not see a constant added to all keys, so that its
            factors sum to zero over tokens, and its inputs count relative to their mean.
    """

    name: str
    channels: int
    width: int
    reads: str | None
    centred: bool


def text_layers(model: Denoiser) -> list[Layer]:
    """Returns the selected layers, in the order of the model.

    Raises:
        ValueError: a selected parameter is no weight of a linear layer that reads the text.
    """
    owners = linear_owners(model.network, model.parameters)
    seen, text = _inputs(model, owners)
    layers = []
    for name, parameter in model.parameters.items():
        path, _, kind = name.rpartition(".")
        reads = _source(model, path, seen.get(path), text) if kind == "weight" else False
        if reads is False:
            raise ValueError(
                f"index: {name} is not the weight of a linear layer whose input is the text, and "
                "only such layers have token factors; choose the keys and values of "
                "cross-attention (--parameters cross-attn-kv), or LoRA weights on them"
            )
        channels, width = parameter.shape
        layers.append(Layer(name, channels, width, reads, ".to_k" in name))
    return layers


def _inputs(model: Denoiser, owners: dict[str, nn.Linear]) -> tuple[dict[str, Tensor], Tensor]:
    """Returns what each layer sees of one example with a made-up text state, and that state."""
    config: Any = model.network.config
    size = config["sample_size"]
    h, w = (size, size) if isinstance(size, int) else size
    generator = torch.Generator().manual_seed(0)
    latents = torch.zeros(1, config["in_channels"], h, w)
    text = torch.randn(1, 3, config["cross_attention_dim"], generator=generator)
    timesteps, noise = torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1, *latents.shape[1:])
    with torch.no_grad(), recorded(owners) as tape:
        model.loss(latents, text, timesteps, noise)
    return {path: calls[0][0] for path, calls in tape.items() if len(calls) == 1}, text


def _source(
    model: Denoiser, path: str, seen: Tensor | None, text: Tensor
) -> str | Literal[False] | None:
    """Returns what stands between text and layer: nothing (None), a weight, or unknown (False)."""
    if seen is None:
        return False
    text = text.to(seen)
    if seen.shape == text.shape and torch.equal(seen, text):
        return None
    below = path.replace(".lora_B.", ".lora_A.") + ".weight"
    weight = dict(model.network.named_parameters()).get(below)
    if below == path + ".weight" or weight is None:
        return False
    same = torch.allclose(seen, text @ weight.detach().T, rtol=1e-3, atol=1e-4)
    return below if same else False


def example_factors(
    model: Denoiser,
    layers: Sequence[Layer],
    batch: tuple[Tensor, Tensor, Tensor, Tensor],
    measures: Sequence[Measure] = ("loss",),
    mask: Tensor | None = None,
    functionals: Tensor | None = None,
) -> tuple[Tensor, dict[Measure, Tensor]]:
    """Runs B examples on their D draws, and one backward pass for each measure.

    Args:
        model: inside of `gradients_on()`.
        layers: of the model.
        batch: latents [B, C, h, w], text [B, T, width], timesteps [B, D], noise [B, D, C, h, w];
            D is even.
        measures: what is differentiated.
        mask: [h, w] of zeros and ones; averages are over its cells only.
        functionals: [B, D, C, h, w] standard normal, for the measure `gauss_newton`.

    Returns:
        losses [B, D] float32 (float64 for a float64 network), in the order of the draws; and for
        each measure the factors [B, 2, T, channels of all layers], averaged over the draws with
        even and with odd numbers. Those of `gauss_newton` are sums over the draws, divided by the
        root of their number: the average of what they are the second moment of.

    Raises:
        ValueError: D is odd.
    """
    latents, text, timesteps, noise = batch
    count, draws = timesteps.shape
    if draws % HALVES:
        raise ValueError(f"index: {draws} draws do not make two halves; choose an even number")

    def halved(of_draws: Tensor) -> Tensor:
        """Row 2b is example b on its even draws, row 2b + 1 on its odd ones."""
        return of_draws.unflatten(1, (-1, HALVES)).transpose(1, 2).flatten(0, 1)

    rows = (
        latents.repeat_interleave(HALVES, 0), text.repeat_interleave(HALVES, 0),
        halved(timesteps), halved(noise),
    )  # fmt: skip
    paths = [layer.name.rpartition(".")[0] for layer in layers]
    modules = {path: module for path, module in model.network.named_modules() if path in paths}
    with recorded(modules) as tape:  # type: ignore[arg-type]
        outputs, targets = model.predict(*rows)
    seen = [tape[path][0][1] for path in paths]
    losses = mean_square(outputs - targets, mask)  # [2B, D/2]
    found: dict[Measure, Tensor] = {}
    for number, measure in enumerate(measures):
        if measure == "gauss_newton":
            assert functionals is not None
            values = gauss_newton(outputs, halved(functionals)) * (draws / HALVES) ** 0.5
        else:
            values = losses if measure == "loss" else mean_square(outputs, mask)
        half = next(model.network.parameters()).dtype == torch.float16
        means, again = values.mean(1), number + 1 < len(measures)
        tokens = _scaled_slopes(means, outputs, seen) if half else _slopes(means, seen, again)
        found[measure] = tokens.unflatten(0, (count, HALVES))
    in_order = losses.detach().unflatten(0, (count, HALVES)).mT.flatten(1)
    return in_order, found


def _slopes(values: Tensor, seen: Sequence[Tensor], again: bool) -> Tensor:
    """Returns derivatives [R, T, channels] of values [R] with respect to what layers put out.

    The gradient of the weights is never formed.

    Args:
        values: of each row.
        seen: outputs of the layers, [R, T, channels] or, a row for each draw, [R * D, T, channels].
        again: there is another backward pass to come.
    """
    got = torch.autograd.grad(values.sum(), seen, retain_graph=again)
    got = [g.float() if g.dtype == torch.float16 else g for g in got]
    # Where a row of text served one draw only, its draws are added up here.
    return torch.cat([g.reshape(len(values), -1, *g.shape[1:]).sum(1) for g in got], dim=2)


def _scaled_slopes(values: Tensor, outputs: Tensor, seen: Sequence[Tensor]) -> Tensor:
    """The same through a float16 network, float32: scaled so that nothing small is lost."""
    found = torch.empty(0)
    for exponent in FLOAT16_EXPONENTS:
        scales = gradient_scales(values, outputs, exponent)
        found = _slopes(values * scales, seen, True) / scales[:, None, None]
        if found.isfinite().all():
            break
    return found


def gradient_scales(values: Tensor, outputs: Tensor, exponent: int) -> Tensor:
    """Returns what to multiply values [R] with before they go back through a float16 network.

    The derivatives of a mean over thousands of elements are too small for float16. Powers of two
    round nothing, and each row has its own, so that it does not depend on its neighbours.

    Args:
        values: of each row.
        outputs: [R, D, C, h, w] of the network, what the values were made of.
        exponent: power of two that the largest derivative in a row is to stay below.
    """
    (slopes,) = torch.autograd.grad(values.sum(), outputs, retain_graph=True)
    largest = slopes.flatten(1).abs().amax(1)
    exponents = torch.frexp(torch.where(largest > 0, largest, 1.0)).exponent
    return torch.ldexp(torch.ones_like(largest), exponent - exponents)


def gauss_newton(outputs: Tensor, functionals: Tensor) -> Tensor:
    """Returns [B, D] functionals of outputs [B, D, C, h, w].

    The loss is the mean square of d elements: its Gauss-Newton matrix is 2/d of JᵀJ.
    """
    scale = (2 / outputs[0, 0].numel()) ** 0.5
    return scale * (outputs * functionals.to(outputs)).sum(dim=(2, 3, 4))


def mean_square(values: Tensor, mask: Tensor | None) -> Tensor:
    """Returns [B, D] of values [B, D, C, h, w]."""
    squares = values.square()
    if mask is None:
        return squares.mean(dim=(2, 3, 4))
    m = mask.to(squares)
    return (squares * m).sum(dim=(2, 3, 4)) / (m.sum() * squares.shape[2])


@dataclass(frozen=True)
class Quantised:
    """Factors as they are stored.

    Attributes:
        values: [..., T, channels] int8, float16 or float32.
        scales: [..., T, layers] float32; the factor is values times its layer's scale.
    """

    values: Tensor
    scales: Tensor


def quantise(factors: Tensor, layers: Sequence[Layer], storage: Storage) -> Quantised:
    """Rounds factors [..., T, channels], relative to the largest of each token and layer."""
    parts = factors.float().split([layer.channels for layer in layers], dim=-1)
    largest = torch.stack([p.abs().amax(-1) for p in parts], dim=-1)
    if storage == "float32":
        return Quantised(factors.float(), torch.ones_like(largest))
    steps = 127 if storage == "int8" else 1
    scales = (largest / steps).clamp_min(torch.finfo(torch.float32).tiny)
    divided = torch.cat([p / scales[..., i, None] for i, p in enumerate(parts)], dim=-1)
    values = divided.round().to(torch.int8) if storage == "int8" else divided.half()
    return Quantised(values, scales)


def dequantise(stored: Quantised, layers: Sequence[Layer]) -> Tensor:
    """Returns the factors [..., T, channels] float32."""
    sizes = torch.tensor([layer.channels for layer in layers], device=stored.scales.device)
    return stored.values.float() * stored.scales.repeat_interleave(sizes, dim=-1)
