"""Labelled sheets of pictures, drawn with Pillow and its own font: alike on every machine."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

PAPER, CARD, EDGE = (244, 245, 247), (255, 255, 255), (222, 225, 230)
INK, FAINT = (31, 35, 40), (116, 124, 134)
TILE, PAD, GAP, MARGIN, OPTION = 128, 12, 14, 28, 380


@dataclass(frozen=True)
class Card:
    """One entry of a sheet.

    Attributes:
        pictures: side by side.
        label: the caption, up to two lines.
        note: a line in small grey type.
    """

    pictures: tuple[Image.Image, ...]
    label: str
    note: str = ""


def to_image(picture: NDArray[np.floating]) -> Image.Image:
    """Returns a picture [H, W, 3] in [0, 1] as a Pillow image."""
    return Image.fromarray((picture * 255).round().clip(0, 255).astype(np.uint8), "RGB")


def card_sheet(cards: Sequence[Card], columns: int, title: str, subtitle: str) -> Image.Image:
    """Returns a sheet of cards in rows: pictures above, caption and note below."""
    pictures = len(cards[0].pictures)
    width = pictures * TILE + (pictures + 1) * PAD
    height = TILE + 2 * PAD + 66
    sheet, draw, top = _paper(columns, -(-len(cards) // columns), width, height, title, subtitle)
    for place, card in enumerate(cards):
        x = MARGIN + place % columns * (width + GAP)
        y = top + place // columns * (height + GAP)
        _box(draw, x, y, width, height)
        for i, picture in enumerate(card.pictures):
            sheet.paste(_enlarge(picture), (x + PAD + i * (TILE + PAD), y + PAD))
        text_y = y + TILE + 2 * PAD
        for line in wrap(card.label, _font(15), width - 2 * PAD, most=2):
            draw.text((x + PAD, text_y), line, INK, _font(15))
            text_y += 19
        if card.note:
            note = wrap(card.note, _font(12), width - 2 * PAD, most=1)[0]
            draw.text((x + PAD, y + height - PAD - 12), note, FAINT, _font(12))
    return sheet


def question_sheet(picture: Image.Image, number: int, captions: Sequence[str]) -> Image.Image:
    """Returns a numbered picture, twice as large as on other sheets, with lettered captions."""
    side = 2 * TILE
    sheet, draw, top = _paper(
        1, 1, side + 3 * PAD + OPTION, side + 2 * PAD, f"Question {number}",
        "Which caption was the picture made for?",
    )  # fmt: skip
    _box(draw, MARGIN, top, side + 3 * PAD + OPTION, side + 2 * PAD)
    sheet.paste(_enlarge(picture, side), (MARGIN + PAD, top + PAD))
    left = MARGIN + side + 2 * PAD
    for i, caption in enumerate(captions):
        y = top + 2 * PAD + i * 46
        draw.text((left, y), "ABCDE"[i], FAINT, _font(18))
        line = wrap(caption, _font(18), OPTION - 26, most=1)[0]
        draw.text((left + 26, y), line, INK, _font(18))
    return sheet


def wrap(text: str, font: ImageFont.FreeTypeFont, width: int, most: int) -> list[str]:
    """Breaks a text into at most `most` lines of `width` pixels; an ellipsis marks what is cut."""
    lines = [""]
    # Pillow's own font has no accented letters.
    letters = unicodedata.normalize("NFKD", text)
    words = "".join(c for c in letters if not unicodedata.combining(c)).split()
    for i, word in enumerate(words):
        longer = f"{lines[-1]} {word}".strip()
        if not lines[-1] or font.getlength(longer) <= width:
            lines[-1] = longer
        elif len(lines) < most:
            lines.append(word)
        else:
            lines[-1] = " ".join([lines[-1], *words[i:]])
            break
    last = lines[-1]
    while font.getlength(lines[-1]) > width and last:
        last = last[:-1].rstrip()
        lines[-1] = f"{last}…"
    return lines


def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)  # type: ignore[return-value]  # given FreeType, always


def _enlarge(picture: Image.Image, side: int = TILE) -> Image.Image:
    return picture.resize((side, side), Image.Resampling.BICUBIC)


def _paper(
    columns: int, rows: int, width: int, height: int, title: str, subtitle: str
) -> tuple[Image.Image, ImageDraw.ImageDraw, int]:
    """Returns an empty sheet, its pen, and where the first row starts."""
    top = MARGIN + 62
    size = (
        2 * MARGIN + columns * (width + GAP) - GAP,
        top + rows * (height + GAP) - GAP + MARGIN,
    )
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN - 4), title, INK, _font(24))
    draw.text((MARGIN, MARGIN + 29), subtitle, FAINT, _font(15))
    return sheet, draw, top


def _box(draw: ImageDraw.ImageDraw, x: int, y: int, width: int, height: int) -> None:
    draw.rounded_rectangle((x, y, x + width - 1, y + height - 1), 8, CARD, EDGE)
