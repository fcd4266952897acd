"""How an index lies on disk; nothing else knows.

    manifest.json                      what the index is of, and the list of its shards
    examples.parquet                   one row for each example, with captions and metadata
    columns/<name>/00012.safetensors   one shard of one column
    curvature/<name>-<hash of the rows>.safetensors

A shard is done when its final name exists. The manifest alone says which shards belong to the
index: rows are deleted by writing new shards first, then the manifest, then removing the old ones.
Of the same content, every file is the same to the last byte.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import secrets
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..files import write_atomically
from ..tensor_files import DamagedFile, read_tensors, write_tensors

SCHEMA = 3

AGAIN = "delete it and run the same `unsee index` again"


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
        edition: 0 in the first data set; otherwise, and where rows were deleted, a number made of
            the rows, so that files of other rows have another name.
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
    def content(self) -> str:
        """A hash of the settings and of which rows there are."""
        about = dataclasses.asdict(self)
        return _hash([self.settings, about["parts"], about["shards"]])

    def key_of(self, shard: Shard) -> str:
        """A hash of what fixes the content of a shard, which each of its files carries."""
        part = self.parts[shard.part]
        about = [part.fingerprint, part.count, dataclasses.asdict(shard)]
        return f"{_hash(self.settings)}-{_hash(about)}"

    def number_of(self, part: Part, path: Path) -> int:
        """Returns which of the data sets a part is.

        Raises:
            ValueError: none of them.
        """
        for number, known in enumerate(self.parts):
            if (known.fingerprint, known.count) == (part.fingerprint, part.count):
                return number
        was = self.parts[0]
        raise ValueError(
            f"index {str(path)!r}: it is of the data set {was.name!r} ({was.count} "
            f"examples, fingerprint {was.fingerprint}), not of {part.name!r} "
            f"({part.count}, {part.fingerprint}): ids, captions or their order differ; "
            "use another folder, or Index.append for further examples"
        )

    def was_appended(self, part: Part) -> bool:
        """Whether a part is one of those behind the first."""
        return any((p.fingerprint, p.count) == (part.fingerprint, part.count)
                   for p in self.parts[1:])  # fmt: skip

    def without_last_part(self) -> Manifest:
        """Returns what the index was before the last data set was added."""
        last = len(self.parts) - 1
        shards = [s for s in self.shards if s.part < last]
        return dataclasses.replace(self, parts=self.parts[:-1], shards=shards)

    def check(self, settings: Mapping[str, Any], path: Path) -> None:
        """Refuses other settings.

        Raises:
            ValueError: names the first field that differs, and both values.
        """
        for name in {**self.settings, **settings}:
            asked = json.loads(json.dumps(settings.get(name)))
            where, here, asked = _difference(name, self.settings.get(name), asked)
            if here != asked:
                raise ValueError(
                    f"index {str(path)!r}: {where} is {json.dumps(here)} there, but "
                    f"{json.dumps(asked)} is asked for; use the same, or another folder"
                )


def _difference(name: str, here: Any, asked: Any) -> tuple[str, Any, Any]:
    """Returns the first field at or below `name` that differs, and both values."""
    fields: Iterable[tuple[str, Any, Any]] = ()
    if isinstance(here, dict) and isinstance(asked, dict):
        fields = ((f"{name}.{k}", here.get(k), asked.get(k)) for k in {**here, **asked})
    elif isinstance(here, list) and isinstance(asked, list):
        pairs = enumerate(itertools.zip_longest(here, asked))
        fields = ((f"{name}[{i}]", *pair) for i, pair in pairs)
    different = (_difference(*field) for field in fields if field[1] != field[2])
    return next(different, (name, here, asked))


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def write_manifest(path: Path, manifest: Manifest, before: Manifest | None = None) -> None:
    """Writes the manifest of the index at `path`.

    Args:
        path: of the index.
        manifest: what it is to be.
        before: what it was when it was read, if it is to be replaced only as such.

    Raises:
        ValueError: see `check_unchanged`.
    """
    text = _text_of(manifest)

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")
        if before is not None:
            check_unchanged(
                path, before
            )  # last: what happens between this and the renaming is lost

    write_atomically(path / "manifest.json", write)


def create_manifest(path: Path, manifest: Manifest) -> bool:
    """Writes the first manifest of an index; False where another writer was faster."""
    file = path / "manifest.json"
    whole = path / f".{file.name}.{os.getpid()}-{secrets.token_hex(4)}.part"
    write_atomically(whole, lambda p: p.write_text(_text_of(manifest), encoding="utf-8"))
    try:
        os.link(whole, file)  # unlike renaming, never over another
    except FileExistsError:
        return False
    except OSError:  # a file system without links
        if file.exists():
            return False
        os.replace(whole, file)
    finally:
        whole.unlink(missing_ok=True)
    return True


def check_unchanged(path: Path, before: Manifest) -> None:
    """Refuses to go on where another writer has changed the index since.

    Raises:
        ValueError: the manifest is another one than it was.
    """
    now = read_manifest(path)
    if now != before:
        raise ValueError(
            f"index {str(path)!r}: another process has changed it meanwhile (its content was "
            f"{before.content}, now it is {now.content}); nothing was changed here, run the same "
            "again"
        )


def _text_of(manifest: Manifest) -> str:
    about = dataclasses.asdict(manifest)
    return json.dumps({"schema": SCHEMA, "checksum": _hash(about), **about}, indent=1) + "\n"


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
        schema, checksum = about.pop("schema"), about.pop("checksum", None)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"index {str(path)!r}: manifest.json is damaged ({error!r}); restore it, or build "
            "again in another folder"
        ) from None
    if schema != SCHEMA:
        raise ValueError(
            f"index {str(path)!r}: its schema is {schema}, this version of unsee reads "
            f"{SCHEMA}; build it again, or use the version that wrote it"
        )
    if checksum != _hash(about):
        raise ValueError(
            f"index {str(path)!r}: manifest.json is damaged (its checksum is {_hash(about)}, not "
            f"{checksum}); restore it, or build again in another folder"
        )
    parts = [Part(**p) for p in about.pop("parts")]
    shards = [Shard(**s) for s in about.pop("shards")]
    return Manifest(**about, parts=parts, shards=shards)


def missing_shards(path: Path, manifest: Manifest) -> Counter[str]:
    """Returns how many files of columns are not there, by the name of the data set."""
    return Counter(
        manifest.parts[shard.part].name
        for column in manifest.settings["columns"]
        for shard in manifest.shards
        if not shard_path(path, column, shard).is_file()
    )


def shard_path(path: Path, column: str, shard: Shard) -> Path:
    """Returns where a shard of a column lies."""
    return path / "columns" / column / f"{shard.name}.safetensors"


def curvature_path(path: Path, manifest: Manifest, name: str) -> Path:
    """Returns where a curvature of just the rows of the index lies."""
    return path / "curvature" / f"{name}-{manifest.content}.safetensors"


def list_others(path: Path, manifest: Manifest) -> list[Path]:
    """Returns what is not of these rows: earlier shards, curvature, and parts of files."""
    columns = manifest.settings["columns"]
    kept = {shard_path(path, c, shard) for c in columns for shard in manifest.shards}
    other = [f for f in path.glob("columns/*/*") if f not in kept]
    other += [f for f in path.glob("curvature/*") if manifest.content not in f.name]
    return [*other, *(f for f in path.glob(".*.part") if f.is_file())]


def remove_files(files: Iterable[Path]) -> None:
    """Removes files, as far as they are still there."""
    for file in files:
        file.unlink(missing_ok=True)


def remove_curvature(path: Path) -> None:
    """Removes every curvature: it is fitted again when it is next needed."""
    remove_files(path.glob("curvature/*"))


def edition_of(rows: object) -> int:
    """Returns the edition of a shard, from what fixes its rows."""
    return int(_hash(rows)[:8], 16) or 1


def rows_key(ids: Sequence[str]) -> str:
    """Returns a hash of the examples of a shard, which each column keeps in its header."""
    return _hash(list(ids))


def write_shard(
    path: Path, manifest: Manifest, column: str, shard: Shard, tensors: Mapping[str, Tensor],
    about: Mapping[str, Any] | None = None,
) -> None:  # fmt: skip
    """Writes one shard of a column; `about` is kept in its header.

    In the column `examples` it has the `ids`, in all others their `rows_key` as `rows`.
    """
    header = {"manifest": manifest.key_of(shard), "column": column, "about": about or {}}
    write_tensors(shard_path(path, column, shard), tensors, header)


def read_shard(
    path: Path, manifest: Manifest, column: str, shard: Shard
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads one shard of a column and what its header says.

    Raises:
        ValueError: it is not there, damaged (every byte is checked), or of another index.
    """
    file = _present(path, column, shard)
    try:
        tensors, header = read_tensors(file)
    except DamagedFile as error:
        raise ValueError(f"{file} is damaged ({error}): {AGAIN}") from None
    return tensors, _checked(file, header, manifest.key_of(shard), column)


def read_header(
    path: Path, manifest: Manifest, column: str, shard: Shard
) -> tuple[dict[str, Any], int]:
    """Returns what the header of a shard says, and how many examples its tensors are of.

    The tensors are not read: quick, and nothing is known of damage to them.

    Raises:
        ValueError: it is not there, damaged, or of another index.
    """
    file = _present(path, column, shard)
    try:
        with safe_open(str(file), framework="pt") as opened:
            header = json.loads((opened.metadata() or {})["unsee"])
            names = list(opened.keys())
            name = "counts" if "counts" in names else names[0]  # examples have several components
            count = opened.get_slice(name).get_shape()[0]
    except (OSError, SafetensorError, ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{file} is damaged ({error!r}): {AGAIN}") from None
    return _checked(file, header, manifest.key_of(shard), column), count


def _present(path: Path, column: str, shard: Shard) -> Path:
    file = shard_path(path, column, shard)
    if not file.is_file():
        raise ValueError(f"{file}: no such shard; run the same `unsee index` again to continue")
    return file


def _checked(file: Path, header: dict[str, Any], expected: str, column: str) -> dict[str, Any]:
    """Returns what a header says of the rows, where it is the right one."""
    try:
        key, about, of = header["manifest"], header["about"], header["column"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged ({error!r}): {AGAIN}") from None
    if (key, of) != (expected, column):
        raise ValueError(
            f"{file} belongs to another index or place: its key is {key} of column {of!r}, that "
            f"of this place is {expected} of {column!r}; put the right one there, or {AGAIN}"
        )
    return about


class writing:
    """Turns what a file system refuses into one line that says what to do."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, OSError | SafetensorError):
            reason = getattr(error, "strerror", None) or error
            raise ValueError(
                f"index {str(self.path)!r} cannot be written ({reason}): make room or choose "
                "another folder, and run the same again; what is done is kept"
            ) from error
