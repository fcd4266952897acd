"""Scores and durations as people read them."""

# Typographic signs are meant.
# ruff: noqa: RUF001, RUF002

from __future__ import annotations

import math

import numpy as np

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


class ScoreScale:
    """One power of ten for all scores of a query, so that they compare at a glance.

    Attributes:
        exponent: scores are written as multiples of ten to this power; 0 where plain decimals do.
    """

    def __init__(self, values: np.ndarray) -> None:
        largest = float(np.abs(values).max(initial=0.0))
        exponent = math.floor(math.log10(largest)) if largest > 0 else 0
        self.exponent = 0 if -1 <= exponent <= 3 else exponent

    @property
    def suffix(self) -> str:
        """`×10⁻⁴`, or nothing for plain decimals."""
        return f"×10{str(self.exponent).translate(_SUPERSCRIPTS)}" if self.exponent else ""

    def mantissa(self, value: float) -> str:
        """Returns `+4.21`: a sign (but for zero), and two digits or more after the point."""
        # Dividing by a power of ten instead of multiplying keeps subnormal exponents finite.
        scaled = value / 10.0**self.exponent
        if scaled == 0:
            return "0.00"
        digits = 2 if abs(scaled) >= 0.1 else 3
        return f"{scaled:+.{digits}f}".replace("-", "\u2212")

    def text(self, value: float) -> str:
        """Returns `+4.21×10⁻⁴`."""
        return self.mantissa(value) + self.suffix

    def size(self, value: float) -> str:
        """Returns a magnitude without a sign, in the scores' own power of ten where that reads."""
        if abs(value) < 0.01 * 10.0**self.exponent:
            return plain(abs(value))
        return self.text(abs(value)).lstrip("+")


def plain(value: float) -> str:
    """Returns a measured number with four significant digits, as `1.234×10⁻⁵` where small."""
    text = f"{value:.4g}"
    if "e" not in text:
        return text.replace("-", "\u2212")
    mantissa, exponent = text.split("e")
    return f"{mantissa}×10{str(int(exponent)).translate(_SUPERSCRIPTS)}".replace("-", "\u2212")


def duration(seconds: float) -> str:
    """Returns `3 h 02 min`, `4 min 05 s`, `7.1 s` or `12 ms`."""
    if seconds >= 3600:
        minutes = round(seconds / 60)
        return f"{minutes // 60} h {minutes % 60:02d} min"
    if seconds >= 59.95:
        whole = round(seconds)
        return f"{whole // 60} min {whole % 60:02d} s"
    if seconds >= 0.1:
        return f"{seconds:.1f} s"
    return f"{seconds * 1000:.0f} ms"


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Returns round numbers between two, a step of 1, 2 or 5 times a power of ten apart."""
    span = high - low
    if not span > 0:
        return [low]
    power = 10.0 ** math.floor(math.log10(span / most))
    step = next(f * power for f in (1, 2, 5, 10, 20) if span / (f * power) <= most)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [k * step for k in range(first, last + 1)]
