"""Writes examples in the image folder convention, which `load_dataset("imagefolder")` reads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from ..files import write_atomically
from .dataset import ImageDataset


def write_image_folder(data: ImageDataset, folder: Path) -> None:
    """Writes pictures, byte for byte, and `metadata.jsonl` with ids, captions and metadata.

    The pictures are copies named by number: whoever reads the folder may change it. Its
    `metadata.jsonl` is written last; a folder that has one is complete.

    Args:
        data: the examples; an id is a column of its own, so that it stays what it is.
        folder: is made, and pictures in it are written over.

    Raises:
        ValueError: a picture's file is missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, (identifier, captions) in enumerate(zip(data.ids, data.captions, strict=True)):
        record = data.table[number]["image"]
        name = f"{number:06d}{Path(record['path'] or '').suffix or '.png'}"
        if record["bytes"] is not None:
            (folder / name).write_bytes(record["bytes"])
        else:
            try:
                shutil.copy2(record["path"], folder / name)  # with its time: caches go by it
            except OSError as error:
                raise ValueError(
                    f"image {identifier} of {data.name}: cannot be copied ({error})"
                ) from None
        text = captions[0] if len(captions) == 1 else list(captions)
        row = {**data.metadata(number), "file_name": name, "id": identifier, "text": text}
        lines.append(json.dumps(row, ensure_ascii=False, default=str) + "\n")
    content = "".join(lines)
    write_atomically(
        folder / "metadata.jsonl", lambda path: path.write_text(content, encoding="utf-8")
    )
