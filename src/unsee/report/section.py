"""One query of the page: its picture, and the training images for and against it."""

# Typographic signs are meant.
# ruff: noqa: RUF001, RUF002

from __future__ import annotations

import numpy as np

from ..data.dataset import Example, ImageDataset
from ..methods.base import Scores
from ..query import Query
from .histogram import histogram, legend
from .markup import Markup, element, join
from .numbers import ScoreScale, plain
from .pictures import at_most, data_uri, fitted
from .settings import settings_block, shortened

QUERY_PIXELS = 384
CARD_PIXELS = 176
STRIP_PIXELS = 96
CLEAR = 3
"""Standard errors that a score has to exceed to stand clear of its noise."""

GRID_CELLS = 1024
"""A mask of more latent cells than this is drawn without lines between them."""


def query_section(
    scores: Scores,
    data: ImageDataset,
    position: dict[str, int],
    *,
    number: int = 1,
    of: int = 1,
    top: int = 10,
    floor: float | None = None,
) -> Markup:
    """Returns the section of one query.

    Args:
        scores: every score of the query.
        data: the training examples.
        position: of each id in `data`.
        number: of the query on the page, from 1.
        of: how many queries the page has.
        top: how many of the most, and at most how many of the least, influential are shown.
        floor: rounding moves a score by up to this much; from `scores.settings` by default.
    """
    if floor is None:
        floor = scores.settings.get("noise_floor")
    scale = ScoreScale(scores.values)
    best = scores.top(top)
    worst = scores.bottom(min(top, len(scores) - len(best)))
    parts = [
        _hero(scores, best, worst, scale, floor, eyebrow=f"Query {number}" if of > 1 else None),
        element("h3", "Most influential"),
        _about_most(scores, best, scale, floor),
        _cards(best, data, position, scale, floor),
    ]
    if len(worst):
        least = [
            _chip(data[position[i]], len(scores) - back, value, scale)
            for back, (i, value) in enumerate(zip(worst.ids, worst.values, strict=True))
        ]
        parts += [
            element("h3", "Least influential"),
            _about_least(scores),
            element("ol", *least, class_="strip"),
        ]
    parts.append(settings_block(scores))
    return element("section", *parts, id=f"query-{number}", class_="query")


def _hero(
    scores: Scores, best: Scores, worst: Scores, scale: ScoreScale, floor: float | None,
    eyebrow: str | None,
) -> Markup:  # fmt: skip
    query = scores.query
    name = f"Scores of {scores.method}" if query is None else f"“{query.prompt}”"
    unit = f"score, in units of {scale.suffix[1:]}" if scale.suffix else "score"
    words = [
        None if eyebrow is None else element("p", eyebrow, class_="eyebrow"),
        element("h2", name, dir="auto"),
        None if query is None else _provenance(query),
        _unlearned(scores),
        element(
            "figure",
            histogram(scores.values, len(best), len(worst), scale, floor),
            element("figcaption", unit),
            legend(len(scores), len(best), len(worst), floor is not None),
            class_="distribution",
        ),
    ]
    picture = None if query is None else _picture(query)
    kind = "hero" if query is not None else "hero bare"
    return element("div", picture, element("div", *words, class_="about"), class_=kind)


def _picture(query: Query) -> Markup:
    # A small picture is enlarged here: browsers smooth worse, and each in its own way.
    image = query.image
    shown = at_most(image, QUERY_PIXELS) if max(image.size) > 256 else fitted(image, 256)
    picture = element(
        "img", src=data_uri(shown, 64_000), alt=f"The picture made for “{query.prompt}”",
        width=shown.width, height=shown.height,
    )  # fmt: skip
    overlay, caption = None, None
    if query.box is not None:
        overlay = _overlay(query, query.box)
        caption = _box_caption(query, query.box)
    frame = element("div", picture, overlay, class_="frame")
    return element("figure", frame, caption, class_="picture")


def _overlay(query: Query, box: tuple[int, int, int, int]) -> Markup:
    """Draws the box over the picture, and shades the latent cells that were not asked about."""
    width, height = query.image.size
    parts = []
    if query.mask is not None:
        mask = query.mask.tolist()
        rows, columns = len(mask), len(mask[0])
        cell_w, cell_h = width / columns, height / rows
        inside, outside = [], []
        for y, row in enumerate(mask):
            for x, cell in enumerate(row):
                square = f"M{x * cell_w:g} {y * cell_h:g}h{cell_w:g}v{cell_h:g}h{-cell_w:g}z"
                (inside if cell else outside).append(square)
        if rows * columns <= GRID_CELLS:
            parts.append(element("path", d="".join(outside), class_="outside"))
            parts.append(element("path", d="".join(inside), class_="cells"))
        else:
            parts.append(element("path", d=_runs(mask, cell_w, cell_h), class_="outside"))
    x0, y0, x1, y1 = box
    for kind in ("halo", "box"):
        parts.append(element("rect", x=x0, y=y0, width=x1 - x0, height=y1 - y0, class_=kind))
    return element(
        "svg", *parts, class_="overlay", viewBox=f"0 0 {width} {height}",
        preserveAspectRatio="none", role="img", aria_label=f"Box {x0}, {y0}, {x1}, {y1}",
    )  # fmt: skip


def _runs(mask: list[list[float]], cell_w: float, cell_h: float) -> str:
    """Returns the path of the cells that are zero, neighbours of a row as one rectangle."""
    path = []
    for y, row in enumerate(mask):
        edges = np.flatnonzero(np.diff(np.concatenate([[0], np.equal(row, 0), [0]])))
        for first, end in edges.reshape(-1, 2):
            width = (end - first) * cell_w
            path.append(f"M{first * cell_w:g} {y * cell_h:g}h{width:g}v{cell_h:g}h{-width:g}z")
    return "".join(path)


def _box_caption(query: Query, box: tuple[int, int, int, int]) -> Markup:
    x0, y0, x1, y1 = box
    text = f"Only the part inside the box was asked about: x {x0}–{x1}, y {y0}–{y1} px"
    if query.mask is not None:
        chosen, total = int(query.mask.sum()), query.mask.numel()
        text += f", {chosen} of {total} latent cells (the others are shaded)"
    return element("figcaption", text + ".")


def _provenance(query: Query) -> Markup | None:
    named = {"generated": "generated from the prompt", "image": "a picture given to the tool"}
    facts = []
    for key, value in query.provenance.items():
        if key == "source":
            facts.append(named.get(str(value), str(value)))
        else:
            number = plain(value) if isinstance(value, float) else str(value)
            facts.append(f"{key.replace('_', ' ')} {shortened(number, 80)}")
    facts.append(f"{query.image.width}×{query.image.height} px")
    return element("ul", *(element("li", fact) for fact in facts), class_="facts")


def _unlearned(scores: Scores) -> Markup | None:
    """Says what unlearning did to the picture's own loss."""
    losses, rise = scores.settings.get("query_loss"), scores.settings.get("rise")
    if losses is None or rise is None:
        return None
    steps, box = scores.settings.get("steps"), scores.settings.get("box")
    whose = "the picture’s own loss" if box is None else "the picture’s own loss inside the box"
    text = f"Unlearning moved {whose} from {plain(losses[0])} to {plain(losses[1])}"
    if steps is not None:
        text += f" in {steps} step{'s' if steps != 1 else ''}"
    change = f"{100 * rise:+.2g}%".replace("-", "\u2212")
    return element("p", f"{text} (", element("strong", change), ").", class_="fact")


def _about_most(scores: Scores, best: Scores, scale: ScoreScale, floor: float | None) -> Markup:
    if np.ptp(scores.values) == 0 and len(scores) > 1:
        return element("p", "All scores are equal: the order below says nothing.", class_="warning")
    if best.errors is not None:
        typical = f"{scale.size(float(np.median(best.errors)))}, at the median of these"
        text = f"Other timesteps and noise would move a score by its standard error ({typical}); "
        return _about_clear(best, floor, f"{text}clear is what exceeds {CLEAR} of them. ")
    if floor is None:
        positive = int((scores.values > 0).sum())
        return element(
            "p", f"{positive:,} of {len(scores):,} images have a positive score.", class_="hint"
        )
    text = "How far other timesteps and noise would move a score is not known here. "
    text += f"Rounding alone moves it by up to {scale.size(floor)}. "
    return _about_clear(best, floor, text)


def _about_clear(best: Scores, floor: float | None, text: str) -> Markup:
    clear = [rank for rank, yes in enumerate(stands_clear(best, floor), start=1) if yes]
    if len(clear) == len(best):
        text += f"All {len(best)} stand clear of it." if len(best) > 1 else "It stands clear of it."
    elif clear:
        text += f"Of these {len(best)}, {_ranks(clear)} {_stand(len(clear))} clear of it."
    else:
        noise = "is noise" if best.errors is None else "may be chance"
        text += f"None of these stands clear of it: this order {noise}."
    return element("p", text, class_="hint" if clear else "warning")


def stands_clear(best: Scores, floor: float | None) -> list[bool]:
    """Tells of each score whether it stands clear of its noise, as far as that is known."""
    if best.errors is not None:
        return (np.abs(best.values) > CLEAR * best.errors).tolist()
    return [floor is None or abs(value) > floor for value in best.values]


def _stand(count: int) -> str:
    return "stands" if count == 1 else "stand"


def _ranks(ranks: list[int]) -> str:
    """Returns `rank 1`, `ranks 1–7` or `ranks 1–3, 9–10`."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    spans = [f"{a}" if a == b else f"{a}–{b}" for a, b in runs]
    return f"rank{'' if len(ranks) == 1 else 's'} {', '.join(spans)}"


def _about_least(scores: Scores) -> Markup:
    negative = int((scores.values < 0).sum())
    if scores.method == "self-influence":
        text = f"{negative:,} of {len(scores):,} scores are negative, which chance alone can make."
    elif negative == 0:
        text = "No image has a negative score: there are no opponents, only the weakest."
    else:
        are = "image is an opponent" if negative == 1 else "images are opponents"
        text = f"{negative:,} of {len(scores):,} {are}: a negative score. The strongest come first."
    return element("p", text, class_="hint")


def _cards(
    best: Scores, data: ImageDataset, position: dict[str, int], scale: ScoreScale,
    floor: float | None,
) -> Markup:  # fmt: skip
    clear = stands_clear(best, floor)
    cards = []
    for i, (identifier, value) in enumerate(zip(best.ids, best.values, strict=True)):
        # Where none stands clear, one sentence says so: a mark on every card would say no more.
        noise = any(clear) and not clear[i]
        example = data[position[identifier]]
        error = None if best.errors is None else scale.size(float(best.errors[i]))
        cards.append(_card(example, i + 1, value, scale, float(best.values[0]), noise, error))
    return element("ol", *cards, class_="cards")


def _card(
    example: Example, rank: int, value: float, scale: ScoreScale, best: float, noise: bool,
    error: str | None,
) -> Markup:  # fmt: skip
    others = len(example.captions) - 1
    share = max(0.0, min(1.0, value / best)) if best > 0 else 0.0
    kind = "up" if value > 0 else "down" if value < 0 else None
    return element(
        "li",
        _thumbnail(example, rank, CARD_PIXELS),
        element(
            "p",
            element("span", f"#{rank}", class_="rank"),
            element("span", scale.text(value), class_=kind),
            class_="score",
        ),
        element("p", f"± {error}", class_="more") if error else None,
        element("div", element("i", style=f"width:{100 * share:.1f}%"), class_="share"),
        element("p", example.captions[0], class_="caption", dir="auto"),
        element("p", f"and {others} more caption{'s' * (others > 1)}", class_="more")
        if others
        else None,
        element("p", "within the noise", class_="tag") if noise else None,
        _details(example),
        class_="noise" if noise else None,
    )


def _chip(example: Example, rank: int, value: float, scale: ScoreScale) -> Markup:
    kind = "up" if value > 0 else "down" if value < 0 else None
    return element(
        "li",
        _thumbnail(example, rank, STRIP_PIXELS),
        element("p", element("span", scale.text(value), class_=kind), class_="score"),
        element("p", example.captions[0], class_="caption", dir="auto"),
        element("p", f"#{rank:,}", class_="rank"),
    )


def _thumbnail(example: Example, rank: int, size: int) -> Markup:
    alt = f"Training image at rank {rank}: {shortened(example.captions[0], 200)}"
    shown = at_most(example.image, size)
    small = "pixelated" if max(shown.size) <= 24 else None
    return element(
        "div", element("img", src=data_uri(shown, 12_000), alt=alt, class_=small), class_="thumb"
    )


def _details(example: Example) -> Markup:
    """Returns id and first text among the metadata; opened, every caption and all metadata."""
    kept = {k: str(v) for k, v in example.metadata.items() if v is not None and str(v).strip()}
    first = next((v for k, v in kept.items() if isinstance(example.metadata[k], str)), None)
    summary = [element("span", example.id, class_="id")]
    if first is not None:
        summary.append(element("span", shortened(first, 40)))
    rows = [("id", example.id)]
    rows += [("caption", c) for c in example.captions]
    rows += [(k.replace("_", " "), shortened(v, 300)) for k, v in kept.items()]
    pairs = [join([element("dt", k), element("dd", v, dir="auto")]) for k, v in rows]
    return element("details", element("summary", *summary), element("dl", *pairs))
