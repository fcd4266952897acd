"""Columns of an index, as they are read: checked, and kept in memory while there is room."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..data.latents import EncodedDataset
from .components import Components
from .examples import unpack_examples
from .factors import Measure
from .layout import AGAIN, Manifest, Shard, read_shard, rows_key, shard_path
from .sketch import Sketch, StoredRows

MEMORY_BYTES = 500_000_000
"""Of shards that are kept after they were read."""


def rows_of(tensors: Mapping[str, Tensor]) -> int:
    """Returns how many examples the tensors of a shard are of."""
    # Of gradients, an example has several components, and a count.
    return len(tensors["counts"] if "counts" in tensors else next(iter(tensors.values())))


class Columns:
    """What lies in an index, column by column and shard by shard.

    Attributes:
        path: folder of the index.
        manifest: what fixes its numbers.
        rows: number of a shard -> ids of its examples, by the table.
    """

    def __init__(self, path: Path, manifest: Manifest, rows: Mapping[int, Sequence[str]]) -> None:
        self.path, self.manifest, self.rows = path, manifest, rows
        self._memory: dict[tuple[str, str], tuple[dict[str, Tensor], dict[str, Any]]] = {}

    @property
    def columns(self) -> list[str]:
        """Names of the columns."""
        return list(self.manifest.settings["columns"])

    @property
    def nbytes(self) -> dict[str, int]:
        """Column -> bytes of its files."""
        return {
            c: sum(shard_path(self.path, c, s).stat().st_size for s in self.manifest.shards)
            for c in self.columns
        }

    def shards(self) -> Iterator[Shard]:
        """Iterates over the shards that hold an example, in the order of `ids`.

        One whose pictures cannot be read, or were all deleted, has no rows, nor knows their width.
        """
        return (shard for shard in self.manifest.shards if self.rows[shard.number])

    def examples(self, shard: Shard) -> EncodedDataset:
        """Returns the encoded examples of a shard."""
        return unpack_examples(*self._column("examples", shard))

    def text(self, shard: Shard) -> Tensor:
        """Returns the text states [captions, T, width] float32 of a shard's examples."""
        return self._column("examples", shard)[0]["text"]

    def losses(self, shard: Shard) -> Tensor:
        """Returns the losses [n, views, draws] float64 of a shard's examples."""
        return self._column("loss", shard)[0]["values"]

    def components(self, column: str, shard: Shard) -> Components:
        """Returns the gradients of a shard's examples, as stored.

        Raises:
            ValueError: the index does not have the column.
        """
        self.require(column)
        return Components.of(self._column(column, shard)[0])

    def features(self, encoder: str, shard: Shard) -> Tensor:
        """Returns what an encoder saw, [n, F] float16 of length 1, of a shard's examples.

        Raises:
            ValueError: the index does not have the column, or not of this encoder.
        """
        self.require("features")
        rows = self._column("features", shard)[0]
        if encoder not in rows:
            raise ValueError(
                f"index {str(self.path)!r}: it has no encoder {encoder!r}, only {', '.join(rows)}"
            )
        return rows[encoder]

    def sketches(self, measure: Measure, shard: Shard) -> StoredRows:
        """Returns a shard's sketched gradients, as stored.

        Raises:
            ValueError: the index does not have the column, or not of this measure.
        """
        self.sketch_of(measure)
        found = self._column("sketch", shard)[0]
        return StoredRows(found[measure], found[f"{measure}.scales"])

    def sketch_of(self, measure: Measure | None = None) -> Sketch:
        """Returns what the column `sketch` holds.

        Raises:
            ValueError: the index does not have the column, or not of this measure.
        """
        self.require("sketch")
        sketch = Sketch.of(self.manifest.settings["sketch"])
        if measure is not None and measure not in sketch.measures:
            raise ValueError(
                f"index {str(self.path)!r}: its sketch is not of the measure {measure!r}, only of "
                f"{', '.join(sketch.measures)}"
            )
        return sketch

    def require(self, column: str) -> None:
        """Refuses a column that the index does not have.

        Raises:
            ValueError: it does not.
        """
        if column not in self.columns:
            raise ValueError(
                f"index {str(self.path)!r}: it has no column {column!r}, only "
                f"{', '.join(self.columns)}; build another with it"
            )

    def _column(self, column: str, shard: Shard) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Reads a shard, or finds it in memory: what is read often is read, and checked, once."""
        key = column, shard.name
        if key in self._memory:
            self._memory[key] = self._memory.pop(key)  # the last used is forgotten last
            return self._memory[key]
        found = read_shard(self.path, self.manifest, column, shard)
        self._check_rows(column, shard, *found)
        self._memory[key] = found
        kept = [tensors for tensors, _ in self._memory.values()]
        sizes = [sum(t.nbytes for t in tensors.values()) for tensors in kept]
        while len(self._memory) > 1 and sum(sizes) > MEMORY_BYTES:
            self._memory.pop(next(iter(self._memory)))
            sizes.pop(0)
        return found

    def _check_rows(
        self, column: str, shard: Shard, tensors: dict[str, Tensor], about: dict[str, Any]
    ) -> None:
        """Refuses rows of other examples than the table has: each score would be a neighbour's."""
        ids = self.rows[shard.number]
        key, what = rows_key(ids), "examples" if column == "examples" else "rows"
        if column == "examples":
            count, said = len(about["ids"]), rows_key(about["ids"])
        else:  # earlier versions did not say which examples
            count, said = rows_of(tensors), about.get("rows", key)
        if (count, said) != (len(ids), key):
            file = shard_path(self.path, column, shard)
            raise ValueError(
                f"{file}: its {what} are {count} with the key {said}, those of the table are "
                f"{len(ids)} with the key {key}; {AGAIN}"
            )

    def warm(self, columns: Sequence[str]) -> None:
        """Reads columns before they are asked for, as far as the memory for them goes.

        Raises:
            ValueError: the index does not have one, or a shard is damaged.
        """
        room = MEMORY_BYTES
        for column in columns:
            self.require(column)
            for shard in self.shards():
                room -= shard_path(self.path, column, shard).stat().st_size
                if room < 0:
                    return
                self._column(column, shard)
