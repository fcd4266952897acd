"""What an index holds, in lines for a person."""

from __future__ import annotations

from pathlib import Path

from .build import COLUMNS
from .layout import read_manifest, shard_path
from .table import read_ids


def describe_index(path: Path) -> list[str]:
    """Returns lines for a person: what is done, how large it is, and what it can answer.

    Raises:
        ValueError: no index there.
    """
    manifest = read_manifest(path)
    settings, total = manifest.settings, len(manifest.shards)
    ids = read_ids(path, manifest)
    planned = sum(p.count for p in manifest.parts) - len(manifest.deleted)
    examples = planned if ids is None else len(ids)  # unreadable pictures may be left out
    lines = [
        f"index of {', '.join(p.name for p in manifest.parts)}: {examples} examples, "
        f"{len(manifest.deleted)} deleted",
        f"model {settings['model']}, {len(settings['layers'])} layers, "
        f"{settings['draws']['n']} draws, {settings['views']} views, stored as "
        f"{settings['storage']}" + "".join(f", encoder {e}" for e in settings.get("encoders", ())),
    ]
    if sketch := settings.get("sketch"):
        chosen = sketch["parameters"]
        where = chosen if isinstance(chosen, str) else ", ".join(chosen)
        lines.append(
            f"sketch of {sketch['length']} numbers of {', '.join(sketch['measures'])} in {where} "
            f"({sketch['weights']} weights)"
        )
    for column in settings["columns"]:
        files = [f for s in manifest.shards if (f := shard_path(path, column, s)).is_file()]
        size = sum(f.stat().st_size for f in files)
        lines.append(
            f"{column}: {len(files)} of {total} shards, {size / 1e6:.1f} MB, "
            f"{size / max(examples, 1) / 1e3:.1f} kB an example; {COLUMNS[column]}"
        )
    return lines
