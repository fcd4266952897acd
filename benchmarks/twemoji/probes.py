"""Scores the benchmark's queries to second order: python benchmarks/twemoji/probes.py WORK

Writes WORK/scores/METHOD, damping D, rise R.npy for judge.py, which tunes the size of the step. Of
the loss alone, and added to what index.py says of the output.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from unsee.draws import Draws
from unsee.evaluation.twemoji import load_benchmark
from unsee.index.index import Index
from unsee.methods.indexed import AbU

DRAWS = Draws(seed=0, n=16)
RISES = (0.02, 0.05, 0.1, 0.25, 0.5)
DAMPINGS = (0.1, 1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    work = arguments.work
    benchmark = load_benchmark(work / "encoded")
    index = Index.build(
        work / "index-16-probes", benchmark.model, benchmark.data, ("factors", "probes"),
        draws=DRAWS,
    )  # fmt: skip
    print({c: n / len(index.ids) for c, n in index.nbytes.items()}, "bytes an example")
    for damping in DAMPINGS:
        of_outputs = np.load(
            work / "scores" / f"index, EK-FAC output norm, damping {damping:g}.npy"
        )
        for rise in RISES:
            method = AbU(index, "ekfac", damping, rise=rise)
            found = np.stack([s.values for s in method.attribute_many(benchmark.queries)])
            total = sum(s / s.std(1, keepdims=True) for s in (found, of_outputs))
            for what, scores in (("loss", found), ("loss + output norm", total)):
                name = f"index to second order, EK-FAC {what}, damping {damping:g}, rise {rise:g}"
                np.save(work / "scores" / f"{name}.npy", scores)


if __name__ == "__main__":
    main()
