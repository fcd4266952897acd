"""The page, the contact sheet and the files of a report."""

# Typographic signs are meant.
# ruff: noqa: RUF001

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image, ImageFont

from unsee.data.dataset import ImageDataset, load_dataset
from unsee.methods.base import Scores
from unsee.query import Query, box_mask
from unsee.report import contact_sheet, render_page, write_report
from unsee.report.histogram import histogram
from unsee.report.numbers import ScoreScale, duration, plain, ticks
from unsee.report.sheet import BOX, GAP, MARGIN, _drawable

N = 14
ATTACK = "<script>alert(\"1\")</script> & 'co' <img src=x onerror=alert(2)>"
VALUES = np.array([3, -1, 0.5, 7, -4, 2, 0, 1, -2, 6, 0.1, -0.2, 5, -3]) * 1e-4
CAPTIONS: list[str | list[str]] = [
    ATTACK,
    "drei Überschriften, 漢字 und قطة",
    ["one caption", "another caption"],
    "a very long caption " * 30,
    *(f"picture number {i}" for i in range(4, N)),
]
SETTINGS = {
    "parameters": ["block.attn2.to_k.weight", "block.attn2.to_v.weight"],
    "steps": 1,
    "rise_wanted": 0.05,
    "rise": 0.0502,
    "query_loss": [0.25, 0.26255],
    "step_sizes": [3.25e-6],
    "damping": 0.1,
    "draws": {"seed": 0, "n": 10},
    "flips": False,
    "seconds": {"losses before": 61.0, "unlearning": 9.5},
}


def colour_of(row: int) -> tuple[int, int, int]:
    return (15 * row, 255 - 15 * row, 40)


@pytest.fixture
def data(tmp_path: Path) -> ImageDataset:
    """Pictures of one colour each; a column is named as one of the score file's is."""
    folder = tmp_path / "train"
    folder.mkdir()
    rows = []
    for i, text in enumerate(CAPTIONS):
        Image.new("RGB", (40, 30), colour_of(i)).save(folder / f"{i}.png")
        artist = "<b>A. Rtist</b>" if i % 2 else None
        rows.append({"file_name": f"{i}.png", "text": text, "artist": artist, "score": i})
    lines = "\n".join(json.dumps(row) for row in rows)
    (folder / "metadata.jsonl").write_text(lines, encoding="utf-8")
    return load_dataset("imagefolder", data_dir=folder)


def make_query(
    prompt: str = "a prompt", box: tuple[int, int, int, int] | None = None, cells: int = 8
) -> Query:
    picture = Image.new("RGB", (64, 64), (200, 220, 250))
    mask = None if box is None else box_mask(box, picture.size, (cells, cells))
    provenance = {"source": "generated", "seed": 3, "guidance_scale": 7.5}
    return Query(
        "q", torch.zeros(4, 8, 8), torch.zeros(2, 4), prompt, picture, mask, box, provenance
    )


def make_scores(data: ImageDataset, query: Query | None = None, **settings: object) -> Scores:
    return Scores(data.ids, VALUES, "AbU", {**SETTINGS, **settings}, query)


class Page(HTMLParser):
    """Reads a page: its elements with attributes and text; tags must nest."""

    EMPTY = ("meta", "img", "br", "hr")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text += data

    def all(self, tag: str, kind: str | None = None) -> list[dict[str, str | None]]:
        return [a for t, a in self.elements if t == tag and kind in (None, a.get("class"))]


def test_page_holds_every_picture_and_loads_nothing(data: ImageDataset) -> None:
    html = render_page([make_scores(data, make_query())], data, top=4)
    page = Page(html)
    images = page.all("img")
    # The picture, the four most and the four least influential.
    assert len(images) == 1 + 4 + 4
    for attributes in images:
        kind, content = str(attributes["src"]).split(";base64,")
        assert kind == "data:image/png"
        Image.open(io.BytesIO(base64.b64decode(content))).load()
        assert attributes["alt"]
    assert {"script", "link", "iframe", "object"}.isdisjoint(t for t, _ in page.elements)
    assert not re.search(r"https?://|url\(|@import|src=\"(?!data:)", html)
    assert "prefers-color-scheme: dark" in html


def test_pictures_come_in_the_order_of_their_scores(data: ImageDataset) -> None:
    images = Page(render_page([make_scores(data, make_query())], data, top=3)).all("img")[1:]
    colours = []
    for attributes in images:
        content = str(attributes["src"]).split(",")[1]
        colours.append(Image.open(io.BytesIO(base64.b64decode(content))).getpixel((5, 5)))
    most, least = [3, 9, 12], [4, 13, 8]
    assert colours == [colour_of(row) for row in most + least]
    assert "rank 1:" in str(images[0]["alt"]) and f"rank {N}:" in str(images[3]["alt"])


def test_page_says_what_was_asked_and_what_came_out(data: ImageDataset) -> None:
    html = render_page(
        [make_scores(data, make_query("a cat on a mat"))], data, top=3,
        timings={"encode pictures": 3725.0, "fit Fisher": 0.5}, notes=["The prompt was cut."],
    )  # fmt: skip
    text = Page(html).text
    for said in (
        "“a cat on a mat”", "seed 3", "guidance scale 7.5", "64×64 px",
        "rise of this training image’s loss when the picture is unlearned",
        "+7.00×10⁻⁴", "−4.00×10⁻⁴", "from 0.25 to 0.2626", "+5%",
        "rise wanted5%", "rise achieved5.02%", "step sizes3.25×10⁻⁶", "parameters2 tensors",
        "block.attn2.to_v.weight", "drawsseed 0, n 10", "flipsno",
        "losses before1 min 01 s", "together1 min 10 s",
        "encode pictures1 h 02 min", "fit Fisher0.5 s", "The prompt was cut.",
    ):  # fmt: skip
        assert said in text
    assert all("open" not in attributes for attributes in Page(html).all("details"))


def test_nothing_given_becomes_markup(data: ImageDataset) -> None:
    query = make_query(ATTACK)
    query.provenance['"><script>'] = ATTACK
    scores = make_scores(data, query, curvature={ATTACK: ATTACK}, seconds={ATTACK: 1.0})
    plain_query = make_scores(data, make_query())
    page = Page(
        render_page([scores], data, top=N, timings={ATTACK: 1.0}, notes=[ATTACK], title=ATTACK)
    )
    assert not page.all("script")
    for _, attributes in page.elements:
        assert not any(name.startswith("on") for name in attributes)
    # What was given is read as text: title twice, prompt, captions, provenance, note ...
    assert page.text.count(ATTACK) >= 8
    # ... and adds no element to those of a harmless page with as many parts.
    harmless = Page(render_page([plain_query], data, top=N))
    assert {t for t, _ in page.elements} - {t for t, _ in harmless.elements} <= {"b", "section"}
    assert len(page.all("img")) == len(harmless.all("img"))


def test_captions_and_metadata_are_shown(data: ImageDataset) -> None:
    text = Page(render_page([make_scores(data)], data, top=N)).text
    assert "drei Überschriften, 漢字 und قطة" in text
    assert "one captionand 1 more caption" in text and "another caption" in text
    assert "artist<b>A. Rtist</b>" in text
    assert "None" not in text


def test_several_queries_share_a_page(data: ImageDataset) -> None:
    results = [make_scores(data, make_query(f"prompt {i}")) for i in range(3)]
    page = Page(render_page(results, data, top=4))
    assert len(page.all("img")) == 3 * (1 + 1 + 4 + 4)
    ids = [a["id"] for a in page.all("section", "query")]
    assert [a["href"] for a in page.all("a")] == [f"#{i}" for i in ids]
    assert len(set(ids)) == 3


def test_fewer_examples_than_asked_for(data: ImageDataset) -> None:
    scores = Scores(data.ids[:3], VALUES[:3], "AbU", {}, make_query())
    page = Page(render_page([scores], data, top=10))
    assert len(page.all("img")) == 1 + 3
    assert "Least influential" not in page.text
    scores = Scores(data.ids[:12], VALUES[:12], "AbU", {}, make_query())
    assert len(Page(render_page([scores], data, top=10)).all("img")) == 1 + 10 + 2


def test_equal_scores_are_called_so(data: ImageDataset) -> None:
    for value in (0.0, 2.5, -1e-9):
        scores = Scores(data.ids, np.full(N, value), "AbU", {}, make_query())
        page = Page(render_page([scores], data, top=3))
        assert "All scores are equal" in page.text
        assert len(page.all("rect", "bar")) == 1


def test_noise_floor_is_told_and_marked(data: ImageDataset) -> None:
    def page(**arguments: float) -> Page:
        scores = make_scores(data, make_query(), noise_floor=5.5e-4)
        return Page(render_page([scores], data, top=5, **arguments))

    # The five largest are 7, 6, 5, 3 and 2 times 1e-4.
    assert "up to 5.50×10⁻⁴. Of these 5, ranks 1–2 stand clear of it." in page().text
    assert len(page().all("p", "tag")) == 3
    assert "All 5 stand clear" in page(floor=1e-4).text
    assert "None of these stands clear" in page(floor=1e-3).text
    assert len(page().all("rect", "floor")) == 1


def test_standard_errors_are_told_and_marked(data: ImageDataset) -> None:
    columns = ["factors", "outputs"]
    errors = np.full(N, 2e-4)
    scores = Scores(data.ids, VALUES, "AbU, first order", {"columns": columns}, errors=errors)
    page = Page(render_page([scores], data, top=3))
    for said in ("clear is what exceeds 3 of them", "rank 1 stands clear of it", "± 2.00×10⁻⁴",
                 "It has no unit", "of the loss and of the network’s output"):  # fmt: skip
        assert said in page.text
    assert page.text.count("within the noise") == 2
    alone = Scores(data.ids, VALUES, "AbU, first order", {"columns": columns[:1]}, errors=errors)
    text = Page(render_page([alone], data)).text
    assert "when the picture is unlearned, to first order. " in text and "no unit" not in text
    probed = Scores(data.ids, VALUES, "AbU, second order", {"columns": ["factors", "probes"]})
    text = Page(render_page([probed], data)).text
    assert "when the picture is unlearned, to second order. " in text and "no unit" not in text


def test_self_influence_is_not_about_a_picture(data: ImageDataset) -> None:
    text = Page(render_page([Scores(data.ids, VALUES, "self-influence")], data, top=3)).text
    assert "Which training images has the model learnt by heart?" in text
    assert "influence of a training image on its own loss" in text
    assert "5 of 14 scores are negative, which chance alone can make" in text
    assert "this picture" not in text and "opponent" not in text


def test_some_of_the_images_are_said_to_be_some(data: ImageDataset) -> None:
    few = Scores(data.ids[:4], VALUES[:4], "AbU, forward")
    assert "4 of the 14 training images of train, scored by" in Page(render_page([few], data)).text


def test_box_and_its_cells_are_drawn(data: ImageDataset) -> None:
    box = (8, 16, 40, 48)
    page = Page(render_page([make_scores(data, make_query(box=box), box=box)], data))
    (drawn,) = page.all("rect", "box")
    assert [drawn[k] for k in ("x", "y", "width", "height")] == ["8", "16", "32", "32"]
    (outside,), (cells,) = page.all("path", "outside"), page.all("path", "cells")
    assert str(cells["d"]).count("M") == 16 and str(outside["d"]).count("M") == 64 - 16
    assert "16 of 64 latent cells" in page.text
    assert not Page(render_page([make_scores(data, make_query())], data)).all("rect", "box")


def test_many_cells_are_shaded_as_runs(data: ImageDataset) -> None:
    query = make_query(box=(8, 16, 40, 48), cells=64)
    (outside,) = Page(render_page([make_scores(data, query)], data)).all("path", "outside")
    runs = re.findall(r"M([\d.]+) ([\d.]+)h([\d.]+)v([\d.]+)", str(outside["d"]))
    shaded = np.zeros((64, 64))
    for x, y, width, height in runs:
        x0, y0 = int(float(x)), int(float(y))
        shaded[y0 : y0 + int(float(height)), x0 : x0 + int(float(width))] += 1
    assert query.mask is not None
    np.testing.assert_array_equal(shaded, 1 - query.mask.numpy())


def test_histogram_counts_and_marks() -> None:
    values = np.concatenate([np.linspace(-1, 1, 500), [9.0]])
    page = Page(histogram(values, 2, 3, ScoreScale(values)))
    assert len(page.all("rect", "most")) == 2 and len(page.all("rect", "least")) == 3
    bars = page.all("rect", "bar")
    # The lone outlier has the lowest bar, at the far right, and it is high enough to be seen.
    heights = [float(str(bar["height"])) for bar in bars]
    assert heights[-1] == min(heights) > 5
    # A mark lies within the bar of its bin.
    mark = float(str(page.all("rect", "most")[0]["x"]).rstrip("%"))
    left = float(str(bars[-1]["x"]).rstrip("%"))
    assert left <= mark <= left + float(str(bars[-1]["width"]).rstrip("%"))
    (svg,) = page.all("svg")
    assert svg["role"] == "img" and "501 scores" in str(svg["aria-label"])


def test_page_of_photographs_stays_small(tmp_path: Path) -> None:
    # Blurred noise with grain compresses worse than photographs do.
    rng = np.random.default_rng(0)
    rows = []
    for i in range(20):
        photograph(rng).save(tmp_path / f"{i}.png")
        rows.append(json.dumps({"file_name": f"{i}.png", "text": f"photograph {i}"}))
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    data = load_dataset("imagefolder", data_dir=tmp_path)
    results = []
    for i in range(3):
        picture = photograph(rng)
        query = Query("q", torch.zeros(4, 64, 64), torch.zeros(1), f"{i}", picture)
        results.append(Scores(data.ids, rng.normal(size=20), "AbU", {}, query))
    assert len(render_page(results, data).encode()) < 2_000_000


def photograph(rng: np.random.Generator) -> Image.Image:
    coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((512, 384), Image.Resampling.BICUBIC)).astype(int)
    grain = rng.integers(-12, 13, smooth.shape)
    return Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8))


def test_wrong_arguments_are_named(data: ImageDataset) -> None:
    scores = make_scores(data)
    with pytest.raises(ValueError, match="no results"):
        render_page([], data)
    with pytest.raises(ValueError, match="top = 0"):
        render_page([scores], data, top=0)
    with pytest.raises(ValueError, match="'stranger' is not in data set 'train'"):
        render_page([Scores(["stranger"], np.ones(1), "AbU")], data)
    with pytest.raises(ValueError, match="no scores"):
        render_page([Scores([], np.ones(0), "AbU")], data)


def test_contact_sheet_shows_the_right_pictures_in_place(data: ImageDataset) -> None:
    cell, top = 64, 7
    sheet = contact_sheet(make_scores(data).top(top), data, columns=4, cell=cell)
    assert sheet.width == 2 * MARGIN + 4 * cell + 3 * GAP
    row_height = (sheet.height - 2 * MARGIN + GAP) // 2
    for place, row in enumerate(np.argsort(-VALUES)[:top]):
        x = MARGIN + (place % 4) * (cell + GAP) + cell // 2
        y = MARGIN + (place // 4) * row_height + cell // 2
        assert sheet.getpixel((x, y)) == colour_of(int(row))
    # The eighth place is empty.
    x, y = MARGIN + 3 * (cell + GAP) + cell // 2, MARGIN + row_height + cell // 2
    assert sheet.getpixel((x, y)) == (255, 255, 255)


def test_contact_sheet_shows_the_query_and_its_box(data: ImageDataset) -> None:
    cell = 64
    scores = make_scores(data, make_query("käthe " * 50, box=(16, 8, 48, 40))).top(2)
    sheet = contact_sheet(scores, data, cell=cell)
    # The picture of 64 pixels is enlarged to 2 * cell - 2, inside a frame of one pixel.
    scale = (2 * cell - 2) / 64
    x, y = MARGIN + 1 + round(16 * scale), MARGIN + 1 + round(24 * scale)
    red = tuple(int(BOX[i : i + 2], 16) for i in (1, 3, 5))
    assert sheet.getpixel((x + 1, y)) == red
    assert sheet.getpixel((x + 10, y)) == (200, 220, 250)
    without = contact_sheet(make_scores(data).top(2), data, cell=cell)
    assert sheet.width == without.width + 2 * cell + 3 * GAP
    assert sheet.height >= 2 * MARGIN + 2 * cell


def test_contact_sheet_refuses_what_it_cannot_draw(data: ImageDataset) -> None:
    with pytest.raises(ValueError, match=r"0 examples to show.*scores.top"):
        contact_sheet(make_scores(data).top(0), data)
    with pytest.raises(ValueError, match="1,000 examples"):
        contact_sheet(Scores([str(i) for i in range(1000)], np.zeros(1000), "AbU"), data)
    with pytest.raises(ValueError, match="0 columns"):
        contact_sheet(make_scores(data), data, columns=0)
    with pytest.raises(ValueError, match="'stranger'"):
        contact_sheet(Scores(["stranger"], np.zeros(1), "AbU"), data)


def test_characters_that_a_font_lacks_are_replaced() -> None:
    builtin = ImageFont.load_default(14)
    assert isinstance(builtin, ImageFont.FreeTypeFont)
    assert _drawable("a Käthe 漢", builtin) == "a Kathe ?"


def test_report_writes_its_files(data: ImageDataset, tmp_path: Path) -> None:
    scores = make_scores(data, make_query())
    paths = write_report(scores, data, tmp_path / "a" / "b", top=3, timings={"load": 1.0})
    assert {k: p.name for k, p in paths.items()} == {
        "scores": "scores.parquet", "sheet": "contact-sheet.png",
        "query": "query.png", "page": "report.html",
    }  # fmt: skip
    # Nothing else is left: no temporary file.
    assert sorted(paths.values()) == sorted((tmp_path / "a" / "b").iterdir())
    assert Image.open(paths["query"]).tobytes() == make_query().image.tobytes()
    assert Image.open(paths["sheet"]).size == contact_sheet(scores.top(3), data).size
    page = paths["page"].read_text(encoding="utf-8")
    assert page == render_page([scores], data, top=3, timings={"load": 1.0})
    assert "query" not in write_report(make_scores(data), data, tmp_path / "c")


def test_saved_scores_come_back_with_captions_beside_them(
    data: ImageDataset, tmp_path: Path
) -> None:
    scores = make_scores(data, make_query())
    path = write_report(scores, data, tmp_path)["scores"]
    loaded = Scores.load(path)
    assert loaded.ids == scores.top(N).ids
    np.testing.assert_array_equal(loaded.values, scores.top(N).values)
    assert (loaded.method, loaded.settings) == ("AbU", SETTINGS)
    table = pq.read_table(path)
    captions = dict(zip(data.ids, data.captions, strict=True))
    assert table["captions"].to_pylist() == [list(captions[i]) for i in loaded.ids]
    # The data set's own column `score` does not replace ours.
    assert table["metadata_score"].to_pylist() == [data.ids.index(i) for i in loaded.ids]
    assert table["artist"].to_pylist()[:2] == ["<b>A. Rtist</b>"] * 2


def test_a_damaged_picture_costs_no_scores(data: ImageDataset, tmp_path: Path) -> None:
    damaged = tmp_path / "train" / "3.png"
    damaged.write_bytes(damaged.read_bytes()[:60])
    scores = make_scores(data, make_query())
    with pytest.raises(ValueError, match=r"3\.png"):
        write_report(scores, data, tmp_path / "out")
    assert len(Scores.load(tmp_path / "out" / "scores.parquet")) == N


def test_scores_share_a_power_of_ten() -> None:
    scale = ScoreScale(np.array([7.04e-4, -1e-5, 0.0]))
    assert [scale.text(v) for v in (7.04e-4, -1e-5, 0.0)] == [
        "+7.04×10⁻⁴", "−0.10×10⁻⁴", "0.00×10⁻⁴",
    ]  # fmt: skip
    assert ScoreScale(np.array([12.5])).text(12.5) == "+12.50"
    assert ScoreScale(np.zeros(3)).text(0.0) == "0.00"
    assert (scale.size(2e-5), scale.size(2e-7)) == ("0.20×10⁻⁴", "2×10⁻⁷")


def test_numbers_read_well() -> None:
    assert [plain(v) for v in (0.25, 1.23456e-7, -2e8)] == ["0.25", "1.235×10⁻⁷", "−2×10⁸"]
    assert [duration(s) for s in (0.012, 7.14, 59.96, 245, 10920)] == [
        "12 ms", "7.1 s", "1 min 00 s", "4 min 05 s", "3 h 02 min",
    ]  # fmt: skip
    # A multiple of a step is not always the nearest double to the decimal: compare to rounding.
    np.testing.assert_allclose(ticks(-0.23, 0.61), [-0.2, 0, 0.2, 0.4, 0.6], atol=1e-12)
    np.testing.assert_allclose(ticks(0, 3e-7), np.arange(7) * 5e-8, atol=1e-20)
