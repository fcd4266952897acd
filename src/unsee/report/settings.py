"""What fixed the scores of a query, and how long it took, as tables."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ..methods.base import Scores
from .markup import Markup, element
from .numbers import duration, plain


def settings_block(scores: Scores) -> Markup:
    """Returns the collapsed tables of settings and seconds of one query."""
    seconds = scores.settings.get("seconds") or {}
    label = "Settings"
    if seconds:
        label = f"Settings and time ({duration(sum(seconds.values()))})"
    rows = [
        element("tr", element("th", name, scope="row"), element("td", value))
        for name, value in _rows(scores)
    ]
    return element(
        "details",
        element("summary", label),
        element("table", element("tbody", *rows)),
        _names(scores.settings.get("parameters")),
        times_table(seconds) if seconds else None,
        class_="settings",
    )


def times_table(seconds: Mapping[str, float]) -> Markup:
    """Returns a table of steps with the time each took, and a bar for its share."""
    total = sum(seconds.values())
    longest = max(seconds.values())
    rows = []
    for step, value in seconds.items():
        share = 100 * value / longest if longest > 0 else 0
        bar = element("div", element("i", style=f"width:{share:.1f}%"), class_="share")
        cells = (element("th", step, scope="row"), element("td", duration(value)))
        rows.append(element("tr", *cells, element("td", bar, class_="wide")))
    cells = (element("th", "together", scope="row"), element("td", duration(total)))
    rows.append(element("tr", *cells, element("td", class_="wide"), class_="total"))
    return element("table", element("tbody", *rows), class_="times")


def shortened(text: str, most: int) -> str:
    """Returns the text, cut to `most` characters with an ellipsis where it is longer."""
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"


def _rows(scores: Scores) -> list[tuple[str, str]]:
    settings = dict(scores.settings)
    settings.pop("seconds", None)
    rows = [("method", scores.method)]
    parameters = settings.pop("parameters", None)
    if parameters is not None:
        rows.append(("parameters", f"{len(parameters)} tensors"))
    if "rise" in settings or "rise_wanted" in settings:
        wanted, rise = settings.pop("rise_wanted", None), settings.pop("rise", None)
        rows.append(
            ("rise wanted", "none: fixed step size" if wanted is None else _percent(wanted))
        )
        if rise is not None:
            rows.append(("rise achieved", _percent(rise)))
    losses = settings.pop("query_loss", None)
    if losses is not None:
        rows.append(("query loss before", plain(losses[0])))
        rows.append(("query loss after", plain(losses[1])))
    rows += [(key.replace("_", " "), shortened(_value(v), 500)) for key, v in settings.items()]
    return rows


def _value(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return plain(value)
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {_value(v)}" for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(_value(v) for v in value)
    return str(value) if isinstance(value, int) else json.dumps(value, default=str)


def _percent(share: float) -> str:
    return f"{100 * share:.3g}%".replace("-", "\u2212")


def _names(parameters: list[str] | None) -> Markup | None:
    if not parameters:
        return None
    listed = element("ul", *(element("li", name) for name in parameters))
    return element("details", element("summary", "Names of the parameters"), listed, class_="names")
