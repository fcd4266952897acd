"""Differentiates every example and query: python benchmarks/twemoji/gradients.py WORK

What all first-order methods of score.py are made of; kept in WORK, about 10 GB for each measure.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from unsee.draws import Draws
from unsee.evaluation.twemoji import Benchmark, load_benchmark
from unsee.methods.example_gradients import (
    GradientMatrix,
    Measure,
    QueryExamples,
    example_gradients,
)

EXAMPLE_DRAWS = Draws(seed=0, n=32)
SECOND_DRAWS = Draws(seed=10, n=32)
"""Another, independent set: curvature is fitted on it, so that no luck is shared with scores."""
QUERY_DRAWS = Draws(seed=1, n=256)


def matrices(
    benchmark: Benchmark, work: Path, measure: Measure = "loss", draws: Draws = EXAMPLE_DRAWS
) -> tuple[GradientMatrix, GradientMatrix | None]:
    """Returns the gradients of the examples and of the queries; the queries' only for the
    measures that are taken of a query."""
    cache = work / "gradients"
    examples = example_gradients(
        benchmark.model, benchmark.data, draws, measure=measure, cache=cache
    )
    if measure == "gauss_newton" or draws != EXAMPLE_DRAWS:
        return examples, None
    queries = example_gradients(
        benchmark.model, QueryExamples(benchmark.queries), QUERY_DRAWS, measure=measure, cache=cache
    )
    return examples, queries


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--measures", nargs="*", default=["loss", "output_norm", "gauss_newton"])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    benchmark = load_benchmark(arguments.work / "encoded", "all")
    for measure in arguments.measures:
        matrices(benchmark, arguments.work, measure)


if __name__ == "__main__":
    main()
