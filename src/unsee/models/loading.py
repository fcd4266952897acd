"""Opens a diffusers pipeline, and says in one line what is wrong with one that does not open."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

Dtype = Literal["float32", "float16", "bfloat16", "float64"]


def load_pipeline(source: str | Path, dtype: Dtype = "float32", device: str | None = None) -> Any:
    """Loads a text-to-image pipeline from a folder or the hub.

    Args:
        source: a folder that `save_pretrained` wrote, or a hub id such as `"org/name"`.
        dtype: of the weights; small unlearning steps vanish in anything below float32.
        device: `"cpu"`, `"cuda"`, `"mps"`; by default the best there is.

    Raises:
        ValueError: no such folder, a folder that lacks a part, a part that does not load, a
            device that is not there.
    """
    from diffusers import DiffusionPipeline

    where = choose_device(device)
    folder = Path(source)
    if folder.is_dir():
        _check_parts(folder)
    elif not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) or str(source).startswith("."):
        raise ValueError(f"model {str(source)!r}: no such folder, and not a hub id like 'org/name'")
    try:
        pipeline = DiffusionPipeline.from_pretrained(str(source), dtype=getattr(torch, dtype))
    except Exception as error:  # from_pretrained raises whatever its parts raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise ValueError(f"model {str(source)!r} does not load: {reason}") from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(where)


def load_lora(pipeline: Any, source: str | Path) -> None:
    """Loads LoRA weights on a pipeline.

    Args:
        pipeline: changed in place.
        source: a folder that holds `pytorch_lora_weights.safetensors`, or a hub id.

    Raises:
        ValueError: no such folder, weights that do not fit the pipeline, or PEFT is missing.
    """
    try:
        pipeline.load_lora_weights(str(source))
    except Exception as error:  # as above
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise ValueError(f"LoRA weights {str(source)!r} do not load: {reason}") from error


def load_snapshot(network: nn.Module, path: str | Path) -> None:
    """Puts weights that a training kept on its way in the place of a network's own.

    Args:
        network: of the finished model, with the LoRA weights if those were what was trained;
            changed in place.
        path: a `snapshot-*.safetensors` of `unsee train --snapshots`.

    Raises:
        ValueError: no such file, or weights that are not those of this network, or not all.
    """
    try:
        weights = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"weights {str(path)!r} cannot be read: {error}") from None
    weights = {_without_adapter(name): value for name, value in weights.items()}
    own = dict(network.named_parameters())
    trained = {n: p for n, p in own.items() if "lora_" in n} or own
    # An adapter is called otherwise where it is trained than where it is loaded.
    places = {_without_adapter(name): p for name, p in trained.items()}
    if len(places) < len(trained):
        raise ValueError(f"weights {str(path)!r} are of one adapter, and the network has several")
    advice = (
        "; give the model that this training has made (for LoRA, the model that it was made on "
        "and --lora)"
    )
    if unlike := sorted(weights.keys() ^ places.keys()):
        there = "has no such weight" if unlike[0] in weights else "needs it too"
        raise ValueError(f"weights {str(path)!r}: {unlike[0]}, and the model {there}{advice}")
    for name, value in weights.items():
        if places[name].shape != value.shape:
            raise ValueError(
                f"weights {str(path)!r}: {name} is {tuple(value.shape)}, and in the model "
                f"{tuple(places[name].shape)}{advice}"
            )
    with torch.no_grad():
        for name, value in weights.items():
            places[name].copy_(value)


def _without_adapter(name: str) -> str:
    return re.sub(r"\.(lora_[AB])\.\w+\.", r".\1.", name)


def choose_device(device: str | None) -> torch.device:
    """Returns the device asked for, or the best there is.

    Raises:
        ValueError: the device is not there, or no device is called so.
    """
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.mps.is_available()}
    if device is None:
        return torch.device(next(name for name in ("cuda", "mps", "cpu") if available[name]))
    there = ", ".join(name for name, yes in available.items() if yes)
    try:
        found = torch.device(device)
    except RuntimeError:
        raise ValueError(
            f"device {device!r} is none; there is: {there} (cuda:1 is the second of several)"
        ) from None
    count = torch.cuda.device_count() if found.type == "cuda" else 1
    if not available.get(found.type, False) or (found.index or 0) >= count:
        raise ValueError(f"device {device!r} is not available here; there is: {there}")
    return found


def _check_parts(folder: Path) -> None:
    index = folder / "model_index.json"
    if not index.is_file():
        raise ValueError(
            f"model {str(folder)!r} has no model_index.json: it is not a diffusers pipeline "
            "(save one with pipeline.save_pretrained)"
        )
    try:
        parts = json.loads(index.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"model {str(folder)!r}: model_index.json is not JSON ({error})") from None
    for name, about in parts.items():
        if name.startswith("_") or not isinstance(about, list) or about[0] is None:
            continue
        if not (folder / name).is_dir():
            raise ValueError(f"model {str(folder)!r} lacks its part {name!r}: no folder {name}/")
        if name in ("unet", "vae", "text_encoder", "transformer") and not [
            *(folder / name).glob("*.safetensors"), *(folder / name).glob("*.bin")
        ]:  # fmt: skip
            raise ValueError(
                f"model {str(folder)!r} lacks its part {name!r}: no weights in {name}/"
            )
