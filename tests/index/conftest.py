"""Small denoisers and indices on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.methods.conftest import examples
from tests.models.test_unet import build
from unsee.data.latents import EncodedDataset
from unsee.draws import Draws
from unsee.index.index import Index
from unsee.models.unet import UNetDenoiser

DRAWS = Draws(seed=3, n=4)


def small_model(**options: Any) -> UNetDenoiser:
    """A network with text in the middle only: one key and one value layer, and fast."""
    return build("text in the middle only", prediction="v_prediction", **options)


def build_index(path: Path, model: UNetDenoiser, data: EncodedDataset, **options: Any) -> Index:
    """Builds with few draws and small shards, and leaves nothing out."""
    exact = {"draws": DRAWS, "shard_size": 4, "tolerance": 0.0}
    return Index.build(path, model, data, **{**exact, **options})


def contents(path: Path) -> dict[str, bytes]:
    """Returns relative name -> bytes of every file of an index."""
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


@pytest.fixture(scope="session")
def model() -> UNetDenoiser:
    return small_model()


@pytest.fixture(scope="session")
def data() -> EncodedDataset:
    """Ten random examples with one or two captions, and their mirror images."""
    return examples(10)


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory, model: UNetDenoiser, data: EncodedDataset):
    """An index in float32, to be read only."""
    return build_index(tmp_path_factory.mktemp("built"), model, data, storage="float32")
