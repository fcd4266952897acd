"""What every attribution method returns and offers."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..files import write_atomically
from ..query import Query

if TYPE_CHECKING:
    from PIL import Image

    from ..data.dataset import ImageDataset


@dataclass(frozen=True)
class Scores:
    """Attribution scores of one query; higher means more influential.

    Attributes:
        ids: training examples.
        values: [len(ids)] float64; positive: without the example the query's loss would be higher
            (a proponent), negative: lower (an opponent).
        method: name of the method.
        settings: everything that fixes the scores, and what was measured on the way.
        query: what was attributed.
        errors: [len(ids)] float64, standard errors of the scores, where the method knows them:
            how far they would move with other timesteps and noise.
    """

    ids: list[str]
    values: np.ndarray
    method: str
    settings: dict[str, Any] = field(default_factory=dict)
    query: Query | None = None
    errors: np.ndarray | None = None

    def __post_init__(self) -> None:
        if len(self.ids) != len(self.values):
            raise ValueError(f"scores: {len(self.ids)} ids but {len(self.values)} values")
        if self.errors is not None and len(self.errors) != len(self.values):
            raise ValueError(f"scores: {len(self.values)} values but {len(self.errors)} errors")
        if not np.isfinite(self.values).all():
            bad = self.ids[int(np.flatnonzero(~np.isfinite(self.values))[0])]
            raise ValueError(f"scores: the score of {bad!r} is not finite")

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def order(self) -> np.ndarray:
        """Positions from most to least influential; ties keep the order of `ids`."""
        return np.argsort(-self.values, kind="stable")

    def top(self, k: int) -> Scores:
        """Returns the `k` most influential examples, most influential first."""
        return self._take(self.order[:k])

    def bottom(self, k: int) -> Scores:
        """Returns the `k` least influential examples, least influential first."""
        return self._take(self.order[::-1][:k])

    def rank_of(self, example_id: str) -> int:
        """Returns the rank of an example; 1 is the most influential.

        Raises:
            ValueError: the example has no score.
        """
        if example_id not in self.ids:
            raise ValueError(f"scores: no example {example_id!r}")
        return int(np.flatnonzero(self.order == self.ids.index(example_id))[0]) + 1

    def _take(self, positions: np.ndarray) -> Scores:
        ids = [self.ids[i] for i in positions]
        errors = None if self.errors is None else self.errors[positions]
        return Scores(ids, self.values[positions], self.method, self.settings, self.query, errors)

    def show(self, data: ImageDataset, path: str | Path | None = None) -> Image.Image:
        """Returns a contact sheet (a PIL image) of these examples; writes it if `path` is given."""
        from ..report import contact_sheet

        sheet = contact_sheet(self, data)
        if path is not None:
            sheet.save(path)
        return sheet

    def save(self, path: str | Path) -> None:
        """Writes ids, scores and ranks as Parquet, most influential first.

        The method and its settings are in the file's metadata.
        """
        order = self.order
        columns = {
            "id": [self.ids[i] for i in order],
            "score": self.values[order],
            "rank": np.arange(1, len(order) + 1),
        }
        if self.errors is not None:
            columns["error"] = self.errors[order]
        table = pa.table(columns)
        about = {"method": self.method, "settings": self.settings}
        table = table.replace_schema_metadata({"unsee": json.dumps(about)})
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(Path(path), lambda temporary: pq.write_table(table, temporary))

    @classmethod
    def load(cls, path: str | Path) -> Scores:
        """Reads what `save` wrote.

        Raises:
            ValueError: no such file, or not a score file.
        """
        if not Path(path).is_file():
            raise ValueError(f"scores {str(path)!r}: no such file")
        try:
            table = pq.read_table(path)
        except (pa.ArrowInvalid, OSError) as error:
            raise ValueError(f"scores {str(path)!r}: cannot be read ({error})") from None
        try:
            about = json.loads((table.schema.metadata or {}).get(b"unsee", b"{}"))
            ids = table["id"].cast(pa.string()).to_pylist()
            values = table["score"].cast(pa.float64()).to_numpy()
            errors = None
            if "error" in table.column_names:
                errors = table["error"].cast(pa.float64()).to_numpy()
            method, settings = about["method"], about["settings"]
        except (KeyError, TypeError, ValueError, pa.ArrowNotImplementedError):
            raise ValueError(f"scores {str(path)!r}: not a score file of unsee") from None
        if len(set(ids)) < len(ids):
            twice = next(i for i, n in Counter(ids).items() if n > 1)
            raise ValueError(f"scores {str(path)!r}: {twice!r} has two scores")
        try:
            return cls(ids, values, method, settings, errors=errors)
        except ValueError as error:
            raise ValueError(f"scores {str(path)!r}: {error}") from None


class Attributor(Protocol):
    """A method: (what it was built on, query) -> scores, higher is more influential."""

    def attribute(self, query: Query, candidates: Sequence[str] | None = None) -> Scores:
        """Scores every training example, or only the candidates."""
        ...
