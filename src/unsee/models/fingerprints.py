"""Hashes of what a model is besides its network's weights: scales of adapters, and encoders."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

OF_VAE = ("scaling_factor", "shift_factor", "norm_num_groups", "act_fn")
OF_TEXT_ENCODER = ("hidden_act", "num_attention_heads", "layer_norm_eps", "use_attention_mask")
"""Of a configuration, what changes numbers and is in no weight. The rest grows with every version
of diffusers and transformers."""

PROBE = "It's a PROBE: naïve 24x7 co-op, Straße & 猫!"
"""A text whose tokens tell how a tokenizer treats case, accents and punctuation."""


def adapter_scales(network: nn.Module) -> bytes:
    """Returns what PEFT layers (LoRA) do with their weights; nothing for a network without any."""
    found = []
    for name, module in network.named_modules():
        scaling: Any = getattr(module, "scaling", None)
        if isinstance(scaling, dict) and hasattr(module, "active_adapters"):
            layer: Any = module
            found.append([name, sorted(scaling.items()), list(layer.active_adapters),
                          bool(layer.disable_adapters), list(layer.merged_adapters)])  # fmt: skip
    return json.dumps(found, default=float).encode() if found else b""


def encoder_fingerprints(pipeline: Any, resolution: tuple[int, int]) -> dict[str, str]:
    """Returns hashes of what makes latents of pictures, and text states of captions.

    Names of weights do not count: those of text encoders change between versions of transformers.

    Args:
        pipeline: with vae, text_encoder and tokenizer.
        resolution: (width, height) of the pictures that the autoencoder is given.
    """
    vae, text = pipeline.vae, pipeline.text_encoder
    decoder = ("decoder.", "post_quant_conv.")
    seen = (p for name, p in vae.named_parameters() if not name.startswith(decoder))
    return {
        "vae": _hash([resolution, _chosen(vae.config, OF_VAE)], seen),
        "text_encoder": _hash(
            [_chosen(text.config, OF_TEXT_ENCODER), adapter_scales(text).decode()],
            text.parameters(),
        ),
        "tokenizer": _hash(_of_tokenizer(pipeline.tokenizer), ()),
    }


def _of_tokenizer(tokenizer: Any) -> list[Any]:
    ids = list(tokenizer(PROBE, truncation=True).input_ids)  # or it warns of its length
    return [sorted(tokenizer.get_vocab().items()), tokenizer.model_max_length,
            tokenizer.pad_token_id, ids]  # fmt: skip


def _chosen(config: Any, names: Iterable[str]) -> list[Any]:
    return [getattr(config, name, None) for name in names]


def _hash(about: list[Any], weights: Iterable[Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(about, default=str).encode())
    for weight in weights:
        digest.update(f"{weight.dtype} {tuple(weight.shape)}".encode())
        values: Any = weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        digest.update(values)
    return digest.hexdigest()[:16]
