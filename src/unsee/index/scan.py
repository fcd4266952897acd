"""Inner products of stored gradients with the directions of queries.

An example's gradient in layer l is M_lᵀc, with its factor M_l [T, channels] and its text state
c [T, width]. With a direction W_l [channels, width] the inner product is the sum of M_l ⊙ (c W_lᵀ):
for one query nothing larger than tokens x channels is formed. For many queries it is cheaper to
form the gradient once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .factors import Layer, Quantised, dequantise

PRODUCT_BYTES = 100_000_000
"""What exists of products or gradients at the same time."""

FORM_GRADIENTS_FROM = 3
"""Queries from which on gradients are formed: two halves of an example cost as much as two
queries do, and one more query then costs a hundredth of that."""


def stack_directions(
    directions: Sequence[Mapping[str, Tensor]], layers: Sequence[Layer],
    weights: Mapping[str, Tensor],
) -> Tensor:  # fmt: skip
    """Joins the layers of each direction, as seen from the text state.

    Args:
        directions: for each query, weight name -> [channels, width].
        layers: of the index.
        weights: name -> value of the weights between text and layer (`Layer.reads`).

    Returns:
        [Q, width of the text state, channels of all layers] float32.
    """

    def seen(direction: Tensor, layer: Layer) -> Tensor:
        return direction if layer.reads is None else direction @ weights[layer.reads].to(direction)

    joined = [torch.cat([seen(d[la.name], la).T for la in layers], dim=1) for d in directions]
    return torch.stack(joined).float()


def scan(stored: Quantised, text: Tensor, layers: Sequence[Layer], directions: Tensor) -> Tensor:
    """Inner products of the gradients of a shard's captions with directions.

    Args:
        stored: factors [views, R, 2, T, channels].
        text: [R, T, width] float32.
        layers: of the index.
        directions: [Q, width, channels], see `stack_directions`.

    Returns:
        [views, R, 2, Q] float64.
    """
    views, rows, _, length, channels = stored.values.shape
    few = len(directions) < FORM_GRADIENTS_FROM
    chunk = at_once((length if few else 2 * text.shape[-1]) * channels)
    found = torch.zeros(views, rows, 2, len(directions), dtype=torch.float64)
    device = directions.device
    for first in range(0, rows, chunk):
        part = slice(first, first + chunk)
        states = text[part].to(device, torch.float32)
        for view in range(views):
            factors = Quantised(
                stored.values[view, part].to(device), stored.scales[view, part].to(device)
            )
            dense = dequantise(factors, layers)  # [r, 2, T, channels]
            if few:
                got = torch.stack([_by_tokens(dense, states, d) for d in directions], dim=-1)
            else:
                got = form_gradients(dense, states).flatten(2) @ directions.flatten(1).T
            found[view, part] = got.double().cpu()
    return found


def at_once(numbers: int) -> int:
    """Returns how many rows of so many float32 numbers may exist at the same time."""
    return max(1, PRODUCT_BYTES // (4 * numbers))


def _by_tokens(factors: Tensor, text: Tensor, direction: Tensor) -> Tensor:
    """Returns [r, 2] for factors [r, 2, T, channels]."""
    products = text @ direction  # [r, T, channels]
    return torch.einsum("rhtc,rtc->rh", factors, products)


def form_gradients(factors: Tensor, text: Tensor) -> Tensor:
    """Returns the gradients [r, 2, width, channels], transposed, of factors [r, 2, T, channels]."""
    return text.mT[:, None] @ factors
