"""HTML elements that escape whatever they are given."""

from __future__ import annotations

import html


class Markup(str):
    """Text that is HTML already; any other string is escaped where it is used."""

    __slots__ = ()


def element(name: str, /, *children: str | None, **attributes: str | float | bool | None) -> Markup:
    """Returns an HTML or SVG element.

    Args:
        name: of the element.
        children: strings are escaped, `Markup` is not, None is left out. No children and a name
            of HTML's empty elements (or of an SVG shape) give an element without a closing tag.
        attributes: values are escaped; `class_` and `aria_label` are written `class` and
            `aria-label`; True writes the bare name, None and False leave it out.
    """
    written = "".join(
        f" {_attribute(key)}"
        if value is True
        else f' {_attribute(key)}="{html.escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    inside = "".join(_escaped(child) for child in children if child is not None)
    if name in _EMPTY:
        return Markup(f"<{name}{written}>")
    if name in _SHAPES and not inside:
        return Markup(f"<{name}{written}/>")
    return Markup(f"<{name}{written}>{inside}</{name}>")


def join(parts: list[Markup], separator: str = "") -> Markup:
    """Returns elements one after the other."""
    return Markup(_escaped(separator).join(parts))


_EMPTY = frozenset({"br", "hr", "img", "meta"})
_SHAPES = frozenset({"rect", "line", "path", "circle"})


def _escaped(text: str) -> str:
    return text if isinstance(text, Markup) else html.escape(text)


def _attribute(name: str) -> str:
    return name.rstrip("_").replace("_", "-")
