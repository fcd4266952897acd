from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from unsee.data.dataset import load_dataset
from unsee.data.latents import encode_dataset
from unsee.methods.similarity import similarity_scores
from unsee.models.base import Denoiser


@pytest.mark.parametrize("feature", ["latent", "pixel", "text"])
def test_an_example_is_most_similar_to_itself(
    tiny_model: Denoiser, image_folder: Path, tmp_path: Path, feature: str
) -> None:
    images = load_dataset("imagefolder", data_dir=image_folder)
    data = encode_dataset(tiny_model, images, cache=tmp_path / "work")
    asked = [2, 7]
    queries = [tiny_model.query(images[r].image, images[r].captions[-1]) for r in asked]
    scores = similarity_scores(feature, data, images, queries)  # type: ignore[arg-type]
    assert scores.shape == (len(images), 2)
    for column, row in enumerate(asked):
        # A cosine in float64 of float32 features.
        assert scores[row, column] == pytest.approx(1, abs=1e-5)
        assert scores[:, column].max() <= scores[row, column] + 1e-6
    assert np.abs(scores).max() <= 1 + 1e-6
