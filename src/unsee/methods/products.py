"""What products of two halves of draws say: scores with standard errors, and second orders."""

from __future__ import annotations

import numpy as np


def second_order(products: np.ndarray) -> np.ndarray:
    """Returns half the expected square of random functionals' products with a step.

    Each half of an example's draws has functionals of its own: their mean square is unbiased.

    Args:
        products: [N, views, Q, 2, 2], halves of the example and of the query.

    Returns:
        [N, views, Q, 2, 2] whose mean over the query's halves is half the square of the mean, and
        whose difference is that of the square, to first order.
    """
    mean = products.mean(-1, keepdims=True)
    return 0.5 * mean * (2 * products - mean)


def with_errors(products: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns scores [n] and their standard errors [n].

    Args:
        products: [n, views, 2, 2], halves of the example and of the query; the view with the
            larger score counts.

    Half the difference of two independent halves has the variance of their mean. The example's
    noise and the query's add up, but for the product of the two, which both differences have in
    them. As differences alone say little, each variance is averaged with the mean over all
    examples. Draws are stratified, and the halves have other timesteps: that makes errors of few
    draws too large, by an eighth for 8 draws of a small model, by a fiftieth for 16.
    """
    means = products.mean((2, 3))
    best = means.argmax(1)
    chosen = products[np.arange(len(products)), best]  # [n, 2, 2]
    of_example = (chosen[:, 0].mean(1) - chosen[:, 1].mean(1)) / 2
    of_query = (chosen[:, :, 0].mean(1) - chosen[:, :, 1].mean(1)) / 2
    of_both = (chosen[:, 0, 0] - chosen[:, 0, 1] - chosen[:, 1, 0] + chosen[:, 1, 1]) / 4
    variance = of_example**2 + of_query**2 - of_both**2
    alone, together = np.maximum(variance, 0), max(float(variance.mean()), 0.0)
    return means.max(1), np.sqrt((alone + together) / 2)


def errors_of_norms(even: np.ndarray, odd: np.ndarray) -> np.ndarray:
    """Returns standard errors [n] of the products of two independent halves of a gradient.

    Half the difference of the halves' squared norms has, where their noise is Gaussian, a mean
    square that is the variance of their product. What all examples share of it, relative to their
    norms, is no chance: the halves have other timesteps. As one difference says little, each
    variance is averaged with what all have together, again relative to the norms.

    Args:
        even, odd: [n], the squared norms of the halves.
    """
    norms = (even + odd) / 2
    if not norms.any():
        return np.zeros_like(norms)
    half = (even - odd) / 2
    if len(half) > 1:
        half = half - norms * half.sum() / norms.sum()
    together = np.square(half).sum() / np.square(norms).sum() * np.square(norms)
    return np.sqrt((np.square(half) + together) / 2)
