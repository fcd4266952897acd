"""Leave-K-out on the twemoji benchmark: python benchmarks/twemoji/leave_out.py WORK

Trains the benchmark's model again without the K examples that a method names for a query, and
without as many random ones, which all queries share; then measures every query. Random removal
comes first, then one query after another with all methods: a part of it is a smaller experiment.
A training that was killed goes on at its checkpoint; what is measured is not trained again.
Prints the table of what is there; with `--limit 0` it only does that.
"""

from __future__ import annotations

import argparse
import multiprocessing
import shlex
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from judge import stored
from measure import DRAWS, network, origin
from tqdm.auto import tqdm
from train import train_one

from unsee.evaluation.benchmark import Run, fingerprint_of
from unsee.evaluation.deviation import measure_outcome
from unsee.evaluation.leave_out import (
    FULL,
    TOGETHER,
    Removal,
    count_of,
    leave_out_differences,
    leave_out_effects,
    plan_removals,
    plan_together,
    table_of,
    table_of_differences,
)
from unsee.evaluation.twemoji import Benchmark, load_benchmark, shipped
from unsee.files import write_atomically

METHODS = (
    "EK-FAC averaged + output norm, EK-FAC, damping 0.1",
    "output norm, EK-FAC, damping 0.1",
    "influence, EK-FAC averaged, damping 1",
    "influence, diagonal per draw, damping 0.01",
)
"""Names in WORK/scores (without .npy) or WORK/unlearned."""

Row = dict[str, Any]


def asked_queries(benchmark: Benchmark, count: int) -> list[int]:
    """Returns judged queries, of training captions and new ones in turn."""
    judged = np.flatnonzero(~benchmark.tuning)
    half = len(judged) // 2
    pairs = zip(judged[:half], judged[half:], strict=True)
    return [int(q) for pair in pairs for q in pair][:count]


def run_name(removal: Removal) -> str:
    """A method that has been scored anew may name other examples: then it is another run."""
    return f"{removal.name}-{fingerprint_of(removal.ids)[:8]}"


def planned(benchmark: Benchmark, work: Path, methods: list[str], k: int, count: int,
            random: int, together: bool) -> list[Removal]:  # fmt: skip
    """Returns the trainings of one K; decoys in a ranking are passed over."""
    found = stored(work, benchmark)
    ids = np.array(benchmark.data.ids)
    orders: dict[str, dict[str, list[str]]] = {}
    for method in methods:
        if method not in found:
            raise SystemExit(f"no scores of {method!r} in {work}; there are: {', '.join(found)}")
        orders[method] = {}
        for q in asked_queries(benchmark, count):
            values, query = found[method][q], benchmark.queries[q].id
            if not np.isfinite(values[benchmark.members]).all():
                raise SystemExit(f"{method!r} has no scores of {query}")
            best = np.argsort(-values, kind="stable")
            orders[method][query] = ids[best[benchmark.members[best]]].tolist()
    plan = plan_together if together else plan_removals
    return plan(orders, ids[benchmark.members].tolist(), k, random=random)


@cache  # once in each process
def benchmark_of(work: Path) -> Benchmark:
    return load_benchmark(work / "encoded", "all")


def measured(benchmark: Benchmark, **about: Any) -> list[Row]:
    """Returns a row for every query under the model as it is now."""
    return [{**about, "query": q.id, **asdict(measure_outcome(benchmark.model, q, DRAWS))}
            for q in benchmark.queries]  # fmt: skip


def train_and_measure(removal: Removal, k: int, work: Path, count: int) -> list[Row]:
    """Trains one model, unless it is there, and returns its rows."""
    torch.set_num_threads(1)
    benchmark = benchmark_of(work)
    gone = set(removal.ids)
    keep = tuple(int(r) for r in np.flatnonzero(benchmark.members)
                 if benchmark.data.ids[r] not in gone)  # fmt: skip
    name = run_name(removal)
    run = Run(f"left-out/{k}/{name}", keep, 0, 0)
    train_one(run, work)
    weights = network(work / run.name / "unet.safetensors").state_dict()
    benchmark.model.network.load_state_dict(weights)
    rows = measured(benchmark, run=name, method=removal.method, k=k, removed_for=removal.query)
    if removal.query == TOGETHER:  # another experiment than query by query, of the same method
        asked = {benchmark.queries[q].id for q in asked_queries(benchmark, count)}
        method = f"{removal.method}, {TOGETHER}"
        rows = [{**r, "method": method, "removed_for": r["query"]}
                for r in rows if r["query"] in asked]  # fmt: skip
    return rows


def earlier_commands(out: Path) -> list[str]:
    """Returns the commands that made the rows that are there."""
    if not out.is_file():
        return []
    about = pq.read_schema(out).metadata or {}
    return about.get(b"commands", b"").decode().splitlines()


def command(arguments: argparse.Namespace) -> str:
    """Returns how these removals are made again, wherever the folder is."""
    words = ["python", "benchmarks/twemoji/leave_out.py", "WORK", "--methods", *arguments.methods,
             "--k", *arguments.k, "--queries", str(arguments.queries),
             "--random", str(arguments.random)]  # fmt: skip
    return shlex.join(words + ["--together"] * arguments.together)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path, help="the folder that train.py and score.py filled")
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--k", nargs="*", default=["2%"], help="numbers, or shares of the members")
    parser.add_argument("--queries", type=int, default=10, help="judged queries")
    parser.add_argument("--random", type=int, default=4, help="random removals for each K")
    parser.add_argument(
        "--together", action="store_true",
        help="one training for each method: K examples are removed for all queries at once",
    )  # fmt: skip
    parser.add_argument("--limit", type=int, help="trainings at most")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, default=shipped() / "left_out.parquet")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    work, out = arguments.work, arguments.out
    benchmark = benchmark_of(work)
    metadata = origin(benchmark, *earlier_commands(out), command(arguments))
    rows: list[Row] = pq.read_table(out).to_pylist() if out.is_file() else []
    done = {(r["k"], r["run"]) for r in rows}
    todo = []
    for k in (count_of(text, int(benchmark.members.sum())) for text in arguments.k):
        plan = planned(benchmark, work, arguments.methods, k, arguments.queries,
                       arguments.random, arguments.together)  # fmt: skip
        todo += [(removal, k) for removal in plan if (k, run_name(removal)) not in done]
    print(f"{len(done)} models are measured, {len(todo)} are to train")

    def add(new: list[Row]) -> None:
        rows.extend(new)
        table = pa.Table.from_pylist(rows).replace_schema_metadata(metadata)
        write_atomically(out, lambda path: pq.write_table(table, path))

    if todo[: arguments.limit] and (0, FULL) not in done:
        add(measured(benchmark, run=FULL, method=FULL, k=0, removed_for=""))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.processes, mp_context=context) as pool:
        futures = [pool.submit(train_and_measure, removal, k, work, arguments.queries)
                   for removal, k in todo[: arguments.limit]]  # fmt: skip
        for future in tqdm(as_completed(futures), total=len(futures), unit="model"):
            if (error := future.exception()) is not None:
                print(f"a training failed, the others go on: {error!r}", flush=True)
            else:
                add(future.result())
    print("\n".join(table_of(leave_out_effects(rows))))
    print("\n".join(table_of_differences(leave_out_differences(rows))))


if __name__ == "__main__":
    main()
