"""How much an example made itself possible: memorised and mislabelled examples stand out."""

from __future__ import annotations

import torch
from torch import Tensor

from ..index.components import Components
from ..index.factors import Quantised, dequantise
from ..index.fit import CurvatureName, check_damping, layer_inputs
from ..index.index import Index
from ..index.scan import at_once
from .base import Scores
from .products import errors_of_norms


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
    Standard errors are estimated from the squared norms of the two, see `errors_of_norms`; like
    those of other scores they know the chance of the draws alone.

    Args:
        index: with the column.
        curvature: see `Index.curvature`, or `identity`.
        damping: relative to each layer's mean.
        column: `factors` or `outputs`.

    Returns:
        Scores in the order of `index.ids`, with standard errors; the larger, the more the example
        is learnt by heart and supported by no other. Captions are averaged; mirrored views are
        left out.

    Raises:
        ValueError: the index does not have the column, the damping is negative, or see
            `Index.curvature`.
    """
    check_damping(damping)
    fitted = None if curvature == "identity" else index.curvature(curvature, column)
    weights = layer_inputs(index.model, index.layers)
    channels = [la.channels for la in index.layers]
    found = [torch.zeros(0, 3, dtype=torch.float64)]
    for shard in index.shards():
        stored = index.components(column, shard)
        text = stored.text[0].float()
        factors = Quantised(stored.factors.values[0], stored.factors.scales[0])
        dense = dequantise(factors, index.layers)
        total = torch.zeros(len(stored.counts), 3, dtype=torch.float64)
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
        found.append(total)
    values, even, odd = torch.cat(found).numpy().T
    settings = {"curvature": curvature, "damping": damping, "column": column,
                "index": str(index.path), "draws": repr(index.draws)}  # fmt: skip
    errors = errors_of_norms(even, odd)
    return Scores(list(index.ids), values.copy(), "self-influence", settings, errors=errors)


def _products(factors: Tensor, text: Tensor, stored: Components, damped: Tensor | None) -> Tensor:
    """Returns [n, 3] float64: products of the halves of each example's gradient.

    They are that of the even half with the odd one, and of each with itself.

    Args:
        factors: [R, 2, channels] of one layer.
        text: [R, width], what the layer sees.
        stored: whose rows they are.
        damped: [channels, width] what is divided by.
    """
    found = torch.zeros(len(stored.counts), 3, dtype=torch.float64)
    for some, rows, real in stored.groups(at_once(2 * factors.shape[-1] * text.shape[-1])):
        halves = (factors[rows] * real[..., None, None]).transpose(1, 2)  # [r, 2, rows, channels]
        both = (halves.mT @ text[rows][:, None]).double()
        divided = both if damped is None else torch.where(damped > 0, both / damped, 0.0)
        pairs = ((0, 1), (0, 0), (1, 1))
        products = [(both[:, a] * divided[:, b]).sum((1, 2)) for a, b in pairs]
        found[some] = torch.stack(products, dim=1)
    return found
