"""A contact sheet: training images with their scores, beside the picture they were asked about."""

from __future__ import annotations

import unicodedata
from functools import lru_cache
from typing import Any, cast

from PIL import Image, ImageDraw, ImageFont

from ..data.dataset import ImageDataset
from ..methods.base import Scores
from ..query import Query
from .numbers import ScoreScale
from .pictures import fitted

MOST = 500
"""A sheet of more examples than this is a mistake: every score of a large data set."""

INK, SOFT, LINE = "#1d2327", "#5d676f", "#d8d6d0"
UP, DOWN, BOX = "#0f6b70", "#a3472b", "#c2371d"
MARGIN, GAP = 24, 16


def contact_sheet(
    scores: Scores, data: ImageDataset, columns: int = 5, cell: int = 128
) -> Image.Image:
    """Draws training images with place, score and caption, and the query's picture at the left.

    Args:
        scores: what to show, in this order; usually `scores.top(10)`.
        data: the training examples.
        columns: training images side by side.
        cell: pixels of a training image's longer side; the query's picture is twice as large.

    Returns:
        An RGB picture on white. Captions are cut to two lines. Characters that no font at hand
        has are written as their base letter, or as a question mark.

    Raises:
        ValueError: nothing to show, too much of it, cells too small, or an example that `data`
            lacks.
    """
    if columns < 1 or cell < 32:
        raise ValueError(
            f"contact sheet: {columns} columns of {cell} pixels; give at least 1 column of 32"
        )
    if not 0 < len(scores) <= MOST:
        raise ValueError(
            f"contact sheet: {len(scores):,} examples to show; give 1 to {MOST}, for instance "
            "scores.top(10)"
        )
    columns = min(columns, len(scores))
    text_size = max(11, cell // 9)
    sheet, left = _blank(-(-len(scores) // columns), columns, cell, text_size, scores.query)
    if scores.query is not None:
        _draw_query(sheet, scores.query, scores.method, 2 * cell, text_size)
        x = left - GAP - GAP // 2
        ImageDraw.Draw(sheet).line((x, MARGIN, x, sheet.height - MARGIN), fill=LINE)
    scale = ScoreScale(scores.values)
    position = {identifier: i for i, identifier in enumerate(data.ids)}
    for place, (identifier, value) in enumerate(zip(scores.ids, scores.values, strict=True)):
        if identifier not in position:
            raise ValueError(f"contact sheet: data set {data.name!r} has no example {identifier!r}")
        row, column = divmod(place, columns)
        height = _cell_height(cell, text_size)
        corner = (left + column * (cell + GAP), MARGIN + row * (height + GAP))
        example = data[position[identifier]]
        _paste(sheet, example.image, corner, cell)
        _draw_words(sheet, corner, cell, text_size, place + 1, value, scale, example.captions[0])
    return sheet


def _line(text_size: int) -> int:
    return round(text_size * 1.35)


def _cell_height(cell: int, text_size: int) -> int:
    return cell + 8 + 3 * _line(text_size)


def _blank(
    rows: int, columns: int, cell: int, text_size: int, query: Query | None
) -> tuple[Image.Image, int]:
    """Returns an empty sheet, and where its training images start."""
    left = MARGIN if query is None else MARGIN + 2 * cell + 3 * GAP
    width = left + columns * cell + (columns - 1) * GAP + MARGIN
    height = rows * _cell_height(cell, text_size) + (rows - 1) * GAP
    if query is not None:
        # Three lines of prompt, two of what was done.
        height = max(height, 2 * cell + 8 + 3 * _line(text_size + 2) + 2 * _line(text_size))
    return Image.new("RGB", (width, height + 2 * MARGIN), "white"), left


def _paste(
    sheet: Image.Image, image: Image.Image, corner: tuple[int, int], cell: int
) -> tuple[int, int, int, int]:
    """Pastes a picture in the middle of a framed square; returns where it lies."""
    x, y = corner
    shown = fitted(image, cell - 2)
    x0, y0 = x + (cell - shown.width) // 2, y + (cell - shown.height) // 2
    sheet.paste(shown, (x0, y0))
    ImageDraw.Draw(sheet).rectangle((x, y, x + cell - 1, y + cell - 1), outline=LINE)
    return x0, y0, x0 + shown.width, y0 + shown.height


def _draw_query(sheet: Image.Image, query: Query, method: str, width: int, size: int) -> None:
    draw = ImageDraw.Draw(sheet)
    x0, y0, x1, y1 = _paste(sheet, query.image, (MARGIN, MARGIN), width)
    if query.box is not None:
        scale_x, scale_y = (x1 - x0) / query.image.width, (y1 - y0) / query.image.height
        left, upper, right, lower = query.box
        box = (
            round(x0 + left * scale_x),
            round(y0 + upper * scale_y),
            round(x0 + right * scale_x) - 1,
            round(y0 + lower * scale_y) - 1,
        )
        draw.rectangle((box[0] - 1, box[1] - 1, box[2] + 1, box[3] + 1), outline="white", width=5)
        draw.rectangle(box, outline=BOX, width=3)
    y = MARGIN + width + 8
    y = _draw_lines(draw, query.prompt, (MARGIN, y), width, size + 2, INK, most=3)
    about = f"training images by {method}"
    if query.box is not None:
        about = "box " + ",".join(map(str, query.box)) + "; " + about
    _draw_lines(draw, about, (MARGIN, y + 2), width, size, SOFT, most=2)


def _draw_words(
    sheet: Image.Image, corner: tuple[int, int], cell: int, size: int, place: int, value: float,
    scale: ScoreScale, caption: str,
) -> None:  # fmt: skip
    draw = ImageDraw.Draw(sheet)
    x, y = corner[0], corner[1] + cell + 6
    # The built-in font has neither a minus sign nor superscripts.
    score = scale.mantissa(value).replace("\u2212", "-")
    score += f"e{scale.exponent}" if scale.exponent else ""
    colour = UP if value > 0 else DOWN if value < 0 else SOFT
    draw.text((x, y), f"#{place}", fill=SOFT, font=_font(size, "#"))
    draw.text((x + cell, y), score, fill=colour, font=_font(size, score), anchor="ra")
    _draw_lines(draw, caption, (x, y + _line(size)), cell, size, INK, most=2)


def _draw_lines(
    draw: ImageDraw.ImageDraw, text: str, corner: tuple[int, int], width: int, size: int,
    colour: str, most: int,
) -> int:  # fmt: skip
    """Draws text wrapped to a width, cut to `most` lines; returns where the next line would go."""
    x, y = corner
    font = _font(size, text)
    for line in _lines(_drawable(" ".join(text.split()), font), font, width, most):
        draw.text((x, y), line, fill=colour, font=font)
        y += _line(size)
    return y


def _lines(text: str, font: ImageFont.FreeTypeFont, width: int, most: int) -> list[str]:
    """Returns the text wrapped to a width in pixels, cut to `most` lines with an ellipsis."""
    lines, rest = [], text
    while rest and len(lines) < most:
        end = _fitting(rest, font, width)
        if end < len(rest) and len(lines) == most - 1:
            while end > 1 and font.getlength(rest[:end].rstrip() + "...") > width:
                end -= 1
            lines.append(rest[:end].rstrip() + "...")
            break
        space = rest.rfind(" ", 0, end + 1) if end < len(rest) else -1
        end = space if space > 0 else end
        lines.append(rest[:end].rstrip())
        rest = rest[end:].lstrip()
    return lines


def _fitting(text: str, font: ImageFont.FreeTypeFont, width: int) -> int:
    """Returns how many leading characters fit into a width, at least one."""
    end = 1
    while end < len(text) and font.getlength(text[: end + 1]) <= width:
        end += 1
    return end


FALLBACK_FONTS = ("NotoSansCJK-Regular.ttc", "NotoSans-Regular.ttf", "DejaVuSans.ttf", "arial.ttf")
"""Where Pillow's built-in font lacks a character (it has ASCII and little more)."""


@lru_cache
def _fonts(size: int) -> list[ImageFont.FreeTypeFont]:
    builtin = ImageFont.load_default(size)
    assert isinstance(builtin, ImageFont.FreeTypeFont)
    found = [builtin]
    for name in FALLBACK_FONTS:
        try:
            found.append(ImageFont.truetype(name, size))
        except OSError:
            continue
    return found


@lru_cache(maxsize=4096)
def _has(font: ImageFont.FreeTypeFont, character: str) -> bool:
    # Pillow draws the font's box for what the font lacks, as it does for this noncharacter.
    missing, drawn = (bytes(cast(Any, font.getmask(c))) for c in ("\U0010ffff", character))
    return character.isspace() or drawn != missing


def _font(size: int, text: str) -> ImageFont.FreeTypeFont:
    """Returns the first font that has every character, or the one that lacks fewest."""
    return min(_fonts(size), key=lambda font: sum(not _has(font, c) for c in set(text)))


def _drawable(text: str, font: ImageFont.FreeTypeFont) -> str:
    """Returns the text with the characters that a font lacks replaced by what it has."""
    result = []
    for character in text:
        if _has(font, character):
            result.append(character)
            continue
        base = unicodedata.normalize("NFKD", character)[0]
        result.append(base if _has(font, base) else "?")
    return "".join(result)
