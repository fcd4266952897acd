"""Tiny real models and data that the tests share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image, ImageDraw
from transformers import BertConfig, BertModel, BertTokenizer

from unsee.models.base import Denoiser

VOCABULARY = """
    [PAD] [UNK] [CLS] [SEP] [MASK]
    a an and on of the with in at
    red green blue yellow orange purple white black grey
    square circle triangle star heart cat dog house tree sun moon
    small large smiling face sitting running
    ##s ##ing ##ed ##er , . ' - 0 1 2 3 4 5 6 7 8 9
"""

COLOURS = {
    "red": (220, 30, 30), "green": (30, 160, 60), "blue": (40, 70, 220), "yellow": (240, 220, 40),
}  # fmt: skip
SHAPES = ("square", "circle", "triangle")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tiny models lose time to threads; one thread also makes timings and sums repeatable."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_pipeline_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved StableDiffusionPipeline with random weights: 64x64 pictures, 8x8 latents."""
    folder = tmp_path_factory.mktemp("tiny-pipeline")
    vocabulary = folder / "words.txt"
    words = VOCABULARY.split()
    vocabulary.write_text("\n".join(words), encoding="utf-8")
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        norm_num_groups=4,
        latent_channels=4,
        sample_size=64,
        scaling_factor=0.7,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=16,
        attention_head_dim=2,
    )
    encoder = BertModel(
        BertConfig(
            vocab_size=len(words),
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=32,
        )
    )
    # StableDiffusionPipeline passes the tokenizer's mask only where the encoder's config asks.
    encoder.config.use_attention_mask = True
    tokenizer = BertTokenizer(str(vocabulary), do_lower_case=True, model_max_length=12)
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(
            beta_schedule="squaredcos_cap_v2",
            prediction_type="v_prediction",
            clip_sample=False,
            timestep_spacing="trailing",
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder / "model")
    return folder / "model"


@pytest.fixture
def tiny_pipeline(tiny_pipeline_dir: Path) -> StableDiffusionPipeline:
    """The tiny pipeline, loaded afresh for every test: a test may change its weights."""
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_pipeline_dir)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def tiny_model(tiny_pipeline: StableDiffusionPipeline) -> Denoiser:
    """The tiny pipeline as a Denoiser, with the default selection `cross-attn-kv`."""
    return Denoiser.from_pipeline(tiny_pipeline)


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """An imagefolder of 12 coloured shapes of 64x64 with captions, colours and a licence."""
    return write_image_folder(tmp_path / "pictures")


def write_image_folder(folder: Path) -> Path:
    """Writes 12 pictures (four colours of three shapes) and their metadata.jsonl."""
    folder.mkdir()
    rows: list[dict[str, Any]] = []
    for colour, rgb in COLOURS.items():
        for shape in SHAPES:
            picture = Image.new("RGB", (64, 64), "white")
            draw = ImageDraw.Draw(picture)
            if shape == "square":
                draw.rectangle((12, 12, 52, 52), fill=rgb)
            elif shape == "circle":
                draw.ellipse((10, 10, 54, 54), fill=rgb)
            else:
                draw.polygon(((8, 56), (56, 56), (20, 8)), fill=rgb)
            picture.save(folder / f"{colour}-{shape}.png")
            rows.append(
                {"file_name": f"{colour}-{shape}.png", "text": f"a {colour} {shape}",
                 "colour": colour, "licence": "CC0"}
            )  # fmt: skip
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metadata.jsonl").write_text(lines, encoding="utf-8")
    return folder
