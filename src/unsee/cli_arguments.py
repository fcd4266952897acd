"""What several commands share: their texts, types of arguments, and how they open a data set."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .data.dataset import ImageDataset
    from .models.base import Denoiser
    from .runs import Source

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
    from .runs import open_data

    return open_data(name, skip_bad)


def source_of(args: argparse.Namespace) -> Source:
    """Returns MODEL and DATA with their options."""
    from .runs import Source

    return Source(
        args.model, args.data, args.parameters, args.lora, args.dtype, args.skip_bad,
        weights=args.weights,
    )  # fmt: skip


def open_model_and_data(args: argparse.Namespace) -> tuple[Denoiser, ImageDataset]:
    """Opens MODEL and DATA; the cheap one first, so that a typo there costs nothing."""
    from .runs import open_model

    data = open_data(args.data, args.skip_bad)
    quiet_loading()
    return open_model(source_of(args), args.device), data


def add_model_options(command: argparse.ArgumentParser) -> None:
    """Adds what fixes the model, besides its name."""
    command.add_argument(
        "--parameters",
        default="cross-attn-kv",
        help="cross-attn-kv, cross-attn, attn, lora, all, or a pattern",
    )
    command.add_argument("--lora", help="LoRA weights to load on the model: a folder or a hub id")
    command.add_argument("--weights", metavar="SNAPSHOT",
                         help="a snapshot of the model's training, in the place of its weights: "
                         "what `unsee train --snapshots` kept")  # fmt: skip
    command.add_argument("--dtype", default="float32",
                         choices=("float32", "float16", "bfloat16", "float64"))  # fmt: skip
    command.add_argument("--device", help="cpu, cuda or mps (default: the best there is)")
    command.add_argument("--skip-bad", action="store_true",
                         help="leave out pictures that cannot be read, with a warning")  # fmt: skip


def quiet_loading() -> None:
    """Switches off the bars that other libraries show while they read weights."""
    import diffusers.utils.logging
    import transformers.utils.logging

    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.disable_progress_bar()
