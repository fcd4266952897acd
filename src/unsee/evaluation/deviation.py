"""What a retrained model makes of a query: its loss, and how else it paints the picture."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch

from ..draws import Draws
from ..methods.unlearning import query_loss
from ..models.base import Denoiser
from ..query import Query


@dataclass(frozen=True)
class Outcome:
    """A query under a model.

    Attributes:
        loss: of the query's latents, averaged over its draws.
        mse: mean squared difference of the picture made from the same noise, RGB in [0, 1].
        ssim: structural similarity of the two pictures; 1 for equal ones.
        latent_cosine: cosine of their latents.
    """

    loss: float
    mse: float
    ssim: float
    latent_cosine: float


def measure_outcome(model: Denoiser, query: Query, draws: Draws) -> Outcome:
    """Measures a query under a model that has the autoencoder of the one that made it.

    Args:
        model: encodes the prompt itself, and makes the picture again.
        query: made by `Denoiser.generate`: its provenance holds seed, steps and guidance.
        draws: timesteps and noise of the loss; the same for all models that are compared.

    Raises:
        ValueError: the query was not generated, the model makes latents of another shape, or the
            loss or picture is not finite.
    """
    about = query.provenance
    if "seed" not in about:
        raise ValueError(f"query {query.id!r} has no seed: only a generated picture is made again")
    again = model.generate(query.prompt, about["seed"], about["steps"], about["guidance_scale"])
    if again.latents.shape != query.latents.shape:
        raise ValueError(
            f"query {query.id!r}: the model makes latents {list(again.latents.shape)}, the query's "
            f"are {list(query.latents.shape)}; retrain with the same autoencoder and size"
        )
    loss = query_loss(model, dataclasses.replace(query, text=again.text), draws)
    if not np.isfinite(loss):
        raise ValueError(f"query {query.id!r}: the model's loss is {loss}")
    if not again.latents.isfinite().all():
        raise ValueError(f"query {query.id!r}: the picture that the model makes is not finite")
    a, b = (np.asarray(p, dtype=np.float64) / 255 for p in (query.image, again.image))
    cosine = torch.cosine_similarity(again.latents.flatten(), query.latents.flatten(), dim=0)
    return Outcome(loss, float(((a - b) ** 2).mean()), ssim(a, b), float(cosine))


def ssim(a: np.ndarray, b: np.ndarray, window: int = 7) -> float:
    """Returns the structural similarity of two pictures (Wang et al., 2004).

    Args:
        a: [H, W, 3] float in [0, 1].
        b: the same shape.
        window: side of the uniform windows; the mean is over windows and channels.

    Raises:
        ValueError: shapes that differ, or pictures smaller than the window.
    """
    if a.shape != b.shape or min(a.shape[:2]) < window:
        raise ValueError(f"ssim: pictures of {a.shape} and {b.shape}, windows of {window}")
    view = np.lib.stride_tricks.sliding_window_view
    x, y = (view(p.astype(np.float64), (window, window), axis=(0, 1)) for p in (a, b))
    mx, my = x.mean((-1, -2)), y.mean((-1, -2))
    vx, vy = x.var((-1, -2)), y.var((-1, -2))
    covariance = (x * y).mean((-1, -2)) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    alike = (2 * mx * my + c1) * (2 * covariance + c2)
    return float((alike / ((mx**2 + my**2 + c1) * (vx + vy + c2))).mean())
