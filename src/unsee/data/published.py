"""The files that the AbU paper released for its MSCOCO experiment, read without unpickling."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

logger = logging.getLogger(__name__)

TRAIN_LATENTS = "coco17_train_latents.npy"
TRAIN_TEXT = "coco17_train_text_embeddings.npy"
QUERY_LATENTS = "coco17_sample_latents.npy"
QUERY_TEXT = "coco17_sample_text_embeddings.npy"
MODEL = "model.bin"
FISHER = "fisher_info.pt"
CONFIG = "config.json"

WEIGHT_SELECTIONS = ("cross-attn-kv", "cross-attn", "attn", "all")

PAPER_UNET: dict[str, Any] = {
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 2,
    "block_out_channels": [128, 256, 256, 256],
    "cross_attention_dim": 1024,
    "attention_head_dim": 8,
    "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
    "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
}
"""Arguments of the UNet that the paper trained on MSCOCO."""

_SCORE = (
    "max over (original, flipped) of mean over captions and timesteps of loss_after - loss_before"
)


@dataclass(frozen=True)
class PublishedConfig:
    """What config.json holds; what it leaves out is as in the paper.

    Attributes:
        unet: arguments of `UNet2DConditionModel`.
        weight_selection: which weights are unlearned, by substrings of their names:
            `cross-attn-kv` (`attn2` with `to_k` or `to_v`), `cross-attn` (`attn2`), `attn`, `all`.
        lr: the step size; each step moves by `lr / dataset_size` times gradient over Fisher.
        steps: unlearning steps.
        unlearn_batch: draws of the query in a micro-batch.
        grad_accum: micro-batches whose gradients are averaged for a step.
        num_captions: captions of a training picture that its loss averages over, the first ones.
        time_samples: draws for each training picture and caption.
        dataset_size: N of the step; the number of training pictures if None.
    """

    unet: Mapping[str, Any] = field(default_factory=lambda: dict(PAPER_UNET))
    weight_selection: str = "cross-attn-kv"
    lr: float = 0.01
    steps: int = 1
    unlearn_batch: int = 80
    grad_accum: int = 625
    num_captions: int = 5
    time_samples: int = 20
    dataset_size: int | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "unlearn_batch", "grad_accum", "num_captions", "time_samples"):
            _check_count(name, getattr(self, name))
        if self.dataset_size is not None:
            _check_count("dataset_size", self.dataset_size)
        number = isinstance(self.lr, (int, float)) and not isinstance(self.lr, bool)
        if not number or not math.isfinite(self.lr):
            raise ValueError(f"lr = {self.lr!r} must be a number")
        if self.weight_selection not in WEIGHT_SELECTIONS:
            raise ValueError(
                f"weight_selection = {self.weight_selection!r} is not one of "
                f"{', '.join(WEIGHT_SELECTIONS)}"
            )
        if not isinstance(self.unet, Mapping):
            raise ValueError(f"unet = {self.unet!r} must be the UNet's arguments by name")

    @classmethod
    def load(cls, folder: Path) -> PublishedConfig:
        """Reads `folder/config.json`, or returns the paper's constants where there is none.

        Raises:
            ValueError: the file is not a JSON object, or a value is out of range.
        """
        path = folder / CONFIG
        if not path.is_file():
            logger.info("%s: no such file: the paper's UNet and constants are used", path)
            return cls()
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: not JSON ({error})") from None
        if not isinstance(content, dict):
            raise ValueError(f"{path}: must hold an object, not {type(content).__name__}")
        if content.pop("score", _SCORE) != _SCORE:
            logger.warning('%s: another "score" is named there; computed is the %s', path, _SCORE)
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(content) - known)
        if unknown:
            logger.warning("%s: nothing is done with %s", path, ", ".join(unknown))
        try:
            return cls(**{name: value for name, value in content.items() if name in known})
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def selects(self, name: str) -> bool:
        """Whether a parameter of this name is unlearned, by the published substring rule."""
        if self.weight_selection == "cross-attn-kv":
            return "attn2" in name and ("to_k" in name or "to_v" in name)
        return {"cross-attn": "attn2" in name, "attn": "attn" in name, "all": True}[
            self.weight_selection
        ]

    @property
    def text_width(self) -> int | None:
        """Width of a text embedding; None where the UNet has no single one."""
        width = self.unet.get("encoder_hid_dim") or self.unet.get("cross_attention_dim", 1280)
        widths = {width} if isinstance(width, int) else set(width)
        return widths.pop() if len(widths) == 1 else None


def _check_count(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} = {value!r} must be a whole number of at least 1")


class PublishedExamples:
    """Latents and text embeddings of the training pictures, left on disk and read row by row.

    Rows 0 to N-1 of the latents are the pictures, rows N to 2N-1 their mirror images, which share
    the captions. See `EncodedExamples`.

    Args:
        folder: holds the released files.
        config: how many captions are used, and the network that must fit.

    Raises:
        ValueError: a file is missing or no array, or shapes disagree.
    """

    def __init__(self, folder: Path, config: PublishedConfig) -> None:
        self._latents = _open_array(folder / TRAIN_LATENTS, 4)
        self._text = _open_array(folder / TRAIN_TEXT, 4)
        count, captions = self._text.shape[:2]
        if len(self._latents) != 2 * count or count == 0:
            raise ValueError(
                f"{folder / TRAIN_LATENTS} has {len(self._latents)} rows, {TRAIN_TEXT} has {count}:"
                " there must be twice as many latents (originals, then flips) as captioned pictures"
            )
        if config.num_captions > captions:
            raise ValueError(
                f"{folder / TRAIN_TEXT} has {captions} captions for each picture, the "
                f"configuration asks for num_captions = {config.num_captions}"
            )
        _check_latents(folder / TRAIN_LATENTS, self._latents.shape, config)
        _check_width(folder / TRAIN_TEXT, self._text.shape, config)
        self.ids = [str(row) for row in range(count)]
        self.caption_counts = [config.num_captions] * count
        self.has_flips = True
        self.fingerprint = " ".join(
            file_fingerprint(folder / name) for name in (TRAIN_LATENTS, TRAIN_TEXT)
        )

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(C, h, w)."""
        return tuple(self._latents.shape[1:])

    def latents(self, rows: Sequence[int], flipped: bool = False) -> Tensor:
        """Returns latents [B, C, h, w] float32."""
        return _read(self._latents, [row + len(self.ids) * flipped for row in rows])

    def text(self, rows: Sequence[int], caption: int) -> Tensor:
        """Returns text embeddings [B, T, D] float32 of one caption of each picture."""
        return _read(self._text, (list(rows), caption))


def read_query(
    folder: Path, query: int, config: PublishedConfig, latent_shape: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """Reads a synthesized picture's latent and the embedding of its prompt.

    Args:
        folder: holds the released files.
        query: which one, from 0.
        config: the network that must fit.
        latent_shape: (C, h, w) of the training latents, which must be the same.

    Returns:
        [C, h, w] float32 and [T, D] float32.

    Raises:
        ValueError: no such query, a file is missing, or shapes disagree.
    """
    latents = _open_array(folder / QUERY_LATENTS, 4)
    text = _open_array(folder / QUERY_TEXT, 4)
    if len(latents) != len(text):
        raise ValueError(
            f"{folder / QUERY_LATENTS} has {len(latents)} queries, {QUERY_TEXT} has {len(text)}"
        )
    if not 0 <= query < len(latents):
        raise ValueError(
            f"query {query}: {folder / QUERY_LATENTS} has {len(latents)}, 0 to {len(latents) - 1}"
        )
    if tuple(latents.shape[1:]) != latent_shape:
        raise ValueError(
            f"{folder / QUERY_LATENTS} holds latents of shape {tuple(latents.shape[1:])}, "
            f"{TRAIN_LATENTS} of {latent_shape}"
        )
    _check_width(folder / QUERY_TEXT, text.shape, config)
    return _read(latents, [query])[0], _read(text, ([query], 0))[0]


def read_unet(folder: Path, config: PublishedConfig) -> UNet2DConditionModel:
    """Builds the UNet that the configuration describes, in float32, with the weights of model.bin.

    Raises:
        ValueError: arguments that make no UNet, or weights that are not exactly its own.
    """
    arguments = {name: v for name, v in config.unet.items() if not name.startswith("_")}
    try:
        unet = UNet2DConditionModel(**arguments)
    except (TypeError, ValueError, LookupError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{folder / CONFIG}: these arguments make no UNet: {error}") from None
    path = folder / MODEL
    weights = _load_tensors(path)
    own = unet.state_dict()
    for what, names in (("lacks", own.keys() - weights), ("has unexpected", weights.keys() - own)):
        if names:
            raise ValueError(
                f"{path} {what} {_some(names)}: it is not the state dict of the UNet that "
                f"{CONFIG} describes"
            )
    for name, value in own.items():
        if weights[name].shape != value.shape:
            raise ValueError(
                f"{path}: {name} has shape {tuple(weights[name].shape)}, the UNet that {CONFIG} "
                f"describes has {tuple(value.shape)}"
            )
    unet.load_state_dict(weights)
    return unet


def read_fisher(folder: Path, shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """Reads the diagonal Fisher of some parameters, exactly as it is in fisher_info.pt.

    Args:
        folder: holds the released files.
        shapes: name -> shape of the parameters.

    Returns:
        name -> float64 tensor.

    Raises:
        ValueError: a parameter is missing, has another shape, or a value that no mean square has.
    """
    path = folder / FISHER
    values = _load_tensors(path)
    missing = [name for name in shapes if name not in values]
    if missing:
        raise ValueError(f"{path} lacks {_some(missing)}: it was fitted for another UNet")
    fisher: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        value = values[name].double()
        if value.shape != torch.Size(shape):
            raise ValueError(
                f"{path}: {name} has shape {tuple(value.shape)}, the parameter has {tuple(shape)}"
            )
        if not (torch.isfinite(value) & (value >= 0)).all():
            raise ValueError(f"{path}: {name} has values that are negative or not finite")
        fisher[name] = value
    return fisher


def file_fingerprint(path: Path, blocks: int = 256, block_size: int = 1 << 18) -> str:
    """Returns a hash of a file's size and content; of a large file, of evenly spread blocks."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        if size <= blocks * block_size:
            while block := file.read(block_size):
                digest.update(block)
        else:
            for i in range(blocks):
                file.seek(i * (size - block_size) // (blocks - 1))
                digest.update(file.read(block_size))
    return digest.hexdigest()[:16]


def _open_array(path: Path, dimensions: int) -> np.ndarray:
    _check_exists(path)
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{path}: not a whole .npy file of numbers ({error})") from None
    if not isinstance(array, np.ndarray) or array.dtype.kind != "f" or array.ndim != dimensions:
        found = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else "an archive"
        raise ValueError(
            f"{path}: must be a floating point array of {dimensions} dimensions, is {found}"
        )
    return array


def _read(array: np.ndarray, index: Any) -> Tensor:
    return torch.from_numpy(np.array(array[index], dtype=np.float32))


def _load_tensors(path: Path) -> dict[str, Tensor]:
    _check_exists(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling, zip and end-of-file errors share no base class
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{path}: not a whole file of tensors ({reason})") from None
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise ValueError(f"{path}: must hold tensors by parameter name")
    return dict(content)


def _check_exists(path: Path) -> None:
    if not path.is_file():
        raise ValueError(f"{path}: no such file")


def _check_latents(path: Path, shape: tuple[int, ...], config: PublishedConfig) -> None:
    channels = config.unet.get("in_channels", 4)
    if shape[1] != channels:
        raise ValueError(f"{path} has {shape[1]} channels, the UNet of {CONFIG} takes {channels}")


def _check_width(path: Path, shape: tuple[int, ...], config: PublishedConfig) -> None:
    width = config.text_width
    if width is not None and shape[3] != width:
        raise ValueError(
            f"{path} has text embeddings of width {shape[3]}, the UNet's cross_attention_dim is "
            f"{width}"
        )
    if shape[1] == 0 or shape[2] == 0:
        raise ValueError(f"{path} has shape {shape}: no caption or no token")


def _some(names: Any) -> str:
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
