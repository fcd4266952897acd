"""What larger steps add to first order, and how well probes know it: python
benchmarks/twemoji/second_order.py WORK

For steps δ that unlearn a query along EK-FAC, and some examples, by differences in float64: the
whole second order of an example's loss, (L(θ+δ) + L(θ-δ) - 2 L(θ)) / 2; its Gauss-Newton part,
‖Jδ‖²/d, from the outputs at θ+δ and θ-δ; what is left is the curvature of the residual. Then
estimates of the Gauss-Newton part from gradients p of random functionals of the output: ½ (p·δ)²,
with functionals of each example's own or the same for all, and ½ Σ δ² p² element by element.
Writes second_order.json. Needs the curvatures that score.py leaves in WORK.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from unsee.curvature.kfac import EKFAC
from unsee.data.batches import gather
from unsee.draws import Draws
from unsee.evaluation.metrics import spearman
from unsee.evaluation.twemoji import Benchmark, load_benchmark
from unsee.index.factors import gauss_newton
from unsee.methods.unlearning import ForwardAbU, Weights

RISES = (0.05, 0.1, 0.25)
DRAWS, QUERY_DRAWS = Draws(seed=0, n=8), Draws(seed=1, n=64)
PROBES = 8
"""Of each kind; an index has two."""

Parts = dict[str, np.ndarray]
"""What a step does to each example, [examples]."""


def losses_and_outputs(benchmark: Benchmark, rows: list[int]) -> tuple[np.ndarray, Tensor]:
    """Returns losses [examples] and outputs [examples, draws, C, h, w] with the weights as now."""
    losses, outputs = [], []
    with torch.no_grad():
        for row in rows:
            found, targets = benchmark.model.predict(*gather(benchmark.data, DRAWS, [(0, row, 0)]))
            losses.append(float((found - targets).square().mean()))
            outputs.append(found[0])
    return np.array(losses), torch.stack(outputs)


def changed_by(benchmark: Benchmark, rows: list[int], step: Weights) -> Parts:
    """Returns the change of each example's loss, and its parts, by symmetric differences."""
    model = benchmark.model
    start = {n: p.detach().clone() for n, p in model.parameters.items()}
    here, _ = losses_and_outputs(benchmark, rows)
    with model.replaced({n: p + step[n] for n, p in start.items()}):
        there, forward = losses_and_outputs(benchmark, rows)
    with model.replaced({n: p - step[n] for n, p in start.items()}):
        back, backward = losses_and_outputs(benchmark, rows)
    moved = (forward - backward) / 2
    return {
        "change": there - here, "first": (there - back) / 2, "second": (there + back) / 2 - here,
        "gauss-newton": moved.square().flatten(1).mean(1).numpy(),
    }  # fmt: skip


def probes(benchmark: Benchmark, row: int, shared: bool) -> Tensor:
    """Returns gradients [PROBES, P] float32 of random functionals of one example's outputs."""
    model = benchmark.model
    generator = torch.Generator().manual_seed(7 if shared else 1000 + row)
    batch = gather(benchmark.data, DRAWS, [(0, row, 0)])
    found = []
    with model.gradients_on():
        outputs, _ = model.predict(*batch)
        for _ in range(PROBES):
            functional = torch.randn(outputs.shape, generator=generator)
            value = gauss_newton(outputs, functional).sum() / DRAWS.n**0.5
            got = torch.autograd.grad(value, list(model.parameters.values()), retain_graph=True)
            found.append(torch.cat([g.flatten() for g in got]).float())
    return torch.stack(found)


def estimates(own: Tensor, same: Tensor, step: Tensor) -> Parts:
    """Returns estimates of the Gauss-Newton part from probes [examples, PROBES, P]."""
    of_own, of_same = (0.5 * (p @ step).square() for p in (own, same))  # [examples, PROBES]
    by_element = 0.5 * torch.stack([p.square().mean(0) @ step.square() for p in own])
    return {
        "two probes": of_own[:, :2].mean(1).numpy(),
        f"{PROBES} probes": of_own.mean(1).numpy(),
        "two shared probes": of_same[:, :2].mean(1).numpy(),
        f"{PROBES} shared probes": of_same.mean(1).numpy(),
        "element by element": by_element.numpy(),
    }


def described(parts: Parts, guessed: Parts) -> dict[str, float]:
    """Returns ratios of means over the examples, and rank correlations."""
    exact, change, first = parts["gauss-newton"], parts["change"], parts["first"]
    found = {
        "gauss-newton over second": exact.mean() / parts["second"].mean(),
        "second over first": np.abs(parts["second"]).mean() / np.abs(first).mean(),
        "gauss-newton ~ second": spearman(exact, parts["second"]),
        "first ~ change": spearman(first, change),
        "first + gauss-newton ~ change": spearman(first + exact, change),
    }
    for name, guess in guessed.items():
        found[f"{name}, over gauss-newton"] = guess.mean() / exact.mean()
        found[f"{name} ~ gauss-newton"] = spearman(guess, exact)
        found[f"first + {name} ~ change"] = spearman(first + guess, change)
    return {name: float(value) for name, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--examples", type=int, default=80)
    parser.add_argument("--queries", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "second_order.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    benchmark = load_benchmark(arguments.work / "encoded")
    benchmark.model.network.double()
    curvature = EKFAC.load(arguments.work / "curvature" / "EK-FAC averaged.safetensors")
    last = len(benchmark.data.ids) - 1
    rows = [int(r) for r in np.linspace(0, last, arguments.examples).round()]
    own, same = (
        torch.stack([probes(benchmark, row, shared) for row in tqdm(rows, desc="probes")])
        for shared in (False, True)
    )
    report: dict = {"examples": len(rows), "queries": arguments.queries, "draws": DRAWS.n}
    places = np.linspace(0, len(benchmark.queries) - 1, arguments.queries).round().astype(int)
    for rise in RISES:
        method = ForwardAbU(
            benchmark.model, benchmark.data, curvature, rise=rise, query_draws=QUERY_DRAWS
        )
        each = []
        for place in tqdm(places, desc=f"rise {rise:g}"):
            weights = method.unlearn(benchmark.queries[place]).weights
            step = {n: w - benchmark.model.parameters[n].detach() for n, w in weights.items()}
            flat = torch.cat([s.flatten() for s in step.values()]).float()
            each.append(described(changed_by(benchmark, rows, step), estimates(own, same, flat)))
        report[f"rise {rise:g}"] = {
            name: [float(np.mean([e[name] for e in each])), float(np.std([e[name] for e in each]))]
            for name in each[0]
        }
        print(json.dumps(report[f"rise {rise:g}"], indent=1), flush=True)
    arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
