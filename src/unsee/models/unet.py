"""Stable Diffusion with a UNet: epsilon, v and sample prediction."""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from PIL import Image
from torch import Tensor

from ..query import Query
from .base import Denoiser

logger = logging.getLogger(__name__)

PIXELS_AT_ONCE = 2**20
"""That an autoencoder encodes: four pictures of 512 by 512, whose activations at full resolution
are half a gigabyte a layer in Stable Diffusion."""

PRESETS: dict[str, tuple[str, ...]] = {
    # A bias of a key projection has no gradient: softmax ignores what is added to all keys.
    "cross-attn-kv": ("*attn2.to_k.weight", "*attn2.to_v.weight"),
    "cross-attn": ("*attn2*",),
    "attn": ("*attn[0-9]*",),
    "lora": ("*lora_*",),
    "all": ("*",),
}


class UNetDenoiser(Denoiser):
    """A `UNet2DConditionModel` with a DDPM training schedule.

    Args:
        unet: the network; left as it is, but for eval mode.
        scheduler: any scheduler with DDPM betas; only its training schedule is used.
        parameters: a preset or fnmatch patterns.
        pipeline: the pipeline that encodes and generates, where there is one.
    """

    network: UNet2DConditionModel
    presets = PRESETS

    def __init__(
        self,
        unet: UNet2DConditionModel,
        scheduler: Any,
        parameters: str | Sequence[str] = "cross-attn-kv",
        pipeline: Any | None = None,
    ) -> None:
        self.network = unet.eval()
        self.pipeline = pipeline
        if "beta_schedule" not in scheduler.config:
            raise ValueError(
                f"{type(scheduler).__name__} has no DDPM training schedule (betas), which the "
                "denoising loss of a UNet needs"
            )
        # The training schedule, not the sampler that the pipeline happens to carry.
        self.schedule = DDPMScheduler.from_config(scheduler.config)
        self.prediction_type = self.schedule.config["prediction_type"]
        if self.prediction_type not in ("epsilon", "v_prediction", "sample"):
            raise ValueError(
                f"prediction_type {self.prediction_type!r} is not supported: it must be "
                "'epsilon', 'v_prediction' or 'sample'"
            )
        self.num_train_timesteps = int(self.schedule.config["num_train_timesteps"])
        self.parameters = self._selected(parameters)
        # Blocks of other kinds read the text elsewhere, where a row must stand by each latent.
        readers = [
            name
            for name, module in unet.named_modules()
            if isinstance(module, Attention)
            and (module.is_cross_attention or module.added_kv_proj_dim is not None)
        ]
        self._text_can_be_shared = (
            all(name.endswith("attn2") for name in readers)
            and unet.config.get("addition_embed_type") is None
        )

    @classmethod
    def from_pipeline(
        cls, pipeline: Any, parameters: str | Sequence[str] = "cross-attn-kv"
    ) -> UNetDenoiser:
        """See `Denoiser.from_pipeline`."""
        for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"):
            if getattr(pipeline, part, None) is None:
                raise ValueError(
                    f"{type(pipeline).__name__} has no {part}: attribution needs a text-to-image "
                    "pipeline with unet, vae, text_encoder, tokenizer and scheduler"
                )
        if getattr(pipeline, "text_encoder_2", None) is not None:
            raise ValueError(
                f"{type(pipeline).__name__} has two text encoders, which is not supported yet"
            )
        takes, gets = pipeline.unet.config["in_channels"], pipeline.vae.config["latent_channels"]
        if takes != gets:
            raise ValueError(
                f"{type(pipeline).__name__}: its unet takes {takes} channels, a latent of its vae "
                f"has {gets}; models that see more than the noisy latent are not supported"
            )
        return cls(pipeline.unet, pipeline.scheduler, parameters, pipeline)

    def fingerprint(self) -> str:
        """See `Denoiser.fingerprint`; the noise levels count."""
        levels = self.schedule.alphas_cumprod.numpy().tobytes()
        return hashlib.sha256(super().fingerprint().encode() + levels).hexdigest()[:16]

    # -- encoding ---------------------------------------------------------------------------

    @property
    def resolution(self) -> tuple[int, int]:
        """(width, height) in pixels of the pictures that the model makes."""
        size = self.network.config["sample_size"]
        h, w = (size, size) if isinstance(size, int) else size
        factor = self._pipeline().vae_scale_factor
        return w * factor, h * factor

    def _pipeline(self) -> Any:
        if self.pipeline is None:
            raise ValueError(
                "this model is a bare network: it can neither encode nor generate; "
                "make it with Denoiser.from_pipeline"
            )
        return self.pipeline

    def crop_box(self, size: tuple[int, int]) -> tuple[int, int, int, int]:
        """See `Denoiser.crop_box`: the largest centred part of the aspect of `resolution`."""
        width, height = self.resolution
        scale = min(size[0] / width, size[1] / height)
        crop_w, crop_h = round(width * scale), round(height * scale)
        left, upper = (size[0] - crop_w) // 2, (size[1] - crop_h) // 2
        return left, upper, left + crop_w, upper + crop_h

    @torch.no_grad()
    def encode_images(self, images: Sequence[Image.Image]) -> Tensor:
        """See `Denoiser.encode_images`. Pictures are cropped (`crop_box`) and resized."""
        vae = self._pipeline().vae
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        width, height = self.resolution
        count = max(1, PIXELS_AT_ONCE // (width * height))
        parts = []
        for first in range(0, len(images), count):
            some = [im.crop(self.crop_box(im.size)) for im in images[first : first + count]]
            pixels = torch.stack([_pixels(image, self.resolution) for image in some])
            posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
            latents = (posterior.mode() - shift) * vae.config.scaling_factor
            parts.append(latents.float().cpu())
        return torch.cat(parts)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        """See `Denoiser.encode_prompts`. Padding stays: the UNet attends to it."""
        pipeline = self._pipeline()
        self._warn_of_cuts(prompts)
        states = []
        with _quiet("diffusers.pipelines"), _quiet("transformers"):
            for first in range(0, len(prompts), 256):
                some = list(prompts[first : first + 256])
                state, _ = pipeline.encode_prompt(
                    some, pipeline.text_encoder.device, 1, do_classifier_free_guidance=False
                )
                states.append(state.float().cpu())
        return torch.cat(states)

    def _warn_of_cuts(self, prompts: Sequence[str]) -> None:
        """Says once what the text encoder does not see."""
        tokenizer = self._pipeline().tokenizer
        limit = tokenizer.model_max_length
        if limit > 1_000_000:  # what transformers puts where a tokenizer has no limit
            raise ValueError(
                "the tokenizer has no model_max_length, to which the pipeline pads every prompt: "
                "set it to the number of tokens that the text encoder takes"
            )
        with _quiet("transformers"):
            tokens = tokenizer(list(prompts)).input_ids
        long = [ids for ids in tokens if len(ids) > limit]
        if long:
            lost = tokenizer.decode(long[0][limit - 1 : -1])  # the last one is the end marker
            more = f"; {len(long) - 1} more prompts are cut" if len(long) > 1 else ""
            logger.warning(
                "the prompt has %d tokens, the text encoder takes %d: cut %r%s",
                len(long[0]), limit, lost, more,
            )  # fmt: skip

    # -- the loss ---------------------------------------------------------------------------

    def loss(
        self,
        latents: Tensor,
        text: Tensor,
        timesteps: Tensor,
        noise: Tensor,
        mask: Tensor | None = None,
    ) -> Tensor:
        """See `Denoiser.loss`. Keys and values of the text are computed once for all D draws."""
        predicted, target = self.predict(latents, text, timesteps, noise)
        error = (predicted - target).square()
        if mask is None:
            return error.mean(dim=(2, 3, 4))
        m = mask.to(error)
        return (error * m).sum(dim=(2, 3, 4)) / (m.sum() * error.shape[2])

    def predict(
        self, latents: Tensor, text: Tensor, timesteps: Tensor, noise: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `Denoiser.predict`."""
        parameter = next(self.network.parameters())
        draws = timesteps.shape[1]
        to = {"device": parameter.device, "dtype": parameter.dtype}
        # Only the network runs in half precision: it would round small noise levels to zero.
        wide = torch.float64 if parameter.dtype == torch.float64 else torch.float32
        clean = latents.to(parameter.device, wide).repeat_interleave(draws, 0)
        noise = noise.to(parameter.device, wide).flatten(0, 1)
        flat_timesteps = timesteps.to(parameter.device).flatten()
        noisy = self._add_noise(clean, noise, flat_timesteps).to(parameter.dtype)
        text = text.to(**to)
        if not self._text_can_be_shared:
            text = text.repeat_interleave(draws, 0)
        with self.shared_text(draws if self._text_can_be_shared else 1):
            predicted = self.network(
                noisy, flat_timesteps, encoder_hidden_states=text, return_dict=False
            )[0]
        target = self._target(clean, noise, flat_timesteps)
        shape = timesteps.shape
        return predicted.to(wide).unflatten(0, shape), target.unflatten(0, shape)

    def _add_noise(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        signal, sigma = self._coefficients(timesteps, clean)
        return signal * clean + sigma * noise

    def _target(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return clean
        signal, sigma = self._coefficients(timesteps, clean)
        return signal * noise - sigma * clean

    def _coefficients(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        alphas = self.schedule.alphas_cumprod.to(like.device)[timesteps].to(like.dtype)
        alphas = alphas.view(-1, 1, 1, 1)
        return alphas.sqrt(), (1 - alphas).sqrt()

    @contextlib.contextmanager
    def shared_text(self, draws: int) -> Iterator[None]:
        """Lets B text states serve B*draws latents, example-major, inside a `with` block.

        Attention is computed per query vector, so the draws of an example may stand behind one
        another as one longer sequence of query vectors: the keys and values of its text are then
        projected once, not once per draw. Hooks make that sequence of what goes into the
        cross-attention, and draws of what comes out, so that any attention processor will do.
        """
        if draws == 1:
            yield
            return

        def fold(_module: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            hidden, *rest = inputs
            return hidden.reshape(-1, draws * hidden.shape[1], hidden.shape[2]), *rest

        def unfold(_module: Any, _inputs: Any, output: Tensor) -> Tensor:
            return output.reshape(output.shape[0] * draws, -1, output.shape[-1])

        handles = []
        for name, module in self.network.named_modules():
            if name.endswith("attn2"):
                handles.append(module.register_forward_pre_hook(fold))
                handles.append(module.register_forward_hook(unfold))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    # -- generation -------------------------------------------------------------------------

    def generate(
        self, prompt: str, seed: int, steps: int = 50, guidance_scale: float = 7.5
    ) -> Query:
        """Makes a picture with the pipeline's own sampler.

        Args:
            prompt: the prompt.
            seed: of the generator of the initial noise, on the CPU: the same on every device.
            steps: sampler steps.
            guidance_scale: classifier-free guidance.

        Returns:
            A query with the sampler's final latent itself, not the re-encoded picture.
        """
        pipeline = self._pipeline()
        text = self.encode_prompts([prompt])[0]
        with _quiet("diffusers.pipelines"), _quiet("transformers"):
            latents = pipeline(
                prompt,
                num_inference_steps=steps,
                guidance_scale=guidance_scale,
                generator=torch.Generator("cpu").manual_seed(seed),
                output_type="latent",
            ).images
        return Query(
            id=f"seed{seed}:{prompt}",
            latents=latents[0].float().cpu(),
            text=text,
            prompt=prompt,
            image=self.decode(latents)[0],
            provenance={"source": "generated", "seed": seed, "steps": steps,
                        "guidance_scale": guidance_scale},
        )  # fmt: skip

    @torch.no_grad()
    def decode(self, latents: Tensor) -> list[Image.Image]:
        """Returns the pictures of scaled latents [B, C, h, w]."""
        pipeline = self._pipeline()
        vae = pipeline.vae
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        scaled = latents.to(vae.device, vae.dtype) / vae.config.scaling_factor + shift
        pixels = vae.decode(scaled, return_dict=False)[0]
        return pipeline.image_processor.postprocess(pixels.detach(), output_type="pil")


def _pixels(image: Image.Image, size: tuple[int, int]) -> Tensor:
    """Returns [3, H, W] float32 in [-1, 1] of a picture resized to (width, height)."""
    resized = image.resize(size, Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(resized).copy()).permute(2, 0, 1).float() / 127.5 - 1


@contextlib.contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Silences a library's warnings about what we have already said in our own words."""
    library = logging.getLogger(name)
    level = library.level
    library.setLevel(logging.ERROR)
    try:
        yield
    finally:
        library.setLevel(level)
