"""Tensors in a safetensors file that knows when it is damaged."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, uint8

from .files import write_atomically


class DamagedFile(ValueError):
    """A file that is cut short, changed, or of another kind; its text says how it was seen."""


def write_tensors(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Writes tensors, whole or not at all, with what `about` says and a checksum of both.

    Of the same content, the file is the same to the last byte.
    """
    found = {n: t.detach().cpu().contiguous() for n, t in tensors.items()}
    # One entry: safetensors writes several in any order.
    text = {"unsee": json.dumps({**about, "crc32": checksum(about, found)})}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda p: save_file(found, p, metadata=text))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns the tensors of a file, and what was said about them; every byte is checked.

    Raises:
        FileNotFoundError: there is none.
        DamagedFile: it is not what `write_tensors` wrote.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            about = json.loads((file.metadata() or {})["unsee"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        crc32 = about.pop("crc32")
    except FileNotFoundError:
        raise
    except (OSError, SafetensorError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise DamagedFile(repr(error)) from None
    if checksum(about, tensors) != crc32:
        raise DamagedFile(f"its checksum is {checksum(about, tensors)}, not {crc32}")
    return tensors, about


def checksum(about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Returns the CRC-32 of tensors and of what is said about them, in hexadecimal."""
    total = zlib.crc32(json.dumps(about, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        total = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), total)
        total = zlib.crc32(cast(Any, tensor.flatten().view(uint8).numpy()), total)
    return f"{total:08x}"
