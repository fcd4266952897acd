"""Inner products of stored gradients with the directions of queries.

An example's gradient in layer l is M_lᵀc, with its factor M_l [T, channels] and its text state
c [T, width]. The inner product with a direction W_l [channels, width] is the sum of
M_l ⊙ (c W_lᵀ). For few queries, W_l is replaced by one of low rank; for many, the gradient is
formed once and serves all of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from .directions import Directions
from .factors import Layer, Quantised, dequantise

PRODUCT_BYTES = 100_000_000
"""What exists of products or gradients at the same time."""


def scan(stored: Quantised, text: Tensor, layers: Sequence[Layer], asked: Directions) -> Tensor:
    """Inner products of the gradients of a shard's captions with directions.

    Args:
        stored: factors [views, R, 2, T, channels].
        text: [R, T, width] float32.
        layers: of the index.
        asked: directions, on the device that is to do the work.

    Returns:
        [views, R, 2, 2Q] float64, on the CPU.
    """
    views, rows, _, length, channels = stored.values.shape
    found = torch.zeros(views, rows, 2, asked.count, dtype=torch.float64)
    truncated = _truncation_pays(asked, length, text.shape[-1])
    if truncated:
        largest = max(p[0].numel() for q in asked.left or () for p in q)
        chunk = at_once(length * (2 * channels + asked.rank) + 2 * largest)
    else:
        chunk = at_once(2 * text.shape[-1] * channels)
    device = asked.full.device
    for first in range(0, rows, chunk):
        part = slice(first, first + chunk)
        states = text[part].to(device, torch.float32)
        for view in range(views):
            factors = Quantised(
                stored.values[view, part].to(device), stored.scales[view, part].to(device)
            )
            if truncated:
                got = _by_tokens(factors, states, layers, asked)
            else:
                dense = dequantise(factors, layers)  # [r, 2, T, channels]
                got = form_gradients(dense, states).flatten(2) @ asked.full.flatten(1).T
            found[view, part] = got.double().cpu()
    return found


def at_once(numbers: int) -> int:
    """Returns how many rows of so many float32 numbers may exist at the same time."""
    return max(1, PRODUCT_BYTES // (4 * numbers))


def _truncation_pays(asked: Directions, length: int, width: int) -> bool:
    """Compares multiplications for one caption."""
    if asked.left is None or asked.right is None:
        return False
    channels = asked.full.shape[2]
    sides = sum(p.numel() for q in asked.left for p in q)  # of two halves
    by_tokens = length * (width * asked.rank + sides) + 2 * sides
    formed = 2 * length * width * channels + 2 * width * channels * asked.count
    return by_tokens < formed


def _by_tokens(
    factors: Quantised, text: Tensor, layers: Sequence[Layer], asked: Directions
) -> Tensor:
    """Returns [r, 2, 2Q] for factors [r, 2, T, channels] and text [r, T, width]."""
    assert asked.left is not None and asked.right is not None
    values = factors.values.split([la.channels for la in layers], dim=-1)
    products = []
    for left, right in zip(asked.left, asked.right, strict=True):
        states = (text @ torch.cat(right, dim=-1)).split([p.shape[-1] for p in right], dim=-1)
        total: Tensor | float = 0.0
        for i, (factor, seen, sides) in enumerate(zip(values, states, left, strict=True)):
            scaled = seen[:, None] * factors.scales[..., i, None]  # [r, 2, T, rank]
            # The gradient against the right side serves both halves of the direction.
            part = scaled.mT @ factor.float()  # [r, 2, rank, channels]
            total = total + functional.linear(part.flatten(2), sides.flatten(1))
        products.append(total)
    return torch.cat(products, dim=-1)


def form_gradients(factors: Tensor, text: Tensor) -> Tensor:
    """Returns the gradients [r, 2, width, channels], transposed, of factors [r, 2, T, channels]."""
    return text.mT[:, None] @ factors
