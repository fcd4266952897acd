"""Similarity of embeddings: what a picture looks like, not what made it possible."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..data.dataset import ImageDataset, to_rgb
from ..data.latents import EncodedExamples
from ..query import Query

Feature = Literal["latent", "pixel", "text"]
SIDE = 32
"""Pictures are compared at this size in pixels: finer detail is noise to a pixel distance."""


def similarity_scores(
    feature: Feature, data: EncodedExamples, images: ImageDataset, queries: Sequence[Query]
) -> np.ndarray:
    """Scores examples by the cosine of a feature with the query's.

    Args:
        feature: `latent`: of the autoencoder; `pixel`: RGB at 32x32, less white, which most
            pictures have in common; `text`: the caption's text state, averaged over tokens (the
            best of an example's captions).
        data: encoded examples.
        images: the same examples as pictures.
        queries: what is asked about.

    Returns:
        [N, Q] float64 in [-1, 1]; higher is more similar.
    """
    rows = list(range(len(data.ids)))
    if feature == "latent":
        return _cosines(data.latents(rows), torch.stack([q.latents for q in queries]))
    if feature == "pixel":
        ours = torch.stack([_pixels(images[r].image) for r in rows])
        return _cosines(ours, torch.stack([_pixels(q.image) for q in queries]))
    asked = torch.stack([q.text.mean(0) for q in queries])
    best = np.full((len(rows), len(queries)), -np.inf)
    for caption in range(max(data.caption_counts)):
        have = [r for r in rows if data.caption_counts[r] > caption]
        best[have] = np.maximum(best[have], _cosines(data.text(have, caption).mean(1), asked))
    return best


def _pixels(image: Image.Image) -> Tensor:
    small = to_rgb(image).resize((SIDE, SIDE), Image.Resampling.BOX)
    return torch.from_numpy(np.asarray(small).astype(np.float32)) / 255 - 1


def _cosines(examples: Tensor, queries: Tensor) -> np.ndarray:
    a, b = (
        torch.nn.functional.normalize(x.flatten(1).double(), dim=1) for x in (examples, queries)
    )
    return (a @ b.T).numpy()
