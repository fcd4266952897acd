from __future__ import annotations

import io
import json
import logging
import shutil
import struct
import zlib
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image

from unsee.data import dataset
from unsee.data.dataset import ImageDataset, load_dataset, open_image, to_rgb


def load(folder: Path, **options: Any) -> ImageDataset:
    return load_dataset("imagefolder", data_dir=folder, **options)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def rewrite(folder: Path, rows: list[dict[str, Any]]) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metadata.jsonl").write_text(lines, encoding="utf-8")


def change(folder: Path, number: int, **fields: Any) -> None:
    """Changes fields of one row; None removes a field."""
    rows = rows_of(folder)
    rows[number] = {k: v for k, v in {**rows[number], **fields}.items() if v is not None}
    rewrite(folder, rows)


# -- what is read -------------------------------------------------------------------------------


def test_imagefolder(image_folder: Path):
    data = load(str(image_folder))
    assert len(data) == 12 and data.name == "pictures"
    assert data.ids[:2] == ["red-square.png", "red-circle.png"]
    example = data[1]
    assert example.id == "red-circle.png" and example.captions == ("a red circle",)
    assert example.metadata == {"colour": "red", "licence": "CC0"} == data.metadata(1)
    assert example.image.mode == "RGB" and example.image.size == (64, 64)
    assert example.image.getpixel((32, 32)) == (220, 30, 30)
    assert [e.id for e in data] == data.ids
    assert data[-1].id == data.ids[-1]
    with pytest.raises(IndexError):
        data[12]


def test_several_captions_and_own_ids(image_folder: Path):
    change(image_folder, 0, text=["a red square", "four red sides"], id="first")
    change(image_folder, 1, id=7)
    data = load(image_folder)
    assert data.captions[0] == ("a red square", "four red sides")
    assert data.ids[:3] == ["first", "7", "red-triangle.png"]


def test_csv(image_folder: Path):
    (image_folder / "metadata.jsonl").unlink()
    table = 'file_name,text,year\nred-square.png,"a square, red",1999\nred-circle.png,a circle,\n'
    (image_folder / "metadata.csv").write_text("\ufeff" + table, encoding="utf-8")  # as Excel does
    data = load(image_folder)
    assert data.ids == ["red-square.png", "red-circle.png"]
    assert data.captions == [("a square, red",), ("a circle",)]
    assert data.metadata(0) == {"year": "1999"}


def test_pictures_in_subfolders(image_folder: Path):
    (image_folder / "sub").mkdir()
    shutil.move(image_folder / "red-square.png", image_folder / "sub" / "red-square.png")
    change(image_folder, 0, file_name="sub/red-square.png")
    assert load(image_folder)[0].id == "sub/red-square.png"


def test_metadata_that_only_some_rows_have_is_kept(image_folder: Path):
    change(image_folder, 3, artist="Ada")
    data = load(image_folder)
    assert data.metadata(0)["artist"] is None and data.metadata(3)["artist"] == "Ada"


def test_a_caption_may_hold_any_character(image_folder: Path):
    """U+2028 ends a line for str.splitlines, but not in a JSON Lines file."""
    caption = "zwei\u2028Zeilen \x85 日本語 🎈"
    rows = rows_of(image_folder)
    rows[2]["text"] = caption
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n\n" for row in rows)
    (image_folder / "metadata.jsonl").write_text(lines, encoding="utf-8")
    assert load(image_folder).captions[2] == (caption,)


def test_select_keeps_the_order_asked_for(image_folder: Path):
    data = load(image_folder)
    some = data.select(["blue-circle.png", "red-square.png"])
    assert some.ids == ["blue-circle.png", "red-square.png"]
    assert some[0].captions == ("a blue circle",)
    with pytest.raises(ValueError, match="'pictures' has no example 'pink'"):
        data.select(["red-square.png", "pink"])


def test_the_fingerprint_follows_ids_captions_and_order(image_folder: Path):
    data = load(image_folder)
    same = load(image_folder)
    assert data.fingerprint == same.fingerprint
    others = [data.select(data.ids[::-1]), data.select(data.ids[:-1])]
    change(image_folder, 0, text="something else")
    others.append(load(image_folder))
    assert len({data.fingerprint, *(o.fingerprint for o in others)}) == 4


def test_the_stamp_follows_the_picture(image_folder: Path):
    data = load(image_folder)
    before = [data.stamp(i) for i in range(len(data))]
    Image.new("RGB", (64, 64), "black").save(image_folder / "red-square.png")
    after = [data.stamp(i) for i in range(len(data))]
    assert before[0] != after[0] and before[1:] == after[1:]
    (image_folder / "red-square.png").unlink()
    assert data.stamp(0) == "missing"


def embedded(*pictures: Image.Image) -> ImageDataset:
    """A data set that carries its pictures, as those of the hub do."""
    records = []
    for picture in pictures:
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        records.append({"bytes": buffer.getvalue(), "path": None})
    columns = {
        "id": [f"{i}" for i in range(len(records))],
        "captions": [["a picture", f"number {i}"] for i in range(len(records))],
        "image": records,
    }
    features = datasets.Features(
        {
            "id": datasets.Value("string"),
            "captions": datasets.List(datasets.Value("string")),
            "image": datasets.Image(),
        }
    )
    return ImageDataset(datasets.Dataset.from_dict(columns, features=features), "embedded")


def test_pictures_inside_the_table():
    data = embedded(Image.new("RGB", (4, 4), "red"), Image.new("RGB", (4, 4), "blue"))
    assert data[1].image.getpixel((0, 0)) == (0, 0, 255)
    assert data[1].captions == ("a picture", "number 1")
    assert data.stamp(0) != data.stamp(1)
    assert data.stamp(0) == embedded(Image.new("RGB", (4, 4), "red")).stamp(0)


# -- what is wrong with the data set ------------------------------------------------------------


def missing(folder: Path) -> None:
    (folder / "red-circle.png").unlink()


def no_name(folder: Path) -> None:
    change(folder, 1, file_name=None)


def number_for_name(folder: Path) -> None:
    change(folder, 1, file_name=5)


def outside(folder: Path) -> None:
    shutil.copy(folder / "red-circle.png", folder.parent / "red-circle.png")
    change(folder, 1, file_name="../red-circle.png")


def absolute(folder: Path) -> None:
    shutil.copy(folder / "red-circle.png", folder.parent / "red-circle.png")
    change(folder, 1, file_name=str(folder.parent / "red-circle.png"))


def blank_caption(folder: Path) -> None:
    change(folder, 1, text="  ")


def no_caption(folder: Path) -> None:
    change(folder, 1, text=None)


def no_captions(folder: Path) -> None:
    change(folder, 1, text=[])


def one_blank_caption(folder: Path) -> None:
    change(folder, 1, text=["a red circle", ""])


def number_for_caption(folder: Path) -> None:
    change(folder, 1, text=5)


def repeated_id(folder: Path) -> None:
    change(folder, 0, id="twin")
    change(folder, 1, id="twin")


PROBLEMS = [
    (missing, "red-circle.png: no such file"),
    (no_name, "row 2: no file_name"),
    (number_for_name, "no file_name"),
    (outside, "red-circle.png: file_name points outside the folder"),
    (absolute, "red-circle.png: file_name points outside the folder"),
    (blank_caption, "red-circle.png: empty caption"),
    (no_caption, "red-circle.png: empty caption"),
    (no_captions, "red-circle.png: empty caption"),
    (one_blank_caption, "red-circle.png: empty caption"),
    (number_for_caption, "red-circle.png: empty caption"),
    (repeated_id, "red-circle.png: id 'twin' appears more than once"),
]


@pytest.mark.parametrize(("damage", "message"), PROBLEMS, ids=lambda p: getattr(p, "__name__", ""))
def test_a_bad_row_is_named_and_fatal_or_skipped(image_folder: Path, caplog, damage, message):
    damage(image_folder)
    with pytest.raises(ValueError) as error:
        load(image_folder)
    assert message in str(error.value) and "on_error='skip'" in str(error.value)
    with caplog.at_level(logging.WARNING):
        data = load(image_folder, on_error="skip")
    assert len(data) == 11
    assert "red-circle.png" not in data.ids
    assert message in caplog.text and "skipped" in caplog.text


def test_many_bad_rows_are_counted(image_folder: Path):
    for name in ("red-square.png", "red-circle.png", "blue-square.png", "blue-circle.png"):
        (image_folder / name).unlink()
    with pytest.raises(ValueError, match=r"red-square.png: no such file; .*, and 1 more; fix them"):
        load(image_folder)


def test_an_empty_data_set(image_folder: Path, tmp_path: Path):
    rewrite(image_folder, [])
    for on_error in ("raise", "skip"):
        with pytest.raises(ValueError, match="is empty: no usable row"):
            load(image_folder, on_error=on_error)
    rewrite(image_folder, [{"file_name": "gone.png", "text": "gone"}])
    with pytest.raises(ValueError, match="is empty: no usable row"):
        load(image_folder, on_error="skip")
    table = datasets.Dataset.from_dict({"id": [], "captions": [], "image": []})
    with pytest.raises(ValueError, match="'nothing' is empty"):
        ImageDataset(table, "nothing")


def test_shared_captions_are_worth_a_warning(image_folder: Path, caplog):
    with caplog.at_level(logging.WARNING):
        load(image_folder)
    assert not caplog.records
    change(image_folder, 1, text="a red square")
    with caplog.at_level(logging.WARNING):
        data = load(image_folder)
    assert len(data) == 12
    assert "1 captions are shared by several examples, for instance 'a red square'" in caplog.text


def test_repeated_ids_of_any_table_are_refused():
    data = embedded(Image.new("RGB", (2, 2)), Image.new("RGB", (2, 2)))
    with pytest.raises(ValueError, match="id '1' appears more than once"):
        data.select(["1", "1"])


def test_no_folder_no_metadata(tmp_path: Path):
    with pytest.raises(ValueError, match=r"absent': no such folder"):
        load(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"has no metadata\.jsonl: a line per image"):
        load(tmp_path)
    with pytest.raises(ValueError, match="needs data_dir="):
        load_dataset("imagefolder")


@pytest.mark.parametrize(
    ("line", "message"),
    [("{'file_name': 1}", r"line 13: not JSON"), ("[1, 2]", "line 13: not a JSON object")],
)
def test_a_broken_line_is_named(image_folder: Path, line, message):
    with (image_folder / "metadata.jsonl").open("a", encoding="utf-8") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match=message):
        load(image_folder)


def test_a_comma_in_a_csv_caption_is_not_lost(image_folder: Path):
    (image_folder / "metadata.jsonl").unlink()
    table = "file_name,text\nred-square.png,a square, red\n"
    (image_folder / "metadata.csv").write_text(table, encoding="utf-8")
    with pytest.raises(ValueError, match=r"metadata\.csv, line 2: more fields .* double quotes"):
        load(image_folder)


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_another_encoding_is_named(image_folder: Path, name):
    (image_folder / "metadata.jsonl").unlink()
    (image_folder / name).write_bytes("file_name,text\na.png,Käse".encode("latin-1"))
    with pytest.raises(ValueError, match=f"{name}: not UTF-8"):
        load(image_folder)


def test_metadata_of_mixed_types_is_named(image_folder: Path):
    change(image_folder, 0, year=1999)
    change(image_folder, 1, year="1999?")
    with pytest.raises(ValueError, match=r"values of several types \(.*1999\?"):
        load(image_folder)


def test_unknown_names_and_options(image_folder: Path):
    with pytest.raises(ValueError, match="unknown data set 'coco': use 'twemoji' or 'imagefolder'"):
        load_dataset("coco")
    with pytest.raises(ValueError, match="unknown option 'split' for data set 'imagefolder'"):
        load(image_folder, split="train")


# -- pictures -----------------------------------------------------------------------------------


def test_a_truncated_picture_is_named_when_it_is_read(image_folder: Path):
    path = image_folder / "red-circle.png"
    path.write_bytes(path.read_bytes()[:-60])
    data = load(image_folder)  # loading decodes nothing
    with pytest.raises(ValueError, match=r"image red-circle\.png of pictures: cannot be read"):
        data[1]
    assert data[2].id == "red-triangle.png"


def test_any_damage_is_an_error_of_ours(tmp_path: Path):
    """Cut or overwritten files: a picture or a ValueError that names it, never another error."""
    path = tmp_path / "picture"
    for kind in ("PNG", "JPEG", "GIF", "WEBP", "BMP"):
        Image.linear_gradient("L").resize((40, 40)).convert("RGB").save(path, kind)
        whole = path.read_bytes()
        for position in range(0, len(whole), max(1, len(whole) // 12)):
            for broken in (
                whole[:position],
                whole[:position] + b"\xff\x00\xff" + whole[position + 3 :],
            ):
                path.write_bytes(broken)
                try:
                    assert open_image(path).mode == "RGB"
                except ValueError as error:
                    assert str(path) in str(error)


@pytest.mark.parametrize("content", [b"", b"not a picture"])
def test_other_files_are_named(tmp_path: Path, content):
    path = tmp_path / "a.png"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.png: cannot be read"):
        open_image(path)
    with pytest.raises(ValueError, match="gone: no such file"):
        open_image(tmp_path / "gone")


def test_huge_pictures_are_refused_before_they_are_decoded(tmp_path: Path, monkeypatch):
    path = tmp_path / "a.png"
    Image.new("1", (300, 200)).save(path)
    monkeypatch.setattr(dataset, "MAX_PIXELS", 59_999)
    with pytest.raises(ValueError, match=r"a\.png: 300x200 has more than 59,999 pixels"):
        open_image(path)
    monkeypatch.setattr(dataset, "MAX_PIXELS", 60_000)
    assert open_image(path).size == (300, 200)


def test_a_decompression_bomb_is_refused(tmp_path: Path):
    """Beyond Pillow's own limit, which raises before we can ask for the size."""
    path = tmp_path / "bomb.png"
    Image.new("1", (1, 1)).save(path)
    header = b"IHDR" + struct.pack(">II", 200_000, 100_000) + b"\x01\x00\x00\x00\x00"
    whole = path.read_bytes()
    path.write_bytes(whole[:12] + header + struct.pack(">I", zlib.crc32(header)) + whole[33:])
    with pytest.raises(ValueError, match=r"bomb\.png: "):
        open_image(path)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "PA", "RGB", "L", "1"])
def test_transparency_becomes_white(tmp_path: Path, mode):
    """Left half opaque black, right half transparent black."""
    path = tmp_path / "a.png"
    if mode in ("RGBA", "LA"):
        picture = Image.new(mode, (4, 2))
        picture.paste((0, 255) if mode == "LA" else (0, 0, 0, 255), (0, 0, 2, 2))
        picture.save(path)
    elif mode == "PA":
        picture = Image.new("RGBA", (4, 2))
        picture.paste((0, 0, 0, 255), (0, 0, 2, 2))
        assert to_rgb(picture.convert("PA")).mode == "RGB"
        return
    else:
        # one colour is declared transparent: index or value 1, which looks black as well
        picture = Image.new(mode, (4, 2), 0 if mode != "RGB" else (0, 0, 0))
        one = (1, 1, 1) if mode == "RGB" else 1
        picture.paste(one, (2, 0, 4, 2))
        if mode == "P":
            picture.putpalette([0, 0, 0, 0, 0, 0])
        picture.save(path, transparency=one)
    rgb = open_image(path)
    assert rgb.mode == "RGB"
    assert rgb.getpixel((0, 0)) == (0, 0, 0)
    assert rgb.getpixel((3, 1)) == (255, 255, 255)


def test_half_transparency_is_mixed_with_white():
    grey = to_rgb(Image.new("RGBA", (1, 1), (0, 0, 0, 128))).getpixel((0, 0))
    assert grey == (127, 127, 127)


@pytest.mark.parametrize("mode", ["L", "1", "CMYK", "YCbCr", "I", "F"])
def test_other_modes_become_rgb(mode):
    assert to_rgb(Image.new(mode, (3, 2))).mode == "RGB"


def test_a_sideways_photograph_is_turned_upright(tmp_path: Path):
    path = tmp_path / "photo.jpg"
    picture = Image.new("RGB", (8, 4), "black")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    picture.save(path, exif=exif)
    assert open_image(path).size == (4, 8)


def test_shared_captions_are_warned_of_once(image_folder: Path, caplog) -> None:
    change(image_folder, 1, text="a red square")
    with caplog.at_level(logging.WARNING):
        data = load(image_folder)
        for _ in range(3):
            data.select(data.ids[:2])
    (record,) = caplog.records
    assert "1 captions are shared by several examples" in record.getMessage()
