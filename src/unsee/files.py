"""Files that are either whole or absent."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Callable
from pathlib import Path


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a file under a temporary name, syncs it, and renames it into place.

    Args:
        path: the final name; it exists only once the content is complete.
        write: writes the content to the path it is given.
    """
    # A name of its own, also among threads, and machines that share a file system.
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.part")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def settings_key(settings: dict[str, object]) -> str:
    """Returns a short hash of JSON-able settings, for the name of a cache folder."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[
        :12
    ]
