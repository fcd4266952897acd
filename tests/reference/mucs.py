"""MUCS with nothing clever in it: one forward pass at a time, torch's own AdamW on a copy."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel

from tests.reference.denoising import denoising_losses
from unsee.data.latents import EncodedExamples
from unsee.draws import Draws, stable_seed
from unsee.query import Query


def unlearned(
    unet: UNet2DConditionModel,
    scheduler: DDPMScheduler,
    names: Sequence[str],
    query: Query,
    retain: EncodedExamples,
    bound: float,
    steps: int,
    batch: int,
    rate: float,
    seed: int = 0,
) -> UNet2DConditionModel:
    """Returns a copy of the network after the steps."""
    unet = copy.deepcopy(unet).requires_grad_(False)
    chosen = [unet.get_parameter(n).requires_grad_() for n in names]
    optimizer = torch.optim.AdamW(chosen, lr=rate, weight_decay=0.01)
    shape = tuple(query.latents.shape)
    for step in range(steps):
        t, e = Draws(stable_seed(seed, "forget", step), batch).of(query.id, shape)
        forget = [
            denoising_losses(unet, scheduler, query.latents[None].double(),
                             query.text[None].double(), t[None, k : k + 1],
                             e[None, k : k + 1].double())[0, 0]
            for k in range(batch)
        ]  # fmt: skip
        key = stable_seed(seed, "retain", step)
        generator = np.random.Generator(np.random.Philox(key=key))
        rows = generator.permutation(len(retain.ids))[:batch]
        keep = []
        for r in rows.tolist():
            caption = int(generator.integers(retain.caption_counts[r]))
            t, e = Draws(key, 1).of(retain.ids[r], shape, caption)
            x, c = retain.latents([r]).double(), retain.text([r], caption).double()
            keep.append(denoising_losses(unet, scheduler, x, c, t[None], e[None].double())[0, 0])
        bounded = [min(loss, torch.tensor(bound, dtype=torch.float64)) for loss in forget]
        loss = sum(keep) / len(keep) - 0.2 * sum(bounded) / len(bounded)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return unet


def skew(
    before: UNet2DConditionModel,
    after: UNet2DConditionModel,
    scheduler: DDPMScheduler,
    data: EncodedExamples,
    timesteps: torch.Tensor,
    noise: torch.Tensor,
) -> list[float]:
    """Returns the scores; the losses of an example's captions are averaged first."""
    scores = []
    for r in range(len(data.ids)):
        total = 0.0
        for t, e in zip(timesteps, noise, strict=True):
            losses = []
            for unet in (before, after):
                parts = []
                for caption in range(data.caption_counts[r]):
                    x, c = data.latents([r]).double(), data.text([r], caption).double()
                    with torch.no_grad():
                        one = denoising_losses(
                            unet, scheduler, x, c, t[None, None], e[None, None].double()
                        )
                    parts.append(float(one))
                losses.append(sum(parts) / len(parts))
            old, new = losses
            total += (new - old) / (new + old + 1e-3)
        scores.append(total / len(timesteps))
    return scores
