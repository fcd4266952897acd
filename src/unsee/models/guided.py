"""A model with classifier-free guidance built in: what a sampler asks of it, as a measurement."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from .unet import UNetDenoiser


class GuidedDenoiser(UNetDenoiser):
    """A denoiser whose prediction is the guided one (Ho and Salimans, 2022).

    Pictures are sampled with guidance, models are trained without: this is for the query's side
    only, in place of the model itself, where a method differentiates the query (D-TRAK's output
    norm and the loss alike). With a scale of 1 it is the model itself.

    Args:
        model: shares its network and selected parameters.
        null_text: [T, D], text state of the empty prompt.
        scale: of the guidance; the prediction is that of the empty prompt, and `scale` times what
            the text adds to it.
    """

    def __init__(self, model: UNetDenoiser, null_text: Tensor, scale: float) -> None:
        super().__init__(model.network, model.schedule, list(model.parameters), model.pipeline)
        self.null_text, self.scale = null_text, scale

    def predict(
        self, latents: Tensor, text: Tensor, timesteps: Tensor, noise: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `Denoiser.predict`; the target is the model's own."""
        told, target = super().predict(latents, text, timesteps, noise)
        empty = self.null_text.to(text).expand_as(text)
        free, _ = super().predict(latents, empty, timesteps, noise)
        return torch.lerp(free, told, self.scale), target

    def fingerprint(self) -> str:
        """See `Denoiser.fingerprint`; guidance counts."""
        null = self.null_text.contiguous().cpu().numpy().tobytes()
        about = f"{super().fingerprint()} {self.scale}".encode() + null
        return hashlib.sha256(about).hexdigest()[:16]
