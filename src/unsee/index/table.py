"""The table of an index's examples: ids, captions and metadata, in examples.parquet."""

from __future__ import annotations

import json
import logging
import zlib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..data.dataset import ImageDataset
from ..files import write_atomically
from .examples import Indexed
from .layout import Manifest, read_shard, remove_curvature, shard_path

logger = logging.getLogger(__name__)


def write_table(path: Path, manifest: Manifest, data: Indexed | None = None) -> None:
    """Writes the table from the shards; what `data` does not tell is kept from before."""
    rows: list[dict[str, Any]] = []
    for shard in manifest.shards:
        about = read_shard(path, manifest, "examples", shard)[1]
        rows += [{"id": i, "shard": shard.number} for i in about["ids"]]
    file = path / "examples.parquet"
    known: dict[str, dict[str, Any]] = {}
    if file.is_file():
        before, said = _read(file)
        known = {row["id"]: row for row in before.to_pylist()}
        if said["parts"] == len(manifest.parts) and list(known) != [row["id"] for row in rows]:
            remove_curvature(path)  # of other rows, though the manifest is the same
    if isinstance(data, ImageDataset):
        at = {identifier: position for position, identifier in enumerate(data.ids)}
        for row in rows:
            if row["id"] in at:
                position = at[row["id"]]
                known[row["id"]] = {
                    **data.metadata(position), "captions": list(data.captions[position])
                }  # fmt: skip
    merged = [{**known.get(row["id"], {}), **row} for row in rows]
    names = dict.fromkeys(["id", "captions", "shard", *(n for row in merged for n in row)])
    table = pa.table({name: [row.get(name) for row in merged] for name in names})
    about = {"parts": len(manifest.parts), "crc32": _checksum([row["id"] for row in merged])}
    table = table.replace_schema_metadata({"unsee": json.dumps(about)})
    write_atomically(file, lambda p: pq.write_table(table, p, write_page_checksum=True))


def read_ids(path: Path, manifest: Manifest) -> list[str] | None:
    """Returns the ids of the examples, in the order of the rows; None where some are to come.

    Raises:
        ValueError: the table is damaged.
    """
    rows = read_rows(path, manifest)
    return None if rows is None else [i for s in manifest.shards for i in rows[s.number]]


def read_rows(path: Path, manifest: Manifest) -> dict[int, list[str]] | None:
    """Returns number of a shard -> ids of its examples; None where some are to come.

    Raises:
        ValueError: the table is damaged.
    """
    file = path / "examples.parquet"
    if not file.is_file():
        return None
    table, about = _read(file, ["id", "shard"])
    ids = table["id"].to_pylist()
    if about["crc32"] != _checksum(ids):
        raise _damaged(file, f"its checksum is {_checksum(ids)}, not {about['crc32']}")
    if about["parts"] != len(manifest.parts):
        return None
    rows: dict[int, list[str]] = {shard.number: [] for shard in manifest.shards}
    # A deletion that was killed may have left rows behind.
    gone = set(manifest.deleted)
    for identifier, number in zip(ids, table["shard"].to_pylist(), strict=True):
        if number not in rows:
            raise _damaged(file, f"it has a row of shard {number!r}, which there is not")
        if identifier not in gone:
            rows[number].append(identifier)
    return rows


def settled(path: Path, manifest: Manifest) -> Manifest:
    """Returns what is complete of an index: all of it, or what it was before an addition."""
    last = len(manifest.parts) - 1
    if not last:
        return manifest
    if (file := path / "examples.parquet").is_file():
        whole = _read(file, ["id"])[1]["parts"] == len(manifest.parts)
    else:  # lost: the shards are the whole truth
        added = [s for s in manifest.shards if s.part == last]
        columns = manifest.settings["columns"]
        whole = all(shard_path(path, c, s).is_file() for c in columns for s in added)
    return manifest if whole else manifest.without_last_part()


def finished(path: Path, manifest: Manifest) -> Manifest:
    """Returns what `settled` does, with a warning where it is not all of the index."""
    before = settled(path, manifest)
    if before is not manifest:
        last = manifest.parts[-1]
        logger.warning(
            "index %r: adding %r (%d examples) was not finished, and the index is as it was "
            "before; append the same examples again", str(path), last.name, last.count,
        )  # fmt: skip
    return before


def _checksum(ids: list[str]) -> int:
    return zlib.crc32(json.dumps(ids).encode())


def _read(file: Path, columns: list[str] | None = None) -> tuple[pa.Table, dict[str, int]]:
    try:
        table = pq.read_table(file, columns=columns, page_checksum_verification=True)
        about = json.loads((table.schema.metadata or {})[b"unsee"])
        return table, {name: about[name] for name in ("parts", "crc32")}
    except (pa.ArrowException, OSError, ValueError, LookupError, TypeError) as error:
        raise _damaged(file, repr(error).splitlines()[0]) from None


def _damaged(file: Path, why: str) -> ValueError:
    return ValueError(f"{file} is damaged ({why}): delete it and run the same `unsee index` again")
