"""Whole trainings, from a data set to a folder that `from_pretrained` opens."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline

from .. import __version__
from ..data.dataset import ImageDataset, OnError
from ..data.latents import EncodedDataset, encode_dataset
from ..draws import Draws
from ..files import write_atomically
from ..models.loading import load_lora
from ..models.unet import UNetDenoiser
from .autoencoder import AutoencoderRecipe, load_pixels, psnr, train_autoencoder, train_decoder
from .loop import Optimization
from .lora import train_lora
from .pipeline import assemble_pipeline, load_text_encoder
from .text_to_image import UNetRecipe, build_scheduler, build_unet, keep_rows, train_denoiser

RECORD = "training.json"
"""Written beside the weights: how they came to be, and how well they fit."""


def autoencoder(
    data: ImageDataset,
    out: Path,
    recipe: AutoencoderRecipe,
    optimization: Optimization,
    *,
    on_error: OnError = "raise",
    device: str | torch.device = "cpu",
) -> Path:
    """Trains an autoencoder and saves it in `out`; returns `out`.

    Args:
        data: the pictures; captions are not looked at.
        out: folder of the autoencoder and the checkpoint.
        recipe: architecture and loss.
        optimization: optimiser, seed, checkpoints.
        on_error: what to do with pictures that cannot be read.
        device: where to train.

    Raises:
        ValueError: see `unsee.training.loop.train`, or a picture that cannot be read.
    """
    pixels = load_pixels(data, recipe.resolution, on_error)
    model = train_autoencoder(pixels, recipe, optimization, out, device=device)
    model.save_pretrained(out)
    quality = psnr(model, pixels)
    _record(out, data, recipe, optimization, psnr_db=float(quality.mean()))
    return out


def decoder(
    data: ImageDataset,
    out: Path,
    optimization: Optimization,
    *,
    autoencoder: Path,
    on_error: OnError = "raise",
    device: str | torch.device = "cpu",
) -> Path:
    """Trains the decoder of an autoencoder further and saves the whole in `out`; returns `out`.

    Args:
        data: the pictures; captions are not looked at.
        out: folder of the autoencoder with the new decoder, and of the checkpoint.
        optimization: optimiser, seed, checkpoints.
        autoencoder: folder of a trained `AutoencoderKL`; nothing is written there.
        on_error: what to do with pictures that cannot be read.
        device: where to train.

    Raises:
        ValueError: the autoencoder does not load, `out` is its folder, or see
            `unsee.training.autoencoder.train_decoder`.
    """
    if out.resolve() == autoencoder.resolve():
        raise ValueError(f"autoencoder {str(autoencoder)!r} is where to write: name another folder")
    model = _load_autoencoder(autoencoder).float().to(device)  # type: ignore[arg-type]
    pixels = load_pixels(data, int(model.config["sample_size"]), on_error)
    before = psnr(model, pixels)
    train_decoder(model, pixels, optimization, out)
    model.save_pretrained(out)
    after = psnr(model, pixels)
    _record(out, data, None, optimization, part="decoder", psnr_db_before=float(before.mean()),
            psnr_db=float(after.mean()))  # fmt: skip
    return out


def text_to_image(
    data: ImageDataset,
    out: Path,
    recipe: UNetRecipe,
    optimization: Optimization,
    *,
    autoencoder: Path,
    text_encoder: str = "minilm",
    max_tokens: int = 20,
    caption_dropout: float = 0.1,
    leave_out: Sequence[str] = (),
    on_error: OnError = "raise",
    device: str | torch.device = "cpu",
) -> Path:
    """Trains a UNet from scratch and saves a complete Stable Diffusion pipeline in `out`.

    Args:
        data: pictures and captions.
        out: folder of the pipeline, the checkpoint and the encoded data.
        recipe: architecture and objective of the UNet.
        optimization: optimiser, seed, checkpoints.
        autoencoder: folder of a trained `AutoencoderKL`.
        text_encoder: `"minilm"`, a folder or a hub id; frozen.
        max_tokens: prompts are padded or cut to this length.
        caption_dropout: share of examples trained with the empty prompt.
        leave_out: ids of examples that are not trained on.
        on_error: what to do with pictures that cannot be read.
        device: where to train.

    Raises:
        ValueError: the autoencoder does not load, or see `unsee.training.loop.train`.
    """
    vae = _load_autoencoder(autoencoder)
    encoder, tokenizer = load_text_encoder(text_encoder, max_tokens)
    torch.manual_seed(optimization.seed)
    size = int(vae.config["sample_size"]) // 2 ** (len(vae.config["block_out_channels"]) - 1)
    unet = build_unet(recipe, vae.config["latent_channels"], size, encoder.config.hidden_size)
    pipeline = assemble_pipeline(vae, unet, build_scheduler(recipe), encoder, tokenizer).to(device)
    denoiser = UNetDenoiser.from_pipeline(pipeline, "all")
    encoded = encode_dataset(denoiser, data, cache=out / "work", on_error=on_error)
    train_denoiser(
        denoiser, encoded, denoiser.encode_prompts([""])[0], keep_rows(encoded, leave_out),
        optimization, out, caption_dropout=caption_dropout, snr_gamma=recipe.snr_gamma,
        description={**dataclasses.asdict(recipe), "scaling_factor": vae.config["scaling_factor"]},
    )  # fmt: skip
    pipeline.save_pretrained(out)
    _record(
        out, data, recipe, optimization, caption_dropout=caption_dropout, text_encoder=text_encoder,
        max_tokens=max_tokens, left_out=len(leave_out), loss=training_loss(denoiser, encoded),
    )  # fmt: skip
    return out


def lora(
    pipeline: DiffusionPipeline,
    data: ImageDataset,
    out: Path,
    optimization: Optimization,
    *,
    rank: int = 8,
    caption_dropout: float = 0.0,
    leave_out: Sequence[str] = (),
    on_error: OnError = "raise",
) -> Path:
    """Fine-tunes a pipeline with LoRA and saves the adapter in `out`, for `load_lora_weights`."""
    denoiser = UNetDenoiser.from_pipeline(pipeline, "all")
    encoded = encode_dataset(denoiser, data, cache=out / "work", on_error=on_error)
    null_text = denoiser.encode_prompts([""])[0]
    train_lora(
        pipeline, encoded, null_text, optimization, out,
        rank=rank, leave_out=leave_out, caption_dropout=caption_dropout,
    )  # fmt: skip
    # The adapter is off again: the loss is that of what was saved, loaded as its users load it.
    load_lora(pipeline, out)
    try:
        loss = training_loss(UNetDenoiser.from_pipeline(pipeline, "all"), encoded)
    finally:
        pipeline.unload_lora_weights()
    _record(out, data, None, optimization, rank=rank, caption_dropout=caption_dropout,
            left_out=len(leave_out), loss=loss)  # fmt: skip
    return out


@torch.no_grad()
def training_loss(denoiser: UNetDenoiser, data: EncodedDataset, examples: int = 256) -> float:
    """Returns the mean loss of the first examples, ten fixed draws each: `doctor` expects it."""
    draws = Draws(seed=0, n=10, num_train_timesteps=denoiser.num_train_timesteps)
    values = []
    for row in range(min(examples, len(data.ids))):
        latents, text = data.latents([row]), data.text([row], 0)
        timesteps, noise = draws.of(data.ids[row], tuple(latents.shape[1:]))
        values.append(denoiser.loss(latents, text, timesteps[None], noise[None]).mean())
    return float(torch.stack(values).mean())


def _load_autoencoder(folder: Path) -> AutoencoderKL:
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"autoencoder {str(folder)!r}: no config.json there; train one with "
            "`unsee train autoencoder DATA OUT`"
        )
    try:
        return AutoencoderKL.from_pretrained(folder).eval()
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"autoencoder {str(folder)!r} does not load: {error}") from error


def _record(
    out: Path, data: ImageDataset, recipe: Any, optimization: Optimization, **measured: Any
) -> None:
    about = {
        "unsee": __version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "data": {"name": data.name, "examples": len(data), "fingerprint": data.fingerprint},
        "recipe": dataclasses.asdict(recipe) if recipe is not None else None,
        "optimization": dataclasses.asdict(optimization),
        **measured,
    }
    text = json.dumps(about, indent=1) + "\n"
    write_atomically(out / RECORD, lambda temporary: temporary.write_text(text, encoding="utf-8"))
