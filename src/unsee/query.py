"""The synthesized picture that is asked about."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor


@dataclass(frozen=True)
class Query:
    """A picture and the prompt it was made for, in the model's own terms.

    Attributes:
        id: names the query; its draws are keyed by it.
        latents: [C, h, w] float32, scaled as training latents are.
        text: [T, D] float32, the prompt's text state.
        prompt: the prompt.
        image: the picture, for people.
        mask: [h, w] float32 of zeros and ones, the latent cells that are asked about; all if None.
        box: the pixel box (x0, y0, x1, y1) that the mask came from.
        provenance: how the picture came to be (seed, steps, guidance, or the file).
    """

    id: str
    latents: Tensor
    text: Tensor
    prompt: str
    image: Image.Image
    mask: Tensor | None = None
    box: tuple[int, int, int, int] | None = None
    provenance: dict[str, Any] = field(default_factory=dict)


def check_box(box: tuple[int, int, int, int], image_size: tuple[int, int]) -> None:
    """Raises a ValueError if a box is empty or reaches outside the picture (width, height)."""
    x0, y0, x1, y1 = box
    width, height = image_size
    if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
        raise ValueError(
            f"box {x0},{y0},{x1},{y1} does not lie in the picture, which is {width}x{height}: "
            "give x0,y0,x1,y1 with x0 < x1 and y0 < y1"
        )


def box_mask(
    box: tuple[int, int, int, int], image_size: tuple[int, int], latent_size: tuple[int, int]
) -> Tensor:
    """Returns the latent cells whose centre lies in a box, at least one.

    Args:
        box: (x0, y0, x1, y1) in pixels, upper left corner included, lower right excluded.
        image_size: (width, height) in pixels.
        latent_size: (h, w) of the latent grid.

    Returns:
        [h, w] float32 of zeros and ones.

    Raises:
        ValueError: the box is empty or reaches outside the picture.
    """
    check_box(box, image_size)
    x0, y0, x1, y1 = box
    width, height = image_size
    h, w = latent_size
    centre_y = (torch.arange(h) + 0.5) * height / h
    centre_x = (torch.arange(w) + 0.5) * width / w
    rows = (centre_y >= y0) & (centre_y < y1)
    columns = (centre_x >= x0) & (centre_x < x1)
    # A box smaller than a cell may hold no centre on an axis: take the nearest one there.
    if not rows.any():
        rows[(centre_y - (y0 + y1) / 2).abs().argmin()] = True
    if not columns.any():
        columns[(centre_x - (x0 + x1) / 2).abs().argmin()] = True
    return (rows[:, None] & columns[None, :]).float()
