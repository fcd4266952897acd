"""Stable Diffusion with a UNet: epsilon, v and sample prediction."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from PIL import Image
from torch import Tensor

from ..query import Query
from ..selection import select_parameters
from .base import Denoiser

logger = logging.getLogger(__name__)

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

    def __init__(
        self,
        unet: UNet2DConditionModel,
        scheduler: Any,
        parameters: str | Sequence[str] = "cross-attn-kv",
        pipeline: Any | None = None,
    ) -> None:
        self.network = unet.eval()
        self.pipeline = pipeline
        # The training schedule, not the sampler that the pipeline happens to carry.
        self.schedule = DDPMScheduler.from_config(scheduler.config)
        self.prediction_type = self.schedule.config["prediction_type"]
        self.num_train_timesteps = int(self.schedule.config["num_train_timesteps"])
        named = dict(unet.named_parameters())
        names = select_parameters(named, parameters, PRESETS)
        self.parameters = {name: named[name] for name in names}

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
        return cls(pipeline.unet, pipeline.scheduler, parameters, pipeline)

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

    @torch.no_grad()
    def encode_images(self, images: Sequence[Image.Image]) -> Tensor:
        """See `Denoiser.encode_images`. Pictures are cropped square at the centre and resized."""
        vae = self._pipeline().vae
        pixels = torch.stack([_pixels(image, self.resolution) for image in images])
        posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        latents = (posterior.mode() - shift) * vae.config.scaling_factor
        return latents.float().cpu()

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        """See `Denoiser.encode_prompts`. Padding stays: the UNet attends to it."""
        pipeline = self._pipeline()
        limit = pipeline.tokenizer.model_max_length
        for prompt in prompts:
            ids = pipeline.tokenizer(prompt).input_ids
            if len(ids) > limit:
                lost = pipeline.tokenizer.decode(ids[limit - 1 : -1])
                logger.warning(
                    "the prompt has %d tokens, the text encoder takes %d: cut %r",
                    len(ids), limit, lost,
                )  # fmt: skip
        with _quiet("diffusers.pipelines"), _quiet("transformers.tokenization_utils_base"):
            states, _ = pipeline.encode_prompt(
                list(prompts), pipeline.text_encoder.device, 1, do_classifier_free_guidance=False
            )
        return states.float().cpu()

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
        parameter = next(self.network.parameters())
        draws = timesteps.shape[1]
        to = {"device": parameter.device, "dtype": parameter.dtype}
        clean = latents.to(**to).repeat_interleave(draws, 0)
        noise = noise.to(**to).flatten(0, 1)
        flat_timesteps = timesteps.to(parameter.device).flatten()
        noisy = self._add_noise(clean, noise, flat_timesteps)
        with self.shared_text(draws):
            predicted = self.network(
                noisy, flat_timesteps, encoder_hidden_states=text.to(**to), return_dict=False
            )[0]
        target = self._target(clean, noise, flat_timesteps)
        wide = torch.float64 if parameter.dtype == torch.float64 else torch.float32
        error = (predicted.to(wide) - target.to(wide)).square()
        if mask is None:
            loss = error.mean(dim=(1, 2, 3))
        else:
            m = mask.to(error)
            loss = (error * m).sum(dim=(1, 2, 3)) / (m.sum() * error.shape[1])
        return loss.unflatten(0, timesteps.shape)

    def _add_noise(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        signal, sigma = self._coefficients(timesteps, clean)
        return signal * clean + sigma * noise

    def _target(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return clean
        if self.prediction_type == "v_prediction":
            signal, sigma = self._coefficients(timesteps, clean)
            return signal * noise - sigma * clean
        raise ValueError(f"prediction_type {self.prediction_type!r} is not supported")

    def _coefficients(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        alphas = self.schedule.alphas_cumprod.to(like.device)[timesteps].to(like.dtype)
        alphas = alphas.view(-1, 1, 1, 1)
        return alphas.sqrt(), (1 - alphas).sqrt()

    @contextlib.contextmanager
    def shared_text(self, draws: int) -> Iterator[None]:
        """Lets B text states serve B*draws latents, example-major, inside a `with` block.

        Attention is computed per query vector, so the draws of an example may stand behind one
        another as one longer sequence of query vectors: the keys and values of its text are then
        projected once, not once per draw. The processor takes the batch size from the text, which
        makes the long sequence; a hook folds it back.
        """
        if draws == 1:
            yield
            return

        def unfold(_module: Any, _inputs: Any, output: Tensor) -> Tensor:
            return output.reshape(output.shape[0] * draws, -1, output.shape[-1])

        handles = [
            module.register_forward_hook(unfold)
            for name, module in self.network.named_modules()
            if name.endswith("attn2")
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    # -- generation -------------------------------------------------------------------------

    def generate(
        self, prompt: str, seed: int, steps: int = 50, guidance_scale: float = 7.5
    ) -> Query:  # type: ignore[override]
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
        with _quiet("diffusers.pipelines"), _quiet("transformers.tokenization_utils_base"):
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
    """Returns [3, H, W] float32 in [-1, 1]: centre crop to the aspect of `size`, then resize."""
    width, height = size
    scale = min(image.width / width, image.height / height)
    crop_w, crop_h = round(width * scale), round(height * scale)
    left, upper = (image.width - crop_w) // 2, (image.height - crop_h) // 2
    cropped = image.crop((left, upper, left + crop_w, upper + crop_h))
    resized = cropped.resize(size, Image.Resampling.LANCZOS)
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
