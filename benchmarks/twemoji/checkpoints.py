"""Scores the benchmark's queries at checkpoints along the training: python
benchmarks/twemoji/checkpoints.py WORK

Trains the benchmark's model once more, keeps its averaged weights at a quarter, half and three
quarters of the steps, and builds an index of each. Writes WORK/scores/METHOD.npy for judge.py: the
default of AbU at each checkpoint, its mean over all of them and the finished model, over the one
halfway and the finished model, and TracIn (Pruthi et al., NeurIPS 2020): products of gradients,
weighted by the learning rate.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import cast

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from recipe import RECIPE, optimization
from safetensors.torch import load_file
from train import encoded

from index import DRAWS
from unsee.draws import Draws
from unsee.evaluation.benchmark import plan
from unsee.evaluation.twemoji import Benchmark, build_model, load_benchmark
from unsee.index.index import Index
from unsee.methods.indexed import AbU, query_draws_for
from unsee.training.loop import Optimization, snapshot_path
from unsee.training.text_to_image import build_scheduler, build_unet, train_text_to_image

SHARES = (0.25, 0.5, 0.75)
"""Of the steps, where a checkpoint is kept; the finished model is the last."""

DAMPING = 0.1


def trained(work: Path) -> Optimization:
    """Trains the model on all members, unless it is there, and returns how."""
    data, null_text = encoded(work)
    run = plan(data.ids)[0]
    how = optimization(len(run.keep), run.seed)
    how = dataclasses.replace(how, snapshots=tuple(round(how.steps * s) for s in SHARES))
    kept = set(run.keep)
    out = [i for row, i in enumerate(data.ids) if row not in kept]
    train_text_to_image(RECIPE, data, null_text, how, work / "checkpoints", leave_out=out)
    return how


def model_at(work: Path, step: int) -> torch.nn.Module:
    unet = build_unet(RECIPE, 8, 8, 384)
    unet.load_state_dict(load_file(snapshot_path(work / "checkpoints", step)))
    return unet.eval()


def scored(benchmark: Benchmark, index: Index) -> tuple[np.ndarray, np.ndarray]:
    """Returns the default's scores and the products of loss gradients, [Q, N] each."""
    draws = query_draws_for(index)
    default = AbU(index, "ekfac", DAMPING, query_draws=draws)
    plain = AbU(index, "identity", 0.0, ["factors"], query_draws=draws)
    asked = [plain.attribute_many(benchmark.queries), default.attribute_many(benchmark.queries)]
    # Scores are in units of the loss: without the size of the step they are plain products.
    products = [s.values / s.settings["step_sizes"]["factors"] for s in asked[0]]
    return np.stack([s.values for s in asked[1]]), np.stack(products)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    work = parser.parse_args().work
    torch.set_num_threads(1)
    how = trained(work)
    benchmark = load_benchmark(work / "encoded")
    models = {step: model_at(work, step) for step in how.snapshots}
    parts, products = [], []
    for step in (*models, how.steps):
        model, name = benchmark.model, f"index-{DRAWS}"  # the finished one, as index.py has it
        if step in models:
            unet = cast(UNet2DConditionModel, models[step])
            model = build_model(unet, build_scheduler(RECIPE), "cross-attn-kv")
            name += f"-step-{step}"
        index = Index.build(work / name, model, benchmark.data, draws=Draws(0, DRAWS))
        default, product = scored(benchmark, index)
        parts.append(default / default.std(1, keepdims=True))
        products.append(product * how.learning_rate_factor(step - 1))
        share = step / how.steps
        np.save(work / "scores" / f"index at {share:.0%} of the training, damping {DAMPING:g}.npy",
                default)  # fmt: skip
    for chosen in (parts, [parts[SHARES.index(0.5)], parts[-1]]):
        name = f"index, {len(chosen)} checkpoints, damping {DAMPING:g}"
        np.save(work / "scores" / f"{name}.npy", np.mean(chosen, axis=0))
    np.save(work / "scores" / f"TracIn, {len(parts)} checkpoints.npy", np.sum(products, axis=0))


if __name__ == "__main__":
    main()
