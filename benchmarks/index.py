"""The index: what it costs to build, to ask and to keep, each as a ratio within one run.

    python benchmarks/index.py build  [--model demo|mscoco]   # over bare passes with gradients
    python benchmarks/index.py query  [--model demo|mscoco]   # over the published work of a query
    python benchmarks/index.py memory                         # peak of a build, against its size
    python benchmarks/index.py rows    [--rows 1000000]       # a scan over a copy, and a product
    python benchmarks/index.py forward [--model demo|mscoco]  # candidates over bare passes

The weights are random, the texts real sentences: what an index keeps depends on them. Everything
runs in one process on all threads; benchmarks/README.md says what the numbers mean.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from forward import machine
from scoring import CASES, Case, processors
from stored_rows import scans, timed
from texts import sentences, text_states
from torch import Tensor

from unsee.data.batches import gather
from unsee.data.latents import EncodedDataset
from unsee.draws import Draws
from unsee.evaluation.metrics import spearman
from unsee.index.index import Index
from unsee.methods.forward import forward_losses
from unsee.methods.indexed import AbU
from unsee.models.kernels import exact_kernels
from unsee.models.unet import UNetDenoiser
from unsee.query import Query

COCO_IMAGES, COCO_VIEWS, COCO_GRADIENT_DRAWS = 118_287, 2, 50_000
"""Of the published experiment: pictures, each also mirrored, and draws of the query's gradient."""

AGREEMENT = 0.98
"""Rank correlation at which two sets of a query's draws count as saying the same."""


def examples(case: Case, count: int, seed: int = 0) -> EncodedDataset:
    """Returns examples of a case's shapes: random latents, real sentences."""
    generator = torch.Generator().manual_seed(seed)
    return EncodedDataset(
        [f"example {seed}-{i}" for i in range(count)],
        torch.randn(count, *case.latent, generator=generator),
        text_states(sentences(count, case.captions, seed), *case.text),
        [list(range(i * case.captions, (i + 1) * case.captions)) for i in range(count)],
    )


def queries(case: Case, count: int) -> list[Query]:
    """Returns made-up pictures of a case's shapes."""
    data = examples(case, count, seed=1)
    return [
        Query(f"query {i}", data.latents([i])[0], data.text([i], 0)[0], "", None)  # type: ignore[arg-type]
        for i in range(count)
    ]


# -- build ----------------------------------------------------------------------------------------


def bare(model: UNetDenoiser, data: EncodedDataset, draws: Draws, passes: int = 64) -> float:
    """Returns the seconds of one forward and backward pass for each caption and draw."""
    jobs = [(r, r, c) for r in range(len(data.ids)) for c in range(data.caption_counts[r])]
    size = max(1, passes // draws.n)
    batches = [gather(data, draws, jobs[i : i + size]) for i in range(0, len(jobs), size)]
    started = time.perf_counter()
    with model.gradients_on():
        for batch in batches:
            loss = model.loss(*batch).sum()
            torch.autograd.grad(loss, list(model.parameters.values()))
    return time.perf_counter() - started


def build(case: Case, count: int, rounds: int) -> dict[str, Any]:
    """Times builds against bare passes over the same batches and draws, in turn."""
    model, data, draws = case.build(), examples(case, count), Draws(0, case.draws)
    columns = {"loss and factors": ("loss", "factors"),
               "with outputs": ("loss", "factors", "outputs"),
               "with probes": ("loss", "factors", "outputs", "probes")}  # fmt: skip
    # A sketch is of all parameters: it is held against passes with their gradients.
    times: dict[str, list[float]] = {
        name: [] for name in ("bare", *columns, "bare, all parameters", "loss and sketch")
    }
    fit, size = 0.0, {}
    for number in range(rounds + 1):
        seconds = {"bare": bare(model, data, draws)}
        seconds["bare, all parameters"] = bare(model.selecting("all"), data, draws)
        for name, wanted in {**columns, "loss and sketch": ("loss", "sketch")}.items():
            with tempfile.TemporaryDirectory() as folder:
                began = time.perf_counter()
                index = Index.build(folder, model, data, wanted, draws=draws)
                seconds[name] = time.perf_counter() - began
                if number == rounds and name == "with outputs":
                    fit = timed(lambda index=index: index.curvature("ekfac", "factors"))
                size |= {c: n / count for c, n in index.nbytes.items()}
        if number:  # the first round warms up
            for name, value in seconds.items():
                times[name].append(value)
    ratios = {
        name: statistics.median(a / b for a, b in zip(times[name], times["bare"], strict=True))
        for name in columns
    }
    pairs = zip(times["loss and sketch"], times["bare, all parameters"], strict=True)
    ratios["loss and sketch"] = statistics.median(a / b for a, b in pairs)
    return {"examples": count, "passes": count * case.captions * case.draws, "rounds": rounds,
            "seconds": times, "over_bare": ratios, "fit_over_bare": fit / times["bare"][-1],
            "bytes_an_example": size}  # fmt: skip


# -- query ----------------------------------------------------------------------------------------


def fewest_draws(index: Index, asked: Sequence[Query], most: int) -> tuple[int, list[float]]:
    """Returns the fewest draws of a query whose scores agree with those of another set."""
    found: list[float] = []
    n = 16
    while True:
        pair = [AbU(index, query_draws=Draws(seed, n), columns=["factors"]).attribute_many(asked)
                for seed in (1, 2)]  # fmt: skip
        found.append(float(np.mean([spearman(a.values, b.values)
                                    for a, b in zip(*pair, strict=True)])))  # fmt: skip
        if found[-1] >= AGREEMENT or n >= most:
            return n, found
        n *= 2


def draws_needed(n: int, agreement: float) -> int:
    """Returns the draws at which two sets agree, if each draw adds noise of its own (the formula
    of Spearman and Brown), where `n` are too few."""
    if agreement >= AGREEMENT:
        return n
    odds = AGREEMENT / (1 - AGREEMENT)
    return round(n * odds * (1 - agreement) / max(agreement, 1e-3))


def query(case: Case, count: int, draws: int, most: int, kept: Path | None) -> dict[str, Any]:
    """Times queries from an index, and the published work of one."""
    model, data = case.build(), examples(case, count)
    with tempfile.TemporaryDirectory() as folder:
        index = Index.build(kept or folder, model, data, ("factors",), draws=Draws(0, draws))
        index.curvature("ekfac", "factors")
        counts = torch.cat([index.components("factors", s).counts for s in index.shards()])
        size = index.nbytes["factors"] / count
        n, agreement = fewest_draws(index, queries(case, 4), most)
        method = AbU(index, query_draws=Draws(1, n), columns=["factors"])
        times = {}
        for number in (1, 32):  # what came before has read the index, as far as it fits
            seconds = method.attribute_many(queries(case, number))[0].settings["seconds"]
            times[number] = {k: v / number for k, v in seconds.items()}
    needed = draws_needed(n, agreement[-1])
    few = examples(case, max(2, 256 // (case.captions * case.draws)), seed=2)
    rows = range(len(few.ids))
    forward = timed(lambda: forward_losses(model, few, Draws(0, case.draws), rows))
    forward /= len(few.ids) * case.captions * case.draws
    backward = bare(model, few, Draws(0, case.draws))
    backward /= len(few.ids) * case.captions * case.draws
    coco = case.name == "mscoco"
    total = COCO_IMAGES if coco else count
    views = COCO_VIEWS if coco else 1
    published = (
        COCO_GRADIENT_DRAWS if coco else 200
    ) * backward + total * views * case.captions * case.draws * forward
    result: dict[str, Any] = {
        "examples_measured": count, "examples": total, "draws_of_examples": draws,
        "bytes_an_example": size, "components_an_example": float(counts.double().mean()),
        "query_draws": n, "agreement": agreement, "query_draws_needed": needed,
        "forward_seconds": forward, "forward_backward_seconds": backward,
        "published_seconds": published,
    }  # fmt: skip
    for number, seconds in times.items():
        one = (seconds["query's gradient"] * needed / n + seconds["directions"]
               + seconds["scan"] * total * views / count)  # fmt: skip
        result[f"seconds_of_{number}"] = {**seconds, "for_all_examples": one}
        result[f"times_faster_{number}"] = published / one
    return result


# -- forward --------------------------------------------------------------------------------------


@torch.no_grad()
def bare_forward(model: UNetDenoiser, data: EncodedDataset, draws: Draws, passes: int) -> float:
    """Returns the seconds of one forward pass for each caption and draw, arguments at hand."""
    jobs = [(r, r, c) for r in range(len(data.ids)) for c in range(data.caption_counts[r])]
    size = max(1, passes // draws.n)
    batches = [gather(data, draws, jobs[i : i + size]) for i in range(0, len(jobs), size)]
    started = time.perf_counter()
    for batch in batches:
        model.loss(*batch)
    return time.perf_counter() - started


def candidates(case: Case, count: int, rounds: int) -> dict[str, Any]:
    """Times real unlearning of a query with candidates from an index, and bare forward passes."""
    model, data, draws = case.build(), examples(case, count), Draws(0, case.draws)
    query = queries(case, 1)[0]
    times: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder, exact_kernels():
        index = Index.build(folder, model, data, ("loss", "factors"), draws=draws)
        method = AbU(index, columns=["factors"], forward=True)
        for number in range(rounds + 1):
            seconds = {f"bare, {size}": bare_forward(model, data, draws, size)
                       for size in case.sizes}  # fmt: skip
            started = time.perf_counter()
            scores = method.attribute(query, data.ids)
            seconds["all"] = time.perf_counter() - started
            seconds["unlearning"] = scores.settings["seconds"]["unlearning"]
            if number:  # the first round warms up
                for name, value in seconds.items():
                    times.setdefault(name, []).append(value)
    assert scores.settings["losses_before"] == "stored"
    medians = {name: statistics.median(values) for name, values in times.items()}
    best = min((n for n in medians if n.startswith("bare")), key=lambda n: medians[n])
    shares = [b / (a - u) for a, u, b in zip(times["all"], times["unlearning"], times[best],
                                             strict=True)]  # fmt: skip
    return {"candidates": count, "passes": count * case.captions * case.draws, "rounds": rounds,
            "seconds": times, "best": best, "of_bare": statistics.median(shares)}  # fmt: skip


# -- memory ---------------------------------------------------------------------------------------


def memory(case: Case, sizes: Sequence[int]) -> dict[str, Any]:
    """Returns the peak memory of builds of several sizes, each in a process of its own."""
    context = multiprocessing.get_context("spawn")
    peaks = {}
    for size in sizes:
        with context.Pool(1) as pool:
            peaks[size] = pool.apply(_peak, (case.name, size))
    return {"peak_mebibytes": peaks, "over_smallest": max(peaks.values()) / peaks[sizes[0]]}


class Streamed:
    """Examples made when they are asked for, so that the data set itself takes no memory."""

    def __init__(self, case: Case, count: int) -> None:
        self.case, self.ids = case, [f"example {i}" for i in range(count)]
        self.caption_counts, self.has_flips = [1] * count, False
        self.fingerprint = f"made up {count}"

    def latents(self, rows: Sequence[int], flipped: bool = False) -> Tensor:
        return torch.stack([_normal(r, self.case.latent) for r in rows])

    def text(self, rows: Sequence[int], caption: int) -> Tensor:
        return torch.stack([_normal(-1 - r, self.case.text) for r in rows])


def _normal(seed: int, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed % 2**31))


def _peak(name: str, size: int) -> float:
    case = CASES[name]
    with tempfile.TemporaryDirectory() as folder:
        Index.build(folder, case.build(), Streamed(case, size), draws=Draws(0, 2))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("build", "query", "forward", "memory", "rows"))
    parser.add_argument("--model", choices=list(CASES), default="demo")
    parser.add_argument("--examples", type=int, help="how many are indexed")
    parser.add_argument("--draws", type=int, default=2, help="of the indexed examples (query)")
    parser.add_argument("--most", type=int, default=1024, help="draws of a query that are tried")
    parser.add_argument("--index", type=Path, help="where the index is kept, or found (query)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=1_000_000, help="of 4,096 float16 numbers")
    parser.add_argument("--threads", type=int, default=processors(), help="(rows)")
    parser.add_argument("--others", action="store_true", help="other ways to scan, too (rows)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="adds every number to it")
    options = parser.parse_args()
    case = CASES[options.model]
    if options.what == "build":
        found = build(case, options.examples or (64 if case.name == "demo" else 4), options.rounds)
    elif options.what == "query":
        found = query(case, options.examples or (1898 if case.name == "demo" else 500),
                      options.draws, options.most, options.index)  # fmt: skip
    elif options.what == "forward":
        found = candidates(case, options.examples or (512 if case.name == "demo" else 16),
                           options.rounds)  # fmt: skip
    elif options.what == "rows":
        found = scans(options.rows, options.rounds, options.threads, options.others)
    else:
        found = memory(case, (500, 2000, 8000))
    report = {"machine": machine(), **found}
    print(json.dumps(report, indent=1))
    if options.json:
        known = json.loads(options.json.read_text()) if options.json.is_file() else {}
        known[f"{options.what} {options.model}"] = report
        options.json.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
