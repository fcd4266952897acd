"""What every text-to-image diffusion model must offer to be attributed."""

from __future__ import annotations

import contextlib
import copy
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from PIL import Image
from torch import Tensor, nn

from ..query import Query, box_mask, check_box
from ..selection import select_parameters
from .fingerprints import adapter_scales, encoder_fingerprints

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


class Denoiser(ABC):
    """A denoising network with its noise schedule and encoders.

    Attributes:
        network: the denoising network, in eval mode.
        parameters: the selected parameters, name -> parameter, in the network's order.
        prediction_type: what the network predicts.
        num_train_timesteps: length of the training schedule.
        pipeline: the pipeline it came from; None for a bare network.
        presets: name -> patterns of parameters, of the architecture.
    """

    network: nn.Module
    parameters: dict[str, nn.Parameter]
    prediction_type: str
    num_train_timesteps: int
    pipeline: Any | None
    presets: ClassVar[Mapping[str, Sequence[str]]] = {}

    @classmethod
    def from_pipeline(
        cls, pipeline: DiffusionPipeline, parameters: str | Sequence[str] = "cross-attn-kv"
    ) -> Denoiser:
        """Wraps a loaded diffusers pipeline; the pipeline itself is not changed.

        Args:
            pipeline: a Stable Diffusion pipeline (any with a `UNet2DConditionModel`, one text
                encoder and an `AutoencoderKL`).
            parameters: a preset (`cross-attn-kv`, `cross-attn`, `attn`, `lora`, `all`) or
                fnmatch patterns of parameter names.

        Raises:
            ValueError: the pipeline lacks a part or is of an unsupported family, or the selection
                matches nothing.
        """
        from .unet import UNetDenoiser

        return UNetDenoiser.from_pipeline(pipeline, parameters)

    def selecting(self, parameters: str | Sequence[str]) -> Self:
        """Returns the same model, network and all, with other parameters selected.

        Args:
            parameters: a preset or fnmatch patterns of parameter names.

        Raises:
            ValueError: the selection matches nothing.
        """
        other = copy.copy(self)
        other.parameters = self._selected(parameters)
        return other

    def _selected(self, parameters: str | Sequence[str]) -> dict[str, nn.Parameter]:
        named = dict(self.network.named_parameters())
        return {n: named[n] for n in select_parameters(named, parameters, self.presets)}

    @property
    def device(self) -> torch.device:
        """Where the network lives."""
        return next(self.network.parameters()).device

    @property
    @abstractmethod
    def resolution(self) -> tuple[int, int]:
        """(width, height) in pixels of the pictures that the model makes."""

    @abstractmethod
    def crop_box(self, size: tuple[int, int]) -> tuple[int, int, int, int]:
        """Returns the part (x0, y0, x1, y1) that the model sees of a picture (width, height)."""

    @abstractmethod
    def encode_images(self, images: Sequence[Image.Image]) -> Tensor:
        """Returns scaled latents [B, C, h, w] float32 (the posterior's mode), on the CPU."""

    @abstractmethod
    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Returns text states [B, T, D] float32, on the CPU; warns of prompts that are cut."""

    @abstractmethod
    def loss(
        self,
        latents: Tensor,
        text: Tensor,
        timesteps: Tensor,
        noise: Tensor,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Denoising loss of B examples on D draws each; differentiable in the parameters.

        Args:
            latents: [B, C, h, w].
            text: [B, T, D_text].
            timesteps: [B, D] int64.
            noise: [B, D, C, h, w].
            mask: [h, w]; the loss is averaged over its cells only.

        Returns:
            [B, D], the squared error averaged over latent elements. The network runs in its own
            dtype; the average is taken in float32, or float64 for a float64 network.
        """

    @abstractmethod
    def predict(
        self, latents: Tensor, text: Tensor, timesteps: Tensor, noise: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What the network says and what it should have said, for B examples on D draws each.

        Args:
            latents: [B, C, h, w].
            text: [B, T, D_text].
            timesteps: [B, D] int64.
            noise: [B, D, C, h, w].

        Returns:
            outputs and targets, both [B, D, C, h, w], float32 (float64 for a float64 network);
            outputs are differentiable in the parameters.
        """

    @abstractmethod
    def generate(
        self, prompt: str, seed: int, steps: int = 50, guidance_scale: float = 7.5
    ) -> Query:
        """Makes a picture and returns it as a query, with the sampler's own final latent."""

    def query(
        self, image: Image.Image, prompt: str, box: tuple[int, int, int, int] | None = None
    ) -> Query:
        """Returns a query for a picture that was made elsewhere.

        Args:
            image: the picture; the query holds the part of it that the model sees.
            prompt: what it was made for.
            box: (x0, y0, x1, y1) in pixels of `image`; restricts the query's loss to this part.

        Raises:
            ValueError: the box is empty, or outside the picture or what the model sees of it.
        """
        from ..data.dataset import to_rgb

        picture = to_rgb(image)
        left, upper, right, lower = seen = self.crop_box(picture.size)
        if box is not None:
            check_box(box, picture.size)
            x0, y0 = max(box[0], left) - left, max(box[1], upper) - upper
            x1, y1 = min(box[2], right) - left, min(box[3], lower) - upper
            if x0 >= x1 or y0 >= y1:
                raise ValueError(
                    f"box {','.join(map(str, box))} lies outside {','.join(map(str, seen))}, the "
                    f"part of the {picture.width}x{picture.height} picture that the model sees"
                )
            box = x0, y0, x1, y1
        latents = self.encode_images([picture])[0]
        # Of the pixels, so that two pictures of one prompt are two queries.
        mark = hashlib.sha256(picture.crop(seen).tobytes()).hexdigest()[:8]
        query = Query(
            id=f"image-{mark}:{prompt}",
            latents=latents,
            text=self.encode_prompts([prompt])[0],
            prompt=prompt,
            image=picture.crop(seen),
            provenance={"source": "image"},
        )
        return with_box(query, box) if box is not None else query

    def fingerprint(self) -> str:
        """Returns a hash of what a loss depends on besides its data: weights and schedule.

        Adapters (LoRA) count with their scale, and with which of them are on.
        """
        digest = hashlib.sha256(f"{self.prediction_type} {self.num_train_timesteps}".encode())
        for name, tensor in self.network.state_dict().items():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
        digest.update(adapter_scales(self.network))
        return digest.hexdigest()[:16]

    def encoder_fingerprints(self) -> dict[str, str]:
        """Returns hashes of vae, text_encoder and tokenizer, which `fingerprint` leaves out.

        Latents and text states depend on them; a bare network has none.
        """
        if self.pipeline is None:
            return {}
        return encoder_fingerprints(self.pipeline, self.resolution)

    @contextlib.contextmanager
    def replaced(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """Gives selected parameters other values in a `with` block; restores every bit after."""
        before = {name: self.parameters[name].detach().clone() for name in values}
        try:
            with torch.no_grad():
                for name, value in values.items():
                    self.parameters[name].copy_(value)
            yield
        finally:
            with torch.no_grad():
                for name, value in before.items():
                    self.parameters[name].copy_(value)

    @contextlib.contextmanager
    def gradients_on(self) -> Iterator[None]:
        """Lets exactly the selected parameters require gradients inside a `with` block."""
        chosen = {id(p) for p in self.parameters.values()}
        before = [(p, p.requires_grad) for p in self.network.parameters()]
        try:
            for parameter, _ in before:
                parameter.requires_grad_(id(parameter) in chosen)
            yield
        finally:
            for parameter, required in before:
                parameter.requires_grad_(required)


def with_box(query: Query, box: tuple[int, int, int, int]) -> Query:
    """Returns the query restricted to a pixel box.

    Raises:
        ValueError: the box is empty or reaches outside the picture.
    """
    import dataclasses

    h, w = query.latents.shape[-2:]
    mask = box_mask(box, query.image.size, (h, w))
    name = f"{query.id}@{','.join(map(str, box))}"
    return dataclasses.replace(query, mask=mask, box=box, id=name)
