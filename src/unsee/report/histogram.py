"""The distribution of scores as an inline SVG."""

from __future__ import annotations

import math

import numpy as np

from .markup import Markup, element, join
from .numbers import ScoreScale, ticks

BINS = 61
PLOT = 150
"""Height of the bars' area in CSS pixels; widths are percentages, so the text never stretches."""
RUG = 12
AXIS = 24


def histogram(
    values: np.ndarray, top: int, bottom: int, scale: ScoreScale, floor: float | None = None
) -> Markup:
    """Draws how all scores are distributed, with the most and least influential marked.

    Args:
        values: [N] scores, in any order.
        top: how many of the largest are marked.
        bottom: how many of the smallest are marked.
        scale: how scores are written.
        floor: scores between minus and plus this are shaded.

    Returns:
        An `<svg>` of fixed height and full width; counts are on a logarithmic axis.
    """
    ordered = np.sort(values)[::-1]
    low, high = _range(values)

    def percent(value: float) -> float:
        return round(100 * (value - low) / (high - low), 3)

    parts: list[Markup] = []
    if floor is not None:
        left, right = max(percent(-floor), 0.0), min(percent(floor), 100.0)
        parts.append(_rect(left, max(right - left, 0.4), 0, PLOT, "floor"))
    counts, edges = np.histogram(values, bins=BINS, range=(low, high))
    parts += _grid(int(counts.max()))
    for count, edge in zip(counts, edges[:-1], strict=True):
        if count:
            height = round(PLOT * _height(count, counts.max()), 2)
            parts.append(_rect(percent(edge), 100 / BINS - 0.25, PLOT - height, height, "bar"))
    parts.append(element("rect", x="0", y=PLOT, width="100%", height=1, class_="axis"))
    marked = [(v, "least") for v in ordered[::-1][:bottom]] + [(v, "most") for v in ordered[:top]]
    for value, kind in marked:
        parts.append(_rect(max(percent(value) - 0.15, 0), 0.3, PLOT + 3, RUG, kind))
    parts += _labels(low, high, scale)
    return element(
        "svg", *parts, class_="histogram", width="100%", height=PLOT + RUG + AXIS, role="img",
        aria_label=_summary(ordered, top, bottom, scale),
    )  # fmt: skip


def _range(values: np.ndarray) -> tuple[float, float]:
    """Returns a range that holds every score and zero, and is not empty."""
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    if high - low <= 0:
        return -1.0, 1.0
    margin = 0.02 * (high - low)
    return low - margin, high + margin


def _height(count: float, most: float) -> float:
    """Returns a share of the plot's height; one example is still visible beside thousands."""
    return math.log1p(count) / math.log1p(most) * 0.94


def _grid(most: int) -> list[Markup]:
    parts = []
    for power in range(int(math.log10(most)) + 1):
        y = round(PLOT * (1 - _height(10**power, most)), 2)
        parts.append(element("rect", x="0", y=y, width="100%", height=1, class_="grid"))
        parts.append(element("text", f"{10**power:,}", x="0", y=y - 3, class_="count"))
    return parts


def _labels(low: float, high: float, scale: ScoreScale) -> list[Markup]:
    parts = []
    for value in ticks(low, high):
        x = 100 * (value - low) / (high - low)
        anchor = "start" if x < 4 else "end" if x > 96 else "middle"
        number = "0" if value == 0 else f"{value / 10.0**scale.exponent:+.4g}"
        number = number.replace("-", "\u2212")
        if value == 0:
            parts.append(element("rect", x=f"{x:.3f}%", y=0, width=1, height=PLOT, class_="zero"))
        parts.append(
            element("text", number, x=f"{x:.3f}%", y=PLOT + RUG + AXIS - 6, text_anchor=anchor)
        )
    return parts


def _rect(x: float, width: float, y: float, height: float, kind: str) -> Markup:
    return element(
        "rect", x=f"{x:.3f}%", width=f"{width:.3f}%", y=y, height=height, class_=kind
    )  # fmt: skip


def _summary(ordered: np.ndarray, top: int, bottom: int, scale: ScoreScale) -> str:
    text = (
        f"Histogram of {len(ordered):,} scores from {scale.text(ordered[-1])} to "
        f"{scale.text(ordered[0])}; median {scale.text(float(np.median(ordered)))}"
    )
    if top:
        text += f"; the {top} most influential start at {scale.text(ordered[top - 1])}"
    if bottom:
        text += f"; the {bottom} least influential end at {scale.text(ordered[-bottom])}"
    return text


def legend(total: int, top: int, bottom: int, floor: bool) -> Markup:
    """Returns the key to the colours of the histogram."""
    entries = [("bar", f"all {total:,} images (log scale)"), ("most", f"{top} most influential")]
    if bottom:
        entries.append(("least", f"{bottom} least influential"))
    if floor:
        entries.append(("floor", "rounding noise"))
    items = [element("li", element("i", class_=kind), text) for kind, text in entries]
    return element("ul", join(items), class_="legend")
