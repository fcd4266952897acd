"""The published curvature of AbU: passes over a sample of examples, one gradient for each draw."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence

from torch import Tensor

from ..curvature.diagonal import DiagonalFisher
from ..data.batches import gather
from ..data.latents import EncodedExamples
from ..draws import Draws
from ..models.base import Denoiser


def fit_diagonal_fisher(
    model: Denoiser, data: EncodedExamples, draws: Draws, batch_size: int = 64,
    progress: Callable[[Sequence], Iterable] = lambda batches: batches,
) -> DiagonalFisher:  # fmt: skip
    """Fits the diagonal of per-draw squared gradients over every example, caption and draw.

    Args:
        model: its selected parameters are used.
        data: the examples of the sample.
        draws: their timesteps and noise; independent of the draws that scores use.
        batch_size: passes at once.
        progress: wraps the list of batches, to show a bar.
    """
    jobs = [(0, row, c) for row in range(len(data.ids)) for c in range(data.caption_counts[row])]
    examples = max(1, batch_size // draws.n)
    batches = [jobs[i : i + examples] for i in range(0, len(jobs), examples)]

    def losses() -> Iterator[Callable[[], Tensor]]:
        for batch in progress(batches):
            latents, text, timesteps, noise = gather(data, draws, batch)
            # One row per draw: the hooks need a draw's own keys and values, not their sum.
            latents, text = (x.repeat_interleave(draws.n, 0) for x in (latents, text))
            row = (latents, text, timesteps.flatten()[:, None], noise.flatten(0, 1)[:, None])
            yield lambda row=row: model.loss(*row)[:, 0]

    with model.gradients_on():
        return DiagonalFisher.fit(
            model.network, model.parameters, losses(),
            {"kind": "per_draw", "draws": dataclasses.asdict(draws), "examples": len(data.ids)},
        )  # fmt: skip
