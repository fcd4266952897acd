"""What encoders see of a picture or of its caption, as rows whose inner product is a cosine."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from ..data.dataset import ImageDataset, to_rgb
from ..data.latents import EncodedDataset
from ..query import Query

if TYPE_CHECKING:
    from ..models.base import Denoiser

OWN = ("latent", "text", "pixel")
"""Encoders that need no other model: the latent, flattened; the text state, averaged over tokens
(and captions); and RGB at 32x32, less white, which most pictures have in common."""

SIDE = 32
"""Pictures are compared at this size in pixels: finer detail is noise to a pixel distance."""

BATCH = 16
"""Pictures that an encoder sees at once."""

BUILT_IN = "of unsee"


class VisionEncoder:
    """A vision model of transformers, with its own preprocessing, from a folder.

    What counts is the embedding that the model was trained to give (`get_image_features` of
    CLIP's kind, otherwise the pooled output), or, where it was not trained to give any, the state
    of its first token.

    Args:
        folder: as `save_pretrained` writes it: config, weights and preprocessor.
        device: of the work.

    Attributes:
        name: the last part of the folder's name.
        fingerprint: of weights and preprocessing.

    Raises:
        ValueError: the folder holds no vision model and preprocessor that transformers can load.
    """

    def __init__(self, folder: str | Path, device: torch.device | str = "cpu") -> None:
        self.name, self.device = Path(folder).resolve().name, device
        try:
            self.model, self.processor, untrained = _load(folder)
        except Exception as error:  # transformers raises all kinds
            raise _unusable(folder, error) from error
        # A pooler that is not in the folder has random weights.
        self.pooled = not any("pool" in name for name in untrained)
        others = [name for name in untrained if "pool" not in name]
        if others:
            raise _unusable(folder, f"it has no weights {others[0]!r}")
        digest = hashlib.sha256(self.processor.to_json_string().encode())
        for name, tensor in self.model.state_dict().items():
            if name not in untrained:
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(memoryview(tensor.contiguous().flatten().view(torch.uint8).numpy()))
        self.fingerprint = digest.hexdigest()[:16]
        self.model.to(device)
        try:
            self([Image.new("RGB", (SIDE, SIDE))])
        except Exception as error:
            raise _unusable(folder, error) from error

    @torch.inference_mode()
    def __call__(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Returns [n, F] float32 of RGB pictures, on the CPU."""
        pixels = self.processor(images=list(pictures), return_tensors="pt")["pixel_values"]
        pixels = pixels.to(self.device)
        if hasattr(self.model, "get_image_features"):
            found = self.model.get_image_features(pixel_values=pixels)
        else:
            found = self.model(pixel_values=pixels)
        if not isinstance(found, Tensor):
            pooled = getattr(found, "pooler_output", None) if self.pooled else None
            found = found.last_hidden_state[:, 0] if pooled is None else pooled
        return found.flatten(1).float().cpu()


Encoders = Mapping[str, VisionEncoder | None]
"""Name -> vision encoder; None for one of `OWN`."""


def _load(folder: str | Path) -> tuple[Any, Any, set[str]]:
    """Returns a model in float32, its preprocessor, and names of weights that are not there."""
    import transformers
    from transformers import AutoImageProcessor, AutoModel

    # Pictures are resized by Pillow in every version: torchvision is not needed, nor its rounding.
    later = int(transformers.__version__.split(".")[0]) >= 5
    options = {"backend": "pil"} if later else {"use_fast": False}
    processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True, **options)
    model, about = AutoModel.from_pretrained(
        folder, local_files_only=True, output_loading_info=True
    )
    return model.float().eval().requires_grad_(False), processor, set(about["missing_keys"])


def _unusable(folder: str | Path, reason: object) -> ValueError:
    line = next(iter(str(reason).strip().splitlines()), "") or repr(reason)
    return ValueError(f"encoder {str(folder)!r} cannot be used as a vision encoder: {line}")


def load_encoders(names: Sequence[str], device: torch.device | str = "cpu") -> Encoders:
    """Loads encoders by name.

    Args:
        names: each one of `OWN`, or the folder of a vision model of transformers.
        device: of their work.

    Returns:
        Name -> encoder; that of a folder is the last part of its name.

    Raises:
        ValueError: there is no such encoder, it cannot be used, or two have the same name.
    """
    found: dict[str, VisionEncoder | None] = {}
    for name in names:
        if name not in OWN and not Path(name).is_dir():
            raise ValueError(
                f"no encoder {name!r}; there are {', '.join(OWN)}, and the folder of any vision "
                "model of transformers"
            )
        encoder = None if name in OWN else VisionEncoder(name, device)
        key = name if encoder is None else encoder.name
        if key in found or (encoder is not None and key in OWN):
            raise ValueError(f"two encoders are called {key!r}; rename a folder, or name one once")
        found[key] = encoder
    return found


def reload_encoders(
    known: Mapping[str, str], folders: Sequence[str], device: torch.device | str = "cpu"
) -> Encoders:
    """Loads the encoders that a manifest names.

    Args:
        known: name -> fingerprint.
        folders: where the vision encoders are now.
        device: of their work.

    Raises:
        ValueError: what is in the folders is not what the manifest names, or see `load_encoders`.
    """
    own = [name for name in known if name in OWN]
    found = load_encoders([*own, *(f for f in folders if f not in own)], device)
    given = encoder_settings(found)
    for name in {**known, **given}:
        if known.get(name) != given.get(name):
            raise ValueError(
                f"encoder {name!r}: its fingerprint is {known.get(name)} in the index, and "
                f"{given.get(name)} of what is given; give the folders of the very encoders that "
                "the index was built with"
            )
    return found


def encoder_settings(encoders: Encoders) -> dict[str, str]:
    """Returns what fixes the rows of encoders, for a manifest: name -> fingerprint."""
    return {name: BUILT_IN if e is None else e.fingerprint for name, e in encoders.items()}


def needs_pictures(name: str) -> bool:
    """Whether an encoder sees the picture itself, which data that came encoded does not have."""
    return name not in ("latent", "text")


def example_features(
    model: Denoiser, encoders: Encoders, encoded: EncodedDataset, pictures: ImageDataset | None
) -> dict[str, Tensor]:
    """Returns encoder -> rows [n, F] float16 of length 1.

    Args:
        model: only the part of a picture that it sees counts.
        encoders: what sees the examples.
        encoded: the examples.
        pictures: where they are, for encoders that need them.
    """
    rows = range(len(encoded.ids))
    if not rows:
        return {name: torch.zeros(0, 0, dtype=torch.float16) for name in encoders}
    found: dict[str, list[Tensor]] = {name: [] for name in encoders}
    if "latent" in encoders:
        found["latent"].append(encoded.latents(rows).flatten(1))
    if "text" in encoders:
        states = [
            torch.stack([encoded.text([r], c)[0] for c in range(encoded.caption_counts[r])])
            for r in rows
        ]
        found["text"].append(torch.stack([s.float().mean((0, 1)) for s in states]))
    seeing = [name for name in encoders if needs_pictures(name)]
    if seeing:
        assert pictures is not None  # refused before the pass
        some = pictures.select(encoded.ids)
        for first in range(0, len(some), BATCH):
            part = [some[p].image for p in range(first, min(first + BATCH, len(some)))]
            part = [image.crop(model.crop_box(image.size)) for image in part]
            for name in seeing:
                found[name].append(_see(name, encoders[name], part))
    return {name: _unit(torch.cat(parts)).half() for name, parts in found.items()}


def query_features(name: str, encoder: VisionEncoder | None, queries: Sequence[Query]) -> Tensor:
    """Returns the rows [Q, F] float32 of queries, of length 1."""
    if name == "latent":
        return _unit(torch.stack([q.latents for q in queries]).flatten(1))
    if name == "text":
        return _unit(torch.stack([q.text.float().mean(0) for q in queries]))
    parts = [queries[i : i + BATCH] for i in range(0, len(queries), BATCH)]
    return _unit(torch.cat([_see(name, encoder, [q.image for q in part]) for part in parts]))


def _see(name: str, encoder: VisionEncoder | None, pictures: Sequence[Image.Image]) -> Tensor:
    rgb = [to_rgb(picture) for picture in pictures]
    if encoder is not None:
        return encoder(rgb)
    return torch.stack([pixels(picture) for picture in rgb]).flatten(1)


def _unit(rows: Tensor) -> Tensor:
    """Returns rows [n, F] float32 of length 1 (a row of zeros stays one)."""
    return normalize(rows.double(), dim=1).float()


def pixels(image: Image.Image) -> Tensor:
    """Returns a picture [32, 32, 3] float32, less white."""
    small = to_rgb(image).resize((SIDE, SIDE), Image.Resampling.BOX)
    return torch.from_numpy(np.asarray(small).astype(np.float32)) / 255 - 1
