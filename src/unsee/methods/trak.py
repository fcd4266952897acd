"""TRAK and D-TRAK with the exact kernel: no projection, where the examples are few enough."""

from __future__ import annotations

import numpy as np

from .example_gradients import GradientMatrix


def trak_scores(kernel: np.ndarray, cross: np.ndarray, ridge: float) -> np.ndarray:
    """Scores a query by its gradient and the regularised kernel of the examples'.

    With Φ the gradients of the N examples [N, P] and φ the query's [P], the score is
    Φ(ΦᵀΦ + λI)⁻¹φ = (ΦΦᵀ + λI)⁻¹Φφ: with the N by N kernel it needs no projection ("TRAK", Park et
    al., ICML 2023; "D-TRAK", Zheng et al., ICLR 2024, which differentiates the output's norm
    instead of the loss). The factor Q of the original is 1 for diffusion losses.

    Args:
        kernel: [N, N] float64, ΦΦᵀ.
        cross: [N, Q] float64, Φφ of each query.
        ridge: λ, relative to the mean of the kernel's diagonal.

    Returns:
        [N, Q] float64; higher is more influential.

    Raises:
        ValueError: shapes do not fit, or the ridge is not positive.
    """
    if kernel.shape != (len(cross), len(cross)):
        raise ValueError(f"trak: kernel {kernel.shape} for {len(cross)} examples")
    if not ridge > 0:
        raise ValueError(f"trak: ridge = {ridge} must be positive")
    damped = kernel + ridge * np.trace(kernel) / len(kernel) * np.eye(len(kernel))
    return np.linalg.solve(damped, cross)


def trak_kernel(examples: GradientMatrix) -> np.ndarray:
    """Returns the inner products [N, N] float64 of the examples' gradients."""
    return examples.products(examples)
