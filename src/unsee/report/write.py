"""The files that one attribution leaves behind."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pyarrow as pa
import pyarrow.parquet as pq

from ..data.dataset import ImageDataset
from ..files import write_atomically
from ..methods.base import Scores
from .page import render_page
from .sheet import contact_sheet


def write_report(
    scores: Scores,
    data: ImageDataset,
    directory: Path,
    *,
    top: int = 10,
    timings: dict[str, float] | None = None,
    notes: list[str] | None = None,
    floor: float | None = None,
) -> dict[str, Path]:
    """Writes every score, a contact sheet, the picture and a page; the scores first.

    Args:
        scores: every score of one query.
        data: the training examples that were scored.
        directory: where the files go; made if it is not there.
        top: how many examples the sheet and the page show.
        timings: seconds of each step of the whole run.
        notes: sentences for the reader of the page.
        floor: rounding moves a score by up to this much; from the settings by default.

    Returns:
        `"scores"` (scores.parquet, which `Scores.load` reads), `"sheet"` (contact-sheet.png),
        `"query"` (query.png, the picture as it is; only where the query is known) and `"page"`
        (report.html).

    Raises:
        ValueError: a scored example that `data` lacks, or `top` below 1.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    paths = {"scores": directory / "scores.parquet"}
    write_atomically(paths["scores"], lambda path: _save_scores(scores, data, path))
    page = render_page([scores], data, top=top, timings=timings, notes=notes, floor=floor)
    sheet = contact_sheet(scores.top(top), data)
    paths["sheet"] = directory / "contact-sheet.png"
    write_atomically(paths["sheet"], lambda path: sheet.save(path, format="PNG"))
    if scores.query is not None:
        picture = scores.query.image
        paths["query"] = directory / "query.png"
        write_atomically(paths["query"], lambda path: picture.save(path, format="PNG"))
    paths["page"] = directory / "report.html"
    write_atomically(paths["page"], lambda path: _write_text(path, page))
    return paths


def _save_scores(scores: Scores, data: ImageDataset, path: Path) -> None:
    """Writes what `Scores.save` writes, with captions and metadata as further columns."""
    scores.save(path)
    table = pq.read_table(path)
    about = table.schema.metadata
    position = {identifier: i for i, identifier in enumerate(data.ids)}
    ids = table["id"].to_pylist()
    unknown = [i for i in ids if i not in position]
    if unknown:
        raise ValueError(
            f"report: the scored example {unknown[0]!r} is not in data set {data.name!r}; give the "
            "data set that the scores were computed on"
        )
    rows = data.table.remove_columns(["id", "image"]).select([position[i] for i in ids])
    columns = cast(pa.Table, rows.with_format("arrow")[:])
    for name in ["captions", *(n for n in columns.column_names if n != "captions")]:
        # A data set may have columns named as ours are.
        free = name
        while free in table.column_names:
            free = f"metadata_{free}"
        table = table.append_column(free, columns[name])
    pq.write_table(table.replace_schema_metadata(about), path)


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
