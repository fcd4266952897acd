"""Similarity of embeddings: what a picture looks like, not what made it possible."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ..data.dataset import ImageDataset
from ..data.latents import EncodedExamples
from ..index.features import Encoders, pixels, query_features, reload_encoders
from ..index.index import Index
from ..index.rows import scan_rows
from ..models.kernels import exact_kernels
from ..query import Query
from .base import Scores
from .indexed import rows_of

Feature = Literal["latent", "pixel", "text"]


@dataclass(frozen=True)
class Similarity:
    """Cosine of what an encoder sees of an example and of the query; higher is more similar.

    From the column `features` of an index. Of several captions, the mean of their text states
    counts; of mirrored views, none.

    Attributes:
        index: of the training data.
        encoder: `latent`, `text` or `pixel`, or the folder of a vision model of transformers: one
            that the index was built with.
    """

    index: Index
    encoder: str = "latent"

    def __post_init__(self) -> None:
        self.index.require("features")
        known = self.index.manifest.settings["encoders"]
        if self.name not in known:
            raise ValueError(
                f"index {str(self.index.path)!r}: it has no encoder {self.name!r}, only "
                f"{', '.join(known)}; build another with it"
            )

    @property
    def name(self) -> str:
        """The encoder's name in the index."""
        return Path(self.encoder).resolve().name

    @cached_property
    def _encoders(self) -> Encoders:
        known = self.index.manifest.settings["encoders"]
        device = self.index.model.device
        return reload_encoders({self.name: known[self.name]}, [self.encoder], device)

    def attribute(self, query: Query, candidates: Sequence[str] | None = None) -> Scores:
        """Scores every example, or the candidates; see `attribute_many`."""
        return self.attribute_many([query], candidates)[0]

    @exact_kernels()
    def attribute_many(
        self, queries: Sequence[Query], candidates: Sequence[str] | None = None
    ) -> list[Scores]:
        """Scores several queries in one pass over the column.

        Returns:
            For each query, scores in [-1, 1] in the order of `index.ids` or of the candidates.

        Raises:
            ValueError: there is no query, one asks about a box, an unknown candidate, or the
                encoder is not what it was.
        """
        if not queries:
            raise ValueError("there is no query")
        for query in queries:
            if query.mask is not None:
                raise ValueError(
                    f"query {query.id!r}: similarity compares whole pictures; ask without a box"
                )
        started = time.monotonic()
        index, name = self.index, self.name
        chosen = rows_of(index.ids, candidates)
        asked = query_features(name, self._encoders[name], queries).to(index.model.device)
        encoded = time.monotonic()
        found = [np.zeros((0, len(queries)))]
        for shard in index.shards():
            rows = index.features(name, shard)
            if len(rows):  # not all deleted
                found.append(scan_rows(rows, asked).double().cpu().numpy())
        values = np.concatenate(found)[chosen]  # [n, Q]
        about = {
            "encoder": name, "fingerprint": index.manifest.settings["encoders"][name],
            "index": str(index.path),
            "seconds": {"encode the query": encoded - started,
                        "scan": time.monotonic() - encoded},
        }  # fmt: skip
        ids = [index.ids[row] for row in chosen]
        return [
            Scores(ids, values[:, i], f"similarity, {name}", dict(about), query)
            for i, query in enumerate(queries)
        ]


def similarity_scores(
    feature: Feature, data: EncodedExamples, images: ImageDataset, queries: Sequence[Query]
) -> np.ndarray:
    """Scores examples by the cosine of a feature with the query's.

    Args:
        feature: `latent`: of the autoencoder; `pixel`: RGB at 32x32, less white, which most
            pictures have in common; `text`: the caption's text state, averaged over tokens (the
            best of an example's captions).
        data: encoded examples.
        images: the same examples as pictures.
        queries: what is asked about.

    Returns:
        [N, Q] float64 in [-1, 1]; higher is more similar.
    """
    rows = list(range(len(data.ids)))
    if feature == "latent":
        return _cosines(data.latents(rows), torch.stack([q.latents for q in queries]))
    if feature == "pixel":
        ours = torch.stack([pixels(images[r].image) for r in rows])
        return _cosines(ours, torch.stack([pixels(q.image) for q in queries]))
    asked = torch.stack([q.text.mean(0) for q in queries])
    best = np.full((len(rows), len(queries)), -np.inf)
    for caption in range(max(data.caption_counts)):
        have = [r for r in rows if data.caption_counts[r] > caption]
        best[have] = np.maximum(best[have], _cosines(data.text(have, caption).mean(1), asked))
    return best


def _cosines(examples: Tensor, queries: Tensor) -> np.ndarray:
    a, b = (
        torch.nn.functional.normalize(x.flatten(1).double(), dim=1) for x in (examples, queries)
    )
    return (a @ b.T).numpy()
