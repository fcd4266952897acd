"""Draws what leave_out.py trained: python benchmarks/twemoji/removal_pictures.py WORK

For each query the picture of the full model, and those from the same noise and caption of models
that were trained without the K examples which a method names, or without K random ones; beside
them the first of what the last method names. Writes docs/images/removal.png. Needs matplotlib.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import torch
from leave_out import asked_queries, planned, run_name
from measure import network, pictures
from PIL import Image
from tqdm.auto import tqdm

from unsee.evaluation.leave_out import RANDOM, Removal, count_of
from unsee.evaluation.twemoji import Benchmark, load_benchmark

METHODS = {
    "influence, diagonal per draw, damping 0.01": "published AbU,\nfirst order",
    "index, EK-FAC loss + output norm, damping 0.1": "AbU(index)",
}
"""Of leave_out.py's --methods, and what the picture calls them; the last one's images are shown."""

SHOWN = 6
"""Of the removed images."""


def picture_without(benchmark: Benchmark, work: Path, removal: Removal, k: int,
                    query: int) -> Image.Image:  # fmt: skip
    """Makes a query's picture again with a model that was trained without some examples."""
    weights = work / "left-out" / str(k) / run_name(removal) / "unet.safetensors"
    if not weights.is_file():
        raise SystemExit(f"there is no model {weights}: leave_out.py trains it")
    benchmark.model.network.load_state_dict(network(weights).state_dict())
    asked = benchmark.queries[query]
    latents = pictures(benchmark.model, [asked.prompt], [asked.provenance["seed"]])
    return benchmark.model.decode(latents)[0]


def show(axes: plt.Axes, image: Image.Image) -> None:
    axes.imshow(image, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    for side in axes.spines.values():
        side.set_color("#d0d7de")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--k", default="2%")
    parser.add_argument("--queries", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("docs/images/removal.png"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    work = arguments.work
    benchmark = load_benchmark(work / "encoded", "all")
    k = count_of(arguments.k, int(benchmark.members.sum()))
    plan = planned(benchmark, work, list(METHODS), k, arguments.queries, 1, False)
    chance = next(r for r in plan if r.method == RANDOM)
    of = {(r.method, r.query): r for r in plan}
    place = {i: row for row, i in enumerate(benchmark.data.ids)}
    asked = asked_queries(benchmark, arguments.queries)
    titles = ["trained on\neverything", f"without {k}\nat random", *METHODS.values()]
    matplotlib.rcParams.update({"font.size": 8, "font.family": "DejaVu Sans"})
    made = len(titles)
    width, height = made + 0.3 + SHOWN * 0.85, len(asked) * 1.2 + 0.45  # in pictures
    figure = plt.figure(figsize=(0.9 * width, 0.9 * height))

    def place_at(left: float, line: int, size: float) -> plt.Axes:
        bottom = height - 0.4 - 1.2 * (line + 1)
        return figure.add_axes((left / width, bottom / height, size / width, size / height))

    def write(left: float, bottom: float, text: str, **options: str) -> None:
        figure.text((left + 0.02) / width, bottom / height, text, va="bottom", **options)

    for column, title in enumerate(titles):
        write(column + 0.45, height - 0.38, title, ha="center", fontweight="bold")
    heading = f"the first {SHOWN} of the {k} images that\n{titles[-1]} names"
    write(made + 0.3, height - 0.38, heading, fontweight="bold")
    for line, query in enumerate(tqdm(asked)):
        about = benchmark.queries[query]
        named = [of[m, about.id] for m in METHODS]
        again = [picture_without(benchmark, work, r, k, query) for r in (chance, *named)]
        write(0, height - 0.42 - 1.2 * line - 0.2, about.prompt)
        for column, image in enumerate([about.image, *again]):
            show(place_at(column, line, 0.92), image)
        for column, identifier in enumerate(named[-1].ids[:SHOWN]):
            show(place_at(made + 0.3 + 0.85 * column, line, 0.78),
                 benchmark.images[place[identifier]].image)  # fmt: skip
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.out, dpi=100, metadata={"Software": None})


if __name__ == "__main__":
    main()
