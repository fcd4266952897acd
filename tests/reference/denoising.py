"""The denoising loss in diffusers' own words: one forward pass for each example and draw."""

from __future__ import annotations

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor


def denoising_losses(
    unet: UNet2DConditionModel,
    scheduler: DDPMScheduler,
    latents: Tensor,
    text: Tensor,
    timesteps: Tensor,
    noise: Tensor,
    mask: Tensor | None = None,
) -> Tensor:
    """Returns [B, D] losses; arguments as those of `Denoiser.loss`."""
    rows = []
    for x, c, ts, es in zip(latents, text, timesteps, noise, strict=True):
        losses = []
        for t, e in zip(ts, es, strict=True):
            x1, e1, t1 = x[None], e[None], t[None]
            noisy = scheduler.add_noise(x1, e1, t1)
            predicted = unet(noisy, t1, encoder_hidden_states=c[None]).sample
            kind = scheduler.config["prediction_type"]
            if kind == "epsilon":
                target = e1
            elif kind == "v_prediction":
                target = scheduler.get_velocity(x1, e1, t1)
            else:
                target = x1
            error = (predicted - target)[0] ** 2
            cells = torch.ones(error.shape[-2:]) if mask is None else mask
            losses.append(error[:, cells == 1].mean())
        rows.append(torch.stack(losses))
    return torch.stack(rows)
