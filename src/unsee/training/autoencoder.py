"""Trains the small autoencoder of the twemoji model: pictures to latents and back."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

from ..data.dataset import ImageDataset, OnError
from .loop import BatchOrder, Optimization, seeded_weights, train

logger = logging.getLogger(__name__)

SMALLEST_ERROR = 1e-6
"""Added to squared errors before their logarithm: a picture that is perfect, 66 dB, counts."""

FAST = torch.channels_last
"""Memory format of the weights while they are trained: convolutions of so few channels are faster
with it on a CPU."""


@dataclass(frozen=True)
class AutoencoderRecipe:
    """Architecture and loss of a small `AutoencoderKL`.

    Attributes:
        resolution: side of the square pictures, in pixels.
        channels: width at each resolution; every further entry halves the resolution.
        layers_per_block: residual blocks at each resolution.
        latent_channels: channels of the latent.
        kl_weight: weight of the KL divergence to a unit normal, per latent element, beside the
            mean squared error per pixel of pictures in [-1, 1].
    """

    resolution: int = 64
    channels: tuple[int, ...] = (16, 24, 64, 128)
    layers_per_block: int = 1
    latent_channels: int = 8
    kl_weight: float = 1e-4


def load_pixels(data: ImageDataset, resolution: int, on_error: OnError = "raise") -> Tensor:
    """Returns all pictures as float32 [N, 3, resolution, resolution] in [-1, 1].

    Pictures that are not square lose their margins, as they do in `Denoiser.encode_images`.

    Args:
        data: the pictures.
        resolution: side in pixels.
        on_error: `"skip"` leaves out pictures that cannot be read, with a warning.

    Raises:
        ValueError: a picture cannot be read, or none can.
    """
    import numpy as np

    pictures = []
    for row in range(len(data)):
        try:
            example = data[row]
        except ValueError as error:
            if on_error == "raise":
                raise
            logger.warning("left out: %s", error)
            continue
        width, height = example.image.size
        side = min(width, height)
        left, upper = (width - side) // 2, (height - side) // 2
        square = example.image.crop((left, upper, left + side, upper + side))
        picture = square.resize((resolution, resolution), Image.Resampling.LANCZOS)
        pictures.append(torch.from_numpy(np.asarray(picture).copy()))
    if not pictures:
        raise ValueError(f"data set {data.name!r}: no picture can be read")
    return torch.stack(pictures).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def build_autoencoder(recipe: AutoencoderRecipe) -> AutoencoderKL:
    """Returns an untrained autoencoder; the caller seeds the generator of initial weights."""
    levels = len(recipe.channels)
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=recipe.channels,
        layers_per_block=recipe.layers_per_block,
        latent_channels=recipe.latent_channels,
        norm_num_groups=8,
        sample_size=recipe.resolution,
    )


def train_autoencoder(
    pixels: Tensor,
    recipe: AutoencoderRecipe,
    optimization: Optimization,
    directory: Path,
    *,
    device: str | torch.device = "cpu",
) -> AutoencoderKL:
    """Trains an autoencoder on `pixels` and returns it in eval mode.

    Its `scaling_factor` is set so that the latents of `pixels` (posterior mode) have unit
    standard deviation, and its `shift_factor` stays unset: pipelines of the first generation of
    Stable Diffusion know no shift.

    Args:
        pixels: [N, 3, H, W] float32 in [-1, 1], on the CPU.
        recipe: architecture and loss.
        optimization: optimiser, seed, checkpoints.
        directory: for the checkpoint.
        device: where to train; batches and noise are made on the CPU, the same for every device.

    Raises:
        ValueError: the checkpoint belongs to other settings or pixels, or the loss is not finite.
    """
    with seeded_weights(optimization.seed):
        model = build_autoencoder(recipe)
    model.to(device=device, memory_format=FAST)  # type: ignore[call-overload]

    def loss_of(positions: Tensor, generator: torch.Generator) -> Tensor:
        target = pixels[positions].to(device)
        posterior = model.encode(target).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(device)
        decoded = model.decode(posterior.mean + posterior.std * noise).sample
        kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
        return (decoded - target).square().mean() + recipe.kl_weight * kl

    settings = {**dataclasses.asdict(recipe), "pixels": _fingerprint([pixels])}
    order = BatchOrder(torch.arange(len(pixels)), optimization.batch_size, optimization.seed)
    train(model, loss_of, order, optimization, directory, settings)
    model.to(memory_format=torch.contiguous_format)  # safetensors writes no other
    latents = encode(model, pixels)
    model.register_to_config(scaling_factor=float(1 / latents.std()))
    return model


def train_decoder(
    model: AutoencoderKL, pixels: Tensor, optimization: Optimization, directory: Path
) -> None:
    """Trains the decoder of `model` further, in place, and leaves `model` in eval mode.

    The encoder and the scaling factor stay as they are, to the bit: so do all latents, and
    whatever was trained or computed on them stays valid. The loss is the mean logarithm of each
    picture's squared error when it is decoded from its posterior mode: lower by 0.23 for every
    decibel of mean PSNR.

    Args:
        model: a trained autoencoder in float32, on any device.
        pixels: [N, 3, H, W] float32 in [-1, 1], on the CPU.
        optimization: optimiser, seed, checkpoints.
        directory: for the checkpoint.

    Raises:
        ValueError: the checkpoint belongs to another autoencoder, other settings or pixels, or
            see `unsee.training.loop.train`.
    """
    latents = encode(model, pixels)
    weights = [p.detach().cpu() for p in model.parameters()]
    settings = {"autoencoder": _fingerprint(weights), "pixels": _fingerprint([pixels])}

    def loss_of(positions: Tensor, _generator: torch.Generator) -> Tensor:
        decoded = model.decode(latents[positions].to(model.device)).sample
        error = (decoded - pixels[positions].to(model.device)).square().mean(dim=(1, 2, 3))
        return (error + SMALLEST_ERROR).log().mean()

    parts = [p for p in (model.post_quant_conv, model.decoder) if p is not None]
    parameters = [p for part in parts for p in part.parameters()]
    model.to(memory_format=FAST)  # type: ignore[call-overload]
    order = BatchOrder(torch.arange(len(pixels)), optimization.batch_size, optimization.seed)
    train(model, loss_of, order, optimization, directory, settings, parameters)
    model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]


def _fingerprint(tensors: Iterable[Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


@torch.no_grad()
def encode(model: AutoencoderKL, pixels: Tensor, batch_size: int = 64) -> Tensor:
    """Returns the unscaled posterior modes [N, C, h, w] of `pixels`, on the CPU."""
    return torch.cat(
        [
            model.encode(b.to(model.device)).latent_dist.mode().cpu()
            for b in pixels.split(batch_size)
        ]
    )


@torch.no_grad()
def psnr(model: AutoencoderKL, pixels: Tensor, batch_size: int = 64) -> Tensor:
    """Returns the peak signal-to-noise ratio of each reconstruction, [N] in dB, on the CPU."""
    values = []
    for batch in pixels.split(batch_size):
        target = batch.to(model.device)
        decoded = model.decode(model.encode(target).latent_dist.mode()).sample.clamp(-1, 1)
        error = ((decoded - target) / 2).square().mean(dim=(1, 2, 3))
        values.append(-10 * torch.log10(error).cpu())
    return torch.cat(values)
