"""Inner products of stored gradients with the directions of queries.

An example's gradient in layer l is M_lᵀc, with the factors M_l [rows, channels] and the text
c [rows, width] of its components. The inner product with a direction W_l [channels, width] is the
sum of M_l ⊙ (c W_lᵀ). For few queries, W_l is replaced by one of low rank; for many, the gradient
is formed once and serves all of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from .components import Components
from .directions import Directions
from .factors import Layer, Quantised

PRODUCT_BYTES = 100_000_000
"""What exists of products or gradients at the same time."""

PASS = 16
"""Multiplications of a matrix product that are counted for one outside of it, which waits for
memory. A guess: it only chooses between two ways to the same sums."""


def scan(stored: Components, layers: Sequence[Layer], asked: Directions) -> Tensor:
    """Inner products of the gradients of a shard's examples with directions.

    Args:
        stored: of n examples.
        layers: of the index.
        asked: directions, on the device that is to do the work.

    Returns:
        [views, n, 2, 2Q] float64, on the CPU.
    """
    views, width = stored.text.shape[0], stored.text.shape[-1]
    found = torch.zeros(views, len(stored.counts), 2, asked.count, dtype=torch.float64)
    if not len(stored.counts):
        return found
    device, longest = asked.full[0].device, int(stored.counts.max())
    truncated = _truncation_pays(asked, longest, width)
    products = _truncated if truncated else _whole
    # Of one layer at a time, the largest: factors, and the gradient or what is left of it.
    sides = asked.left if truncated and asked.left is not None else [asked.full]
    largest = max(p[0].numel() for q in sides for p in q)
    most = max(la.channels for la in layers)
    chunk = at_once(longest * (2 * most + width + asked.rank) + 2 * largest)
    for examples, rows, real in stored.groups(chunk):
        for view in range(views):
            values = stored.factors.values[view][rows].to(device)
            scales = (stored.factors.scales[view][rows] * real[..., None, None]).to(device)
            text = stored.text[view][rows].to(device, torch.float32)
            factors = Quantised(values.transpose(1, 2), scales.transpose(1, 2))
            got = products(factors, text, layers, asked)
            found[view, examples] = got.double().cpu()
    return found


def at_once(numbers: int) -> int:
    """Returns how many rows of so many float32 numbers may exist at the same time."""
    return max(1, PRODUCT_BYTES // (4 * numbers))


def _truncation_pays(asked: Directions, length: int, width: int) -> bool:
    """Compares multiplications for one example of `length` rows."""
    if asked.left is None or asked.right is None:
        return False
    channels = sum(f.shape[2] for f in asked.full)
    sides = sum(p.numel() for q in asked.left for p in q)  # of two halves
    by_rows = length * (width * asked.rank + 2 * sides + PASS * 4 * asked.rank)
    formed = 2 * length * width * channels + 2 * width * channels * asked.count
    return by_rows < formed


def _truncated(
    factors: Quantised, text: Tensor, layers: Sequence[Layer], asked: Directions
) -> Tensor:
    """Returns [r, 2, 2Q] for factors [r, 2, rows, channels] and text [r, rows, width]."""
    assert asked.left is not None and asked.right is not None
    seen = [(text @ torch.cat(right, dim=-1)).split([p.shape[-1] for p in right], dim=-1)
            for right in asked.right]  # fmt: skip
    totals: list[Tensor | float] = [0.0] * len(seen)
    for i, factor in enumerate(factors.values.split([la.channels for la in layers], dim=-1)):
        dense = factor.float() * factors.scales[..., i, None]
        for q, left in enumerate(asked.left):
            # An example has few rows: less is written than if its gradient came first.
            sides = dense @ left[i].flatten(0, 1).T  # [r, 2, rows, 2 * rank]
            products = sides.unflatten(-1, (2, -1)) * seen[q][i][:, None, :, None]
            totals[q] = totals[q] + products.sum((2, 4))
    return torch.cat([torch.as_tensor(t) for t in totals], dim=-1)


def _whole(factors: Quantised, text: Tensor, layers: Sequence[Layer], asked: Directions) -> Tensor:
    """Does what `_truncated` does with whole directions, from gradients that it forms."""
    total: Tensor | float = 0.0
    values = factors.values.split([la.channels for la in layers], dim=-1)
    for i, (factor, direction) in enumerate(zip(values, asked.full, strict=True)):
        dense = factor.float() * factors.scales[..., i, None]
        gradients = text.mT[:, None] @ dense  # [r, 2, width, channels]
        total = total + functional.linear(gradients.flatten(2), direction.flatten(1))
    assert isinstance(total, Tensor)
    return total
