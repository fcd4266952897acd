from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageOps

from tests.data.test_dataset import change, load
from unsee.data.latents import EncodedDataset, encode_dataset


def same(a: EncodedDataset, b: EncodedDataset, flipped: bool = False) -> bool:
    rows = range(len(a.ids))
    return a.ids == b.ids and torch.equal(a.latents(rows, flipped), b.latents(rows, flipped))


def shards(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


def test_latents_and_text_states_are_the_models(tiny_model, image_folder: Path):
    change(image_folder, 0, text=["a red square", "a large square"])
    data = load(image_folder)
    encoded = encode_dataset(tiny_model, data, flips=True)
    assert encoded.ids == data.ids
    assert encoded.caption_counts == [2] + [1] * 11
    assert encoded.has_flips
    rows = [3, 0, 3]
    pictures = [data[r].image for r in rows]
    # the VAE sees other batches here: float32 rounding of values of size 1
    torch.testing.assert_close(
        encoded.latents(rows), tiny_model.encode_images(pictures), rtol=1e-5, atol=1e-6
    )
    mirrored = tiny_model.encode_images([ImageOps.mirror(p) for p in pictures])
    torch.testing.assert_close(encoded.latents(rows, flipped=True), mirrored, rtol=1e-5, atol=1e-6)
    text = tiny_model.encode_prompts(["a green square", "a red square", "a green square"])
    torch.testing.assert_close(encoded.text(rows, 0), text, rtol=1e-5, atol=1e-6)
    second = tiny_model.encode_prompts(["a large square"])
    torch.testing.assert_close(encoded.text([0], 1), second, rtol=1e-5, atol=1e-6)
    assert encoded.latents(rows).dtype == encoded.text(rows, 0).dtype == torch.float32


def test_select(tiny_model, image_folder: Path):
    change(image_folder, 2, text=["a red triangle", "three sides"])
    encoded = encode_dataset(tiny_model, load(image_folder), flips=True)
    some = encoded.select(["blue-circle.png", "red-triangle.png"])
    rows = [encoded.ids.index(i) for i in some.ids]
    assert some.caption_counts == [1, 2] and some.has_flips
    for flipped in (False, True):
        assert torch.equal(some.latents([0, 1], flipped), encoded.latents(rows, flipped))
    assert torch.equal(some.text([1], 1), encoded.text([rows[1]], 1))
    with pytest.raises(ValueError, match="no example 'pink'"):
        encoded.select(["pink"])


def test_an_id_that_is_there_twice_is_refused():
    latents, states = torch.zeros(3, 1, 2, 2), torch.zeros(1, 2, 3)
    with pytest.raises(ValueError, match="encoded examples: id 'b' appears more than once"):
        EncodedDataset(["a", "b", "b"], latents, states, [[0]] * 3)
    encoded = EncodedDataset(["a", "b", "c"], latents, states, [[0]] * 3)
    with pytest.raises(ValueError, match="encoded examples: id 'a' appears more than once"):
        encoded.select(["a", "c", "a"])


def test_the_fingerprint_follows_everything_in_it():
    def make(ids=("a", "b"), captions=((0,), (1,)), flips=True, nudge=-1):
        tensors = [torch.arange(8.0).reshape(2, 1, 2, 2) + k for k in range(2)]
        tensors.append(torch.arange(12.0).reshape(2, 2, 3))
        if nudge >= 0:
            tensors[nudge].view(-1)[0] += 1e-6
        captions = [list(c) for c in captions]
        return EncodedDataset(
            list(ids), tensors[0], tensors[2], captions, tensors[1] if flips else None
        )

    assert make().fingerprint == make().fingerprint
    prints = [
        make(),
        make(ids=("b", "a")),
        make(captions=((0,), (0,))),
        make(flips=False),
        *(make(nudge=k) for k in range(3)),
    ]
    assert len({p.fingerprint for p in prints}) == 7


def test_flips_must_have_been_encoded(tiny_model, image_folder: Path):
    encoded = encode_dataset(tiny_model, load(image_folder))
    assert not encoded.has_flips
    with pytest.raises(ValueError, match="flips=True"):
        encoded.latents([0], flipped=True)


# -- the cache ----------------------------------------------------------------------------------


def test_a_second_run_continues_where_the_first_was_killed(
    tiny_model, image_folder: Path, tmp_path: Path, monkeypatch
):
    data, cache = load(image_folder), tmp_path / "cache"
    fresh = encode_dataset(tiny_model, data, flips=True, batch_size=5)
    whole = encode_dataset(tiny_model, data, flips=True, batch_size=5, cache=cache)
    assert same(fresh, whole) and same(fresh, whole, flipped=True)
    assert len(shards(cache)) == 3
    shards(cache)[1].unlink()  # as if the run had been killed before it was there
    calls = []
    encode = tiny_model.encode_images
    monkeypatch.setattr(
        tiny_model,
        "encode_images",
        lambda pictures: calls.append(len(pictures)) or encode(pictures),
    )
    again = encode_dataset(tiny_model, data, flips=True, batch_size=5, cache=cache)
    assert calls == [5, 5]  # the missing shard and its mirror images
    assert same(again, whole) and same(again, whole, flipped=True)


def test_another_batch_size_does_not_mix_with_the_first(tiny_model, image_folder, tmp_path):
    data = load(image_folder)
    for size in (12, 5, 1):
        encoded = encode_dataset(tiny_model, data, cache=tmp_path / "cache", batch_size=size)
        assert encoded.ids == data.ids
        assert encoded.latents(range(12)).shape == (12, 4, 8, 8)


def test_a_picture_that_changed_is_encoded_again(tiny_model, image_folder, tmp_path):
    data, cache = load(image_folder), tmp_path / "cache"
    before = encode_dataset(tiny_model, data, cache=cache, batch_size=4)
    Image.new("RGB", (64, 64), "black").save(image_folder / "red-square.png")
    after = encode_dataset(tiny_model, data, cache=cache, batch_size=4)
    assert not torch.equal(before.latents([0]), after.latents([0]))
    assert torch.equal(before.latents(range(4, 12)), after.latents(range(4, 12)))
    assert len(shards(cache)) == 3


def test_another_autoencoder_is_another_cache(tiny_model, image_folder, tmp_path):
    data, cache = load(image_folder), tmp_path / "cache"
    before = encode_dataset(tiny_model, data, cache=cache)
    with torch.no_grad():
        next(tiny_model.pipeline.vae.parameters()).mul_(1.5)
    after = encode_dataset(tiny_model, data, cache=cache)
    assert not torch.equal(before.latents([0]), after.latents([0]))


def test_another_decoder_is_the_same_cache(tiny_model, image_folder, tmp_path, monkeypatch):
    data, cache = load(image_folder), tmp_path / "cache"
    before = encode_dataset(tiny_model, data, cache=cache)
    vae = tiny_model.pipeline.vae
    with torch.no_grad():
        for part in (vae.post_quant_conv, vae.decoder):
            next(part.parameters()).mul_(1.5)
    monkeypatch.setattr(vae, "encode", None)  # not needed again
    after = encode_dataset(tiny_model, data, cache=cache)
    assert torch.equal(before.latents(range(12)), after.latents(range(12)))


@pytest.mark.parametrize("length", [0, 20, -4])
def test_a_damaged_shard_is_named(tiny_model, image_folder, tmp_path, length):
    data, cache = load(image_folder), tmp_path / "cache"
    encode_dataset(tiny_model, data, cache=cache)
    (shard,) = shards(cache)
    shard.write_bytes(shard.read_bytes()[:length])
    with pytest.raises(ValueError, match=r"is damaged .* delete it and run again") as error:
        encode_dataset(tiny_model, data, cache=cache)
    assert str(shard) in str(error.value)


# -- pictures that cannot be read ---------------------------------------------------------------


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-60])


@pytest.mark.parametrize("cached", [False, True])
def test_a_truncated_picture_is_fatal_or_skipped(
    tiny_model, image_folder, tmp_path, caplog, cached
):
    data = load(image_folder)
    whole = encode_dataset(tiny_model, data)
    truncate(image_folder / "red-circle.png")
    cache = tmp_path / "cache" if cached else None
    options = {"cache": cache, "batch_size": 5, "flips": True}
    for _ in range(2):  # the second time some shards are there
        with pytest.raises(ValueError, match=r"red-circle\.png of pictures.*on_error='skip'"):
            encode_dataset(tiny_model, data, **options)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            encoded = encode_dataset(tiny_model, data, on_error="skip", **options)
        assert "red-circle.png of pictures" in caplog.text and len(caplog.records) == 1
        assert encoded.ids == [i for i in data.ids if i != "red-circle.png"]
        kept = [r for r, i in enumerate(data.ids) if i != "red-circle.png"]
        assert torch.equal(encoded.text(range(11), 0), whole.text(kept, 0))
        # other batches: float32 rounding of values of size 1
        torch.testing.assert_close(
            encoded.latents(range(11)), whole.latents(kept), rtol=1e-5, atol=1e-6
        )


def test_a_whole_shard_of_bad_pictures(tiny_model, image_folder, tmp_path):
    data = load(image_folder)
    for name in data.ids[4:8]:
        truncate(image_folder / name)
    for _ in range(2):
        encoded = encode_dataset(
            tiny_model, data, cache=tmp_path / "c", batch_size=4, on_error="skip"
        )
        assert encoded.ids == data.ids[:4] + data.ids[8:]
        assert encoded.latents(range(8)).shape == (8, 4, 8, 8)


def test_no_readable_picture_at_all(tiny_model, image_folder):
    data = load(image_folder)
    for name in data.ids:
        truncate(image_folder / name)
    with pytest.raises(ValueError, match="'pictures': none of its 12 pictures can be read"):
        encode_dataset(tiny_model, data, on_error="skip")


def test_captions_that_are_cut_are_worth_one_warning(tiny_model, image_folder, caplog):
    change(image_folder, 0, text="a red square and a blue circle and a green triangle on the moon")
    change(image_folder, 1, text="a cat with a hat in a house on the moon and a dog in the sun")
    with caplog.at_level(logging.WARNING):
        encode_dataset(tiny_model, load(image_folder))
    assert len(caplog.records) == 1
    assert "1 more prompts are cut" in caplog.text
