from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch import Tensor

from unsee.data.dataset import ImageDataset, load_dataset
from unsee.draws import Draws
from unsee.index import features as module
from unsee.index.features import VisionEncoder, load_encoders, pixels
from unsee.index.index import Index
from unsee.index.layout import read_manifest, shard_path
from unsee.models.base import Denoiser

from .conftest import build_index, contents
from .test_build import Stopped, stop_after

ROUNDING = 2**-11
"""Of a number in float16, relative."""

SIZES: dict[str, Any] = {
    "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
    "image_size": 16, "patch_size": 8,
}  # fmt: skip


def rows(index: Index, encoder: str) -> Tensor:
    """Returns what an encoder saw of every example."""
    parts = [index.features(encoder, s) for s in index.shards() if index.examples(s).ids]
    return torch.cat(parts)


def build_features(path: Path, model: Denoiser, data: Any, *encoders: str, **options: Any) -> Index:
    return build_index(path, model, data, columns=["features"], encoders=encoders, **options)


def save_vision(folder: Path, kind: str = "ViT", seed: int = 0, **options: Any) -> Path:
    """Saves a tiny vision model with random weights, and its preprocessor."""
    torch.manual_seed(seed)
    if kind == "CLIP":
        text = {**{k: v for k, v in SIZES.items() if k not in ("image_size", "patch_size")},
                "vocab_size": 20}  # fmt: skip
        config = transformers.CLIPConfig(vision_config=SIZES, text_config=text, projection_dim=6)
    else:
        config = getattr(transformers, f"{kind}Config")(**SIZES)
    model = getattr(transformers, f"{kind}Model")(config, **options)
    model.save_pretrained(folder)
    if kind == "CLIP":
        processor = transformers.CLIPImageProcessorPil(
            size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
        )
    else:
        processor = transformers.ViTImageProcessorPil(size={"height": 16, "width": 16})
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def pictures(image_folder: Path) -> ImageDataset:
    return load_dataset("imagefolder", data_dir=image_folder)


# -- what a row is -----------------------------------------------------------------------------


def unit(values: list[float]) -> np.ndarray:
    """Divides numbers by their length, one after the other."""
    length = math.sqrt(sum(v * v for v in values))
    return np.array([v / length for v in values])


def close(found: Tensor, expected: list[np.ndarray]) -> None:
    assert found.dtype == torch.float16
    # Numbers below float16's normal range have a step of 6e-8.
    np.testing.assert_allclose(found.double(), np.stack(expected), rtol=ROUNDING, atol=6e-8)


def test_rows_of_latents_and_texts_against_loops(model, data, tmp_path: Path) -> None:
    index = build_features(tmp_path, model, data)
    assert index.columns == ["examples", "features"]
    assert index.manifest.settings["encoders"] == {"latent": "of unsee", "text": "of unsee"}
    close(rows(index, "latent"), [unit(data.latents([r]).flatten().tolist()) for r in range(10)])
    expected = []
    for r in range(10):
        states = [data.text([r], c)[0] for c in range(data.caption_counts[r])]
        sums = [
            sum(float(s[t, d]) for s in states for t in range(len(s)))
            for d in range(states[0].shape[-1])
        ]
        expected.append(unit(sums))
    close(rows(index, "text"), expected)


def test_rows_of_pictures_against_one_picture_at_a_time(tiny_model, pictures, tmp_path) -> None:
    folder = save_vision(tmp_path / "vit")
    index = build_features(tmp_path / "ix", tiny_model, pictures, "pixel", str(folder))
    network = transformers.ViTModel.from_pretrained(folder)
    processor = transformers.ViTImageProcessorPil.from_pretrained(folder)
    seen = []
    for example in pictures:
        inputs = processor(images=example.image, return_tensors="pt")
        with torch.no_grad():
            seen.append(unit(network(**inputs).pooler_output[0].tolist()))
    # Pictures in batches: some roundings of float32 more.
    close(rows(index, "vit"), seen)
    close(rows(index, "pixel"), [unit(pixels(e.image).flatten().tolist()) for e in pictures])
    assert rows(index, "pixel").shape == (12, 32 * 32 * 3)


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        ("ViT", {}, lambda m, x: m(x).pooler_output),
        ("ViT", {"add_pooling_layer": False}, lambda m, x: m(x).last_hidden_state[:, 0]),
        ("Dinov2", {}, lambda m, x: m(x).pooler_output),
        ("CLIP", {}, lambda m, x: m.visual_projection(m.vision_model(x).pooler_output)),
    ],
    ids=["ViT", "ViT without pooler", "Dinov2", "CLIP"],
)
def test_what_a_vision_model_gives(
    tmp_path: Path, kind: str, options: dict[str, Any], expected: Callable[[Any, Tensor], Tensor]
) -> None:
    folder = save_vision(tmp_path / "model", kind, **options)
    encoder = VisionEncoder(folder)
    picture = Image.effect_noise((40, 24), 90).convert("RGB")
    network = getattr(transformers, f"{kind}Model").from_pretrained(folder, **options).eval()
    inputs = encoder.processor(images=picture, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        torch.testing.assert_close(encoder([picture]), expected(network, inputs))
    # An untrained pooler has other weights each time: it counts for nothing.
    shutil.copytree(folder, tmp_path / "elsewhere" / "model")
    again = VisionEncoder(tmp_path / "elsewhere" / "model")
    assert (again.name, again.fingerprint) == ("model", encoder.fingerprint)
    torch.testing.assert_close(again([picture]), encoder([picture]))
    other = VisionEncoder(save_vision(tmp_path / "other", kind, seed=1, **options))
    assert other.fingerprint != encoder.fingerprint


# -- choosing ----------------------------------------------------------------------------------


def test_an_index_without_the_column_is_as_before(model, data, tmp_path: Path) -> None:
    index = build_index(tmp_path, model, data, columns=["loss"])
    assert "encoders" not in index.manifest.settings
    assert "features" not in index.columns
    with pytest.raises(ValueError, match="no column 'features', only examples, loss; build anot"):
        index.features("latent", next(index.shards()))


def test_features_need_no_passes(model, data, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("unsee.index.build.example_factors", lambda *_: pytest.fail("a pass"))
    index = build_features(tmp_path, model, data, "text")
    with pytest.raises(ValueError, match="no encoder 'latent', only text"):
        index.features("latent", next(index.shards()))


def test_encoders_that_cannot_be_are_refused_in_one_line(
    model, data, tiny_pipeline_dir, tmp_path: Path
) -> None:
    (tmp_path / "text").mkdir()
    vision = save_vision(tmp_path / "vit")
    twin = save_vision(tmp_path / "other" / "vit")
    (tmp_path / "empty").mkdir()
    torn = save_vision(tmp_path / "torn")
    weights = torn / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])
    refused = {
        "no encoder 'latnet'; there are latent, text, pixel, and the folder of any vision model":
            ["latnet"],
        "two encoders are called 'vit'; rename a folder": [str(vision), str(twin)],
        "two encoders are called 'text'": ["text", "text"],
        r"empty' cannot be used as a vision encoder": [str(tmp_path / "empty")],
        r"torn' cannot be used as a vision encoder": [str(torn)],
        r"text_encoder' cannot be used as a vision": [str(tiny_pipeline_dir / "text_encoder")],
        "encoder 'pixel' needs pictures, and this data set came encoded": ["latent", "pixel"],
        "encoder 'vit' needs pictures, and this data set came encoded": [str(vision)],
    }  # fmt: skip
    for message, encoders in refused.items():
        with pytest.raises(ValueError, match=message) as caught:
            build_features(tmp_path / "ix", model, data, *encoders)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="encoders are for the column `features`: add it"):
        build_index(tmp_path / "ix", model, data, columns=["loss"], encoders=["latent"])
    assert not (tmp_path / "ix").exists()


def test_other_encoders_are_another_index(tiny_model, pictures, tmp_path: Path) -> None:
    folder = save_vision(tmp_path / "vit")
    build_features(tmp_path / "ix", tiny_model, pictures, "latent", str(folder))
    before = contents(tmp_path / "ix")
    build_features(tmp_path / "ix", tiny_model, pictures, str(folder), "latent")  # order is none
    shutil.rmtree(folder)
    save_vision(folder, seed=1)
    with pytest.raises(ValueError, match=r"encoders\.vit is \"[0-9a-f]{16}\" there, but"):
        build_features(tmp_path / "ix", tiny_model, pictures, "latent", str(folder))
    with pytest.raises(ValueError, match=r"encoders\.vit is .* there, but null is asked for"):
        build_features(tmp_path / "ix", tiny_model, pictures, "latent")
    assert contents(tmp_path / "ix") == before


# -- going on, adding, erasing -------------------------------------------------------------------


@pytest.mark.parametrize("files", [0, 1, 2, 5])
def test_a_stopped_build_goes_on_to_the_same_bytes(model, data, tmp_path, monkeypatch, files):
    options = {"columns": ["loss", "features"]}
    build_index(tmp_path / "whole", model, data, **options)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_after(files, patch, Stopped())
        build_index(tmp_path / "stopped", model, data, **options)
    build_index(tmp_path / "stopped", model, data, **options)
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")


def test_rows_do_not_depend_on_shards(tiny_model, pictures, tmp_path: Path) -> None:
    encoders = ["latent", "text", "pixel", str(save_vision(tmp_path / "vit"))]
    index = build_features(tmp_path / "a", tiny_model, pictures, *encoders, shard_size=5)
    other = build_features(tmp_path / "b", tiny_model, pictures, *encoders, shard_size=12)
    for name in index.manifest.settings["encoders"]:
        # One float16 rounding, where float32's falls to the other side.
        torch.testing.assert_close(
            rows(index, name), rows(other, name), rtol=2 * ROUNDING, atol=1e-6
        )


def test_appended_and_deleted_rows(tiny_model, pictures, tmp_path: Path) -> None:
    folder = str(save_vision(tmp_path / "vit"))
    ids = pictures.ids
    encoders = ["latent", "text", "pixel", folder]
    options = {"draws": Draws(n=2)}
    whole = build_features(tmp_path / "whole", tiny_model, pictures, *encoders, **options)
    begun = build_features(tmp_path / "ix", tiny_model, pictures.select(ids[:4]), *encoders,
                           **options)  # fmt: skip
    more = pictures.select(ids[4:])
    other = str(save_vision(tmp_path / "other" / "vit", seed=1))
    for given in ([], [other]):
        before = contents(begun.path)
        with pytest.raises(ValueError, match=r"encoder 'vit': its fingerprint is [0-9a-f]{16} in"):
            begun.append(more, encoders=given)
        assert contents(begun.path) == before
    grown = begun.append(more, encoders=[folder])
    assert grown.ids == ids
    gone = [ids[1], *ids[4:8], ids[11]]  # of the second shard, every one
    names = ("latent", "text", "pixel", "vit")
    before = {name: rows(grown, name) for name in names}
    smaller = grown.delete(gone)
    left = [i for i, identifier in enumerate(ids) if identifier not in gone]
    for name, there in before.items():
        torch.testing.assert_close(there, rows(whole, name), rtol=2 * ROUNDING, atol=1e-6)
        assert torch.equal(rows(smaller, name), there[left])
        bytes_of = [there[ids.index(i)].numpy().tobytes() for i in gone]
        files = contents(smaller.path).values()
        assert not any(needle in text for needle in bytes_of for text in files)
    assert read_manifest(smaller.path).deleted == gone
    # A lost shard is computed again without them.
    shard_path(smaller.path, "features", next(smaller.shards())).unlink()
    again = build_features(tmp_path / "ix", tiny_model, pictures.select(ids[:4]), *encoders,
                           **options)  # fmt: skip
    for name in names:
        assert torch.equal(rows(again, name), rows(smaller, name))


def test_encoders_are_loaded_by_folder_and_named_by_its_last_part(tmp_path, monkeypatch) -> None:
    save_vision(tmp_path / "vit")
    monkeypatch.chdir(tmp_path)
    assert list(load_encoders(["latent", "./vit/"])) == ["latent", "vit"]
    monkeypatch.setattr(module, "OWN", ("latent", "vit"))
    with pytest.raises(ValueError, match="two encoders are called 'vit'"):
        load_encoders(["./vit"])
