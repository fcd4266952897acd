"""Draws the table of judge.py: python benchmarks/twemoji/plot.py

Reads results.json and writes docs/images/benchmark-lds.png: for each method the LDS with its
interval, members and new captions apart, and the share of decoys among its best. Needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
DEFAULT, PUBLISHED = "index, EK-FAC loss + output norm", "influence, diagonal per draw"
CHANCE = 0.1
"""Share of decoys in a random ranking."""

SHOWN = (
    DEFAULT, PUBLISHED, "EK-FAC averaged + D-TRAK, both", "EK-FAC averaged + D-TRAK, K and V",
    "EK-FAC averaged + output norm, EK-FAC", "D-TRAK, all parameters", "D-TRAK, K and V",
    "Journey-D-TRAK, K and V", "Journey-TRAK, K and V", "MUCS", "index, EK-FAC output norm",
    "index, EK-FAC loss", "influence, EK-FAC averaged", "influence, EK-FAC Gauss-Newton",
    "influence, K-FAC averaged", "influence, diagonal averaged", "influence, identity",
    "AbU, damped Fisher, rise 0.05", "AbU, EK-FAC averaged, rise 0.05",
    "l-RelatIF, EK-FAC averaged", "renormalised, EK-FAC averaged", "second order, EK-FAC averaged",
    "TRAK, K and V", "TRAK, all parameters", "similarity, text", "similarity, pixel",
    "similarity, latent", "random", "AbU, damped Fisher, rise 0.25",
    "AbU, EK-FAC averaged, rise 0.25", "index to second order, EK-FAC loss",
    "D-TRAK without own term, all parameters", "D-TRAK, sketch of 16384",
    "influence, little noise, EK-FAC", "influence, most noise, EK-FAC", "index, 2 checkpoints",
    "TracIn, 4 checkpoints", "AbU, EK-FAC averaged, rise 0.01", "AbU, EK-FAC averaged, rise 1",
    "AbU, ten steps, EK-FAC averaged, rise 0.25", "AbU, identity, rise 0.25",
    "loss + output norm, linear layers",
)  # fmt: skip
"""Of the families in results.json, one of each kind; all are in the table."""

COLORS = {DEFAULT: "#1b7f4b", PUBLISHED: "#b3403a"}
GREY, MEMBERS, NEW = "#59636e", "#2f6fb0", "#e08a2b"


def draw(rows: list[dict[str, Any]], out: Path) -> None:
    """Draws one line a method, the best on top.

    Args:
        rows: of results.json, whose methods are shown.
        out: PNG to write.
    """
    matplotlib.rcParams.update({"font.size": 8, "svg.hashsalt": "unsee"})
    figure, (left, right) = plt.subplots(
        1, 2, sharey=True, figsize=(8.5, 0.2 * len(rows) + 1.1), width_ratios=(3, 1),
        layout="constrained",
    )  # fmt: skip
    for place, row in enumerate(reversed(rows)):
        value, low, high = row["lds"]
        color = COLORS.get(row["method"], GREY)
        left.plot([low, high], [place, place], color=color, lw=1.6, solid_capstyle="butt")
        left.plot(value, place, "o", color=color, ms=4.5)
        left.plot(row["lds_member"], place, "|", color=MEMBERS, ms=6)
        left.plot(row["lds_new"], place, "|", color=NEW, ms=6)
        right.barh(place, row["decoys"], color=color, height=0.55)
    left.set_yticks(range(len(rows)), [name(r) for r in reversed(rows)])
    left.set_ylim(-0.7, len(rows) - 0.3)
    for label, row in zip(left.get_yticklabels(), reversed(rows), strict=True):
        label.set_color(COLORS.get(row["method"], "black"))
    left.axvline(0, color="#c8ced4", lw=0.8, zorder=0)
    left.plot([], [], "|", color=MEMBERS, ms=6, label="training captions")
    left.plot([], [], "|", color=NEW, ms=6, label="new captions")
    left.legend(loc="lower right", frameon=False)
    left.set_xlabel("LDS, 95% interval")
    right.axvline(CHANCE, color="black", lw=0.8, ls=":")
    right.set_xlabel("decoys in the top 50")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x", color="#eceff2", zorder=0)
        axes.set_axisbelow(True)
    figure.savefig(out, dpi=160, metadata={"Software": None})
    plt.close(figure)


def name(row: dict[str, Any]) -> str:
    """Returns what a method is called in the plot."""
    if row["method"] == DEFAULT:
        return "AbU(index), the default"
    if row["method"] == PUBLISHED:
        return "AbU as published, to first order"
    return row["method"] if row["queries"] >= 20 else f"{row['method']} ({row['queries']} queries)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=HERE / "results.json")
    parser.add_argument("--out", type=Path,
                        default=HERE.parents[1] / "docs/images/benchmark-lds.png")  # fmt: skip
    arguments = parser.parse_args()
    results = json.loads(arguments.results.read_text(encoding="utf-8"))
    found = {row["method"]: row for row in results["rows"]}
    missing = [method for method in SHOWN if method not in found]
    if missing:
        raise SystemExit(f"{arguments.results} has no row of {missing[0]!r}: run judge.py again")
    rows = sorted((found[m] for m in SHOWN), key=lambda row: -row["lds"][0])
    draw(rows, arguments.out)


if __name__ == "__main__":
    main()
