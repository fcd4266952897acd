"""How good is the twemoji model? Numbers as JSON and Markdown, pictures as PNG.

evaluate.py MODEL_DIR --out DIR                        the numbers and two grids of pictures
evaluate.py MODEL_DIR --out DIR --guidance 1,2,3,5     a sweep, to choose the guidance scale
evaluate.py MODEL_DIR --out DIR --blind                a blind test to take
evaluate.py --out DIR --grade PICKS.json               and its score
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from blind import grade, make_questions, question_text
from captions import GROUPS, NOVEL, SELECTION_SEED, check_novel, stratified_rows
from measures import (
    Array,
    box_downscale,
    copy_report,
    copy_threshold,
    nearest_distinct,
    psnr_report,
    quantiles,
    retrieval_ranks,
    retrieval_report,
    rms_distances,
    share,
)
from pictures import Settings, Training, generate, reconstruction_psnr
from PIL import Image
from sheets import Card, card_sheet, question_sheet, to_image
from tables import markdown, sweep_markdown

from unsee.data.dataset import load_dataset
from unsee.models.loading import load_pipeline
from unsee.training.autoencoder import load_pixels

RETRIEVAL_SIDE = 16
GRID = 40
SWEEP = 60


# -- comparisons --------------------------------------------------------------------------------


def compare(generated: Array, own: Sequence[int], training: Training) -> list[dict[str, Any]]:
    """Compares each generated picture with its own training picture and with all.

    Args:
        generated: [n, H, W, 3] in [0, 1].
        own: row of each caption's training picture.
        training: the training pictures.
    """
    rows = np.asarray(own)
    small = rms_distances(
        box_downscale(generated, RETRIEVAL_SIDE), box_downscale(training.pictures, RETRIEVAL_SIDE)
    )
    full = rms_distances(generated, training.pictures)
    ranks, nearest = retrieval_ranks(small, rows), full.argmin(axis=1)
    return [
        {
            "id": training.ids[row],
            "caption": training.captions[row],
            "category": training.categories[row],
            "rank": int(ranks[i]),
            "own_rms": float(full[i, row]),
            "nearest_id": training.ids[nearest[i]],
            "nearest_caption": training.captions[nearest[i]],
            "nearest_rms": float(full[i, nearest[i]]),
        }
        for i, row in enumerate(own)
    ]


def threshold_report(decibels: Array, training: Training) -> dict[str, Any]:
    """Returns the RMS distance below which a picture is a near-copy, and what it rests on."""
    reconstruction = 10 ** (-decibels / 20)
    neighbour = nearest_distinct(rms_distances(training.pictures, training.pictures))
    threshold = copy_threshold(reconstruction, neighbour)
    return {
        "threshold_rms": threshold,
        "reconstructions_missed": float(np.mean(reconstruction >= threshold)),
        "neighbours_mistaken": float(np.mean(neighbour < threshold)),
        "reconstruction_rms": quantiles(reconstruction),
        "neighbour_rms": quantiles(neighbour),
    }


def novel_rows(generated: Array, training: Training) -> list[dict[str, Any]]:
    """Returns the nearest training picture of each picture of a novel prompt."""
    full = rms_distances(generated, training.pictures)
    return [
        {
            "caption": prompt,
            "nearest_id": training.ids[d.argmin()],
            "nearest_caption": training.captions[d.argmin()],
            "nearest_rms": float(d.min()),
        }
        for prompt, d in zip(NOVEL, full, strict=True)
    ]


# -- whole evaluations --------------------------------------------------------------------------


def evaluate(
    pipeline: Any, training: Training, unseen: torch.Tensor, settings: Settings, out: Path
) -> dict[str, Any]:
    """Measures everything and writes `grid.png` and `novel.png`.

    Args:
        pipeline: the model.
        training: its training pictures.
        unseen: [M, 3, H, W] in [-1, 1], pictures that the autoencoder never saw.
        settings: how pictures are made.
        out: folder for the pictures.

    Returns:
        The report, for JSON.
    """
    check_novel(NOVEL, training.captions)
    own = stratified_rows(training.ids, training.captions, training.categories, settings.captions)
    decibels = reconstruction_psnr(pipeline.vae, training.pixels, "training pictures")
    unseen_decibels = reconstruction_psnr(pipeline.vae, unseen, "skin-tone variants")
    started = time.monotonic()
    generated = generate(pipeline, [*(training.captions[row] for row in own), *NOVEL], settings)
    seconds = time.monotonic() - started
    rows = compare(generated[: len(own)], own, training)
    novel = novel_rows(generated[len(own) :], training)
    limits = threshold_report(decibels, training)
    threshold = limits["threshold_rms"]

    _in_set_grid(generated, own, rows, training).save(out / "grid.png", optimize=True)
    _novel_grid(generated[len(own) :], novel, training).save(out / "novel.png", optimize=True)
    categories = sorted(set(training.categories))
    return {
        "settings": {**dataclasses.asdict(settings), "selection_seed": SELECTION_SEED},
        "autoencoder": {"training": psnr_report(decibels), "unseen": psnr_report(unseen_decibels)},
        "retrieval": retrieval_report(rows),
        "retrieval_by_category": {
            c: retrieval_report(chosen)
            for c in categories
            if (chosen := [row for row in rows if row["category"] == c])
        },
        "copies": {
            **limits,
            **copy_report(rows, threshold),
            "novel_near_copies_of_any": share(
                np.array([row["nearest_rms"] < threshold for row in novel])
            ),
        },
        "seconds_per_picture": seconds / len(generated),
        "pictures": rows,
        "novel": novel,
    }


def sweep(
    pipeline: Any, training: Training, settings: Settings, guidances: Sequence[float]
) -> list[dict[str, Any]]:
    """Returns retrieval and distances for each guidance scale, on the first `SWEEP` captions."""
    own = stratified_rows(training.ids, training.captions, training.categories, settings.captions)
    own = own[:SWEEP]
    decibels = reconstruction_psnr(pipeline.vae, training.pixels, "training pictures")
    threshold = threshold_report(decibels, training)["threshold_rms"]
    results = []
    for guidance in guidances:
        chosen = dataclasses.replace(settings, guidance=guidance)
        generated = generate(pipeline, [training.captions[row] for row in own], chosen)
        rows = compare(generated, own, training)
        results.append(
            {"guidance": guidance, **retrieval_report(rows), **copy_report(rows, threshold)}
        )
    return results


def write_blind_test(pipeline: Any, captions: Sequence[str], settings: Settings, out: Path) -> None:
    """Writes `blind/` for the taker, a picture for each question and a text, and the answers.

    Args:
        pipeline: the model.
        captions: of the training set; none of them may be asked about.
        settings: how pictures are made.
        out: folder for the test and, outside the folder that the taker gets, `answers.json`.
    """
    check_novel([caption for group in GROUPS for caption in group], captions)
    questions = make_questions(GROUPS, settings.seed)
    folder = out / "blind"
    folder.mkdir(exist_ok=True)
    generated = generate(pipeline, [q.prompt for q in questions], settings)
    for question, picture in zip(questions, generated, strict=True):
        sheet = question_sheet(to_image(picture), question.number, question.captions)
        sheet.save(folder / f"question_{question.number:02d}.png", optimize=True)
    (folder / "questions.txt").write_text(question_text(questions), encoding="utf-8")
    _write_json(out / "answers.json", {str(q.number): q.answer for q in questions})


# -- pictures -----------------------------------------------------------------------------------


def _in_set_grid(
    generated: Array, own: Sequence[int], rows: Sequence[Any], training: Training
) -> Image.Image:
    total = len(training.ids)
    cards = [
        Card(
            (to_image(generated[i]), to_image(training.pictures[row])),
            rows[i]["caption"],
            f"own picture is number {rows[i]['rank']:,} of {total:,}",
        )
        for i, row in enumerate(own[:GRID])
    ]
    return card_sheet(
        cards, 5, "Captions of the training set", "Left: generated. Right: the training picture."
    )


def _novel_grid(generated: Array, novel: Sequence[Any], training: Training) -> Image.Image:
    at = {identifier: i for i, identifier in enumerate(training.ids)}
    cards = [
        Card(
            (to_image(picture), to_image(training.pictures[at[row["nearest_id"]]])),
            row["caption"],
            f"nearest: {row['nearest_caption']}",
        )
        for picture, row in zip(generated, novel, strict=True)
    ]
    return card_sheet(
        cards, 5, "Captions that are not in the training set",
        "Left: generated. Right: the training picture nearest to it, pixel by pixel.",
    )  # fmt: skip


# -- the command --------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    options = _parser().parse_args(arguments)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        if options.grade is not None:
            return _grade(options.out, options.grade)
        if options.model is None:
            raise ValueError("no model: give the folder of a StableDiffusionPipeline")
        return _measure(options)
    except (ValueError, OSError) as error:
        print(f"evaluate: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    default = Settings()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, nargs="?", help="folder of a StableDiffusionPipeline")
    parser.add_argument("--out", type=Path, required=True, help="folder for JSON and pictures")
    parser.add_argument("--steps", type=int, default=default.steps, help="sampler steps")
    parser.add_argument(
        "--guidance", type=_numbers, default=[default.guidance],
        help="guidance scale; several with commas make a sweep",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=default.seed, help="of the pictures' noise")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--blind", action="store_true", help="write a blind test instead")
    mode.add_argument("--grade", type=Path, metavar="PICKS", help="score the picks of a blind test")
    return parser


def _numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def _measure(options: argparse.Namespace) -> int:
    pipeline = load_pipeline(options.model, device="cpu")
    resolution = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    data = load_dataset("twemoji")
    settings = Settings(steps=options.steps, guidance=options.guidance[0], seed=options.seed)
    about = {"model": options.model.name, "unet_sha256": _weights_hash(options.model / "unet")}
    if options.blind:
        captions = [caption for several in data.captions for caption in several]
        write_blind_test(pipeline, captions, settings, options.out)
        print(f"wrote {options.out / 'blind'}/ to take, and {options.out / 'answers.json'}")
        return 0
    training = Training.of(data, resolution)
    if len(options.guidance) > 1:
        results = sweep(pipeline, training, settings, options.guidance)
        _write_json(options.out / "sweep.json", {**about, "results": results})
        print(sweep_markdown(results), end="")
    else:
        seen = set(data.ids)
        toned = load_dataset("twemoji", skin_tones=True)
        unseen = load_pixels(toned.select(i for i in toned.ids if i not in seen), resolution)
        report = evaluate(pipeline, training, unseen, settings, options.out)
        _write_json(options.out / "evaluation.json", {**about, **report})
        (options.out / "evaluation.md").write_text(markdown(report), encoding="utf-8")
        print(markdown(report), end="")
    return 0


def _grade(out: Path, picks: Path) -> int:
    result = grade(_read_letters(out / "answers.json"), _read_letters(picks))
    _write_json(out / "blind-score.json", result)
    print(
        f"{result['right']} of {result['of']} right "
        f"(aim {result['aim']}, guessing gives {result['by_guessing']:g})"
    )
    return 0


def _read_letters(path: Path) -> dict[str, str]:
    read = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(read, dict):
        raise ValueError(f"{path}: not a JSON object from number to letter")
    return read


def _weights_hash(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
