"""Trains the denoiser of a Stable Diffusion pipeline: a small one from scratch, or part of one."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn

from ..data.latents import EncodedExamples
from ..draws import stable_seed
from ..models.unet import UNetDenoiser
from .loop import BatchOrder, Optimization, seeded_weights, train


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


def keep_rows(data: EncodedExamples, leave_out: Sequence[str] = ()) -> Tensor:
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
    data: EncodedExamples,
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
        keep: rows to train on; no other row is looked at.
        optimization: optimiser, seed, checkpoints.
        directory: for the checkpoint.
        caption_dropout: share of examples whose caption becomes the empty prompt, which is what
            classifier-free guidance needs.
        snr_gamma: Min-SNR weighting, or None.
        parameters: what is trained; all of the network by default.
        description: what else fixes the run, kept with the checkpoint.

    Raises:
        ValueError: a setting is out of range, `null_text` has another shape than the captions,
            the checkpoint belongs to other settings, or the loss is not finite.
    """
    _check(data, null_text, keep, caption_dropout, snr_gamma)
    alphas = denoiser.schedule.alphas_cumprod.double()
    snr = alphas / (1 - alphas)

    def loss_of(positions: Tensor, generator: torch.Generator) -> Tensor:
        latents, text, timesteps = draw_batch(
            data, null_text, positions.tolist(), denoiser.num_train_timesteps,
            caption_dropout, generator,
        )  # fmt: skip
        noise = torch.randn(latents.shape, generator=generator)
        losses = denoiser.loss(latents, text, timesteps[:, None], noise[:, None])[:, 0]
        if snr_gamma is not None:
            weights = min_snr_weight(snr[timesteps], snr_gamma, denoiser.prediction_type)
            losses = losses * weights.to(losses)
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


def _check(
    data: EncodedExamples,
    null_text: Tensor,
    keep: Tensor,
    caption_dropout: float,
    snr_gamma: float | None,
) -> None:
    if not 0 <= caption_dropout < 1:
        raise ValueError(f"caption_dropout = {caption_dropout} must be in [0, 1)")
    if snr_gamma is not None and not snr_gamma > 0:
        raise ValueError(f"snr_gamma = {snr_gamma} must be positive, or None to weight all alike")
    shape = data.text([int(keep[0])], 0).shape[1:] if len(keep) else null_text.shape
    if null_text.shape != shape:
        raise ValueError(
            f"the empty prompt's text state is {tuple(null_text.shape)}, the captions' are "
            f"{tuple(shape)}: encode both with the same text encoder"
        )


def draw_batch(
    data: EncodedExamples,
    null_text: Tensor,
    rows: Sequence[int],
    num_train_timesteps: int,
    caption_dropout: float,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor]:
    """Collects a training batch: of each example one caption or none, and one timestep.

    Args:
        data: latents and text states.
        null_text: [T, D], text state of the empty prompt.
        rows: B examples.
        num_train_timesteps: length of the training schedule.
        caption_dropout: probability that a caption becomes the empty prompt.
        generator: on the CPU.

    Returns:
        latents [B, C, h, w], text [B, T, D] and timesteps [B] int64, one from each of B equal
        parts of the schedule: less noise in the loss than with independent ones.
    """
    latents = data.latents(rows)
    which = torch.rand(len(rows), generator=generator).tolist()
    text = torch.cat(
        [data.text([r], int(u * data.caption_counts[r])) for r, u in zip(rows, which, strict=True)]
    )
    dropped = torch.rand(len(rows), generator=generator) < caption_dropout
    text = torch.where(dropped[:, None, None], null_text, text)
    place = torch.arange(len(rows)) + torch.rand(len(rows), generator=generator)
    timesteps = (place * num_train_timesteps / len(rows)).long()
    return latents, text, timesteps.clamp_(max=num_train_timesteps - 1)


def min_snr_weight(snr: Tensor, gamma: float, prediction_type: str) -> Tensor:
    """Returns Min-SNR weights: min(SNR, gamma) for the squared error of the clean latent.

    Hang et al., "Efficient Diffusion Training via Min-SNR Weighting Strategy", ICCV 2023.

    Args:
        snr: signal-to-noise ratios alpha_bar / (1 - alpha_bar).
        gamma: where the weight is cut.
        prediction_type: what the squared error that will be weighted is of; the error of the
            clean latent is 1 / SNR times that of epsilon, and 1 / (SNR + 1) times that of v.
    """
    if prediction_type == "epsilon":
        return (gamma / snr).clamp(max=1)
    clipped = snr.clamp(max=gamma)
    return clipped / (snr + 1) if prediction_type == "v_prediction" else clipped


def train_text_to_image(
    recipe: UNetRecipe,
    data: EncodedExamples,
    null_text: Tensor,
    optimization: Optimization,
    directory: Path,
    *,
    leave_out: Sequence[str] = (),
    caption_dropout: float = 0.1,
    device: str | torch.device = "cpu",
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
        device: where to train; batches and noise are made on the CPU, the same for every device.

    Returns:
        A bare denoiser on `device` with all parameters selected; `assemble_pipeline` makes a
        pipeline of its `network`, with `build_scheduler(recipe)`.

    Raises:
        ValueError: see `train_denoiser` and `keep_rows`.
    """
    keep = keep_rows(data, leave_out)
    example = data.latents([0])[0]
    with seeded_weights(optimization.seed):
        unet = build_unet(recipe, example.shape[0], example.shape[-1], null_text.shape[-1])
    denoiser = UNetDenoiser(unet.to(device), build_scheduler(recipe), "all")
    train_denoiser(
        denoiser, data, null_text, keep, optimization, directory,
        caption_dropout=caption_dropout, snr_gamma=recipe.snr_gamma,
        description=dataclasses.asdict(recipe),
    )  # fmt: skip
    return denoiser
