"""A query of the demo model from its index, over all of the published work of one, nothing
extrapolated: python benchmarks/demo_query.py

The model that ships with the package, its real 1,898 pictures, and pictures that it generates. The
published work: 50,000 gradients of the query, then a forward pass of every picture and its mirror
image at 20 timesteps. Both are run whole, in one process on all threads.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from forward import machine

from index import AGREEMENT, COCO_GRADIENT_DRAWS
from unsee import AbU, Denoiser, Index, load_dataset
from unsee.data.latents import encode_dataset
from unsee.demo import GUIDANCE, PROMPTS, write_demo_model
from unsee.draws import Draws
from unsee.evaluation.metrics import spearman
from unsee.methods.forward import forward_losses
from unsee.methods.unlearning import query_gradient
from unsee.models.kernels import exact_kernels
from unsee.models.loading import load_pipeline
from unsee.query import Query

TIMESTEPS, MICROBATCH = 20, 80
"""Of the published evaluation, and draws of the gradient at once."""

SIZES = (16, 64, 256, 1000)
"""Draws of a query that are tried."""

ROUNDS = 5


def agreement(index: Index, asked: list[Query]) -> dict[int, list[float]]:
    """Returns, by draws of the query, the rank correlation of the scores of two disjoint sets of
    them for each query; ends where the mean is high enough."""
    found: dict[int, list[float]] = {}
    for n in SIZES:
        one, other = (AbU(index, query_draws=Draws(seed, n)).attribute_many(asked)
                      for seed in (1, 2))  # fmt: skip
        found[n] = [float(spearman(a.values, b.values)) for a, b in zip(one, other, strict=True)]
        if np.mean(found[n]) >= AGREEMENT:
            break
    return found


def seconds_of(index: Index, query: Query, n: int) -> float:
    """Returns the median time from latents to sorted scores."""
    times = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        AbU(index, query_draws=Draws(1, n)).attribute(query).top(10)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


@exact_kernels()
def published(model: Denoiser, data: Any, query: Query) -> dict[str, float]:
    """Returns the seconds of the published work for one query, by stage."""
    started = time.perf_counter()
    for step in range(COCO_GRADIENT_DRAWS // MICROBATCH):
        query_gradient(model, query, Draws(step, MICROBATCH), MICROBATCH)
    gradient = time.perf_counter() - started
    rows = range(len(data.ids))
    started = time.perf_counter()
    forward_losses(model, data, Draws(0, TIMESTEPS), rows, flips=True, batch_size=160)
    return {"gradient": gradient, "forward": time.perf_counter() - started}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--index", type=Path, help="where the index is kept, or found")
    parser.add_argument("--json", type=Path, metavar="FILE", help="adds every number to it")
    options = parser.parse_args()
    model = Denoiser.from_pipeline(load_pipeline(write_demo_model()))
    pictures = load_dataset("twemoji")
    with tempfile.TemporaryDirectory() as folder:
        index = Index.build(options.index or folder, model, pictures)
        index.warm(("factors", "outputs"))
        asked = [model.generate(p, s, guidance_scale=GUIDANCE) for p, s in PROMPTS]
        agreed = agreement(index, asked)
        default = AbU(index).used_query_draws.n
        times = {n: seconds_of(index, asked[1], n) for n in sorted({default, max(agreed)})}
    work = published(model, encode_dataset(model, pictures, flips=True), asked[1])
    whole = sum(work.values())
    report = {
        "machine": machine(), "agreement": agreed, "query_seconds": times,
        "published_seconds": work, "times_faster": {n: whole / t for n, t in times.items()},
    }  # fmt: skip
    print(json.dumps(report, indent=1))
    if options.json:
        known = json.loads(options.json.read_text()) if options.json.is_file() else {}
        known["query of the demo model, whole"] = report
        options.json.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
