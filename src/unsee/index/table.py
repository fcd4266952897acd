"""The table of an index's examples: ids, captions and metadata, in examples.parquet."""

from __future__ import annotations

import json
import logging
import zlib
from pathlib import Path
from typing import cast

import pyarrow as pa
import pyarrow.parquet as pq

from ..data.dataset import ImageDataset
from ..data.metadata import of_one_type
from ..files import write_atomically
from .examples import Indexed
from .layout import Manifest, read_header, remove_curvature, shard_path

logger = logging.getLogger(__name__)

SHARD = "unsee_shard"
"""The column that says in which shard an example is."""

OWN = ("id", "captions", SHARD)


def write_table(path: Path, manifest: Manifest, data: Indexed | None = None) -> None:
    """Writes the table, where it is not as it should be.

    Args:
        path: of the index.
        manifest: of the index; its shards say which examples there are.
        data: their captions and metadata; what it does not tell is kept from before.
    """
    ids: list[str] = []
    shards: list[int] = []
    for shard in manifest.shards:
        here = read_header(path, manifest, "examples", shard)[0]["ids"]
        ids += here
        shards += [shard.number] * len(here)
    file = path / "examples.parquet"
    before, said = _read(file) if file.is_file() else (None, {})
    same = before is not None and said["parts"] == len(manifest.parts)
    if same and said["crc32"] != _checksum(ids):
        remove_curvature(path)  # of other rows, though the manifest is the same
    known = _known(ids, before, data)
    columns = {"id": pa.array(ids, pa.string()), "captions": known["captions"],
               SHARD: pa.array(shards, pa.int64())}  # fmt: skip
    columns |= {name: known[name] for name in known.column_names if name not in OWN}
    about = {"parts": len(manifest.parts), "crc32": _checksum(ids)}
    table = pa.table(columns)
    if before is None or said != about or not table.equals(before):
        write_atomically(file, lambda temporary: _write(temporary, table, about))


def _write(file: Path, table: pa.Table, about: dict[str, int]) -> None:
    # Without Arrow's own schema, which tells apart what was read before from what is new.
    with pq.ParquetWriter(
        file, table.schema, store_schema=False, write_page_checksum=True
    ) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({"unsee": json.dumps(about)})


def _known(ids: list[str], before: pa.Table | None, data: Indexed | None) -> pa.Table:
    """Returns captions and metadata of examples, in their order; of a data set before a table."""
    wanted, tables = set(ids), []
    if isinstance(data, ImageDataset):
        told = cast(pa.Table, data.table.remove_columns("image").with_format("arrow")[:])
        tables.append(
            told.replace_schema_metadata(None).filter(pa.array([i in wanted for i in data.ids]))
        )
        wanted -= set(data.ids)
    if before is not None:
        kept = before.filter(pa.array([i in wanted for i in before["id"].to_pylist()], pa.bool_()))
        if SHARD not in kept.column_names:  # of an earlier version, which called it so
            kept = kept.drop_columns("shard")
        tables.insert(0, kept)
    tables = [table for table in tables if len(table)]
    captions = pa.schema({"id": pa.string(), "captions": pa.list_(pa.string())})
    found = pa.concat_tables(
        [captions.empty_table(), *of_one_type(tables)], promote_options="default"
    )
    place = {identifier: row for row, identifier in enumerate(found["id"].to_pylist())}
    return found.take(pa.array([place.get(identifier) for identifier in ids], pa.int64()))


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
    table, about = _read(file, ["id", SHARD, "shard"])
    ids = table["id"].to_pylist()
    if about["crc32"] != _checksum(ids):
        raise _damaged(file, f"its checksum is {_checksum(ids)}, not {about['crc32']}")
    if about["parts"] != len(manifest.parts):
        return None
    rows: dict[int, list[str]] = {shard.number: [] for shard in manifest.shards}
    # A deletion that was killed may have left rows behind.
    gone = set(manifest.deleted)
    numbers = table[SHARD if SHARD in table.column_names else "shard"].to_pylist()
    for identifier, number in zip(ids, numbers, strict=True):
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
    """Returns the table, or those of the columns that it has, and what is said of it."""
    try:
        with pq.ParquetFile(file, page_checksum_verification=True) as opened:
            names = opened.schema_arrow.names
            table = opened.read(None if columns is None else [c for c in columns if c in names])
            about = json.loads((opened.metadata.metadata or {})[b"unsee"])
        if "id" not in names or not {SHARD, "shard"}.intersection(names):
            raise LookupError(f"it has no column 'id' or {SHARD!r}")
        return table.replace_schema_metadata(None), {
            name: about[name] for name in ("parts", "crc32")
        }
    except (pa.ArrowException, OSError, ValueError, LookupError, TypeError) as error:
        raise _damaged(file, repr(error).splitlines()[0]) from None


def _damaged(file: Path, why: str) -> ValueError:
    return ValueError(f"{file} is damaged ({why}): delete it and run the same `unsee index` again")
