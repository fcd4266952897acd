"""Scores the queries of the twemoji benchmark by every first-order method: python
benchmarks/twemoji/score.py WORK

Writes WORK/scores/METHOD.npy, [Q, N] float64, higher is more influential.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from gradients import matrices

from unsee.curvature.diagonal import DiagonalFisher
from unsee.curvature.kfac import EKFAC, KFAC, kronecker_covariances
from unsee.draws import Draws
from unsee.evaluation.twemoji import Benchmark, load_benchmark
from unsee.gradients import per_example_gradients
from unsee.methods.example_gradients import GradientMatrix, Measure
from unsee.methods.forward import gather
from unsee.methods.influence import influence_scores
from unsee.methods.similarity import similarity_scores
from unsee.methods.trak import trak_kernel, trak_scores
from unsee.methods.unlearning import fit_diagonal_fisher
from unsee.models.unet import UNetDenoiser

Scored = Iterator[tuple[str, np.ndarray]]
"""(method, scores [N, Q]) one after another."""

DAMPINGS = (0.01, 0.1, 1.0, 10.0)
RIDGES = (1e-2, 1e-1, 1.0, 10.0)
FIT_EXAMPLES, FIT_DRAWS = 512, Draws(seed=20, n=8)


def batches(
    benchmark: Benchmark, draws: Draws, examples: int = 8, averaged: bool = False
) -> Iterator[Callable[[], torch.Tensor]]:
    """Losses of a spread sample of the members, for the fit of a curvature."""
    rows = np.flatnonzero(benchmark.members)
    rows = rows[np.linspace(0, len(rows) - 1, FIT_EXAMPLES).astype(int)]
    for first in range(0, len(rows), examples):
        jobs = [(0, int(r), 0) for r in rows[first : first + examples]]
        latents, text, t, e = gather(benchmark.data, draws, jobs)
        # One row for each draw: hooks need a draw's own keys and values.
        latents, text = (x.repeat_interleave(draws.n, 0) for x in (latents, text))
        row = (latents, text, t.flatten()[:, None], e.flatten(0, 1)[:, None])
        shape = (len(jobs), draws.n) if averaged else (-1,)
        yield lambda row=row, shape=shape: benchmark.model.loss(*row)[:, 0].reshape(shape)


def curvatures(benchmark: Benchmark, gradients: GradientMatrix, kv: list[str]) -> dict:
    """Fits every curvature of the K and V weights; `gradients` are the examples' averaged ones."""
    model = benchmark.model
    parameters = {n: model.parameters[n] for n in kv}
    keys = [n for n in kv if "to_k" in n]
    members = torch.from_numpy(np.flatnonzero(benchmark.members))
    found: dict = {"identity": None}
    narrow = UNetDenoiser(model.network, model.pipeline.scheduler, kv)
    found["diagonal per draw"] = fit_diagonal_fisher(narrow, benchmark.data, Draws(seed=21, n=2))
    squares = {n: gradients.of(n)[members].double().square().mean(0) for n in kv}
    found["diagonal averaged"] = DiagonalFisher(squares, len(members))
    with narrow.gradients_on():
        for kind in ("per_draw", "averaged"):
            averaged = kind == "averaged"
            covariances = kronecker_covariances(
                model.network, parameters, batches(benchmark, FIT_DRAWS, averaged=averaged),
                kind, centre_inputs=keys,
            )  # fmt: skip
            found[f"K-FAC {kind}"] = KFAC.fit(covariances)
            rows = (
                ({n: gradients.of(n)[members]} for n in kv) if averaged else
                (per_example_gradients(model.network, parameters, loss)
                 for loss in batches(benchmark, FIT_DRAWS))
            )  # fmt: skip
            found[f"EK-FAC {kind}"] = EKFAC.fit(covariances, rows)
            if averaged:
                basis = covariances
    found["basis"] = basis
    return found


def kv_names(gradients: GradientMatrix) -> list[str]:
    """Returns the names of the cross-attention's key and value weights."""
    return [n for n in gradients.names if ".attn2." in n and ("to_k" in n or "to_v" in n)]


def influence(benchmark: Benchmark, work: Path) -> Scored:
    """Influence functions on K and V, each curvature and damping."""
    examples_all, queries_all = matrices(benchmark, work, "loss")
    kv = kv_names(examples_all)
    examples, queries = examples_all.only(kv), queries_all.only(kv)
    found = curvatures(benchmark, examples, kv)
    basis = found.pop("basis")
    for name, curvature in found.items():  # for unlearn.py
        if curvature is not None:
            curvature.save(work / "curvature" / f"{name}.safetensors")
    if list((work / "gradients").glob("gradients-gauss_newton-*")):
        sampled = matrices(benchmark, work, "gauss_newton")[0].only(kv)
        found["EK-FAC Gauss-Newton"] = EKFAC.fit(basis, ({n: sampled.of(n)} for n in kv))
    for name, curvature in found.items():
        for damping in DAMPINGS if curvature is not None else (0.0,):
            scores = influence_scores(examples, queries, curvature, damping)
            yield f"influence, {name}, damping {damping:g}", scores
    yield "renormalised gradients", influence_scores(examples, queries, None, normalise=True)


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


def outputs(benchmark: Benchmark, work: Path) -> Scored:
    """Gradients of the output's norm, as D-TRAK's, divided by EK-FAC instead of their kernel."""
    examples, queries = matrices(benchmark, work, "output_norm")
    kv = kv_names(examples)
    examples, queries = examples.only(kv), queries.only(kv)
    members = torch.from_numpy(np.flatnonzero(benchmark.members))
    basis = EKFAC.load(work / "curvature" / "EK-FAC averaged.safetensors")
    values = {}
    for n in kv:
        rotated = basis.rotate({n: examples.of(n)[members]})[n]
        values[n] = rotated.double().square().mean(0)
    curvature = dataclasses.replace(basis, values=values)
    for damping in DAMPINGS:
        scores = influence_scores(examples, queries, curvature, damping)
        yield f"output norm, EK-FAC, damping {damping:g}", scores


def combined(work: Path) -> Scored:
    """Sums of standardised scores: what the query's loss says, and what its output says."""
    for damping in (0.1, 1.0):
        loss = np.load(work / "scores" / f"influence, EK-FAC averaged, damping {damping:g}.npy")
        for other in ("D-TRAK, K and V, ridge 1", "output norm, EK-FAC, damping 1"):
            output = np.load(work / "scores" / f"{other}.npy")
            parts = [s / s.std(1, keepdims=True) for s in (loss, output)]
            name = other.rsplit(",", 1)[0]
            yield f"EK-FAC averaged + {name}, damping {damping:g}", sum(parts).T


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
    parser.add_argument(
        "--methods",
        nargs="*",
        default=["similarity", "influence", "trak", "d-trak", "output", "combined"],
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    benchmark = load_benchmark(arguments.work / "encoded", "all")
    out = arguments.work / "scores"
    out.mkdir(exist_ok=True)
    started = time.monotonic()
    work = arguments.work
    families = {
        "similarity": lambda: similarities(benchmark),
        "influence": lambda: influence(benchmark, work),
        "trak": lambda: kernels(benchmark, work, "loss"),
        "output": lambda: outputs(benchmark, work),
        "combined": lambda: combined(work),
        "d-trak": lambda: kernels(benchmark, work, "output_norm"),
    }
    for method, scores in itertools.chain.from_iterable(families[m]() for m in arguments.methods):
        np.save(out / f"{method}.npy", scores.T)
        print(f"{time.monotonic() - started:6.0f} s  {method}", flush=True)


if __name__ == "__main__":
    main()
