"""Scores the judged queries of the twemoji benchmark by MUCS: python benchmarks/twemoji/mucs.py
WORK

Published: the MLPs of the transformer blocks and the embedding of the text are trained, with a
tenth of the training's learning rate; draws are of noise levels of 0.31 and more. Resumes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from recipe import BATCH, optimization
from tqdm.auto import tqdm
from unlearn import wanted

from unsee.evaluation.twemoji import load_benchmark
from unsee.methods.mucs import MUCS, SharedDraws

SELECTION = ("*.ff.net.*weight", "*attn2.to_k.weight", "*attn2.to_v.weight")
"""This model has no embedding of the text but the keys and values."""
LEAST_NOISE = 0.31
"""Standard deviation of the noise, for a signal of one."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--draws", type=int, default=12)
    parser.add_argument("--queries", type=int, default=20, help="at most")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    benchmark = load_benchmark(arguments.work / "encoded", SELECTION)
    members = [i for i, m in zip(benchmark.data.ids, benchmark.members, strict=True) if m]
    levels = (1 / benchmark.model.schedule.alphas_cumprod - 1).sqrt()
    method = MUCS(
        benchmark.model, benchmark.data, optimization(len(members), 0).learning_rate / 10,
        retain=benchmark.data.select(members), batch_size=BATCH,
        draws=SharedDraws(n=arguments.draws, first=int((levels < LEAST_NOISE).sum())),
        cache=arguments.work / "losses",
    )  # fmt: skip
    for query in tqdm(wanted(benchmark, arguments.queries, tuning=False)):
        path = arguments.work / "unlearned" / "MUCS" / f"{query.id}.parquet"
        if not path.is_file():
            method.attribute(query).save(path)


if __name__ == "__main__":
    main()
