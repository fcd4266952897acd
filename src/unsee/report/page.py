"""One self-contained HTML page for one query or several."""

# Typographic signs are meant.
# ruff: noqa: RUF001

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..data.dataset import ImageDataset
from ..methods.base import Scores
from .markup import Markup, element
from .pictures import at_most, data_uri
from .section import query_section
from .settings import times_table
from .style import STYLE


def render_page(
    results: Sequence[Scores],
    data: ImageDataset,
    *,
    top: int = 10,
    timings: Mapping[str, float] | None = None,
    notes: Sequence[str] | None = None,
    floor: float | None = None,
    title: str | None = None,
) -> str:
    """Returns an HTML page that shows what made pictures possible; it loads nothing else.

    Args:
        results: every score of each query, one section each.
        data: the training examples that were scored.
        top: how many of the most, and at most how many of the least, influential are shown.
        timings: seconds of each step of the whole run; those of an attribution itself are read
            from its settings (`"seconds"`).
        notes: sentences for the reader, such as warnings about the prompt.
        floor: rounding moves a score by up to this much; read from the settings
            (`"noise_floor"`) where it is not given.
        title: heading; a question by default.

    Raises:
        ValueError: no results, a result without scores, `top` below 1, or a scored example that
            `data` lacks.
    """
    position = _checked(results, data, top)
    if title is None and _by_heart(results):
        title = "Which training images has the model learnt by heart?"
    elif title is None:
        pictures = "these pictures" if len(results) > 1 else "this picture"
        title = f"Which training images made {pictures} possible?"
    sections = [
        query_section(scores, data, position, number=number, of=len(results), top=top, floor=floor)
        for number, scores in enumerate(results, start=1)
    ]
    run = None
    if timings:
        run = element(
            "section", element("h2", "Time of the whole run"), times_table(timings), class_="run"
        )
    body = element(
        "main",
        element(
            "header",
            element("p", "unsee", class_="brand"),
            element("h1", title),
            _summary(results, data),
            _reading(results),
            _notes(notes or ()),
            _contents(results) if len(results) > 1 else None,
        ),
        *sections,
        run,
    )
    page = element("html", _head(title), element("body", body), lang="en")
    return f"<!doctype html>\n{page}\n"


def _checked(results: Sequence[Scores], data: ImageDataset, top: int) -> dict[str, int]:
    """Returns the position of each example in the data set, after checks of the arguments."""
    if not results:
        raise ValueError("report: no results; give the scores of one query or more")
    if top < 1:
        raise ValueError(f"report: top = {top} must be at least 1")
    position = {identifier: i for i, identifier in enumerate(data.ids)}
    for scores in results:
        if not len(scores):
            raise ValueError("report: a result has no scores; was the list of candidates empty?")
        for identifier in scores.ids:
            if identifier not in position:
                raise ValueError(
                    f"report: the scored example {identifier!r} is not in data set {data.name!r}; "
                    "give the data set that the scores were computed on"
                )
    return position


def _head(title: str) -> Markup:
    return element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", f"{title} – unsee"),
        element("style", Markup(STYLE)),
    )


def _summary(results: Sequence[Scores], data: ImageDataset) -> Markup:
    counts = sorted({len(scores) for scores in results})
    scored = f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"
    if counts == [len(data)]:
        scored = f"All {scored}"
    elif counts[-1] < len(data):
        scored += f" of the {len(data):,}"
    methods = ", ".join(dict.fromkeys(scores.method for scores in results))
    if methods.startswith("AbU"):
        methods = methods.replace("AbU", "attribution by unlearning (AbU)", 1)
    each = " for each picture" if len(results) > 1 else ""
    return element(
        "p",
        f"{scored} training images of ",
        element("strong", data.name),
        f", scored{each} by {methods}.",
        class_="lead",
    )


SUMS = {
    "plain": ("", True),
    "scaled": (", each divided by its spread over all training images, and has no unit", True),
    "standardised": (", each less its mean and divided by its spread over all training images, and "
                     "has no unit: only differences mean something", False),
    "ranks": (", of which each is a rank from 0 to 1: only differences mean something", False),
}  # fmt: skip
"""What is added up in a sum of scores, and whether its sign says for or against the picture."""


def _reading(results: Sequence[Scores]) -> Markup:
    """Says how to read a score."""
    columns = {c for scores in results for c in scores.settings.get("columns", ())}
    order = "second" if "probes" in columns else "first"
    columns -= {"probes"}  # they add to what the factors say
    whole = ". Scores compare within one query, not between queries."
    how: tuple[str | Markup, ...]
    if _by_heart(results):
        how = (
            "The score is the influence of a training image on its own loss. The higher it is, the "
            "more the model has learnt this very image, with little support from others: "
            "memorised, rare and wrongly captioned images tend to come first. It has no unit, and "
            "compares within one run.",
        )
    elif columns <= {"factors"} and all(
        s.method.startswith("AbU") and "parts" not in s.settings for s in results
    ):
        how = (
            "The score is the rise of this training image’s loss when the picture is unlearned",
            f", to {order} order. " if columns else ". ",
            element("b", "Positive: the model forgot it too", class_="up"),
            ", so the picture leaned on it. ",
            element("b", "Negative: its loss fell", class_="down"),
            whole,
        )
    else:
        how = (
            "A higher score means more influence on the picture. ",
            element("b", "Positive: it made the picture more likely", class_="up"),
            ". ",
            element("b", "Negative: it worked against the picture", class_="down"),
            whole,
        )
        sums = {(s.settings.get("how"), len(s.settings.get("parts", ()))) for s in results}
        if len(sums) == 1 and (kind := next(iter(sums)))[0] in SUMS:
            what, signed = SUMS[kind[0]]
            sum_of = f"It is the mean of {kind[1]} scores{what}. "
            how = (how[0], sum_of, *(how[1:] if signed else (whole.removeprefix(". "),)))
        elif len(columns) > 1:
            sum_of = "It has no unit: what the gradients of the loss and of the network’s output "
            sum_of += "say is divided by its spread over all training images, and added. "
            how = (how[0], sum_of, *how[1:])
    return element(
        "aside", element("strong", "How to read a score"), element("p", *how), class_="reading"
    )


def _by_heart(results: Sequence[Scores]) -> bool:
    """Whether the question is not about a picture, but about the training set itself."""
    return all(scores.method == "self-influence" for scores in results)


def _notes(notes: Sequence[str]) -> Markup | None:
    if not notes:
        return None
    return element("ul", *(element("li", note) for note in notes), class_="notes")


def _contents(results: Sequence[Scores]) -> Markup:
    items = []
    for number, scores in enumerate(results, start=1):
        query = scores.query
        picture = None
        if query is not None:
            picture = element("img", src=data_uri(at_most(query.image, 64)), alt="")
        name = query.prompt if query is not None else f"Query {number}"
        label = element("span", name, dir="auto")
        items.append(element("li", element("a", picture, label, href=f"#query-{number}")))
    return element("nav", element("ol", *items), aria_label="Queries")
