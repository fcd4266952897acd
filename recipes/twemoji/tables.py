"""The numbers of an evaluation as Markdown tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def markdown(report: dict[str, Any]) -> str:
    """Returns the report's tables."""
    copies, auto = report["copies"], report["autoencoder"]
    lines = [
        "| autoencoder PSNR (dB) | pictures | mean | median | 5th percentile |",
        "|---|--:|--:|--:|--:|",
    ]
    for name, label in (("training", "training pictures"), ("unseen", "unseen skin-tone variants")):
        a = auto[name]
        lines.append(
            f"| {label} | {a['pictures']:,} | {a['mean_db']:.1f} | {a['median_db']:.1f} "
            f"| {a['q05_db']:.1f} |"
        )
    lines += [
        "",
        "| category | captions | own picture first | in the first ten |",
        "|---|--:|--:|--:|",
    ]
    for name, r in [*report["retrieval_by_category"].items(), ("**all**", report["retrieval"])]:
        lines.append(
            f"| {name} | {r['pictures']} | {r['first']['share']:.0%} "
            f"| {r['first_ten']['share']:.0%} |"
        )
    own, nearest = copies["own_rms"], copies["nearest_rms"]
    lines += [
        "",
        f"Near-copies (RMS below {copies['threshold_rms']:.3f}; "
        f"{copies['reconstructions_missed']:.0%} of reconstructions lie above it, "
        f"{copies['neighbours_mistaken']:.0%} of nearest distinct training pictures below): "
        f"{copies['near_copies_of_own']['share']:.0%} of their own picture, "
        f"{copies['near_copies_of_any']['share']:.0%} of any. "
        f"Mean RMS distance to the own picture {own['mean']:.3f}, "
        f"to the nearest {nearest['mean']:.3f}.",
    ]
    return "\n".join(lines) + "\n"


def sweep_markdown(results: Sequence[dict[str, Any]]) -> str:
    """Returns the sweep's table."""
    lines = [
        "| guidance | own picture first | in the first ten | near-copies | RMS to own "
        "| RMS to nearest |",
        "|--:|--:|--:|--:|--:|--:|",
    ]
    for r in results:
        lines.append(
            f"| {r['guidance']:g} | {r['first']['share']:.0%} | {r['first_ten']['share']:.0%} "
            f"| {r['near_copies_of_any']['share']:.0%} | {r['own_rms']['mean']:.3f} "
            f"| {r['nearest_rms']['mean']:.3f} |"
        )
    return "\n".join(lines) + "\n"
