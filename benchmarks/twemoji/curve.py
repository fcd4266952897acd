"""Draws how much is lost when more is removed: python benchmarks/twemoji/curve.py

Reads left_out.parquet, and writes docs/images/benchmark-curve.png: the rise of a query's loss
against K, for what `AbU(index)` names for it and for random removal. Prints the same numbers. Needs
matplotlib.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pyarrow.parquet as pq

from unsee.evaluation.leave_out import FULL, RANDOM
from unsee.evaluation.twemoji import shipped

METHOD = "index, EK-FAC loss + output norm, damping 0.1"
NAMED, CHANCE = "#1b7f4b", "#59636e"

Curves = dict[str, dict[int, tuple[float, float]]]
"""query -> K -> (rise by what was named, mean rise by random removal)."""


def curves(rows: list[dict[str, Any]], method: str) -> Curves:
    """Returns the rises of each query that the method was asked for."""
    full = {r["query"]: r["loss"] for r in rows if r["method"] == FULL}
    found: Curves = {}
    for r in rows:
        if r["method"] == method and r["removed_for"] == r["query"]:
            chance = [o["loss"] for o in rows if o["method"] == RANDOM and o["k"] == r["k"]
                      and o["query"] == r["query"]]  # fmt: skip
            rises = r["loss"] - full[r["query"]], float(np.mean(chance)) - full[r["query"]]
            found.setdefault(r["query"], {})[r["k"]] = rises
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--outcomes", type=Path, default=shipped() / "left_out.parquet")
    parser.add_argument(
        "--out", type=Path,
        default=Path(__file__).parents[2] / "docs" / "images" / "benchmark-curve.png",
    )  # fmt: skip
    arguments = parser.parse_args()
    found = curves(pq.read_table(arguments.outcomes).to_pylist(), METHOD)
    matplotlib.rcParams.update({"font.size": 8})
    figure, axis = plt.subplots(figsize=(5, 2.8), layout="constrained")
    for of in found.values():
        ks = sorted(of)
        for place, color in ((1, CHANCE), (0, NAMED)):
            style = {"color": color, "lw": 0.8, "marker": "o", "ms": 3, "alpha": 0.6}
            axis.plot(ks, [of[k][place] for k in ks], **style)
    for k in (every := sorted({k for of in found.values() for k in of})):
        pairs = np.array([of[k] for of in found.values() if k in of])
        named, chance = pairs.mean(0)
        print(f"K = {k}: {len(pairs)} queries, named {named:+.3f}, random {chance:+.3f}, "
              f"over random {named - chance:+.3f}")  # fmt: skip
    axis.set(xscale="log", xlabel="K, of 1,708 images", ylabel="rise of the query's loss")
    axis.set_xticks(every, [str(k) for k in every], minor=False)
    axis.minorticks_off()
    axis.grid(color="#dddddd", lw=0.5)
    for label, color in (("named by AbU(index)", NAMED), ("at random", CHANCE)):
        axis.plot([], [], color=color, marker="o", ms=3, label=label)
    axis.legend(frameon=False)
    figure.savefig(arguments.out, dpi=140)


if __name__ == "__main__":
    main()
