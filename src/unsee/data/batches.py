"""What a network takes for a batch of examples: latents, text and each example's own draws."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..draws import DrawSource
from .latents import EncodedExamples


def gather(
    data: EncodedExamples,
    draws: DrawSource,
    jobs: Sequence[tuple[int, int, int]],
    flipped: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Collects what `Denoiser.loss` takes for a batch of (place, row, caption) jobs.

    Returns:
        latents [B, C, h, w], text [B, T, D], timesteps [B, n], noise [B, n, C, h, w].
    """
    rows = [row for _, row, _ in jobs]
    latents = data.latents(rows, flipped)
    captions = [caption for _, _, caption in jobs]
    text = torch.empty(0)
    if len(set(captions)) == 1:
        text = data.text(rows, captions[0])
    else:
        text = torch.cat([data.text([r], c) for r, c in zip(rows, captions, strict=True)])
    shape = tuple(latents.shape[1:])
    made = [draws.of(data.ids[r], shape, c, flipped) for _, r, c in jobs]
    return latents, text, torch.stack([t for t, _ in made]), torch.stack([n for _, n in made])
