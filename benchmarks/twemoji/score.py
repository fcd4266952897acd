"""Scores the queries of the twemoji benchmark by every first-order method: python
benchmarks/twemoji/score.py WORK

Writes WORK/scores/METHOD.npy, [Q, N] float64, higher is more influential.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from curvatures import (
    Fitted,
    averaged,
    curvatures,
    diagonal,
    gauss_newton,
    kv_names,
    refitted,
)
from gradients import (
    SEED_DRAWS,
    by_noise,
    guided,
    journeys,
    matrices,
    query_functionals,
    second_seed,
    without_captions,
)

from unsee.curvature.diagonal import DiagonalFisher
from unsee.curvature.kfac import EKFAC
from unsee.evaluation.twemoji import Benchmark, load_benchmark
from unsee.methods.combine import combined_values, sharpened
from unsee.methods.example_gradients import GradientMatrix, Measure
from unsee.methods.influence import influence_scores, second_order_scores
from unsee.methods.similarity import similarity_scores
from unsee.methods.trak import trak_kernel, trak_scores

Scored = Iterator[tuple[str, np.ndarray]]
"""(method, scores [N, Q]) one after another."""

DAMPINGS = (0.001, 0.01, 0.1, 1.0, 10.0)
UNDAMPED = 0.0
"""Also of diagonals: the published update."""
RIDGES = (1e-2, 1e-1, 1.0, 10.0)
CAPTION_DROPOUT = 0.1
"""Of the benchmark's training."""


def keys_and_values(
    benchmark: Benchmark, work: Path, measure: Measure
) -> tuple[GradientMatrix, GradientMatrix]:
    """Returns the gradients of examples and queries in the keys and values of cross-attention."""
    examples, queries = matrices(benchmark, work, measure)
    kv = kv_names(examples)
    return examples.only(kv), queries.only(kv)


def damped(
    name: str, examples: GradientMatrix, queries: GradientMatrix, found: Mapping[str, Fitted | None]
) -> Scored:
    """Influence under each curvature and damping."""
    for kind, curvature in found.items():
        dampings = DAMPINGS if curvature is not None else (UNDAMPED,)
        if isinstance(curvature, DiagonalFisher):
            dampings = (UNDAMPED, *DAMPINGS)
        for damping in dampings:
            scores = influence_scores(examples, queries, curvature, damping)
            yield f"{name}, {kind}, damping {damping:g}", scores


def influence(benchmark: Benchmark, work: Path) -> Scored:
    """Influence functions on K and V, each empirical curvature and damping."""
    examples, queries = keys_and_values(benchmark, work, "loss")
    yield from damped("influence", examples, queries, curvatures(benchmark, work, examples))


def uncentred(benchmark: Benchmark, work: Path) -> Scored:
    """Influence functions whose factors do not know that softmax ignores what all keys share."""
    examples, queries = keys_and_values(benchmark, work, "loss")
    kfac, ekfac = averaged(benchmark, examples, centred=False)
    found = {"K-FAC averaged": kfac, "EK-FAC averaged": ekfac}
    yield from damped("influence, keys not centred", examples, queries, found)


def gauss_newtons(benchmark: Benchmark, work: Path) -> Scored:
    """Gradients of the loss, and of the output's norm, under the Gauss-Newton matrix; and the
    second-order term, of which the same sampled gradients are an estimate."""
    examples_all, _ = matrices(benchmark, work, "gauss_newton")
    sampled = examples_all.only(kv_names(examples_all))
    found = gauss_newton(benchmark, work, sampled)
    for name, measure in (("influence", "loss"), ("output norm", "output_norm")):
        examples, queries = keys_and_values(benchmark, work, measure)
        yield from damped(name, examples, queries, found)
    _, queries = keys_and_values(benchmark, work, "loss")
    steps = {"EK-FAC Gauss-Newton": found["EK-FAC Gauss-Newton"], "EK-FAC averaged": EKFAC.load(
        work / "curvature" / "EK-FAC averaged.safetensors")}  # fmt: skip
    functionals = query_functionals(benchmark, work, sampled.names)
    for (kind, curvature), damping in itertools.product(steps.items(), DAMPINGS):
        scores = second_order_scores(sampled, queries, curvature, damping)
        yield f"second order, {kind}, damping {damping:g}", scores
        # Whatever the query's loss says: how far its predictions move those for the example.
        scores = second_order_scores(sampled, functionals, curvature, damping)
        mean = scores.reshape(len(scores), len(benchmark.queries), -1).mean(2)
        yield f"mutual second order, {kind}, damping {damping:g}", mean


def renormalised(benchmark: Benchmark, work: Path) -> Scored:
    """TracIn's cosine, and RelatIF under EK-FAC."""
    examples, queries = keys_and_values(benchmark, work, "loss")
    yield "renormalised gradients", influence_scores(examples, queries, None, normalise="gradient")
    curvature = EKFAC.load(work / "curvature" / "EK-FAC averaged.safetensors")
    for damping in DAMPINGS:
        scores = influence_scores(examples, queries, curvature, damping, "gradient")
        yield f"renormalised, EK-FAC averaged, damping {damping:g}", scores
    for damping in (0.01, 0.1, 1.0):  # each example's gradient is divided by the curvature: slow
        for what, name in (("parameters", "theta-RelatIF"), ("loss", "l-RelatIF")):
            scores = influence_scores(examples, queries, curvature, damping, what)
            yield f"{name}, EK-FAC averaged, damping {damping:g}", scores


def kernels(benchmark: Benchmark, work: Path, measure: Measure) -> Scored:
    """TRAK (loss) or D-TRAK (output norm), of K and V and of all parameters."""
    name = "TRAK" if measure == "loss" else "D-TRAK"
    examples, queries = matrices(benchmark, work, measure)
    kv = kv_names(examples)
    for what, e, q in (
        ("K and V", examples.only(kv), queries.only(kv)),
        ("all parameters", examples, queries),
    ):
        kernel, cross = trak_kernel(e), e.products(q)
        for ridge in RIDGES:
            scores = trak_scores(kernel, cross, ridge, benchmark.members)
            yield f"{name}, {what}, ridge {ridge:g}", scores
            scores = trak_scores(kernel, cross, ridge, benchmark.members, own=False)
            yield f"{name} without own term, {what}, ridge {ridge:g}", scores


def outputs(benchmark: Benchmark, work: Path) -> Scored:
    """Gradients of the output's norm, as D-TRAK's, divided by EK-FAC instead of their kernel."""
    examples, queries = keys_and_values(benchmark, work, "output_norm")
    basis = EKFAC.load(work / "curvature" / "EK-FAC averaged.safetensors")
    curvature = refitted(basis, examples, benchmark.members)
    yield from damped("output norm", examples, queries, {"EK-FAC": curvature})


def along_journeys(benchmark: Benchmark, work: Path) -> Scored:
    """Journey-TRAK, and gradients along the journey under EK-FAC."""
    for measure in ("loss", "output_norm"):
        examples, _ = keys_and_values(benchmark, work, measure)
        queries = journeys(benchmark, work, measure, examples.names)
        name = "Journey-TRAK" if measure == "loss" else "Journey-D-TRAK"
        kernel, cross = trak_kernel(examples), examples.products(queries)
        for ridge in RIDGES:
            scores = trak_scores(kernel, cross, ridge, benchmark.members)
            yield f"{name}, K and V, ridge {ridge:g}", scores
        basis = EKFAC.load(work / "curvature" / "EK-FAC averaged.safetensors")
        found = {"EK-FAC": refitted(basis, examples, benchmark.members)}
        what = "influence" if measure == "loss" else "output norm"
        yield from damped(f"{what} along the journey", examples, queries, found)


def guidances(benchmark: Benchmark, work: Path) -> Scored:
    """The queries measured by their guided predictions."""
    basis = EKFAC.load(work / "curvature" / "EK-FAC averaged.safetensors")
    for measure, name in (("loss", "influence"), ("output_norm", "output norm")):
        examples, _ = keys_and_values(benchmark, work, measure)
        curvature = refitted(basis, examples, benchmark.members)
        asked = guided(benchmark, work, measure, examples.names)
        yield from damped(f"{name}, guided query", examples, asked, {"EK-FAC": curvature})
        if measure == "output_norm":
            kernel, cross = trak_kernel(examples), examples.products(asked)
            for ridge in RIDGES:
                scores = trak_scores(kernel, cross, ridge, benchmark.members)
                yield f"D-TRAK, guided query, K and V, ridge {ridge:g}", scores


def dropped(benchmark: Benchmark, work: Path) -> Scored:
    """The examples as training saw them: a tenth of the time without their caption."""
    basis = EKFAC.load(work / "curvature" / "EK-FAC averaged.safetensors")
    for measure, name in (("loss", "influence"), ("output_norm", "output norm")):
        examples, queries = keys_and_values(benchmark, work, measure)
        curvature = refitted(basis, examples, benchmark.members)
        empty = without_captions(benchmark, work, measure, examples.names)
        for damping in DAMPINGS:
            parts = [influence_scores(e, queries, curvature, damping) for e in (examples, empty)]
            scores = combined_values(parts, "plain", (1 - CAPTION_DROPOUT, CAPTION_DROPOUT))
            yield f"{name}, captions dropped, EK-FAC, damping {damping:g}", scores


BLOCKS = {
    "keys": "to_k", "values": "to_v", "down": "down_blocks", "middle": "mid_block",
    "up": "up_blocks",
}  # fmt: skip
"""Some of the layers, by a part of their names."""


def layers(benchmark: Benchmark, work: Path) -> Scored:
    """Some of the keys and values alone."""
    basis = EKFAC.load(work / "curvature" / "EK-FAC averaged.safetensors")
    for measure, name in (("loss", "influence"), ("output_norm", "output norm")):
        examples, queries = keys_and_values(benchmark, work, measure)
        curvature = refitted(basis, examples, benchmark.members)
        for what, part in BLOCKS.items():
            names = [n for n in examples.names if part in n]
            few = examples.only(names), queries.only(names)
            yield from damped(f"{name}, {what}", *few, {"EK-FAC": curvature})


def beyond(benchmark: Benchmark, work: Path) -> Scored:
    """More than keys and values: the weights of all linear layers under EK-FAC, all parameters
    under the diagonal, and sums of what the loss and the output say."""
    modules = benchmark.model.network.named_modules()
    linear = {f"{name}.weight" for name, m in modules if isinstance(m, torch.nn.Linear)}
    found: dict[str, list[tuple[str, np.ndarray]]] = {}
    basis: EKFAC | None = None
    for measure, name in (("loss", "influence"), ("output_norm", "output norm")):
        examples, queries = matrices(benchmark, work, measure)
        names = [n for n in examples.names if n in linear]
        few = examples.only(names), queries.only(names)
        basis = averaged(benchmark, few[0])[1] if basis is None else basis
        ekfac = refitted(basis, few[0], benchmark.members)
        pairs = (
            ("linear layers", damped(f"{name}, linear layers", *few, {"EK-FAC": ekfac})),
            ("all parameters", damped(
                f"{name}, all parameters", examples, queries,
                {"diagonal averaged": diagonal(examples, benchmark.members)},
            )),
        )  # fmt: skip
        for what, scored in pairs:
            for method, scores in scored:
                yield method, scores
                setting = method.rsplit(", ", 1)[1]
                found.setdefault(f"{what}, {setting}", []).append(scores)
    for what, parts in found.items():
        yield f"loss + output norm, {what}", combined_values(parts, "scaled")


def noise_levels(benchmark: Benchmark, work: Path) -> Scored:
    """Gradients of draws with little noise (the first half of the schedule), medium (the third
    quarter), most (the last) and much (medium and most); and little and much apart: a sum in which
    no gradient of one meets a gradient of the other."""
    basis = EKFAC.load(work / "curvature" / "EK-FAC averaged.safetensors")
    for measure, name in (("loss", "influence"), ("output_norm", "output norm")):
        parts = by_noise(benchmark, work, measure, *keys_and_values(benchmark, work, measure))
        fitted = {what: refitted(basis, e, benchmark.members) for what, (e, _) in parts.items()}
        for damping in DAMPINGS:
            found = {w: influence_scores(*pair, fitted[w], damping) for w, pair in parts.items()}
            found["noise levels apart"] = found["little noise"] + found["much noise"]
            for what, scores in found.items():
                yield f"{name}, {what}, EK-FAC, damping {damping:g}", scores


def seeds(benchmark: Benchmark, work: Path) -> Scored:
    """The same methods on a model of another seed, and the mean of both models' scores."""
    other = second_seed(benchmark, work)
    loss = matrices(other, work, "loss", SEED_DRAWS)
    basis = averaged(other, loss[0])[1]
    for damping in DAMPINGS:
        scores = influence_scores(*loss, basis, damping)
        yield from _with_first(work, "influence, EK-FAC averaged", f"damping {damping:g}", scores)
    output = matrices(other, work, "output_norm", SEED_DRAWS)
    curvature = refitted(basis, output[0], benchmark.members)
    for damping in DAMPINGS:
        scores = influence_scores(*output, curvature, damping)
        yield from _with_first(work, "output norm, EK-FAC", f"damping {damping:g}", scores)
    kernel, cross = trak_kernel(output[0]), output[0].products(output[1])
    for ridge in RIDGES:
        scores = trak_scores(kernel, cross, ridge, benchmark.members)
        yield from _with_first(work, "D-TRAK, K and V", f"ridge {ridge:g}", scores)


def _with_first(work: Path, name: str, setting: str, scores: np.ndarray) -> Scored:
    first = np.load(work / "scores" / f"{name}, {setting}.npy").T
    yield f"{name}, second seed, {setting}", scores
    yield f"{name}, two seeds, {setting}", combined_values([first, scores])


LOSS, MUTUAL = (
    f"{what}, EK-FAC averaged, damping {{0}}" for what in ("influence", "mutual second order")
)
DTRAK_KV, DTRAK_ALL = "D-TRAK, K and V, ridge 1", "D-TRAK, all parameters, ridge 0.1"
OUTPUT = "output norm, EK-FAC, damping 1"
SUMS = {
    # the damping is tuned; ridges and OUTPUT's damping are those that are best by themselves
    "EK-FAC averaged + D-TRAK, K and V": (LOSS, DTRAK_KV),
    "EK-FAC averaged + output norm, EK-FAC": (LOSS, OUTPUT),
    "EK-FAC averaged + D-TRAK, all parameters": (LOSS, DTRAK_ALL),
    "EK-FAC averaged + D-TRAK, both": (LOSS, DTRAK_KV, DTRAK_ALL),
    "EK-FAC averaged + mutual second order": (LOSS, MUTUAL),
    "EK-FAC averaged + D-TRAK, both + mutual second order": (LOSS, DTRAK_KV, DTRAK_ALL, MUTUAL),
    "Gauss-Newton: loss + output norm": (
        "influence, EK-FAC Gauss-Newton, damping {0}",
        "output norm, EK-FAC Gauss-Newton, damping {0}",
    ),
}

SHARPENED = (
    "influence, EK-FAC averaged", "influence, diagonal per draw", "output norm, EK-FAC",
    "D-TRAK, K and V", "D-TRAK, all parameters", "TRAK, K and V",
)  # fmt: skip
POWERS = (1.25, 1.5, 2.0)


def combined(work: Path) -> Scored:
    """Sums of scores: what the query's loss says, and what its output says."""
    for (name, parts), damping in itertools.product(SUMS.items(), (0.01, 0.1, 1)):
        loaded = [np.load(work / "scores" / f"{p.format(damping)}.npy").T for p in parts]
        yield f"{name}, damping {damping:g}", combined_values(loaded)
        yield f"{name}, ranks, damping {damping:g}", combined_values(loaded, "ranks")
        for power in POWERS:
            scores = combined_values(loaded, power=power)
            yield f"{name}, sharpened, damping {damping:g}, power {power:g}", scores


def sharper(work: Path) -> Scored:
    """Single methods to a power: the order of the examples stays, their sums over sets do not."""
    for name in SHARPENED:
        for path in sorted((work / "scores").glob(f"{name}, [dr]*.npy")):
            for power in POWERS:
                setting = path.stem.removeprefix(f"{name}, ")
                scores = sharpened(np.load(path).T, power)
                yield f"{name}, sharpened, {setting}, power {power:g}", scores


def similarities(benchmark: Benchmark) -> Scored:
    """Embedding similarity, and chance."""
    for what in ("latent", "pixel", "text"):
        scores = similarity_scores(what, benchmark.data, benchmark.images, benchmark.queries)
        yield f"similarity, {what}", scores
    generator = np.random.Generator(np.random.Philox(key=0))
    yield "random", generator.standard_normal((len(benchmark.data.ids), len(benchmark.queries)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--methods", nargs="*", help="some of the families below")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    work = arguments.work
    benchmark = load_benchmark(work / "encoded", "all")
    out = work / "scores"
    out.mkdir(exist_ok=True)
    started = time.monotonic()
    families = {
        "similarity": lambda: similarities(benchmark),
        "influence": lambda: influence(benchmark, work),
        "uncentred": lambda: uncentred(benchmark, work),
        "gauss-newton": lambda: gauss_newtons(benchmark, work),
        "renormalised": lambda: renormalised(benchmark, work),
        "trak": lambda: kernels(benchmark, work, "loss"),
        "d-trak": lambda: kernels(benchmark, work, "output_norm"),
        "output": lambda: outputs(benchmark, work),
        "journey": lambda: along_journeys(benchmark, work),
        "guided": lambda: guidances(benchmark, work),
        "dropped": lambda: dropped(benchmark, work),
        "layers": lambda: layers(benchmark, work),
        "beyond": lambda: beyond(benchmark, work),
        "noise": lambda: noise_levels(benchmark, work),
        "seeds": lambda: seeds(benchmark, work),
        "combined": lambda: combined(work),
        "sharpened": lambda: sharper(work),
    }
    chosen = [families[m]() for m in arguments.methods or families]
    for method, scores in itertools.chain.from_iterable(chosen):
        np.save(out / f"{method}.npy", scores.T)
        print(f"{time.monotonic() - started:6.0f} s  {method}", flush=True)


if __name__ == "__main__":
    main()
