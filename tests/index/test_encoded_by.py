"""What made latents and texts of an index of pictures is part of what it is of."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline

from unsee.data.dataset import load_dataset
from unsee.data.latents import encode_dataset
from unsee.draws import Draws
from unsee.index.index import Index
from unsee.index.layout import Manifest, read_manifest, shard_path, write_manifest
from unsee.models.base import Denoiser
from unsee.models.unet import UNetDenoiser

from .conftest import build_index

OPTIONS: dict[str, Any] = {"draws": Draws(n=2), "shard_size": 5, "columns": ["loss"]}


@pytest.fixture
def pictures(image_folder: Path):
    return load_dataset("imagefolder", data_dir=image_folder)


@pytest.fixture
def index(tiny_model, pictures, tmp_path: Path) -> Index:
    return build_index(tmp_path / "ix", tiny_model, pictures, **OPTIONS)


def another(folder: Path, part: str, change: Callable[[Any], object]) -> Any:
    """The same network with another encoder."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    with torch.no_grad():
        change(getattr(pipeline, part))
    return Denoiser.from_pipeline(pipeline)


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("vae", lambda vae: vae.encoder.conv_in.weight.add_(0.1)),
        ("text_encoder", lambda text: text.get_input_embeddings().weight.add_(0.1)),
        ("tokenizer", lambda tokenizer: tokenizer.add_tokens(["sks"])),
    ],
)
def test_other_encoders_are_refused(index, pictures, tiny_pipeline_dir, part, change) -> None:
    other = another(tiny_pipeline_dir, part, change)
    assert other.fingerprint() == index.model.fingerprint()
    here, asked = (m.encoder_fingerprints()[part] for m in (index.model, other))
    said = f'encoded_by.{part} is "{here}" there, but "{asked}" is asked for'
    with pytest.raises(ValueError, match=said):
        Index.open(index.path, other)
    shard_path(index.path, "loss", index.manifest.shards[1]).unlink()
    with pytest.raises(ValueError, match=said):
        build_index(index.path, other, pictures, **OPTIONS)
    build_index(index.path, index.model, pictures, **OPTIONS)
    assert Index.open(index.path, index.model).ids == pictures.ids


def test_a_bare_network_opens_what_others_encoded(index: Index) -> None:
    model: Any = index.model
    bare = UNetDenoiser(model.network, model.pipeline.scheduler)
    assert Index.open(index.path, bare).ids == index.ids


def test_of_what_came_encoded_nothing_is_known(
    tiny_model, pictures, tiny_pipeline_dir, tmp_path: Path
) -> None:
    encoded = encode_dataset(tiny_model, pictures)
    built = build_index(tmp_path / "ix", tiny_model, encoded, **OPTIONS)
    assert "encoded_by" not in built.manifest.settings
    other = another(tiny_pipeline_dir, "vae", lambda vae: vae.encoder.conv_in.weight.add_(0.1))
    build_index(tmp_path / "ix", other, encoded, **OPTIONS)
    assert Index.open(tmp_path / "ix", other).ids == pictures.ids


def test_encoded_data_is_added_to_pictures(index, pictures) -> None:
    """And such an addition goes on where it was killed."""
    part = encode_dataset(index.model, pictures.select(pictures.ids[:2]))
    part.ids = ["one", "two"]
    grown = index.append(part)
    shard_path(index.path, "loss", grown.manifest.shards[-1]).unlink()
    again = build_index(index.path, index.model, part, **OPTIONS)
    assert again.ids == [*pictures.ids, "one", "two"]


def test_an_index_that_does_not_tell_goes_on(tiny_model, pictures, index: Index) -> None:
    """As those that were built before it was recorded."""
    settings = {n: v for n, v in index.manifest.settings.items() if n != "encoded_by"}
    before = Manifest(settings, index.manifest.environment, index.manifest.parts,
                      index.manifest.shards)  # fmt: skip
    for shard in before.shards:
        for column in settings["columns"]:
            shard_path(index.path, column, shard).unlink()
    (index.path / "examples.parquet").unlink()
    write_manifest(index.path, before)
    built = build_index(index.path, tiny_model, pictures, **OPTIONS)
    assert read_manifest(index.path) == before
    assert Index.open(index.path, tiny_model).ids == built.ids == pictures.ids
    assert "encoded_by" not in json.loads((index.path / "manifest.json").read_text())["settings"]
