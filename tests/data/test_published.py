"""The paper's released files: what is read, and what is refused."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel

from tests.reference import abu
from tests.reference.released import write_experiment
from unsee.data.published import (
    PAPER_UNET,
    WEIGHT_SELECTIONS,
    PublishedConfig,
    PublishedExamples,
    file_fingerprint,
    read_fisher,
    read_query,
    read_unet,
)
from unsee.data.recorded import RecordedDraws

N, CAPTIONS, SHAPE = 3, 2, (4, 8, 8)
LATENTS, TEXT = "coco17_train_latents.npy", "coco17_train_text_embeddings.npy"
QUERIES, PROMPTS = "coco17_sample_latents.npy", "coco17_sample_text_embeddings.npy"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published") / "data"
    return write_experiment(folder, n=N, captions=CAPTIONS, num_captions=2, shape=SHAPE)


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "data"))


def configure(folder: Path, **values) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def open_all(folder: Path, query: int = 0) -> None:
    """Reads everything there is, as the experiment does."""
    config = PublishedConfig.load(folder)
    data = PublishedExamples(folder, config)
    read_query(folder, query, config, data.latent_shape)
    unet = read_unet(folder, config)
    read_fisher(folder, {n: p.shape for n, p in unet.named_parameters() if config.selects(n)})
    RecordedDraws(folder / "draws.npz", query, data, config)


# -- configuration ------------------------------------------------------------------------------


def test_without_configuration_the_constants_are_the_papers(tmp_path: Path) -> None:
    config = PublishedConfig.load(tmp_path)
    assert (config.lr, config.steps, config.unlearn_batch, config.grad_accum) == (0.01, 1, 80, 625)
    assert (config.num_captions, config.time_samples, config.dataset_size) == (5, 20, None)
    assert config.weight_selection == "cross-attn-kv"
    assert config.text_width == 1024
    with torch.device("meta"):
        unet = UNet2DConditionModel(**PAPER_UNET)
    sizes = [p.numel() for name, p in unet.named_parameters() if config.selects(name)]
    # The paper's model: key and value of the text in 16 blocks.
    assert (len(sizes), sum(sizes)) == (32, 7_077_888)


def test_what_the_configuration_leaves_out_is_as_in_the_paper(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"lr": 0.5, "steps": 7}')
    assert PublishedConfig.load(tmp_path) == PublishedConfig(lr=0.5, steps=7)


@pytest.mark.parametrize("selection", WEIGHT_SELECTIONS)
def test_selection_is_the_published_substring_rule(selection: str) -> None:
    config = PublishedConfig(weight_selection=selection)
    with torch.device("meta"):
        names = [name for name, _ in UNet2DConditionModel(**PAPER_UNET).named_parameters()]
    names += ["x.attn2.to_k.bias", "x.attn2.norm.weight", "attentions.0.to_k.weight", "attn1.to_v"]
    chosen = [name for name in names if config.selects(name)]
    assert chosen == [name for name in names if abu.selected(name, selection)]
    assert chosen


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 0}, "steps = 0"),
        ({"grad_accum": 2.5}, "grad_accum = 2.5"),
        ({"unlearn_batch": True}, "unlearn_batch = True"),
        ({"num_captions": "2"}, "num_captions = '2'"),
        ({"dataset_size": -4}, "dataset_size = -4"),
        ({"lr": float("nan")}, "lr = nan"),
        ({"lr": None}, "lr = None"),
        ({"weight_selection": "kv"}, "'kv' is not one of cross-attn-kv, cross-attn, attn, all"),
        ({"weight_selection": ["attn"]}, "is not one of"),
        ({"unet": [1, 2]}, "unet = "),
        ({"num_captions": 3}, "has 2 captions.*num_captions = 3"),
        ({"time_samples": 9}, r"loss_timesteps has shape \(2,\).*\(9,\)"),
        ({"steps": 4}, r"unlearn_timesteps_0 has shape \(1, 2, 3\).*\(4, 2, 3\)"),
        ({"unet": {"no_such_argument": 1}}, "make no UNet.*no_such_argument"),
        ({"unet": {"down_block_types": ["NoBlock"]}}, "make no UNet"),
    ],
)
def test_bad_configuration_is_named(folder: Path, values: dict, message: str) -> None:
    if isinstance(values.get("unet"), dict):
        own = json.loads((folder / "config.json").read_text())["unet"]
        values = {"unet": {**own, **values["unet"]}}
    configure(folder, **values)
    with pytest.raises(ValueError, match=message):
        open_all(folder)


@pytest.mark.parametrize(
    ("text", "message"), [("{", "not JSON"), ("[1]", "must hold an object, not list")]
)
def test_configuration_that_is_no_object_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=f"config.json: {message}"):
        PublishedConfig.load(tmp_path)


def test_unknown_configuration_is_mentioned(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    configure(folder, learning_rate=3, score="mean over views")
    open_all(folder)
    assert "nothing is done with learning_rate" in caplog.text
    assert 'another "score" is named' in caplog.text


# -- arrays -------------------------------------------------------------------------------------


def test_flips_are_the_second_half_and_share_captions(folder: Path) -> None:
    data = PublishedExamples(folder, PublishedConfig.load(folder))
    latents, text = np.load(folder / LATENTS), np.load(folder / TEXT)
    assert len(data.ids) == len(set(data.ids)) == N
    assert data.caption_counts == [2] * N
    assert data.has_flips
    assert data.latent_shape == SHAPE
    for rows in ([0], [2, 0, 2]):
        assert np.array_equal(data.latents(rows), latents[rows])
        assert np.array_equal(data.latents(rows, flipped=True), latents[[r + N for r in rows]])
        for caption in (0, 1):
            assert np.array_equal(data.text(rows, caption), text[rows, caption])
    assert data.latents([0]).dtype == data.text([0], 0).dtype == torch.float32


def test_fewer_captions_than_the_file_holds(folder: Path) -> None:
    configure(folder, num_captions=1)
    assert PublishedExamples(folder, PublishedConfig.load(folder)).caption_counts == [1] * N
    open_all(folder)  # draws that were recorded for both captions serve the first


def test_half_precision_arrays_are_read_as_float32(folder: Path) -> None:
    half = np.load(folder / TEXT).astype(np.float16)
    np.save(folder / TEXT, half)
    text = PublishedExamples(folder, PublishedConfig.load(folder)).text([1], 1)
    assert text.dtype == torch.float32
    assert np.array_equal(text[0], half[1, 1].astype(np.float32))


def test_arrays_stay_on_disk(folder: Path) -> None:
    # Sparse files of 2 GB: only a program that reads them whole would notice.
    count, width = 25_000, 100
    for name, shape in ((LATENTS, (2 * count, *SHAPE)), (TEXT, (count, 2, 100, width))):
        np.lib.format.open_memmap(folder / name, "w+", np.float32, shape)
    config = PublishedConfig(unet={"cross_attention_dim": width}, num_captions=2)
    tracemalloc.start()
    try:
        data = PublishedExamples(folder, config)
        data.text([0, count - 1], 1)
        data.latents([0, count - 1], flipped=True)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # Mostly the ids: about 100 bytes each.
    assert peak < 20e6


def test_query_is_read_with_its_first_prompt(folder: Path) -> None:
    latents, text = read_query(folder, 1, PublishedConfig.load(folder), SHAPE)
    assert np.array_equal(latents, np.load(folder / QUERIES)[1])
    assert np.array_equal(text, np.load(folder / PROMPTS)[1, 0])


@pytest.mark.parametrize("query", [-1, 2])
def test_query_out_of_range_is_named(folder: Path, query: int) -> None:
    with pytest.raises(ValueError, match=f"query {query}: .* has 2, 0 to 1"):
        open_all(folder, query)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (LATENTS, lambda a: a[:-1], "has 5 rows, .* has 3"),
        (LATENTS, lambda a: a[:0], "has 0 rows, .* has 3"),
        (LATENTS, lambda a: a[:, :3], "has 3 channels, .* takes 4"),
        (LATENTS, lambda a: a[:, 0], r"4 dimensions, is float32 \(6, 8, 8\)"),
        (LATENTS, lambda a: a.astype(int), "floating point array .* is int64"),
        (LATENTS, lambda a: a[..., :4], r"of shape \(4, 8, 8\), .* of \(4, 8, 4\)"),
        (TEXT, lambda a: a[:2], "has 6 rows, .* has 2"),
        (TEXT, lambda a: a[:, :1], "has 1 captions .* num_captions = 2"),
        (TEXT, lambda a: a[..., :7], "of width 7, .* cross_attention_dim is 12"),
        (TEXT, lambda a: a[:, :, :0], "no caption or no token"),
        (QUERIES, lambda a: a[:1], "has 1 queries, .* has 2"),
        (PROMPTS, lambda a: a[..., :7], "of width 7, .* cross_attention_dim is 12"),
    ],
)
def test_arrays_that_do_not_fit_are_named(folder: Path, name: str, change, message: str) -> None:
    np.save(folder / name, change(np.load(folder / name)))
    with pytest.raises(ValueError, match=message):
        open_all(folder)


@pytest.mark.parametrize(
    "name", [LATENTS, TEXT, QUERIES, PROMPTS, "model.bin", "fisher_info.pt", "draws.npz"]
)
def test_missing_and_truncated_files_are_named(folder: Path, name: str) -> None:
    path = folder / name
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=f"{name}: not a whole"):
        open_all(folder)
    path.unlink()
    with pytest.raises(ValueError, match=f"{name}: no such file"):
        open_all(folder)


def test_pickled_objects_are_not_loaded(folder: Path) -> None:
    np.save(folder / LATENTS, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=f"{LATENTS}: not a whole .npy file of numbers"):
        open_all(folder)
    torch.save({"conv_in.weight": Path("x")}, folder / "model.bin")
    with pytest.raises(ValueError, match=r"model.bin: not a whole file of tensors"):
        read_unet(folder, PublishedConfig.load(folder))


# -- weights and Fisher -------------------------------------------------------------------------


def change_weights(path: Path, change) -> None:
    weights = torch.load(path, weights_only=True)
    torch.save(change(weights) or weights, path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: {n: v for n, v in w.items() if n != "conv_in.bias"}, "lacks conv_in.bias"),
        (lambda w: {**w, "extra": torch.zeros(1)}, "has unexpected extra"),
        (lambda w: {**w, "conv_in.bias": torch.zeros(9)}, r"conv_in.bias has shape \(9,\).*\(8,\)"),
        (lambda w: {"state": w}, "must hold tensors by parameter name"),
        (lambda w: list(w.values()), "must hold tensors by parameter name"),
    ],
)
def test_weights_of_another_network_are_named(folder: Path, change, message: str) -> None:
    change_weights(folder / "model.bin", change)
    with pytest.raises(ValueError, match=f"model.bin.* ?{message}"):
        open_all(folder)


def test_weights_are_loaded_bit_by_bit(folder: Path) -> None:
    weights = torch.load(folder / "model.bin", weights_only=True)
    unet = read_unet(folder, PublishedConfig.load(folder))
    for name, value in unet.state_dict().items():
        assert torch.equal(value, weights[name])


def test_fisher_is_exactly_the_files(folder: Path) -> None:
    name = "conv_in.weight"
    values = torch.load(folder / "fisher_info.pt", weights_only=True)
    read = read_fisher(folder, {name: values[name].shape})
    assert list(read) == [name]
    assert read[name].dtype == torch.float64
    assert torch.equal(read[name], values[name])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.pop("conv_in.bias"), "lacks conv_in.bias: it was fitted for another UNet"),
        (lambda f: f.update({"conv_in.bias": torch.ones(2)}), r"shape \(2,\).*\(8,\)"),
        (lambda f: f["conv_in.bias"].neg_(), "conv_in.bias has values that are negative"),
        (lambda f: f["conv_in.bias"].fill_(np.inf), "negative or not finite"),
    ],
)
def test_bad_fisher_is_named(folder: Path, change, message: str) -> None:
    values = torch.load(folder / "fisher_info.pt", weights_only=True)
    change(values)
    torch.save(values, folder / "fisher_info.pt")
    with pytest.raises(ValueError, match=f"fisher_info.pt.* ?{message}"):
        read_fisher(folder, {"conv_in.bias": (8,)})


# -- recorded draws -----------------------------------------------------------------------------


def test_recorded_draws_are_played_by_example_view_and_caption(folder: Path) -> None:
    config = PublishedConfig.load(folder)
    data = PublishedExamples(folder, config)
    draws = RecordedDraws(folder / "draws.npz", 1, data, config)
    recorded = np.load(folder / "draws.npz")
    assert draws.n == 2
    for row, identifier in enumerate(data.ids):
        for caption in (0, 1):
            for flipped in (False, True):
                timesteps, noise = draws.of(identifier, SHAPE, caption, flipped)
                assert np.array_equal(timesteps, recorded["loss_timesteps"])
                assert np.array_equal(noise, recorded["loss_noise"][row + N * flipped, caption])
    timesteps, noise = draws.unlearning(0, 1)
    assert np.array_equal(timesteps, recorded["unlearn_timesteps_1"][0, 1])
    assert np.array_equal(noise, recorded["unlearn_noise_1"][0, 1])
    with pytest.raises(ValueError, match="none were recorded for example '3'"):
        draws.of("3", SHAPE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("unlearn_noise_0"), "lacks unlearn_noise_0; it has loss_timesteps"),
        (lambda d: d.update(loss_noise=d["loss_noise"][:4]), r"\(4, 2, 2, 4, 8, 8\).*\(6, 2, 2"),
        (lambda d: d.update(loss_noise=d["loss_noise"][:, :1]), r"\(6, 1, 2, .*\(6, 2, 2"),
        (lambda d: d.update(loss_noise=d["loss_noise"][..., 1:]), r"\(6, 2, 2, 4, 8, 7\)"),
        (lambda d: d.update(unlearn_noise_0=d["unlearn_noise_0"][:, 1:]), r"\(1, 1, 3, 4, 8, 8\)"),
        (lambda d: d.update(loss_timesteps=np.array([0, 1000])), "whole numbers from 0 to 999"),
        (lambda d: d.update(loss_timesteps=np.array([-1, 5])), "whole numbers from 0 to 999"),
        (lambda d: d.update(loss_timesteps=np.array([0.5, 5])), "whole numbers from 0 to 999"),
    ],
)
def test_draws_of_another_run_are_named(folder: Path, change, message: str) -> None:
    draws = dict(np.load(folder / "draws.npz"))
    change(draws)
    np.savez(folder / "draws.npz", **draws)
    with pytest.raises(ValueError, match=message):
        open_all(folder)


# -- fingerprints -------------------------------------------------------------------------------


def test_fingerprint_sees_size_and_content(tmp_path: Path) -> None:
    path = tmp_path / "file"
    seen = set()
    for content in (b"", b"a" * 100, b"a" * 101, b"b" + b"a" * 99, b"a" * 99 + b"b"):
        path.write_bytes(content)
        seen.add(file_fingerprint(path))
        seen.add(file_fingerprint(path, blocks=3, block_size=10))  # read in part
    # Nine: a file that fits into three blocks is read whole, to the same hash.
    assert len(seen) == 9
    path.write_bytes(b"a" * 45 + b"b" * 10 + b"a" * 45)
    assert file_fingerprint(path, blocks=3, block_size=10) not in seen
