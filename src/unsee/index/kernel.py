"""The kernel of sketched gradients, for TRAK: fitted once, for any ridge."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..tensor_files import DamagedFile, read_tensors, write_tensors
from .factors import Measure
from .sketch import dequantise_rows

if TYPE_CHECKING:
    from .index import Index

FIT_EXAMPLES = 4096
"""The kernel is of at most this many examples, spread over the index; eigenvectors take their
square. Each then stands for several."""

AT_ONCE = 256
"""Rows that are float64 at the same time."""


@dataclass(frozen=True)
class SketchKernel:
    """Inner products of the rows of n examples, as eigenvectors.

    Attributes:
        rows: [n] int64, which examples of the index they are.
        vectors: [n, n] float64, in columns. In float32 a small ridge would drown in their rounding.
        values: [n] float64, not negative.
        share: how many examples of the index each of the n stands for.
    """

    rows: Tensor
    vectors: Tensor
    values: Tensor
    share: float

    def precondition(self, sketched: Tensor, asked: Tensor, ridge: float) -> Tensor:
        """Returns (ΦᵀΦ + λI)⁻¹φ of queries, with Φ the rows that it was fitted on, `share` times.

        The F by F matrix is never formed: with the n by n kernel K = ΦΦᵀ it is
        (φ - Φᵀ(K + λI)⁻¹Φφ) / λ.

        Args:
            sketched: [n, F] float32, the rows that it was fitted on.
            asked: [Q, F] float64, the queries' φ.
            ridge: λ relative to the mean squared length of a row.

        Returns:
            [Q, F] float64.

        Raises:
            ValueError: the ridge is not positive.
        """
        absolute = self._absolute(ridge)
        parts = sketched.split(AT_ONCE)
        products = torch.cat([part.double() @ asked.T for part in parts])  # [n, Q]
        weights = self.vectors.T @ products / (self.share * self.values + absolute)[:, None]
        solved = (self.share * (self.vectors @ weights)).split(AT_ONCE)
        explained = torch.zeros_like(asked.T)
        for part, s in zip(parts, solved, strict=True):
            explained += part.double().T @ s
        return (asked - explained.T) / absolute

    def leverage(self, ridge: float) -> Tensor:
        """Returns [n] float64 in [0, 1): how much of a row's own gradient its own term explains.

        For a row ψ of Φ it is share · ψ(ΦᵀΦ + λI)⁻¹ψ. Without the row in Φ its products with
        preconditioned queries are 1 / (1 - leverage) times as large (Sherman and Morrison, 1950).
        """
        scaled = self.share * self.values
        return self.vectors.square() @ (scaled / (scaled + self._absolute(ridge)))

    def _absolute(self, ridge: float) -> float:
        if not ridge > 0:
            raise ValueError(f"trak: ridge = {ridge} must be positive")
        return ridge * float(self.values.mean())

    def save(self, path: Path) -> None:
        """Writes safetensors."""
        tensors = {"rows": self.rows, "vectors": self.vectors, "values": self.values}
        write_tensors(path, tensors, {"share": self.share})

    @classmethod
    def load(cls, path: Path) -> SketchKernel:
        """Reads what `save` wrote.

        Raises:
            ValueError: the file is damaged, or of another kind.
        """
        try:
            tensors, about = read_tensors(path)
            return cls(**tensors, share=about["share"])
        except (DamagedFile, KeyError, TypeError) as error:
            again = "delete it, it is fitted again"
            raise ValueError(f"{path} is damaged ({error}): {again}") from None


def sketched_rows(index: Index, measure: Measure, rows: Tensor) -> Tensor:
    """Returns [n, F] float32 of some examples: means of both halves."""
    wanted, found, first = set(rows.tolist()), [], 0
    for shard in index.shards():
        stored = index.sketches(measure, shard)
        places = [p for p in range(len(stored.values)) if first + p in wanted]
        first += len(stored.values)
        if places:
            found.append(dequantise_rows(stored.select(places)).mean(1))
    return torch.cat(found)


def fit_kernel(index: Index, measure: Measure) -> SketchKernel:
    """Fits the kernel; see `Index.kernel`.

    Raises:
        ValueError: no example, or all gradients are zero.
    """
    index.sketch_of(measure)
    total = len(index.ids)
    if not total:
        raise ValueError(f"index {str(index.path)!r}: there is no example to fit a kernel on")
    places = np.linspace(0, total - 1, min(total, FIT_EXAMPLES)).round().astype(np.int64)
    rows = torch.from_numpy(places)
    sketched = sketched_rows(index, measure, rows)
    products = torch.cat([sketched.double() @ p.double().T for p in sketched.split(AT_ONCE)], dim=1)
    values, vectors = torch.linalg.eigh(products)
    if not values[-1] > 0:
        raise ValueError(
            f"index {str(index.path)!r}: all gradients of {measure!r} are zero in the parameters "
            "of its sketch: choose others that the model uses (--sketch-parameters)"
        )
    return SketchKernel(rows, vectors.contiguous(), values.clamp_min(0), total / len(rows))
