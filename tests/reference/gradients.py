"""Gradients one row at a time, straight from autograd."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn


def row_gradients(
    losses: Callable[[], Tensor], parameters: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """Returns name -> [R, *shape] float64; the forward pass is run again for every row."""
    rows = len(losses())
    gradients: dict[str, list[Tensor]] = {name: [] for name in parameters}
    for row in range(rows):
        found = torch.autograd.grad(losses()[row], list(parameters.values()), allow_unused=True)
        for (name, parameter), one in zip(parameters.items(), found, strict=True):
            gradients[name].append((torch.zeros_like(parameter) if one is None else one).double())
    return {name: torch.stack(g) for name, g in gradients.items()}


def squared_gradients(
    losses: Callable[[], Tensor], parameters: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """Returns name -> sum over rows of the squared gradient, float64."""
    return {n: g.square().sum(0) for n, g in row_gradients(losses, parameters).items()}
