"""Scores the judged queries of the twemoji benchmark by real unlearning: python
benchmarks/twemoji/unlearn.py WORK

For each curvature and step: every training example's loss is evaluated again. Resumes. Needs the
curvatures that score.py leaves in WORK.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from unsee.curvature.diagonal import DiagonalFisher
from unsee.curvature.kfac import EKFAC
from unsee.draws import Draws
from unsee.evaluation.twemoji import Benchmark, load_benchmark
from unsee.methods.unlearning import Change, ForwardAbU
from unsee.query import Query

SETTINGS = (
    # name, curvature, damping, rise, steps; in the order in which they are wanted
    ("AbU, damped Fisher", "diagonal per draw", 0.1, 0.05, 1),
    ("AbU, EK-FAC averaged", "EK-FAC averaged", 0.1, 0.05, 1),
    ("AbU, damped Fisher", "diagonal per draw", 0.1, 0.25, 1),
    ("AbU, EK-FAC averaged", "EK-FAC averaged", 0.1, 0.25, 1),
    ("AbU, damped Fisher", "diagonal per draw", 0.1, 1.0, 1),
    ("AbU, EK-FAC averaged", "EK-FAC averaged", 0.1, 1.0, 1),
    ("AbU, ten steps, EK-FAC averaged", "EK-FAC averaged", 0.1, 0.25, 10),
    ("AbU, ten steps, damped Fisher", "diagonal per draw", 0.1, 0.25, 10),
    ("AbU, identity", "identity", 0.0, 0.25, 1),
    ("AbU, undamped Fisher", "diagonal per draw", 0.0, 0.05, 1),
    ("AbU, EK-FAC averaged", "EK-FAC averaged", 0.1, 0.01, 1),
    ("AbU, damped Fisher", "diagonal per draw", 0.1, 0.01, 1),
)
CHANGES: tuple[Change, ...] = ("difference", "ratio", "timestep")
"""Ways of comparing the losses, which one pass over the examples serves."""


def curvature_of(benchmark: Benchmark, work: Path, kind: str) -> DiagonalFisher | EKFAC:
    """Loads a curvature, or makes the one that is the same everywhere."""
    if kind == "identity":
        ones = {n: torch.ones_like(p).double() for n, p in benchmark.model.parameters.items()}
        return DiagonalFisher(ones, 0)
    known = DiagonalFisher if kind.startswith("diagonal") else EKFAC
    return known.load(work / "curvature" / f"{kind}.safetensors")


def wanted(benchmark: Benchmark, count: int, tuning: bool) -> list[Query]:
    """Returns queries of both kinds in turn, so that a part of them is balanced."""
    rows = np.flatnonzero(benchmark.tuning == tuning)
    half = len(rows) // 2
    order = [r for pair in zip(rows[:half], rows[half:], strict=True) for r in pair]
    return [benchmark.queries[r] for r in order[:count]]


def attribute(method: ForwardAbU, query: Query, folders: dict[Change, Path]) -> None:
    """Writes the scores of each comparison that is not there yet."""
    missing = {c: f for c, f in folders.items() if not (f / f"{query.id}.parquet").is_file()}
    if not missing:
        return
    try:
        unlearned = method.unlearn(query)
        for change, folder in missing.items():
            scores = dataclasses.replace(method, change=change).attribute(
                query, unlearned=unlearned
            )
            scores.save(folder / f"{query.id}.parquet")
    except ValueError as error:  # a step that cannot be taken is a result too
        print(f"{next(iter(folders.values())).name}: {error}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--draws", type=int, default=8)
    parser.add_argument("--queries", type=int, default=20, help="at most")
    parser.add_argument("--rises", type=float, nargs="*", help="only these of the settings' rises")
    parser.add_argument("--names", nargs="*", help="only these of the settings' names")
    parser.add_argument("--tuning", action="store_true", help="the queries to tune on instead")
    arguments = parser.parse_args()
    work = arguments.work
    torch.set_num_threads(1)
    benchmark = load_benchmark(work / "encoded")
    queries = wanted(benchmark, arguments.queries, arguments.tuning)
    settings = [s for s in SETTINGS
                if (not arguments.rises or s[3] in arguments.rises)
                and (not arguments.names or s[0] in arguments.names)]  # fmt: skip
    bar = tqdm(total=len(settings) * len(queries))
    for name, kind, damping, rise, steps in settings:
        method = ForwardAbU(
            benchmark.model, benchmark.data, curvature_of(benchmark, work, kind),
            rise=rise, steps=steps, damping=damping, draws=Draws(seed=0, n=arguments.draws),
            query_draws=Draws(seed=1, n=128), cache=work / "losses",
        )  # fmt: skip
        folders = {
            c: work / "unlearned" / f"{name}{'' if c == 'difference' else f', {c}'}, rise {rise:g}"
            for c in CHANGES
        }
        for query in queries:
            attribute(method, query, folders)
            bar.update()


if __name__ == "__main__":
    main()
