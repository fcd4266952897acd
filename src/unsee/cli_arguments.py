"""What several commands share: their texts, types of arguments, and how they open a data set."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .data.dataset import ImageDataset

DATA_HELP = (
    "training data: 'twemoji', 'twemoji-skin-tones' (with those variants), or a folder with "
    "metadata.jsonl (file_name, text)"
)
MODEL_HELP = "a diffusers pipeline: a folder, a hub id, or 'demo' for the model that ships"


def positive(text: str) -> int:
    """A whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def integers(text: str) -> tuple[int, ...]:
    """Whole numbers, separated by commas."""
    return tuple(positive(part) for part in text.split(","))


def box(text: str) -> tuple[int, int, int, int]:
    """x0,y0,x1,y1 in pixels."""
    try:
        x0, y0, x1, y1 = (int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not x0,y0,x1,y1 in pixels") from None
    return x0, y0, x1, y1


def open_data(name: str, skip_bad: bool = False) -> ImageDataset:
    """Opens DATA: one that ships with a package, or a folder."""
    from .data.dataset import load_dataset

    if name in ("twemoji", "twemoji-skin-tones"):
        return load_dataset("twemoji", skin_tones=name == "twemoji-skin-tones")
    return load_dataset("imagefolder", data_dir=name, on_error="skip" if skip_bad else "raise")


def quiet_loading() -> None:
    """Switches off the bars that other libraries show while they read weights."""
    import diffusers.utils.logging
    import transformers.utils.logging

    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.disable_progress_bar()
