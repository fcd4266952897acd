"""TRAK and D-TRAK with the exact kernel: no projection, where the examples are few enough."""

from __future__ import annotations

import numpy as np

from .example_gradients import GradientMatrix


def trak_scores(
    kernel: np.ndarray, cross: np.ndarray, ridge: float, trained: np.ndarray | None = None
) -> np.ndarray:
    """Scores a query by its gradient and the regularised kernel of the examples'.

    With Φ the gradients of the n examples that the model was trained on [n, P], φ the query's and
    ψ an example's [P], the score is ψ(ΦᵀΦ + λI)⁻¹φ. With the n by n kernel ΦΦᵀ it needs no
    projection: λ times the score is ψφ - ψΦᵀ(ΦΦᵀ + λI)⁻¹Φφ ("TRAK", Park et al., ICML 2023;
    "D-TRAK", Zheng et al., ICLR 2024, which differentiates the output's norm instead of the loss).
    The factor Q of the original is 1 for diffusion losses.

    Args:
        kernel: [N, N] float64, inner products of all examples' gradients.
        cross: [N, Q] float64, inner products of the examples' gradients with the queries'.
        ridge: λ, relative to the mean of the trained examples' squared gradients.
        trained: [N] bool, the examples that the model was trained on; all if None.

    Returns:
        [N, Q] float64; higher is more influential.

    Raises:
        ValueError: shapes do not fit, or the ridge is not positive.
    """
    if kernel.shape != (len(cross), len(cross)):
        raise ValueError(f"trak: kernel {kernel.shape} for {len(cross)} examples")
    if not ridge > 0:
        raise ValueError(f"trak: ridge = {ridge} must be positive")
    seen = np.ones(len(cross), dtype=bool) if trained is None else np.asarray(trained, dtype=bool)
    if seen.shape != (len(cross),) or not seen.any():
        raise ValueError(f"trak: trained is {seen.shape}, {seen.sum()} of {len(cross)} examples")
    inner = kernel[np.ix_(seen, seen)]
    absolute = ridge * np.trace(inner) / len(inner)
    solved = np.linalg.solve(inner + absolute * np.eye(len(inner)), cross[seen])
    scores = np.empty_like(cross)
    scores[seen] = solved
    scores[~seen] = (cross[~seen] - kernel[np.ix_(~seen, seen)] @ solved) / absolute
    return scores


def trak_kernel(examples: GradientMatrix) -> np.ndarray:
    """Returns the inner products [N, N] float64 of the examples' gradients."""
    return examples.products(examples)
