"""How near generated pictures are to training pictures: numpy on arrays of pictures in [0, 1]."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]

TIE = 1e-6
"""RMS distances closer than this are equal. Cancellation in float64 leaves about 1e-8 where there
should be zero; one grey level in one subpixel of a 64x64 picture makes 3.5e-5."""

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


def box_downscale(pictures: Array, side: int) -> Array:
    """Returns pictures [N, H, H, C] as [N, side, side, C], each new pixel the mean of its block.

    Raises:
        ValueError: the pictures are not square, or `side` does not divide their height.
    """
    n, height, width, channels = pictures.shape
    if height != width or height % side:
        raise ValueError(
            f"cannot average {width}x{height} pictures in blocks down to {side}x{side}"
        )
    block = height // side
    return pictures.reshape(n, side, block, side, block, channels).mean(axis=(2, 4))


def rms_distances(a: Array, b: Array) -> Array:
    """Returns root-mean-square differences [n, m] float64 of pictures [n, ...] and [m, ...]."""
    x = a.reshape(len(a), -1).astype(np.float64)
    y = b.reshape(len(b), -1).astype(np.float64)
    squared = (x * x).sum(1)[:, None] + (y * y).sum(1) - 2 * x @ y.T
    return np.sqrt(np.maximum(squared, 0) / x.shape[1])


def retrieval_ranks(distances: Array, own: NDArray[np.integer]) -> NDArray[np.int64]:
    """Returns where each picture's own training picture stands among all, by distance.

    Training pictures at the same distance share the better rank: twemoji draws several emoji
    alike to the pixel (some flags, most families).

    Args:
        distances: [n, N] between generated and training pictures.
        own: [n], the training picture of each generated picture's caption.

    Returns:
        [n], 1 is first.
    """
    mine = distances[np.arange(len(own)), own]
    return 1 + (distances < mine[:, None] - TIE).sum(axis=1)


def nearest_distinct(distances: Array) -> Array:
    """Returns each picture's distance [N] to the nearest that differs from it.

    Args:
        distances: [N, N] of a set with itself; zeros, on and off the diagonal, are left out.
    """
    return np.where(distances < TIE, np.inf, distances).min(axis=1)


def copy_threshold(reconstruction: Array, neighbour: Array) -> float:
    """Returns the distance that best tells a picture's copy from a neighbour of it.

    A model that knew a training latent by heart would still differ from the picture by what the
    autoencoder loses; a model that made another picture would differ by at least what training
    pictures differ. Below the threshold returned lie equal shares of mistakes: as large a share
    of reconstructions is missed as of nearest neighbours is taken for copies.

    Args:
        reconstruction: distances between training pictures and their reconstructions.
        neighbour: distances between training pictures and their nearest distinct neighbour.
    """
    candidates = np.unique(np.concatenate([reconstruction, neighbour]))
    missed = 1 - np.searchsorted(np.sort(reconstruction), candidates) / len(reconstruction)
    mistaken = np.searchsorted(np.sort(neighbour), candidates) / len(neighbour)
    return float(candidates[np.argmin(np.abs(missed - mistaken))])


def quantiles(values: Array) -> dict[str, float]:
    """Returns the quantiles that reports show, by name such as `"q05"`."""
    return {f"q{q * 100:02.0f}": float(np.quantile(values, q)) for q in QUANTILES}


def share(hits: NDArray[np.bool_]) -> dict[str, float]:
    """Returns the share of hits with its binomial standard error."""
    p = float(np.mean(hits))
    return {"share": p, "standard_error": float(np.sqrt(p * (1 - p) / len(hits)))}


def psnr_report(values: Array) -> dict[str, float]:
    """Returns mean, median and 5th percentile in dB, and how many pictures they are of."""
    return {
        "pictures": len(values),
        "mean_db": float(values.mean()),
        "median_db": float(np.median(values)),
        "q05_db": float(np.quantile(values, 0.05)),
    }


def retrieval_report(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns how often the own picture is first and in the first ten."""
    ranks = np.array([row["rank"] for row in rows])
    return {
        "pictures": len(ranks),
        "first": share(ranks <= 1),
        "first_ten": share(ranks <= 10),
        "median_rank": float(np.median(ranks)),
    }


def copy_report(rows: Sequence[dict[str, Any]], threshold: float) -> dict[str, Any]:
    """Returns how many pictures are near-copies, and how far the nearest pictures are."""
    own = np.array([row["own_rms"] for row in rows])
    nearest = np.array([row["nearest_rms"] for row in rows])
    return {
        "near_copies_of_own": share(own < threshold),
        "near_copies_of_any": share(nearest < threshold),
        "own_rms": {"mean": float(own.mean()), **quantiles(own)},
        "nearest_rms": {"mean": float(nearest.mean()), **quantiles(nearest)},
    }
