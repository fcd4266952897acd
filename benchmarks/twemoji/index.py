"""Scores the benchmark's queries from an index, and says what the index gives up: python
benchmarks/twemoji/index.py WORK

Writes WORK/scores/index, METHOD, damping D.npy for judge.py, and index.json: rank correlation of
the stored scores with unquantised float64 ones. steps.py holds first order against unlearning.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import numpy as np
import torch

from unsee.draws import Draws
from unsee.evaluation.metrics import spearman
from unsee.evaluation.twemoji import Benchmark, load_benchmark
from unsee.index.build import MEASURES
from unsee.index.factors import Storage, dequantise
from unsee.index.fit import CurvatureName
from unsee.index.index import Index
from unsee.methods.indexed import AbU, query_draws_for, query_gradients

DAMPINGS = (0.01, 0.1, 1.0, 10.0)
CURVATURES: tuple[CurvatureName, ...] = ("ekfac", "kfac", "diagonal", "diagonal_per_draw")
SCORED = (0.1, 1.0)
DRAWS = 16
"""Of each example: the library's default."""

FIDELITY_EXAMPLES = 320
"""Of the index that leaves nothing out, which is many times as large."""

KEPT: dict[str, tuple[Storage, float]] = {
    "float32, all": ("float32", 0.0), "int8, all": ("int8", 0.0), "int8, 3e-4": ("int8", 3e-4),
    "int8, 1e-3": ("int8", 1e-3), "int8, 1e-2": ("int8", 1e-2),
    "float16, 3e-4": ("float16", 3e-4),
}  # fmt: skip
"""Storage and tolerance of the indices that are compared."""


def scores(benchmark: Benchmark, index: Index, work: Path) -> None:
    """Writes the scores of both columns, and of their sum, by damping."""
    prefix = "index" if index.draws == Draws(0, DRAWS) else f"index of {index.draws.n} draws"
    if not isinstance(part := index.draws.timesteps, str):
        prefix += f" from {part[0]:g} to {part[1]:g}"
    for damping in SCORED:
        total = 0.0
        for name, column in (("loss", "factors"), ("output norm", "outputs")):
            method = AbU(index, "ekfac", damping, [column], query_draws=query_draws_for(index))
            found = np.stack([s.values for s in method.attribute_many(benchmark.queries)])
            np.save(work / "scores" / f"{prefix}, EK-FAC {name}, damping {damping:g}.npy", found)
            total = total + found / found.std(1, keepdims=True)  # what AbU makes of both columns
        name = f"{prefix}, EK-FAC loss + output norm, damping {damping:g}"
        np.save(work / "scores" / f"{name}.npy", total)


def exact(index: Index, method: AbU, query) -> np.ndarray:
    """Returns the first-order scores [N] of the column `factors` in float64, from whole
    directions: slow and obvious."""
    gradient = query_gradients(index, query, method.used_query_draws, [MEASURES["factors"]])["loss"]
    curvature = index.curvature(method.curvature, "factors")
    mean = {n: g.double() for n, g in gradient.mean.items()}
    direction = curvature.precondition(mean, method.damping)
    parts = []
    for shard in index.shards():
        stored = index.components("factors", shard)
        factors = dequantise(stored.factors, index.layers)[0].mean(1).double()
        text, found = stored.text[0].double(), torch.zeros(len(stored.counts)).double()
        split = factors.split([la.channels for la in index.layers], dim=-1)
        for layer, m in zip(index.layers, split, strict=True):
            rows = ((m @ direction[layer.name]) * text).sum(1)
            found.index_add_(0, stored.owners, rows)
        parts.append(found)
    return torch.cat(parts).numpy()


def fidelity(benchmark: Benchmark, work: Path, queries: int) -> list[dict]:
    """Compares what is stored and scanned with unquantised float64, by curvature and damping."""
    ids = benchmark.data.ids[:: len(benchmark.data.ids) // FIDELITY_EXAMPLES]
    few = benchmark.data.select(ids)
    indices = {
        name: Index.build(work / "fidelity" / name.replace(", ", "-"), benchmark.model, few,
                          ("factors",), storage=storage, tolerance=kept)
        for name, (storage, kept) in KEPT.items()
    }  # fmt: skip
    rows = []
    for curvature in CURVATURES:
        for damping in DAMPINGS:
            asked = [benchmark.queries[i] for i in np.linspace(0, 39, queries).astype(int)]
            plain = AbU(indices["float32, all"], curvature, damping, ["factors"],
                        query_draws=Draws(1, 64))  # fmt: skip
            truth = [exact(indices["float32, all"], plain, q) for q in asked]
            row = {"curvature": curvature, "damping": damping}
            for kept, tolerance in (
                ("float32, all", 0.0), ("int8, all", 0.0), ("int8, 3e-4", 0.0),
                ("int8, 3e-4", 1e-4), ("float16, 3e-4", 1e-4), ("int8, 1e-3", 1e-4),
                ("int8, 1e-2", 1e-4), ("int8, 3e-4", 1e-3),
            ):  # fmt: skip
                method = AbU(indices[kept], curvature, damping, ["factors"],
                             query_draws=Draws(1, 64), tolerance=tolerance)  # fmt: skip
                got = [method.attribute(q).values for q in asked]
                r = [float(spearman(a, b)) for a, b in zip(got, truth, strict=True)]
                row[f"{kept}; {tolerance:g}"] = [min(r), float(np.mean(r))]
            rows.append(row)
            print(row, flush=True)
    sizes = {s: i.nbytes["factors"] / len(ids) for s, i in indices.items()}
    lengths = {s: float(np.mean([c for shard in i.shards()
                                 for c in i.components("factors", shard).counts.tolist()]))
               for s, i in indices.items()}  # fmt: skip
    return [{"bytes_an_example": sizes, "components_an_example": lengths, "examples": len(ids),
             "queries": queries}, *rows]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--draws", type=int, default=DRAWS, help="others than the default are "
                        "scored only, as `index of N draws`")  # fmt: skip
    parser.add_argument("--timesteps", type=float, nargs=2, metavar=("FIRST", "LAST"),
                        help="the part of the noise schedule, in shares")  # fmt: skip
    parser.add_argument("--queries", type=int, default=4, help="of the comparison with float64")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "index.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    work = arguments.work
    benchmark = load_benchmark(work / "encoded")
    draws, name = Draws(0, arguments.draws), f"index-{arguments.draws}"
    if arguments.timesteps:
        draws = dataclasses.replace(draws, timesteps=arguments.timesteps)
        name += "-{:g}-{:g}".format(*arguments.timesteps)
    index = Index.build(work / name, benchmark.model, benchmark.data, draws=draws)
    size = {c: n / len(index.ids) for c, n in index.nbytes.items()}
    report: dict = {"draws": arguments.draws, "bytes_an_example": size}
    scores(benchmark, index, work)
    if draws != Draws(0, DRAWS):
        return
    report["against_float64"] = fidelity(benchmark, work, arguments.queries)
    arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
