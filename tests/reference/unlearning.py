"""Attribution by Unlearning with nothing clever in it: one forward pass at a time."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor

from tests.reference.denoising import denoising_losses
from unsee.data.latents import EncodedExamples
from unsee.draws import DrawSource
from unsee.query import Query


def query_loss(
    unet: UNet2DConditionModel, scheduler: DDPMScheduler, query: Query, draws: DrawSource
) -> Tensor:
    """Returns the mean loss of the query over its draws, differentiable."""
    timesteps, noise = draws.of(query.id, tuple(query.latents.shape))
    losses = denoising_losses(
        unet, scheduler, query.latents[None].to(unet.dtype), query.text[None].to(unet.dtype),
        timesteps[None], noise[None].to(unet.dtype), query.mask,
    )  # fmt: skip
    return losses.mean()


def training_losses(
    unet: UNet2DConditionModel,
    scheduler: DDPMScheduler,
    data: EncodedExamples,
    draws: DrawSource,
    flipped: bool = False,
) -> list[float]:
    """Returns each example's loss, averaged over captions and draws."""
    means = []
    for row, identifier in enumerate(data.ids):
        total, count = 0.0, 0
        for caption in range(data.caption_counts[row]):
            latents = data.latents([row], flipped).to(unet.dtype)
            text = data.text([row], caption).to(unet.dtype)
            t, e = draws.of(identifier, tuple(latents.shape[1:]), caption, flipped)
            with torch.no_grad():
                losses = denoising_losses(
                    unet, scheduler, latents, text, t[None], e[None].to(unet.dtype)
                )
            total, count = total + float(losses.double().sum()), count + losses.numel()
        means.append(total / count)
    return means


def unlearned(
    unet: UNet2DConditionModel,
    scheduler: DDPMScheduler,
    names: Sequence[str],
    query: Query,
    plans: Sequence[DrawSource],
    sizes: Sequence[float],
    fisher: Mapping[str, Tensor],
    damping: float,
) -> UNet2DConditionModel:
    """Returns a copy of the network after one ascent step for each plan and size."""
    unet = copy.deepcopy(unet)
    for plan, size in zip(plans, sizes, strict=True):
        parameters = [unet.get_parameter(name) for name in names]
        gradients = torch.autograd.grad(query_loss(unet, scheduler, query, plan), parameters)
        with torch.no_grad():
            for name, parameter, gradient in zip(names, parameters, gradients, strict=True):
                damped = fisher[name] + damping * fisher[name].mean()
                parameter += size * gradient / damped
    return unet


def scores(
    before: UNet2DConditionModel,
    after: UNet2DConditionModel,
    scheduler: DDPMScheduler,
    data: EncodedExamples,
    draws: DrawSource,
    flips: bool,
) -> list[float]:
    """Returns the rise of each example's loss; of both views the larger one."""
    views = []
    for flipped in [False, True] if flips else [False]:
        old = training_losses(before, scheduler, data, draws, flipped)
        new = training_losses(after, scheduler, data, draws, flipped)
        views.append([b - a for a, b in zip(old, new, strict=True)])
    return [max(values) for values in zip(*views, strict=True)]
