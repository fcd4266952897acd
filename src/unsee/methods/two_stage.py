"""Two stages: first order names the candidates, real unlearning judges them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..data.latents import EncodedDataset
from ..index.build import environment_of
from ..index.fit import CurvatureName
from ..index.index import Index
from ..query import Query
from .base import Scores
from .unlearning import ForwardAbU


def reevaluate(
    index: Index, query: Query, candidates: Sequence[str], curvature: CurvatureName,
    **settings: Any,
) -> Scores:  # fmt: skip
    """Scores candidates by real unlearning, on the draws that the index was built with.

    Where the index was built on the same device with the same versions, and has the column
    `loss`, the losses before come from there; otherwise they are computed for the candidates.

    Args:
        index: of the training data.
        query: the picture to forget.
        candidates: ids.
        curvature: of the index, see `Index.curvature`.
        settings: of `ForwardAbU`, for instance `rise`, `damping` and `batch_size`.

    Returns:
        Scores in the order of the candidates.

    Raises:
        ValueError: no curvature, no candidate, or see `ForwardAbU.attribute`.
    """
    if curvature == "identity":
        raise ValueError("forward: choose a curvature; the published one is diagonal_per_draw")
    if not len(candidates):
        raise ValueError(
            "candidates: the list is empty; leave it out, and the first order names them"
        )
    data, before = gathered(index, candidates)
    stored = before is not None and index.manifest.environment == environment_of(index.model)
    flips = index.manifest.settings["views"] == 2
    fitted = index.curvature(curvature)
    engine = ForwardAbU(index.model, data, fitted, draws=index.draws, flips=flips, **settings)
    scores = engine.attribute(query, candidates, before=before if stored else None)
    about = {**scores.settings, "losses_before": "stored" if stored else "computed",
             "reevaluated": len(candidates)}  # fmt: skip
    return dataclasses.replace(scores, method="AbU, forward", settings=about)


def gathered(index: Index, ids: Sequence[str]) -> tuple[EncodedDataset, np.ndarray | None]:
    """Returns some examples of an index, and their losses [n, views, draws] if it has them."""
    wanted = set(ids)
    latents, flipped, states, rows, losses, found = [], [], [], [], [], []
    for shard in index.shards():
        examples = index.examples(shard)
        places = [p for p, i in enumerate(examples.ids) if i in wanted]
        if not places:
            continue
        found += [examples.ids[p] for p in places]
        latents.append(examples.latents(places))
        if examples.has_flips:
            flipped.append(examples.latents(places, flipped=True))
        for p in places:
            count = examples.caption_counts[p]
            rows.append([len(states) + c for c in range(count)])
            states += [examples.text([p], c)[0] for c in range(count)]
        if "loss" in index.columns:
            losses.append(index.losses(shard)[places])
    missing = sorted(wanted - set(found))
    if missing:
        raise ValueError(f"candidate {missing[0]!r} is not in the index")
    data = EncodedDataset(
        found,
        torch.cat(latents),
        torch.stack(states),
        rows,
        torch.cat(flipped) if flipped else None,
    )
    if not losses:
        return data.select(ids), None
    order = [found.index(i) for i in ids]
    return data.select(ids), torch.cat(losses).numpy()[order]
