"""Pictures at the size they are looked at."""

from __future__ import annotations

import base64
import io

from PIL import Image

from ..data.dataset import to_rgb

PIXEL_ART = 24
"""Pictures whose longer side is at most this many pixels are enlarged without smoothing."""


def fitted(image: Image.Image, size: int) -> Image.Image:
    """Returns a picture as RGB whose longer side is `size` pixels, enlarged where it is smaller."""
    image = to_rgb(image)
    scale = size / max(image.size)
    target = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    if target == image.size:
        return image
    smooth = max(image.size) > PIXEL_ART
    return image.resize(target, Image.Resampling.LANCZOS if smooth else Image.Resampling.NEAREST)


def at_most(image: Image.Image, size: int) -> Image.Image:
    """Returns a picture as RGB whose longer side is `size` pixels or less; none is enlarged."""
    return fitted(image, size) if max(image.size) > size else to_rgb(image)


def data_uri(image: Image.Image, most_png: int = 24_000) -> str:
    """Returns a picture as `data:image/png;base64,...`.

    A photograph takes several times less space as JPEG: that is used for a picture whose PNG has
    more than `most_png` bytes.
    """
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    kind = "png"
    if buffer.tell() > most_png:
        smaller = io.BytesIO()
        image.save(smaller, format="JPEG", quality=85)
        if smaller.tell() < buffer.tell():
            buffer, kind = smaller, "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
