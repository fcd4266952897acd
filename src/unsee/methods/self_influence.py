"""How much an example made itself possible: memorised and mislabelled examples stand out."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..index.components import Components
from ..index.factors import Quantised, dequantise
from ..index.fit import CurvatureName, layer_inputs
from ..index.index import Index
from ..index.scan import at_once
from .base import Scores


def self_influence(
    index: Index,
    curvature: CurvatureName = "ekfac",
    damping: float = 0.1,
    column: str = "factors",
) -> Scores:
    """Scores every example of an index as if it were its own query.

    The score is the inner product of the example's gradient over even draws with that over odd
    draws, divided by the curvature: the noise of the draws, which would add its own square to a
    norm, has no part in the mean. (Koh and Liang, ICML 2017; Feldman and Zhang, NeurIPS 2020.)

    Args:
        index: with the column.
        curvature: see `Index.curvature`, or `identity`.
        damping: relative to each layer's mean.
        column: `factors` or `outputs`.

    Returns:
        Scores in the order of `index.ids`; the larger, the more the example is learnt by heart
        and supported by no other. Captions are averaged; mirrored views are left out.

    Raises:
        ValueError: the index does not have the column, or see `Index.curvature`.
    """
    fitted = None if curvature == "identity" else index.curvature(curvature, column)
    weights = layer_inputs(index.model, index.layers)
    channels = [la.channels for la in index.layers]
    values: list[float] = []
    for shard in index.shards():
        stored = index.components(column, shard)
        text = stored.text[0].float()
        factors = Quantised(stored.factors.values[0], stored.factors.scales[0])
        dense = dequantise(factors, index.layers)
        total = torch.zeros(len(stored.counts), dtype=torch.float64)
        for layer, part in zip(index.layers, dense.split(channels, dim=-1), strict=True):
            seen = text if layer.reads is None else text @ weights[layer.reads].float().T
            damped = None
            if fitted is not None:
                damped = fitted.values[layer.name]
                damped = damped + damping * damped.mean()
                if (vectors := getattr(fitted, "input_vectors", None)) is not None:
                    seen = seen @ vectors[layer.name].float()
                    part = part @ fitted.output_vectors[layer.name].float()  # type: ignore[union-attr]
            total += _products(part, seen, stored, damped)
        values += total.tolist()
    settings = {"curvature": curvature, "damping": damping, "column": column,
                "index": str(index.path), "draws": repr(index.draws)}  # fmt: skip
    return Scores(list(index.ids), np.array(values), "self-influence", settings)


def _products(factors: Tensor, text: Tensor, stored: Components, damped: Tensor | None) -> Tensor:
    """Returns the products [n] float64 of the two halves of each example's gradient.

    Args:
        factors: [R, 2, channels] of one layer.
        text: [R, width], what the layer sees.
        stored: whose rows they are.
        damped: [channels, width] what is divided by.
    """
    found = torch.zeros(len(stored.counts), dtype=torch.float64)
    for some, rows, real in stored.groups(at_once(2 * factors.shape[-1] * text.shape[-1])):
        halves = (factors[rows] * real[..., None, None]).transpose(1, 2)  # [r, 2, rows, channels]
        even, odd = (halves.mT @ text[rows][:, None]).double().unbind(1)
        if damped is not None:
            odd = torch.where(damped > 0, odd / damped, 0.0)
        found[some] = (even * odd).sum((1, 2))
    return found
