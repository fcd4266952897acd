"""Training examples as the network sees them: latents and text states, encoded once."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from PIL import ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..files import write_atomically
from ..progress import Progress
from .dataset import ImageDataset, OnError

if TYPE_CHECKING:
    from ..models.base import Denoiser

logger = logging.getLogger(__name__)


class EncodedExamples(Protocol):
    """What methods need of the training data; rows are examples in a fixed order."""

    ids: list[str]
    caption_counts: list[int]
    has_flips: bool

    @property
    def fingerprint(self) -> str:
        """A hash of ids, latents and text states."""
        ...

    def latents(self, rows: Sequence[int], flipped: bool = False) -> Tensor:
        """Returns scaled latents [B, C, h, w] float32."""
        ...

    def text(self, rows: Sequence[int], caption: int) -> Tensor:
        """Returns text states [B, T, D] float32 of one caption of each example."""
        ...


class EncodedDataset:
    """Latents and text states in memory; equal captions are kept once.

    Args:
        ids: example ids.
        latents: [N, C, h, w] float32, scaled.
        states: [M, T, D] float32, text states of M distinct captions.
        caption_rows: for each example, which rows of `states` are its captions.
        flipped: [N, C, h, w], latents of the mirrored pictures, or None.

    Raises:
        ValueError: an id is there twice.
    """

    def __init__(
        self,
        ids: list[str],
        latents: Tensor,
        states: Tensor,
        caption_rows: list[list[int]],
        flipped: Tensor | None = None,
    ) -> None:
        if len(set(ids)) < len(ids):
            twice = next(i for i, n in Counter(ids).items() if n > 1)
            raise ValueError(
                f"encoded examples: id {twice!r} appears more than once; draws and scores are "
                "keyed by it, give each example its own"
            )
        self.ids = ids
        self._latents, self._flipped = latents, flipped
        self._states, self._caption_rows = states, caption_rows
        self.caption_counts = [len(rows) for rows in caption_rows]
        self.has_flips = flipped is not None

    @property
    def fingerprint(self) -> str:
        """A hash of ids, latents (of both views) and text states."""
        digest = hashlib.sha256(json.dumps([self.ids, self._caption_rows]).encode())
        for tensor in (self._latents, self._states, self._flipped):
            if tensor is not None:  # adds nothing, or checkpoints made before would be refused
                digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()[:16]

    def latents(self, rows: Sequence[int], flipped: bool = False) -> Tensor:
        """Returns scaled latents [B, C, h, w] float32.

        Raises:
            ValueError: flips are asked for but were not encoded.
        """
        source = self._flipped if flipped else self._latents
        if source is None:
            raise ValueError("flips were not encoded: encode the data set with flips=True")
        return source[list(rows)]

    def text(self, rows: Sequence[int], caption: int) -> Tensor:
        """Returns text states [B, T, D] float32 of one caption of each example."""
        return self._states[[self._caption_rows[r][caption] for r in rows]]

    def select(self, ids: Sequence[str]) -> EncodedDataset:
        """Returns the examples with these ids, in the order given."""
        at = {identifier: row for row, identifier in enumerate(self.ids)}
        missing = [i for i in ids if i not in at]
        if missing:
            raise ValueError(f"the encoded data set has no example {missing[0]!r}")
        rows = [at[i] for i in ids]
        flipped = None if self._flipped is None else self._flipped[rows]
        captions = [self._caption_rows[r] for r in rows]
        return EncodedDataset(list(ids), self._latents[rows], self._states, captions, flipped)


def encode_dataset(
    model: Denoiser,
    data: ImageDataset,
    *,
    cache: Path | None = None,
    flips: bool = False,
    on_error: OnError = "raise",
    batch_size: int = 64,
    progress: bool = True,
) -> EncodedDataset:
    """Encodes every picture and caption once.

    Args:
        model: encodes; its VAE's scaling and posterior mode are used.
        data: the training set.
        cache: folder for finished shards; a second call continues there.
        flips: also encodes the mirrored pictures.
        on_error: a picture that cannot be decoded is fatal (`"raise"`) or left out (`"skip"`).
        batch_size: pictures at once, and examples per shard.
        progress: shows a bar.

    Raises:
        ValueError: a picture that cannot be decoded, or no usable picture at all.
    """
    distinct = list(dict.fromkeys(c for captions in data.captions for c in captions))
    row_of = {caption: row for row, caption in enumerate(distinct)}
    bar = Progress(len(data), "encode", "image", shown=progress)
    ids: list[str] = []
    latents, flipped, captions = [], [], []
    about = f"{data.fingerprint} {_encoder_key(model)} {flips} {batch_size}"
    key = hashlib.sha256(about.encode()).hexdigest()[:12]
    for first in range(0, len(data), batch_size):
        positions = range(first, min(first + batch_size, len(data)))
        path = cache / f"latents-{key}" / f"{first:08d}.safetensors" if cache else None
        kept, shard, fresh = _encode_shard(model, data, positions, flips, on_error, path)
        ids += [data.ids[p] for p in kept]
        captions += [[row_of[c] for c in data.captions[p]] for p in kept]
        latents.append(shard["latents"])
        flipped += [shard["flipped"]] if flips else []
        (bar.update if fresh else bar.skip)(len(positions))
    bar.close()
    if not ids:
        raise ValueError(f"data set {data.name!r}: none of its {len(data)} pictures can be read")
    mirrored = torch.cat(flipped) if flips else None
    states = model.encode_prompts(distinct)
    return EncodedDataset(ids, torch.cat(latents), states, captions, mirrored)


def _encoder_key(model: Denoiser) -> str:
    """Returns a hash of what latents depend on besides the pictures; the decoder does not count."""
    vae = getattr(model.pipeline, "vae", None)
    if vae is None:
        return "none"
    config = {k: v for k, v in vae.config.items() if not k.startswith("_")}  # no paths, versions
    digest = hashlib.sha256(str(sorted(config.items(), key=str)).encode())
    digest.update(str(model.resolution).encode())
    for name, parameter in vae.named_parameters():
        if not name.startswith(("decoder.", "post_quant_conv.")):
            digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
            values = parameter.detach().cpu().contiguous().flatten()
            digest.update(values.view(torch.uint8).numpy())
    return digest.hexdigest()


def _encode_shard(
    model: Denoiser,
    data: ImageDataset,
    positions: range,
    flips: bool,
    on_error: OnError,
    path: Path | None,
) -> tuple[list[int], dict[str, Tensor], bool]:
    """Returns kept positions, tensors, and whether they were made now."""
    stamp = json.dumps([data.stamp(position) for position in positions])
    found = _load_shard(path, stamp) if path is not None and path.is_file() else None
    if found is not None and (on_error == "skip" or len(found[0]) == len(positions)):
        for position in sorted(set(positions) - set(found[0])):
            logger.warning("skipped, as before: %s of %s", data.ids[position], data.name)
        return *found, False
    kept, pictures = [], []
    for position in positions:
        try:
            pictures.append(data[position].image)
            kept.append(position)
        except ValueError as error:
            if on_error == "raise":
                raise ValueError(f"{error}; remove it, or skip it with on_error='skip'") from None
            logger.warning("skipped: %s", error)
    if kept:
        shard = {"latents": model.encode_images(pictures).contiguous()}
        if flips:
            mirrored = [ImageOps.mirror(p) for p in pictures]
            shard["flipped"] = model.encode_images(mirrored).contiguous()
    else:
        names = ["latents", "flipped"] if flips else ["latents"]
        shard = {name: torch.empty(0) for name in names}
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        about = {"kept": json.dumps(kept), "stamp": stamp}
        write_atomically(path, lambda temporary: save_file(shard, temporary, metadata=about))
    return kept, shard, True


def _load_shard(path: Path, stamp: str) -> tuple[list[int], dict[str, Tensor]] | None:
    """Returns kept positions and tensors; None where the pictures have changed since."""
    try:
        with safe_open(str(path), framework="pt") as file:
            about = file.metadata() or {}
            if about.get("stamp") != stamp:
                return None
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return json.loads(about["kept"]), tensors
    except (OSError, SafetensorError, KeyError) as error:
        raise ValueError(f"{path} is damaged ({error}): delete it and run again") from None
