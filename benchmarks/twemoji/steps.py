"""Holds first order against real unlearning, by the size of the step: python
benchmarks/twemoji/steps.py WORK

Scores some examples for each query both ways, with the index that index.py left in WORK, and
writes the rank correlations to steps.json. `shared`: unlearning and first order see the same
timesteps and noise, of examples and of the query, so that they differ by the step alone;
`disjoint`: each has its own. Resumes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from unsee.draws import Draws
from unsee.evaluation.metrics import spearman
from unsee.evaluation.twemoji import load_benchmark
from unsee.files import write_atomically
from unsee.index.fit import CurvatureName
from unsee.index.index import Index
from unsee.methods.indexed import AbU
from unsee.methods.two_stage import gathered
from unsee.methods.unlearning import ForwardAbU
from unsee.query import Query

RISES = (0.01, 0.05, 0.25)
CURVATURES: tuple[CurvatureName, ...] = ("diagonal_per_draw", "ekfac")
DAMPING = 0.1
DRAWS = {
    "shared": (Draws(seed=0, n=16), Draws(seed=1, n=64)),
    "disjoint": (Draws(seed=101, n=16), Draws(seed=102, n=64)),
}
"""Of examples and of the query; the first pair is that of the index and of first order."""


def compared(
    index: Index, kind: CurvatureName, queries: list[Query], ids: list[str], known: dict, out: Path
) -> None:
    """Adds the correlations of one curvature to `known`, query by query."""
    first = AbU(index, kind, DAMPING, ["factors"], query_draws=DRAWS["shared"][1])
    data, _ = gathered(index, ids)
    for query in tqdm(queries, desc=kind):
        expected = None
        for which, (draws, query_draws) in DRAWS.items():
            for rise in RISES:
                key = f"{kind}, {which}, rise {rise:g}"
                if query.id in known.setdefault(key, {}):
                    continue
                if expected is None:
                    expected = first.attribute(query, ids).values
                engine = ForwardAbU(
                    index.model, data, index.curvature(kind), rise=rise, damping=DAMPING,
                    draws=draws, query_draws=query_draws, cache=out.parent / "steps",
                )  # fmt: skip
                try:
                    found = engine.attribute(query).values
                except ValueError as error:  # a step that cannot be taken is a result too
                    print(f"{key}, {query.id}: {error}")
                    continue
                known[key][query.id] = float(spearman(found, expected))
                text = json.dumps(known, indent=1) + "\n"
                write_atomically(out, lambda p, t=text: p.write_text(t, encoding="utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--examples", type=int, default=120, help="that are scored")
    parser.add_argument("--queries", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "steps.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    benchmark = load_benchmark(arguments.work / "encoded")
    index = Index.open(arguments.work / "index-16", benchmark.model)
    chosen = np.linspace(0, len(index.ids) - 1, arguments.examples).round().astype(int)
    ids = [index.ids[i] for i in chosen]
    places = np.linspace(0, len(benchmark.queries) - 1, arguments.queries).round().astype(int)
    work = arguments.work / "steps.json"
    known = json.loads(work.read_text(encoding="utf-8")) if work.is_file() else {}
    for kind in CURVATURES:
        compared(index, kind, [benchmark.queries[i] for i in places], ids, known, work)
    report = {
        "examples": len(ids), "damping": DAMPING, "queries": len(places),
        "correlations": {
            key: {"mean": float(np.mean(r)), "deviation": float(np.std(r, ddof=1)),
                  "least": min(r), "queries": len(r)}
            for key, of in known.items() if len(r := list(of.values())) > 1
        },
    }  # fmt: skip
    arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for key, row in report["correlations"].items():
        print(f"| {key} | {row['mean']:.3f} | {row['deviation']:.3f} | {row['queries']} |")


if __name__ == "__main__":
    main()
