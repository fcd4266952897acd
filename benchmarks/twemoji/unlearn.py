"""Scores the judged queries of the twemoji benchmark by real unlearning: python
benchmarks/twemoji/unlearn.py WORK

For each curvature and step: every training example's loss is evaluated again. Resumes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from unsee.curvature.diagonal import DiagonalFisher
from unsee.curvature.kfac import EKFAC
from unsee.draws import Draws
from unsee.evaluation.twemoji import load_benchmark
from unsee.methods.unlearning import AbU

SETTINGS = (
    # name, curvature, damping, rise
    ("AbU, published Fisher", "diagonal per draw", 0.0, (0.05, 0.25, 1.0)),
    ("AbU, damped Fisher", "diagonal per draw", 0.1, (0.01, 0.05, 0.25, 1.0)),
    ("AbU, EK-FAC averaged", "EK-FAC averaged", 0.1, (0.05, 0.25, 1.0)),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--draws", type=int, default=8)
    parser.add_argument("--queries", type=int, default=20, help="judged queries at most")
    parser.add_argument("--rises", type=float, nargs="*", help="only these of the settings' rises")
    arguments = parser.parse_args()
    work = arguments.work
    torch.set_num_threads(1)
    benchmark = load_benchmark(work / "encoded")
    judged = np.flatnonzero(~benchmark.tuning)
    # From both kinds in turn, so that a part of them is balanced.
    half = len(judged) // 2
    judged = [q for pair in zip(judged[:half], judged[half:], strict=True) for q in pair]
    bar = tqdm(total=sum(len(s[3]) for s in SETTINGS) * min(len(judged), arguments.queries))
    for q in judged[: arguments.queries]:
        for name, kind, damping, rises in SETTINGS:
            curvature = (DiagonalFisher if kind.startswith("diagonal") else EKFAC).load(
                work / "curvature" / f"{kind}.safetensors"
            )
            for rise in rises if not arguments.rises else set(rises) & set(arguments.rises):
                query = benchmark.queries[q]
                path = work / "unlearned" / f"{name}, rise {rise:g}" / f"{query.id}.parquet"
                if not path.is_file():
                    method = AbU(
                        benchmark.model, benchmark.data, curvature, rise=rise, damping=damping,
                        draws=Draws(seed=0, n=arguments.draws), query_draws=Draws(seed=1, n=128),
                        cache=work / "losses",
                    )  # fmt: skip
                    try:
                        method.attribute(query).save(path)
                    except ValueError as error:  # a step that cannot be taken is a result too
                        print(f"{name}, rise {rise:g}: {error}")
                bar.update()


if __name__ == "__main__":
    main()
