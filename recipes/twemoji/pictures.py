"""The pictures that are compared: the training set's, the model's, the autoencoder's."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from measures import Array
from tqdm.auto import tqdm

from unsee.data.dataset import ImageDataset
from unsee.draws import stable_seed
from unsee.training.autoencoder import load_pixels, psnr


@dataclass(frozen=True)
class Settings:
    """What fixes an evaluation beside the model.

    Attributes:
        steps: of the pipeline's sampler.
        guidance: classifier-free guidance scale.
        seed: of the pictures' noise; each caption has its own, whatever the batch.
        batch_size: pictures generated at a time.
        captions: how many captions of the data set are tried.
    """

    steps: int = 50
    guidance: float = 3.0
    seed: int = 0
    batch_size: int = 40
    captions: int = 200


@dataclass(frozen=True)
class Training:
    """The training pictures, as the model saw them.

    Attributes:
        ids: of all N examples.
        captions: one each.
        categories: one each.
        pictures: [N, H, W, 3] float32 in [0, 1].
    """

    ids: list[str]
    captions: list[str]
    categories: list[str]
    pictures: Array

    @classmethod
    def of(cls, data: ImageDataset, resolution: int) -> Training:
        """Loads all pictures of a data set."""
        pixels = load_pixels(data, resolution)
        pictures = ((pixels + 1) / 2).permute(0, 2, 3, 1).numpy()
        captions = [captions[0] for captions in data.captions]
        return cls(data.ids, captions, list(data.table["category"]), pictures)

    @property
    def pixels(self) -> torch.Tensor:
        """[N, 3, H, W] in [-1, 1], as the autoencoder takes them."""
        return torch.from_numpy(self.pictures).permute(0, 3, 1, 2) * 2 - 1


def reconstruction_psnr(vae: Any, pixels: torch.Tensor, what: str) -> Array:
    """Returns the PSNR of each reconstruction, [N] in dB."""
    batches = tqdm(pixels.split(64), desc=f"autoencoder, {what}", unit="batch", file=sys.stderr)
    return torch.cat([psnr(vae, batch) for batch in batches]).double().numpy()


def generate(pipeline: Any, prompts: Sequence[str], settings: Settings) -> Array:
    """Returns a picture for each prompt, [n, H, W, 3] float32 in [0, 1].

    The noise of a prompt comes from (seed, prompt): it is the same in every list and batch.
    """
    pipeline.set_progress_bar_config(disable=True)
    pictures = []
    with tqdm(total=len(prompts), desc="pictures", unit="picture", file=sys.stderr) as bar:
        for first in range(0, len(prompts), settings.batch_size):
            batch = list(prompts[first : first + settings.batch_size])
            seeds = [stable_seed(settings.seed, prompt) for prompt in batch]
            result = pipeline(
                batch,
                num_inference_steps=settings.steps,
                guidance_scale=settings.guidance,
                generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
                output_type="np",
            )
            pictures.append(result.images)
            bar.update(len(batch))
    return np.concatenate(pictures)
