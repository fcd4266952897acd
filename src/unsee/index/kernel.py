"""The kernel of sketched gradients, for TRAK: fitted once, for any ridge."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..tensor_files import DamagedFile, read_tensors, write_tensors
from .factors import Measure
from .sketch import dequantise_rows

if TYPE_CHECKING:
    from .index import Index
    from .layout import Shard

FIT_EXAMPLES = 4096
"""The kernel is that of at most this many examples, in shards spread over the index; the others
count as if they were like them."""


@dataclass(frozen=True)
class SketchKernel:
    """Inner products of the rows of n examples, as eigenvectors.

    Attributes:
        vectors: [n, n] float32, in columns.
        values: [n] float64, not negative.
        share: how many examples of the index each of the n stands for.
        shards: names of the shards that they are.
    """

    vectors: Tensor
    values: Tensor
    share: float
    shards: list[str]

    def precondition(self, rows: Sequence[Tensor], asked: Tensor, ridge: float) -> Tensor:
        """Returns (ΦᵀΦ + λI)⁻¹φ of queries, with Φ the rows of the index.

        Φ itself is read, and the F by F matrix never formed: with the n by n kernel K = ΦΦᵀ it is
        (φ - Φᵀ(K + λI)⁻¹Φφ) / λ.

        Args:
            rows: [n_i, F] float32 of one shard after another, those that it was fitted on.
            asked: [Q, F] float64, the queries' φ.
            ridge: λ relative to the mean squared length of a row.

        Returns:
            [Q, F] float64.

        Raises:
            ValueError: the ridge is not positive, or all rows are zero.
        """
        if not ridge > 0:
            raise ValueError(f"trak: ridge = {ridge} must be positive")
        mean = float(self.values.sum()) / max(1, len(self.values))
        if not mean > 0:
            raise ValueError(
                "trak: all gradients of the index are zero: sketch parameters that the model uses"
            )
        absolute = ridge * mean
        products = torch.cat([r.double() @ asked.T for r in rows])  # [n, Q]
        vectors = self.vectors.double()
        weights = vectors.T @ products / (self.share * self.values + absolute)[:, None]
        solved = (self.share * (vectors @ weights)).split([len(r) for r in rows])
        explained = sum((r.double().T @ s for r, s in zip(rows, solved, strict=True)),
                        torch.zeros(()))  # fmt: skip
        return (asked - explained.T) / absolute

    def save(self, path: Path) -> None:
        """Writes safetensors."""
        about = {"share": self.share, "shards": self.shards}
        write_tensors(path, {"vectors": self.vectors, "values": self.values}, about)

    @classmethod
    def load(cls, path: Path) -> SketchKernel:
        """Reads what `save` wrote.

        Raises:
            ValueError: the file is damaged, or of another kind.
        """
        try:
            tensors, about = read_tensors(path)
            return cls(tensors["vectors"], tensors["values"], about["share"], about["shards"])
        except (DamagedFile, KeyError) as error:
            raise ValueError(
                f"{path} is damaged ({error}): delete it, it is fitted again"
            ) from None


def sample_rows(index: Index, measure: Measure, shards: Sequence[Shard]) -> Iterator[Tensor]:
    """Yields rows [n, F] float32 of one shard after another: means of both halves, as pictured."""
    for shard in shards:
        stored = index.sketches(measure, shard)
        if len(stored.values):  # not all deleted
            yield dequantise_rows(stored)[:, 0].mean(1)


def fit_kernel(index: Index, measure: Measure) -> SketchKernel:
    """Fits the kernel; see `Index.kernel`.

    Raises:
        ValueError: no example.
    """
    from .fit import spread

    shards = spread(index, FIT_EXAMPLES)
    rows = list(sample_rows(index, measure, shards))
    count = sum(len(r) for r in rows)
    if not count:
        raise ValueError(f"index {str(index.path)!r}: there is no example to fit a kernel on")
    products = torch.cat([torch.cat([a.double() @ b.double().T for b in rows], 1) for a in rows])
    values, vectors = torch.linalg.eigh(products)
    return SketchKernel(vectors.float().contiguous(), values.clamp_min(0), len(index.ids) / count,
                        [s.name for s in shards])  # fmt: skip
