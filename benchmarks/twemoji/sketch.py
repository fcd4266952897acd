"""Scores the benchmark's queries from sketches: python benchmarks/twemoji/sketch.py WORK

Writes WORK/scores/METHOD, sketch of N, ridge R.npy for judge.py, and sketch.json: rank correlation
of these scores with those of the exact kernel, without own terms as they are.
Needs the index that index.py and the exact scores that score.py leave in WORK.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from unsee.draws import Draws
from unsee.evaluation.metrics import spearman
from unsee.evaluation.twemoji import load_benchmark
from unsee.index.index import Index
from unsee.index.sketch import Sketch
from unsee.methods.combine import combined_values
from unsee.methods.trak import NAMES, TRAK

RIDGES = (1e-2, 1e-1, 1.0)
DEFAULT = "index, EK-FAC loss + output norm, damping 0.1"
QUERY_DRAWS = Draws(seed=1, n=64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--draws", type=int, default=16)
    parser.add_argument("--lengths", type=int, nargs="*", default=[4096, 16384])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "sketch.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    work = arguments.work
    benchmark = load_benchmark(work / "encoded")
    default = np.load(work / "scores" / f"{DEFAULT}.npy").T
    rows = []
    for length in arguments.lengths:
        index = Index.build(
            work / f"sketch-{length}", benchmark.model, benchmark.data, ("sketch",),
            sketch=Sketch(length, measures=("output_norm", "loss")),
            draws=Draws(0, arguments.draws),
        )  # fmt: skip
        size = index.nbytes["sketch"] / len(index.ids) / 2
        for (measure, name), ridge in ((m, r) for m in NAMES.items() for r in RIDGES):
            method = TRAK(index, measure, ridge, QUERY_DRAWS)
            found = np.stack([s.values for s in method.attribute_many(benchmark.queries)])
            np.save(work / "scores" / f"{name}, sketch of {length}, ridge {ridge:g}.npy", found)
            if measure == "output_norm":
                total = combined_values([default, found.T]).T
                path = work / "scores" / f"index + {name}, sketch of {length}, ridge {ridge:g}.npy"
                np.save(path, total)
            exact = np.load(
                work / "scores" / f"{name} without own term, all parameters, ridge {ridge:g}.npy"
            )
            r = [float(spearman(a, b)) for a, b in zip(found, exact, strict=True)]
            rows.append({"method": name, "length": length, "ridge": ridge, "bytes_an_example": size,
                         "rank_correlation": [min(r), float(np.mean(r))]})  # fmt: skip
            print(rows[-1], flush=True)
    arguments.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
