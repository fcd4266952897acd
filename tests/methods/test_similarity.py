from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.index.test_features import save_vision
from unsee.data.dataset import ImageDataset, load_dataset
from unsee.data.latents import encode_dataset
from unsee.draws import Draws
from unsee.index.index import Index
from unsee.methods.similarity import Feature, Similarity, similarity_scores
from unsee.models.base import Denoiser
from unsee.query import Query


@pytest.mark.parametrize("feature", ["latent", "pixel", "text"])
def test_an_example_is_most_similar_to_itself(
    tiny_model: Denoiser, image_folder: Path, tmp_path: Path, feature: str
) -> None:
    images = load_dataset("imagefolder", data_dir=image_folder)
    data = encode_dataset(tiny_model, images, cache=tmp_path / "work")
    rows = [2, 7]
    queries = [tiny_model.query(images[r].image, images[r].captions[-1]) for r in rows]
    scores = similarity_scores(feature, data, images, queries)  # type: ignore[arg-type]
    assert scores.shape == (len(images), 2)
    for column, row in enumerate(rows):
        # A cosine in float64 of float32 features.
        assert scores[row, column] == pytest.approx(1, abs=1e-5)
        assert scores[:, column].max() <= scores[row, column] + 1e-6
    assert np.abs(scores).max() <= 1 + 1e-6


# -- from an index -------------------------------------------------------------------------------

ENCODERS = ("latent", "text", "pixel")


@pytest.fixture
def images(image_folder: Path) -> ImageDataset:
    return load_dataset("imagefolder", data_dir=image_folder)


@pytest.fixture
def index(tiny_model: Denoiser, images: ImageDataset, tmp_path: Path) -> Index:
    vision = str(save_vision(tmp_path / "vit"))
    return Index.build(
        tmp_path / "ix", tiny_model, images, ["features"], encoders=[*ENCODERS, vision],
        draws=Draws(n=2), shard_size=5,
    )  # fmt: skip


def asked(model: Denoiser, images: ImageDataset) -> list[Query]:
    return [model.query(images[r].image, images[r].captions[0]) for r in (2, 7)]


@pytest.mark.parametrize("encoder", [*ENCODERS, "vit"])
def test_from_an_index_an_example_is_most_similar_to_itself(
    index: Index, tiny_model: Denoiser, images: ImageDataset, tmp_path: Path, encoder: str
) -> None:
    method = Similarity(index, str(tmp_path / "vit") if encoder == "vit" else encoder)
    queries = asked(tiny_model, images)
    found = method.attribute_many(queries)
    for query, row, scores in zip(queries, (2, 7), found, strict=True):
        assert scores.ids == images.ids and scores.query is query
        # A row in float16, whose length is 1 to one rounding, at most.
        assert scores.values[row] == pytest.approx(1, abs=2**-11)
        assert scores.values.max() <= scores.values[row] + 2**-11
        assert scores.values.dtype == np.float64
        alone = method.attribute(query)
        # Products of two queries are summed in another order than those of one: in float32, and
        # thousands of equal numbers (a flat picture) round to the same side.
        np.testing.assert_allclose(alone.values, scores.values, atol=2e-5)
        few = method.attribute(query, candidates=[images.ids[7], images.ids[0]])
        assert few.ids == [images.ids[7], images.ids[0]]
        np.testing.assert_array_equal(few.values, alone.values[[7, 0]])
    assert found[0].method == f"similarity, {encoder}"


@pytest.mark.parametrize("encoder", ENCODERS)
def test_the_index_agrees_with_cosines_of_encoded_pictures(
    index: Index, tiny_model: Denoiser, images: ImageDataset, tmp_path: Path, encoder: Feature
) -> None:
    """The pictures have one caption each, and the model sees all of them."""
    data, queries = encode_dataset(tiny_model, images), asked(tiny_model, images)
    slow = similarity_scores(encoder, data, images, queries)  # float64, nothing rounded
    fast = np.stack([s.values for s in Similarity(index, encoder).attribute_many(queries)], axis=1)
    np.testing.assert_allclose(fast, slow, atol=2**-11)


def test_similarity_follows_rows_that_come_and_go(
    index: Index, tiny_model: Denoiser, images: ImageDataset
) -> None:
    query = asked(tiny_model, images)[0]
    before = Similarity(index).attribute(query)
    smaller = index.delete([*images.ids[:5], images.ids[9]])  # the first shard, and one more
    after = Similarity(Index.open(index.path, tiny_model)).attribute(query)
    assert after.ids == smaller.ids == [*images.ids[5:9], *images.ids[10:]]
    kept = [before.ids.index(i) for i in after.ids]
    np.testing.assert_allclose(after.values, before.values[kept], atol=1e-6)
    assert len(Similarity(smaller.delete(smaller.ids)).attribute(query)) == 0


def test_similarity_refuses_in_one_line(
    index: Index, tiny_model: Denoiser, images: ImageDataset, tmp_path: Path
) -> None:
    query = asked(tiny_model, images)[0]
    with pytest.raises(ValueError, match="no encoder 'clip', only latent, text, pixel, vit"):
        Similarity(index, "clip")
    with pytest.raises(ValueError, match="there is no query"):
        Similarity(index).attribute_many([])
    with pytest.raises(ValueError, match="candidate 'nobody' is not in the index"):
        Similarity(index).attribute(query, ["nobody"])
    boxed = tiny_model.query(images[2].image, "a square", box=(0, 0, 16, 16))
    with pytest.raises(ValueError, match="compares whole pictures; ask without a box"):
        Similarity(index).attribute(boxed)
    other = save_vision(tmp_path / "other" / "vit", seed=1)
    with pytest.raises(ValueError, match="encoder 'vit': its fingerprint is"):
        Similarity(index, str(other)).attribute(query)
    without = Index.build(tmp_path / "without", tiny_model, images, [], draws=Draws(n=2))
    with pytest.raises(ValueError, match="no column 'features', only examples; build another"):
        Similarity(without)
