"""Attribution scores fitted to the outcomes of retrained models, numpy only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .metrics import check_subsets

ALPHAS = tuple(float(a) for a in np.logspace(0, 6, 13))
"""Of the ridge: from next to none to next to no coefficients, for hundreds to 100,000 examples."""


def datamodels(
    masks: np.ndarray, outcomes: np.ndarray, alphas: Sequence[float] = ALPHAS
) -> np.ndarray:
    """Returns datamodel scores [Q, N] float64 by ridge regression (Ilyas et al., 2022).

    Each query's loss is regressed, with an intercept, on which examples were trained on. The
    coefficient of an example that lowers the loss is negative; its score is positive. One alpha
    serves all queries: that of the least leave-one-out error, see `left_out_errors`.

    Args:
        masks: [M, N] bool, which examples each subset holds.
        outcomes: [M, Q] float, losses of a model trained on each subset. Scores are judged on
            other subsets than these.
        alphas: penalties to choose from, of the squared coefficients.

    Raises:
        ValueError: no alphas or one that is not positive; shapes that do not fit, fewer than 3
            subsets or all of the same examples, values that are not finite, or a query of
            constant outcomes.
    """
    errors = left_out_errors(masks, outcomes, alphas)
    alpha = alphas[int(np.argmin(errors.mean(1)))]
    x = np.asarray(masks, dtype=np.float64)
    x = x - x.mean(0)
    y = np.asarray(outcomes, dtype=np.float64)
    # The dual: there are far fewer subsets than examples.
    dual = np.linalg.solve(x @ x.T + alpha * np.eye(len(x)), y - y.mean(0))
    return -(x.T @ dual).T


def left_out_errors(
    masks: np.ndarray, outcomes: np.ndarray, alphas: Sequence[float] = ALPHAS
) -> np.ndarray:
    """Returns the squared error of predicting each subset from the others.

    Args:
        masks: [M, N] bool.
        outcomes: [M, Q] float.
        alphas: A penalties.

    Returns:
        [A, Q] float64, mean over subsets, in units of the variance of the query's outcomes.

    Raises:
        ValueError: see `datamodels`.
    """
    masks, outcomes = np.asarray(masks), np.asarray(outcomes, dtype=np.float64)
    check_subsets(masks, outcomes)
    if (masks == masks[0]).all():
        raise ValueError("datamodels: masks: all subsets hold the same examples")
    if not len(alphas) or min(alphas) <= 0 or not np.isfinite(alphas).all():
        raise ValueError(f"datamodels: alphas {list(alphas)} must be positive numbers")
    x = masks - masks.mean(0)
    y = outcomes - outcomes.mean(0)
    values, vectors = np.linalg.eigh(x @ x.T)
    values = np.maximum(values, 0)
    errors = []
    for alpha in alphas:
        # Ridge is a linear smoother y_hat = H y: the residual of a subset that is left out is
        # its residual divided by 1 - H_ii, and the intercept adds 1 / M to every entry of H.
        shrunk = vectors * (values / (values + alpha))
        smoother = shrunk @ vectors.T
        leverage = np.diag(smoother) + 1 / len(x)
        left_out = (y - smoother @ y) / (1 - leverage)[:, None]
        errors.append((left_out**2).mean(0) / y.var(0))
    return np.array(errors)
