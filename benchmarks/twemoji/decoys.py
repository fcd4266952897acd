"""What scores are worth that nobody can have earned: python benchmarks/twemoji/decoys.py WORK

A tenth of the images are decoys, which no model was trained on: their scores are the null. For a
few methods, of which index.py and score.py left the scores in WORK, the share of decoys and of
members above each score, in standard deviations of the query's decoys. Writes decoys.json and
docs/images/benchmark-decoys.png. Needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from judge import stored

from unsee.evaluation.twemoji import load_benchmark

HERE = Path(__file__).parent
METHODS = {
    "AbU(index)": "index, EK-FAC loss + output norm, damping 0.1",
    "AbU as published, to first order": "influence, diagonal per draw, damping 0.01",
    "D-TRAK, all parameters": "D-TRAK, all parameters, ridge 0.1",
}
LEVELS = (0.05, 0.01, 0.001)
"""Shares of all queries' decoys above a score."""

DECOYS, MEMBERS = "#b3403a", "#1b7f4b"


def standardised(scores: np.ndarray, members: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the scores of all queries' decoys, and of their members, in deviations of decoys."""
    decoys = scores[:, ~members]
    mean, spread = decoys.mean(1, keepdims=True), decoys.std(1, keepdims=True)
    return ((decoys - mean) / spread).ravel(), ((scores[:, members] - mean) / spread).ravel()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--out", type=Path, default=HERE / "decoys.json")
    parser.add_argument(
        "--picture", type=Path, default=HERE.parents[1] / "docs/images/benchmark-decoys.png"
    )
    arguments = parser.parse_args()
    benchmark = load_benchmark(arguments.work / "encoded")
    scores = stored(arguments.work, benchmark)
    matplotlib.rcParams.update({"font.size": 8})
    figure, axes = plt.subplots(1, len(METHODS), sharey=True, figsize=(8.5, 2.6),
                                layout="constrained")  # fmt: skip
    report = {}
    for axis, (name, key) in zip(axes, METHODS.items(), strict=True):
        decoys, members = standardised(scores[key], benchmark.members)
        report[name] = [
            {"share of decoys": level, "above": (cut := float(np.quantile(decoys, 1 - level))),
             "share of members": float((members > cut).mean())}
            for level in LEVELS
        ]  # fmt: skip
        for values, color, label in ((members, MEMBERS, "members"), (decoys, DECOYS, "decoys")):
            ordered = np.sort(values)[::-1]
            axis.step(ordered, np.arange(1, len(ordered) + 1) / len(ordered), color=color,
                      label=label, lw=1.4)  # fmt: skip
        axis.set(title=name, xlim=(-2, 12), yscale="log", xlabel="score, in deviations of decoys")
        axis.grid(color="#dddddd", lw=0.5)
    axes[0].set_ylabel("share above")
    axes[0].legend(frameon=False)
    figure.savefig(arguments.picture, dpi=140)
    arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for name, rows in report.items():
        for r in rows:
            print(f"| {name} | {r['share of decoys']:.1%} | {r['above']:.1f} | "
                  f"{r['share of members']:.1%} |")  # fmt: skip


if __name__ == "__main__":
    main()
