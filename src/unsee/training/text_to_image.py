"""Trains the denoiser of a small Stable Diffusion pipeline, or a LoRA on one."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn

from ..data.latents import EncodedDataset
from ..draws import stable_seed
from ..models.unet import UNetDenoiser
from .loop import BatchOrder, Optimization, train


@dataclass(frozen=True)
class UNetRecipe:
    """Architecture and objective of a small text-to-image UNet.

    Attributes:
        channels: width at each resolution; each has cross-attention, each further entry halves
            the resolution.
        layers_per_block: residual and attention blocks at each resolution.
        heads: attention heads at each resolution.
        prediction_type: `"epsilon"`, `"v_prediction"` or `"sample"`.
        beta_schedule: of the 1,000-step training schedule, in diffusers' terms.
        snr_gamma: Min-SNR weighting of timesteps (Hang et al., 2023); None weights all alike.
    """

    channels: tuple[int, ...] = (64, 128)
    layers_per_block: int = 1
    heads: int = 4
    prediction_type: str = "v_prediction"
    beta_schedule: str = "squaredcos_cap_v2"
    snr_gamma: float | None = None


def build_unet(
    recipe: UNetRecipe, latent_channels: int, latent_size: int, text_width: int
) -> UNet2DConditionModel:
    """Returns an untrained UNet; the caller seeds the generator of initial weights."""
    levels = len(recipe.channels)
    return UNet2DConditionModel(
        sample_size=latent_size,
        in_channels=latent_channels,
        out_channels=latent_channels,
        down_block_types=("CrossAttnDownBlock2D",) * levels,
        up_block_types=("CrossAttnUpBlock2D",) * levels,
        block_out_channels=recipe.channels,
        layers_per_block=recipe.layers_per_block,
        cross_attention_dim=text_width,
        # diffusers' name for the number of heads of a UNet of the first generation
        attention_head_dim=recipe.heads,
    )


def build_scheduler(recipe: UNetRecipe) -> DDIMScheduler:
    """Returns the sampler whose configuration also fixes the training schedule."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule=recipe.beta_schedule,
        prediction_type=recipe.prediction_type,
        clip_sample=False,
        # Sampling starts at the last, pure-noise timestep: with leading spacing it would not.
        timestep_spacing="trailing",
        steps_offset=1,
    )


def keep_rows(data: EncodedDataset, leave_out: Sequence[str] = ()) -> Tensor:
    """Returns the rows that are trained on, [n] int64, after leaving out some ids.

    Raises:
        ValueError: an id to leave out is not in the data set.
    """
    unknown = sorted(set(leave_out) - set(data.ids))
    if unknown:
        raise ValueError(f"leave out: {unknown[0]!r} is not in the data set")
    out = set(leave_out)
    return torch.tensor([row for row, i in enumerate(data.ids) if i not in out], dtype=torch.int64)


def train_denoiser(
    denoiser: UNetDenoiser,
    data: EncodedDataset,
    null_text: Tensor,
    keep: Tensor,
    optimization: Optimization,
    directory: Path,
    *,
    caption_dropout: float = 0.1,
    snr_gamma: float | None = None,
    parameters: list[nn.Parameter] | None = None,
    description: dict[str, Any] | None = None,
) -> None:
    """Trains a denoiser in place, on its own training schedule.

    Args:
        denoiser: the model; trained on its device.
        data: latents and text states.
        null_text: [T, D], text state of the empty prompt.
        keep: rows to train on.
        optimization: optimiser, seed, checkpoints.
        directory: for the checkpoint.
        caption_dropout: share of examples whose caption becomes the empty prompt, which is what
            classifier-free guidance needs.
        snr_gamma: Min-SNR weighting, or None.
        parameters: what is trained; all of the network by default.
        description: what else fixes the run, kept with the checkpoint.

    Raises:
        ValueError: the checkpoint belongs to other settings, or the loss is not finite.
    """
    if not 0 <= caption_dropout < 1:
        raise ValueError(f"caption_dropout = {caption_dropout} must be in [0, 1)")
    total = denoiser.num_train_timesteps
    snr = _signal_to_noise(denoiser)

    def loss_of(positions: Tensor, generator: torch.Generator) -> Tensor:
        rows = positions.tolist()
        latents = data.latents(rows)
        which = torch.rand(len(rows), generator=generator).tolist()
        captions = [int(u * data.caption_counts[r]) for r, u in zip(rows, which, strict=True)]
        text = torch.cat([data.text([r], c) for r, c in zip(rows, captions, strict=True)])
        dropped = torch.rand(len(rows), generator=generator) < caption_dropout
        text = torch.where(dropped[:, None, None], null_text, text)
        # One timestep from each of B equal parts of the schedule: less noise in the loss.
        place = torch.arange(len(rows)) + torch.rand(len(rows), generator=generator)
        timesteps = (place * total / len(rows)).long().clamp_(max=total - 1)
        noise = torch.randn(latents.shape, generator=generator)
        losses = denoiser.loss(latents, text, timesteps[:, None], noise[:, None])[:, 0]
        if snr_gamma is not None:
            weight = _min_snr_weight(snr, timesteps, snr_gamma, denoiser.prediction_type)
            losses = losses * weight.to(losses)
        return losses.mean()

    settings = {
        "data": data.fingerprint,
        "kept": len(keep),
        "keep": stable_seed(*keep.tolist()),
        "caption_dropout": caption_dropout,
        "snr_gamma": snr_gamma,
        **(description or {}),
    }
    order = BatchOrder(keep, optimization.batch_size, optimization.seed)
    train(denoiser.network, loss_of, order, optimization, directory, settings, parameters)


def _signal_to_noise(denoiser: UNetDenoiser) -> Tensor:
    alphas = denoiser.schedule.alphas_cumprod.double()
    return alphas / (1 - alphas)


def _min_snr_weight(snr: Tensor, timesteps: Tensor, gamma: float, prediction: str) -> Tensor:
    """Min-SNR weight of the clean-latent error, expressed for the predicted quantity."""
    value = snr[timesteps]
    clipped = value.clamp(max=gamma)
    weights = {
        "epsilon": clipped / value,
        "v_prediction": clipped / (value + 1),
        "sample": clipped,
    }
    return weights[prediction]


def train_text_to_image(
    recipe: UNetRecipe,
    data: EncodedDataset,
    null_text: Tensor,
    optimization: Optimization,
    directory: Path,
    *,
    leave_out: Sequence[str] = (),
    caption_dropout: float = 0.1,
) -> UNetDenoiser:
    """Trains a UNet from scratch and returns it with its scheduler.

    Args:
        recipe: architecture and objective.
        data: latents and text states.
        null_text: [T, D], text state of the empty prompt.
        optimization: optimiser, seed, checkpoints.
        directory: for the checkpoint.
        leave_out: ids of examples that are not trained on.
        caption_dropout: see `train_denoiser`.
    """
    torch.manual_seed(optimization.seed)
    example = data.latents([0])[0]
    unet = build_unet(recipe, example.shape[0], example.shape[-1], null_text.shape[-1])
    denoiser = UNetDenoiser(unet, build_scheduler(recipe), "all")
    train_denoiser(
        denoiser, data, null_text, keep_rows(data, leave_out), optimization, directory,
        caption_dropout=caption_dropout, snr_gamma=recipe.snr_gamma,
        description=dataclasses.asdict(recipe),
    )  # fmt: skip
    return denoiser
