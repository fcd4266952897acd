"""The column `examples`: a shard of the data set, encoded and packed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..data.dataset import ImageDataset, OnError
from ..data.latents import EncodedDataset, EncodedExamples, encode_dataset
from ..models.base import Denoiser
from .layout import Manifest, Shard

Indexed = ImageDataset | EncodedExamples
"""What can be indexed: pictures with captions, or what is already encoded."""


def encode_shard(
    model: Denoiser, data: Indexed, shard: Shard, manifest: Manifest, on_error: OnError
) -> EncodedDataset | None:
    """Returns the examples of a shard; None where all were deleted, or no picture can be read."""
    flips = manifest.settings["views"] == 2
    gone = set(manifest.deleted)
    positions = [p for p in range(shard.first, shard.last) if data.ids[p] not in gone]
    if not positions:
        return None
    if isinstance(data, ImageDataset):
        some = data.select([data.ids[p] for p in positions])
        if on_error == "skip" and not any(_readable(some, p) for p in range(len(some))):
            return None
        return encode_dataset(model, some, flips=flips, on_error=on_error, progress=False)
    states, rows = [], []
    for p in positions:
        rows.append([len(states) + c for c in range(data.caption_counts[p])])
        states += [data.text([p], c)[0] for c in range(data.caption_counts[p])]
    return EncodedDataset(
        [data.ids[p] for p in positions], data.latents(positions), torch.stack(states), rows,
        data.latents(positions, flipped=True) if flips else None,
    )  # fmt: skip


def _readable(data: ImageDataset, position: int) -> bool:
    try:
        _ = data[position].image
    except ValueError:
        return False
    return True


def pack_examples(
    encoded: EncodedDataset | None, manifest: Manifest
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns the tensors and the header of a shard of the column `examples`."""
    if encoded is None:
        return {"latents": torch.empty(0), "text": torch.empty(0)}, {"ids": [], "captions": []}
    rows = range(len(encoded.ids))
    tensors = {"latents": encoded.latents(rows)}
    if manifest.settings["views"] == 2:
        tensors["flipped"] = encoded.latents(rows, flipped=True)
    tensors["text"] = torch.cat(
        [encoded.text([r], c) for r in rows for c in range(encoded.caption_counts[r])]
    )
    return tensors, {"ids": encoded.ids, "captions": encoded.caption_counts}


def unpack_examples(tensors: dict[str, Tensor], about: dict[str, Any]) -> EncodedDataset:
    """Returns the examples of a shard; no caption state is shared between them."""
    counts = iter(range(len(tensors["text"])))
    rows = [[next(counts) for _ in range(n)] for n in about["captions"]]
    return EncodedDataset(
        about["ids"], tensors["latents"], tensors["text"], rows, tensors.get("flipped")
    )
