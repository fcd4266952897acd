"""Fine-tunes low-rank adapters (LoRA, Hu et al., 2021) on the UNet of a pipeline."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data.latents import EncodedExamples
from ..files import write_atomically
from ..models.unet import UNetDenoiser
from .loop import Optimization, seeded_weights
from .text_to_image import keep_rows, train_denoiser

ADAPTER = "default"
WEIGHTS = "pytorch_lora_weights.safetensors"
"""The file name that `load_lora_weights` looks for."""


def train_lora(
    pipeline: Any,
    data: EncodedExamples,
    null_text: Tensor,
    optimization: Optimization,
    directory: Path,
    *,
    rank: int = 8,
    alpha: float | None = None,
    targets: Sequence[str] = ("to_q", "to_k", "to_v", "to_out.0"),
    leave_out: Sequence[str] = (),
    caption_dropout: float = 0.1,
) -> Path:
    """Trains a LoRA on the pipeline's UNet and saves it; the pipeline is left as it was.

    Args:
        pipeline: any with a `UNet2DConditionModel`, in float32 or bfloat16, on any device.
        data: latents and text states, encoded with this pipeline.
        null_text: [T, D], text state of the empty prompt.
        optimization: optimiser, seed, checkpoints.
        directory: for the checkpoint and the weights.
        rank: of every adapter.
        alpha: adapters are scaled by alpha / rank; alpha = rank by default.
        targets: ends of the names of the modules that get an adapter.
        leave_out: ids of examples that are not trained on.
        caption_dropout: share of examples whose caption becomes the empty prompt.

    Returns:
        The safetensors file in `directory`; `pipeline.load_lora_weights(directory)` loads it.
        Its weights are the averaged ones, float32.

    Raises:
        ValueError: peft is not installed, a target is in no module's name, the pipeline has
            adapters already or is float16, the checkpoint belongs to other settings or other
            base weights, or the loss is not finite.
    """
    denoiser = UNetDenoiser.from_pipeline(pipeline, "all")
    unet = pipeline.unet
    alpha = rank if alpha is None else alpha
    _check(unet, rank, alpha, targets)
    config = _configuration(rank, alpha, targets)
    keep = keep_rows(data, leave_out)
    description = {
        "base": _fingerprint(unet), "rank": rank, "alpha": float(alpha), "targets": sorted(targets),
    }  # fmt: skip
    with _adapter(unet, config, optimization.seed) as parameters:
        train_denoiser(
            denoiser, data, null_text, keep, optimization, directory,
            caption_dropout=caption_dropout, parameters=parameters, description=description,
        )  # fmt: skip
        return _save(pipeline, directory / WEIGHTS)


def _configuration(rank: int, alpha: float, targets: Sequence[str]) -> Any:
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ValueError("LoRA needs the package peft: pip install 'unsee[lora]'") from error
    return LoraConfig(r=rank, lora_alpha=alpha, target_modules=sorted(targets))  # type: ignore[arg-type]


def _check(unet: nn.Module, rank: int, alpha: float, targets: Sequence[str]) -> None:
    if rank < 1 or not alpha > 0:
        raise ValueError(f"LoRA: rank = {rank} and alpha = {alpha} must be positive")
    if getattr(unet, "peft_config", None):
        raise ValueError(
            "LoRA: the pipeline has adapters already; call pipeline.unload_lora_weights() first, "
            "after pipeline.fuse_lora() where they are to be kept"
        )
    dtype = next(unet.parameters()).dtype
    if dtype == torch.float16:
        raise ValueError(
            f"LoRA: the UNet is {dtype}, where gradients of a mean loss vanish: load the pipeline "
            "in torch.bfloat16 or torch.float32"
        )
    names = [name for name, _ in unet.named_modules()]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            raise ValueError(f"LoRA: no module of the UNet is called {target!r}")
    if not targets:
        raise ValueError("LoRA: targets is empty, so there is nothing to train")


def _fingerprint(unet: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, parameter in unet.named_parameters():
        digest.update(name.encode())
        raw = parameter.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(raw.numpy().data)
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def _adapter(unet: Any, config: Any, seed: int) -> Iterator[list[nn.Parameter]]:
    """Gives the UNet an adapter inside a `with` block, in float32, and takes it away after."""
    required = [(p, p.requires_grad) for p in unet.parameters()]
    try:
        with seeded_weights(seed):
            unet.add_adapter(config, adapter_name=ADAPTER)
        parameters = [p for n, p in unet.named_parameters() if "lora_" in n]
        for parameter in parameters:
            parameter.data = parameter.data.float()
        yield parameters
    finally:
        unet.unload_lora()
        for parameter, before in required:
            parameter.requires_grad_(before)


def _save(pipeline: Any, path: Path) -> Path:
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft.utils import get_peft_model_state_dict

    layers = convert_state_dict_to_diffusers(
        get_peft_model_state_dict(pipeline.unet, adapter_name=ADAPTER)
    )
    # The metadata hold alpha: without them, a reader takes it to be the rank. Sets are sorted, or
    # equal runs would write different metadata.
    about = {
        key: sorted(value) if isinstance(value, set) else value
        for key, value in pipeline.unet.peft_config[ADAPTER].to_dict().items()
    }
    write_atomically(
        path,
        lambda temporary: pipeline.save_lora_weights(
            temporary.parent, unet_lora_layers=layers, weight_name=temporary.name,
            unet_lora_adapter_metadata=about,
        ),
    )  # fmt: skip
    return path
