"""Judges every score in WORK by the retrained models: python benchmarks/twemoji/judge.py WORK

Methods are tuned on one half of queries and subsets; on the other half the table reports them,
with intervals over queries and subsets. Writes results.json and a table in Markdown to OUT.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from unsee.evaluation.intervals import (
    FEWEST_RESAMPLED,
    lds_interval,
    mean_interval,
    paired_difference,
)
from unsee.evaluation.metrics import decoy_share, lds, noise_ceiling
from unsee.evaluation.twemoji import Benchmark, load_benchmark
from unsee.methods.base import Scores

FEWEST_QUERIES = 2
"""Of a row of the table: an interval over queries needs two."""

TOP = 50
"""Of which the decoy share is taken; a random ranking has a tenth."""


def stored(work: Path, benchmark: Benchmark) -> dict[str, np.ndarray]:
    """Returns method -> [Q, N] float64, NaN rows where a query was not scored."""
    found = {p.stem: np.load(p) for p in sorted((work / "scores").glob("*.npy"))}
    place = {i: row for row, i in enumerate(benchmark.data.ids)}
    for folder in sorted((work / "unlearned").glob("*")):
        values = np.full((len(benchmark.queries), len(place)), np.nan)
        for at, query in enumerate(benchmark.queries):
            if (path := folder / f"{query.id}.parquet").is_file():
                scores = Scores.load(path)
                values[at, [place[i] for i in scores.ids]] = scores.values
        found[folder.name] = values
    return found


def family(method: str) -> str:
    """Returns the method without what is tuned."""
    return method.rsplit(", damping", 1)[0].rsplit(", ridge", 1)[0]


def judged(benchmark: Benchmark, methods: dict[str, np.ndarray], reference: str) -> list[dict]:
    """Returns a row for each family, its setting chosen on the tuning half."""
    outcomes, tuning = benchmark.outcomes(), benchmark.tuning
    tune_masks, tune_losses = outcomes.half(tune=True)
    masks, losses = outcomes.half(tune=False)
    kinds = np.array([q.id.startswith("member") for q in benchmark.queries])
    best: dict[str, tuple[float, str]] = {}
    for name, scores in methods.items():
        if family(name) == name and np.isnan(scores[tuning]).any():
            best[name] = (float("nan"), name)  # nothing was tuned, or not on every query
            continue
        value = float(lds(scores[tuning], tune_masks, tune_losses[:, tuning]).mean())
        best[family(name)] = max(best.get(family(name), (-np.inf, "")), (value, name))
    base = methods[best[reference][1]]
    rows = []
    for value, name in best.values():
        scores = methods[name]
        have = ~tuning & np.isfinite(scores).all(1)
        if have.sum() < FEWEST_QUERIES:  # it is still being scored
            continue
        row = {"method": family(name), "chosen": name, "queries": int(have.sum()),
               "subsets": len(masks),
               "tuned_lds": None if np.isnan(value) else value}  # fmt: skip
        estimate = lds_interval(scores[have], masks, losses[:, have])
        row["lds"] = [estimate.value, estimate.low, estimate.high]
        for kind, chosen in (("lds_member", have & kinds), ("lds_new", have & ~kinds)):
            row[kind] = float(lds(scores[chosen], masks, losses[:, chosen]).mean())
        shares = decoy_share(scores[have], ~benchmark.members, TOP)
        row["decoys"] = mean_interval(shares).value
        if name != best[reference][1]:
            d = paired_difference(scores[have], base[have], masks, losses[:, have])
            row["over_reference"] = [d.value, d.low, d.high]
        rows.append(row)
    return sorted(rows, key=lambda r: -r["lds"][0])


def explored(benchmark: Benchmark, methods: dict[str, np.ndarray]) -> list[dict]:
    """Returns a row for every setting on all queries and subsets: nothing is held back, and the
    standard error is that over queries alone. For a benchmark that is not finished."""
    outcomes = benchmark.outcomes()
    kinds = np.array([q.id.startswith("member") for q in benchmark.queries])
    rows = []
    for name, scores in methods.items():
        if not np.isfinite(scores).all():
            continue
        values = lds(scores, outcomes.masks, outcomes.losses)
        rows.append({
            "method": name, "lds": float(values.mean()),
            "standard_error": float(values.std(ddof=1) / len(values) ** 0.5),
            "lds_member": float(values[kinds].mean()), "lds_new": float(values[~kinds].mean()),
            "decoys": float(decoy_share(scores, ~benchmark.members, TOP).mean()),
        })  # fmt: skip
    return sorted(rows, key=lambda r: -r["lds"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--reference", default="influence, diagonal per draw")
    arguments = parser.parse_args()
    benchmark = load_benchmark(arguments.work / "encoded")
    outcomes = benchmark.outcomes()
    methods = stored(arguments.work, benchmark)
    fewest = min(len(outcomes.half(tune)[0]) for tune in (True, False))
    if unfinished := fewest < FEWEST_RESAMPLED:
        rows = explored(benchmark, methods)
    else:
        rows = judged(benchmark, methods, arguments.reference)
    about = {"subsets": len(outcomes.numbers), "reference": arguments.reference}
    if len(outcomes.first) >= 3:
        r = noise_ceiling(outcomes.first, outcomes.second)
        about["seed_correlation"] = float(r.mean())
        about["subsets_twice"] = len(outcomes.first)
    text = json.dumps({**about, "rows": rows}, indent=1, allow_nan=False) + "\n"
    (arguments.out / "results.json").write_text(text, encoding="utf-8")
    print(about)
    if unfinished:
        print("| method and setting | LDS | members | new | decoys in the top 50 |")
        print("|---|---|---|---|---|")
        for r in rows:
            print(f"| {r['method']} | {r['lds']:.3f} ± {r['standard_error']:.3f} | "
                  f"{r['lds_member']:.3f} | {r['lds_new']:.3f} | {r['decoys']:.0%} |")  # fmt: skip
        return
    print(f"| method | setting | LDS | members | new | over {arguments.reference} | decoys |")
    print("|---|---|---|---|---|---|---|")
    for r in rows:
        print(line(r))


def line(row: dict) -> str:
    """Returns a row of the table in Markdown."""
    setting = row["chosen"].removeprefix(row["method"]).strip(", ") or "-"
    over = "-"
    if "over_reference" in row:
        over = "{:+.3f} [{:+.3f}, {:+.3f}]".format(*row["over_reference"])
    value = "{:.3f} [{:.3f}, {:.3f}]".format(*row["lds"])
    kinds = f"{row['lds_member']:.2f} | {row['lds_new']:.2f}"
    return f"| {row['method']} | {setting} | {value} | {kinds} | {over} | {row['decoys']:.0%} |"


if __name__ == "__main__":
    main()
