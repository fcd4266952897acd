"""Differentiates every example and query: python benchmarks/twemoji/gradients.py WORK

What all first-order methods of score.py are made of; kept in WORK, about 10 GB for each measure.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any, cast

import torch
from measure import network
from torch import Tensor

from unsee.data.latents import EncodedDataset
from unsee.draws import Draws
from unsee.evaluation.twemoji import Benchmark, load_benchmark
from unsee.files import write_atomically
from unsee.methods.example_gradients import (
    GradientMatrix,
    Measure,
    QueryExamples,
    example_gradients,
)
from unsee.methods.forward import load_array, save_array
from unsee.methods.journey import journey_gradients
from unsee.models.guided import GuidedDenoiser
from unsee.models.unet import UNetDenoiser

EXAMPLE_DRAWS = Draws(seed=0, n=32)
QUERY_DRAWS = Draws(seed=1, n=256)
SEED_DRAWS = Draws(seed=0, n=16), Draws(seed=1, n=64)
"""Of examples and queries under the model of another seed."""
FUNCTIONALS = 8
"""Random functionals of each query."""


def matrices(
    benchmark: Benchmark,
    work: Path,
    measure: Measure = "loss",
    draws: tuple[Draws, Draws] = (EXAMPLE_DRAWS, QUERY_DRAWS),
) -> tuple[GradientMatrix, GradientMatrix | None]:
    """Returns the gradients of the examples and of the queries; the queries' only for the
    measures that are taken of a query."""
    cache = work / "gradients"
    examples = example_gradients(
        benchmark.model, benchmark.data, draws[0], measure=measure, cache=cache
    )
    if measure == "gauss_newton":
        return examples, None
    queries = example_gradients(
        benchmark.model, QueryExamples(benchmark.queries), draws[1], measure=measure, cache=cache
    )
    return examples, queries


def second_seed(benchmark: Benchmark, work: Path) -> Benchmark:
    """Returns the benchmark with the model of the second seed, keys and values selected."""
    unet = network(work / "full-1" / "unet.safetensors")
    model = UNetDenoiser(cast(Any, unet), benchmark.model.schedule, "cross-attn-kv")
    return dataclasses.replace(benchmark, model=model)


def query_functionals(benchmark: Benchmark, work: Path, names: list[str]) -> GradientMatrix:
    """Returns gradients of random functionals of the outputs for the queries, some for each."""
    model = UNetDenoiser(benchmark.model.network, benchmark.model.schedule, names)
    # A functional is keyed by the example: one query under many names.
    copies = [dataclasses.replace(q, id=f"{q.id}#{m}")
              for q in benchmark.queries for m in range(FUNCTIONALS)]  # fmt: skip
    return example_gradients(
        model, QueryExamples(copies), Draws(seed=1, n=16), measure="gauss_newton",
        cache=work / "gradients",
    )  # fmt: skip


def guided(benchmark: Benchmark, work: Path, measure: Measure, names: list[str]) -> GradientMatrix:
    """Returns the gradients of the queries' guided predictions, in some of the parameters."""
    model = UNetDenoiser(benchmark.model.network, benchmark.model.schedule, names)
    null = benchmark.model.encode_prompts([""])[0]
    scale = benchmark.queries[0].provenance["guidance_scale"]
    return example_gradients(
        GuidedDenoiser(model, null, scale), QueryExamples(benchmark.queries), Draws(seed=1, n=128),
        measure=measure, cache=work / "gradients",
    )  # fmt: skip


def without_captions(
    benchmark: Benchmark, work: Path, measure: Measure, names: list[str]
) -> GradientMatrix:
    """Returns the gradients of the examples with the empty caption, as a tenth of the training
    saw them."""
    model = UNetDenoiser(benchmark.model.network, benchmark.model.schedule, names)
    data, null = benchmark.data, benchmark.model.encode_prompts([""])
    rows = list(range(len(data.ids)))
    empty = EncodedDataset(data.ids, data.latents(rows), null, [[0]] * len(rows))
    return example_gradients(
        model, empty, Draws(seed=0, n=8), measure=measure, cache=work / "gradients"
    )


@dataclasses.dataclass(frozen=True)
class NoisePart:
    """Those of some draws that lie in a part of the noise schedule.

    Attributes:
        draws: stratified, so that their timesteps rise.
        first, last: where the part begins and ends, as shares of the schedule.
    """

    draws: Draws
    first: float
    last: float

    @property
    def n(self) -> int:
        return round(self.last * self.draws.n) - round(self.first * self.draws.n)

    def of(
        self, example_id: str, shape: tuple[int, ...], caption: int = 0, flipped: bool = False
    ) -> tuple[Tensor, Tensor]:
        part = slice(round(self.first * self.draws.n), round(self.last * self.draws.n))
        timesteps, noise = self.draws.of(example_id, shape, caption, flipped)
        return timesteps[part], noise[part]


Pair = tuple[GradientMatrix, GradientMatrix]
"""Of examples, and of queries."""


def mixed(parts: list[tuple[float, Pair]]) -> Pair:
    """Returns the weighted sums of gradients of examples and of queries."""
    found = []
    for side in (0, 1):
        first = parts[0][1][side]
        shards = [
            sum(weight * pair[side].shards[i] for weight, pair in parts)
            for i in range(len(first.shards))
        ]
        found.append(dataclasses.replace(first, shards=shards))
    return found[0], found[1]


def by_noise(
    benchmark: Benchmark, work: Path, measure: Measure, examples: GradientMatrix,
    queries: GradientMatrix,
) -> dict[str, Pair]:  # fmt: skip
    """Splits the gradients of examples and queries by the noise of their draws."""
    model = UNetDenoiser(benchmark.model.network, benchmark.model.schedule, examples.names)
    asked = QueryExamples(benchmark.queries)

    def of(first: float, last: float) -> Pair:
        return (
            example_gradients(model, benchmark.data, NoisePart(EXAMPLE_DRAWS, first, last),
                              measure=measure, cache=work / "gradients"),
            example_gradients(model, asked, NoisePart(QUERY_DRAWS, first, last), measure=measure,
                              cache=work / "gradients"),
        )  # fmt: skip

    every, little, most = (examples, queries), of(0, 0.5), of(0.75, 1)
    # The mean over all draws is the mean of the parts'.
    medium = mixed([(4, every), (-2, little), (-1, most)])
    much = mixed([(2, every), (-1, little)])
    return {"little noise": little, "medium noise": medium, "most noise": most, "much noise": much}


def journeys(
    benchmark: Benchmark, work: Path, measure: Measure, names: list[str]
) -> GradientMatrix:
    """Returns the gradients of the queries along their generation, in some of the parameters."""
    pipeline = benchmark.model.pipeline
    model = UNetDenoiser(benchmark.model.network, benchmark.model.schedule, names, pipeline)
    path = work / "gradients" / f"journeys-{measure}.npy"
    if not path.is_file():
        rows = journey_gradients(model, benchmark.queries, measure=measure).shards[0]
        write_atomically(path, lambda p: save_array(p, rows))
    width = sum(p.numel() for p in model.parameters.values())
    shapes = [tuple(p.shape) for p in model.parameters.values()]
    rows = load_array(path, (len(benchmark.queries), width))
    return GradientMatrix([q.id for q in benchmark.queries], list(model.parameters), shapes, [rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--measures", nargs="*", default=["loss", "output_norm", "gauss_newton"])
    parser.add_argument("--second-seed", action="store_true", help="of the model full-1 instead")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    benchmark = load_benchmark(arguments.work / "encoded", "all")
    for measure in arguments.measures:
        if arguments.second_seed:
            matrices(second_seed(benchmark, arguments.work), arguments.work, measure, SEED_DRAWS)
        else:
            matrices(benchmark, arguments.work, measure)


if __name__ == "__main__":
    main()
