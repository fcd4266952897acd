"""How an index lies on disk; nothing else knows.

    manifest.json                      what the index is of, and the list of its shards
    examples.parquet                   one row for each example, with captions and metadata
    columns/<name>/00012.safetensors   one shard of one column
    curvature/<name>.safetensors

A shard is done when its final name exists. The manifest alone says which shards belong to the
index: rows are deleted by writing new shards first, then the manifest, then removing the old ones.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..files import write_atomically

SCHEMA = 1


@dataclass(frozen=True)
class Part:
    """One data set that was indexed; the first is that of the build, others were appended.

    Attributes:
        name: of the data set.
        fingerprint: of its ids and captions (and latents, where it came encoded).
        count: of its examples.
    """

    name: str
    fingerprint: str
    count: int


@dataclass(frozen=True)
class Shard:
    """Examples `first` to `last` (excluded) of a part, in one file for each column.

    Attributes:
        number: of the shard; its position in the index.
        part: which data set.
        first, last: positions in that data set.
        edition: how often rows were deleted from it.
    """

    number: int
    part: int
    first: int
    last: int
    edition: int = 0

    @property
    def name(self) -> str:
        """File name without ending."""
        return f"{self.number:05d}" + (f".{self.edition}" if self.edition else "")


@dataclass(frozen=True)
class Manifest:
    """What an index is of.

    Attributes:
        settings: what fixes the numbers in its columns, field by field.
        environment: what they were computed with: device, versions. For the record, and to tell
            whether stored losses can be compared with new ones to the last digits.
        parts: data sets.
        shards: in order.
        deleted: ids that were deleted, and are not to come back.
    """

    settings: dict[str, Any]
    environment: dict[str, Any]
    parts: list[Part] = field(default_factory=list)
    shards: list[Shard] = field(default_factory=list)
    deleted: list[str] = field(default_factory=list)

    @property
    def key(self) -> str:
        """A hash of the settings, which every shard carries."""
        text = json.dumps(self.settings, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def check(self, settings: Mapping[str, Any], path: Path) -> None:
        """Refuses other settings.

        Raises:
            ValueError: names the first field that differs, and both values.
        """
        for name in {**self.settings, **settings}:
            here, asked = self.settings.get(name), json.loads(json.dumps(settings.get(name)))
            if here != asked:
                raise ValueError(
                    f"index {str(path)!r}: {name} is {_short(here)} there, but {_short(asked)} is "
                    "asked for; use the same, or another folder"
                )


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 120 else f"{text[:80]}... ({len(text)} characters)"


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Writes the manifest of the index at `path`."""
    about = {"schema": SCHEMA, **dataclasses.asdict(manifest)}
    text = json.dumps(about, indent=1) + "\n"
    write_atomically(path / "manifest.json", lambda p: p.write_text(text, encoding="utf-8"))


def read_manifest(path: Path) -> Manifest:
    """Reads the manifest of the index at `path`.

    Raises:
        ValueError: no index there, a damaged manifest, or one of another version.
    """
    file = path / "manifest.json"
    if not file.is_file():
        raise ValueError(
            f"index {str(path)!r}: no manifest.json there; build it with `unsee index`"
        )
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
        schema = about.pop("schema")
        if schema != SCHEMA:
            raise ValueError(
                f"index {str(path)!r}: its schema is {schema}, this version of unsee reads "
                f"{SCHEMA}; build it again, or use the version that wrote it"
            )
        parts = [Part(**p) for p in about.pop("parts")]
        shards = [Shard(**s) for s in about.pop("shards")]
        return Manifest(**about, parts=parts, shards=shards)
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"index {str(path)!r}: manifest.json is damaged ({error!r}); restore it, or build "
            "again in another folder"
        ) from None


def shard_path(path: Path, column: str, shard: Shard) -> Path:
    """Returns where a shard of a column lies."""
    return path / "columns" / column / f"{shard.name}.safetensors"


def write_shard(
    path: Path, column: str, shard: Shard, key: str, tensors: Mapping[str, Tensor],
    about: Mapping[str, Any] | None = None,
) -> None:  # fmt: skip
    """Writes one shard of a column; `about` is kept in its header, `key` is the manifest's."""
    tensors = {n: t.detach().cpu().contiguous() for n, t in tensors.items()}
    header = {
        "manifest": key, "column": column, "about": json.dumps(about or {}),
        "crc32": f"{_checksum(tensors):08x}",
    }  # fmt: skip
    file = shard_path(path, column, shard)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, lambda p: save_file(tensors, p, metadata=header))


def read_shard(
    path: Path, column: str, shard: Shard, key: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads one shard of a column and what its header says.

    Raises:
        ValueError: it is not there, damaged (every byte is checked), or of another index.
    """
    file = shard_path(path, column, shard)
    if not file.is_file():
        raise ValueError(f"{file}: no such shard; run the same `unsee index` again to continue")
    try:
        with safe_open(str(file), framework="pt") as opened:
            header = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        about, crc32 = json.loads(header["about"]), header["crc32"]
    except (OSError, SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{file} is damaged ({error!r}): delete it and run the same `unsee index` again"
        ) from None
    if header.get("manifest") != key:
        raise ValueError(
            f"{file} belongs to an index with other settings: its manifest is "
            f"{header.get('manifest')}, that of this index is {key}"
        )
    if f"{_checksum(tensors):08x}" != crc32:
        raise ValueError(
            f"{file} is damaged (its checksum is {_checksum(tensors):08x}, not {crc32}): delete "
            "it and run the same `unsee index` again"
        )
    return tensors, about


def _checksum(tensors: Mapping[str, Tensor]) -> int:
    total = 0
    for name in sorted(tensors):
        total = zlib.crc32(name.encode(), total)
        total = zlib.crc32(tensors[name].flatten().view(torch.uint8).numpy(), total)
    return total
