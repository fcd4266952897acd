import json

import datasets
import numpy as np
import pytest
from PIL import Image

from unsee.data.dataset import ImageDataset, load_dataset
from unsee.data.image_folder import write_image_folder


def equal(a: ImageDataset, b: ImageDataset) -> None:
    assert a.ids == b.ids and a.captions == b.captions
    for left, right in zip(a, b, strict=True):
        assert np.array_equal(np.asarray(left.image), np.asarray(right.image))
        assert left.metadata == right.metadata


def test_what_is_written_is_read_again(image_folder, tmp_path):
    rows = [json.loads(line) for line in (image_folder / "metadata.jsonl").read_text().splitlines()]
    rows[0] |= {"id": "dir/first é", "text": ["one", "two \u2028 lines"], "year": 1999}
    (image_folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = load_dataset("imagefolder", data_dir=image_folder)
    write_image_folder(data, tmp_path / "copy")
    again = load_dataset("imagefolder", data_dir=tmp_path / "copy")
    equal(data, again)
    assert again.fingerprint == data.fingerprint
    assert [again.stamp(i) for i in range(12)] == [data.stamp(i) for i in range(12)]


def test_some_of_the_emoji(tmp_path):
    data = load_dataset("twemoji")
    some = data.select(data.ids[5:9])
    write_image_folder(some, tmp_path / "copy")
    equal(some, load_dataset("imagefolder", data_dir=tmp_path / "copy"))


def test_pictures_that_are_bytes(image_folder, tmp_path):
    files = sorted(image_folder.glob("red*.png"))
    table = datasets.Dataset.from_dict({
        "id": [f.name for f in files], "captions": [["red"]] * len(files),
        "image": [{"path": None, "bytes": f.read_bytes()} for f in files],
    }, features=datasets.Features({
        "id": datasets.Value("string"), "captions": [datasets.Value("string")],
        "image": datasets.Image(decode=False),
    }))  # fmt: skip
    data = ImageDataset(table, "bytes")
    write_image_folder(data, tmp_path / "copy")
    equal(data, load_dataset("imagefolder", data_dir=tmp_path / "copy"))


def test_a_copy_may_be_changed(image_folder, tmp_path):
    data = load_dataset("imagefolder", data_dir=image_folder)
    write_image_folder(data, tmp_path / "copy")
    before = np.asarray(data[0].image)
    Image.new("RGB", (2, 2)).save(tmp_path / "copy" / "000000.png")
    assert np.array_equal(np.asarray(data[0].image), before)


def test_a_picture_that_is_gone(image_folder, tmp_path):
    data = load_dataset("imagefolder", data_dir=image_folder)
    (image_folder / "red-circle.png").unlink()
    with pytest.raises(ValueError, match=r"image red-circle\.png of pictures: cannot be copied"):
        write_image_folder(data, tmp_path / "copy")
    assert not (tmp_path / "copy" / "metadata.jsonl").exists()
