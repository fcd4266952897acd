from __future__ import annotations

import dataclasses
import errno
import gc
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.methods.conftest import examples
from unsee import tensor_files
from unsee.data.dataset import load_dataset
from unsee.data.latents import EncodedDataset
from unsee.draws import Draws
from unsee.files import write_atomically
from unsee.index import build as building
from unsee.index import layout
from unsee.index.components import Components
from unsee.index.factors import dequantise
from unsee.index.index import Index
from unsee.index.layout import SCHEMA, read_manifest, shard_path, write_manifest
from unsee.index.sketch import Sketch
from unsee.index.table import read_ids
from unsee.methods.forward import forward_losses
from unsee.methods.indexed import AbU

from .conftest import DRAWS, build_index, contents, small_model
from .killed import KILLS, change, fill


class Stopped(Exception):
    """Ends a run from inside, as a crash would."""


def gradients(index: Index, example: Components) -> Tensor:
    """Returns an example's gradients [views, 2, width, channels of all layers]."""
    factors = dequantise(example.factors, index.layers).transpose(1, 2)
    return example.text.float().mT[:, None] @ factors


def columns(index: Index) -> dict[str, dict[str, Tensor]]:
    """Returns id -> what the index holds of the example."""
    found = {}
    for shard in index.shards():
        about = index.examples(shard)
        first = 0
        stored = {c: index.components(c, shard) for c in ("factors", "outputs")}
        for row, identifier in enumerate(about.ids):
            captions = slice(first, first + about.caption_counts[row])
            first = captions.stop
            one = torch.arange(len(about.ids)) == row
            found[identifier] = {
                "latents": about.latents([row])[0], "text": index.text(shard)[captions],
                "loss": index.losses(shard)[row],
                **{c: gradients(index, s.select(one)) for c, s in stored.items()},
            }  # fmt: skip
    return found


def assert_same(some: Index, other: Index, ids: Sequence[str] | None = None) -> None:
    """Compares what two indices hold of each example.

    A batch of another size or order is summed in another order: float32 has 1e-7 a rounding, and
    an output of the network is some hundred of them away from another, at most; one int8 step
    is 1/127 of a token's largest number.
    """
    a, b = columns(some), columns(other)
    step = 1e-4 + (1 / 127 if some.manifest.settings["storage"] == "int8" else 0)
    for identifier in ids or some.ids:
        for name, tensor in a[identifier].items():
            tolerance = {"loss": 1e-5, "factors": step, "outputs": step}.get(name, 0.0)
            error = (tensor - b[identifier][name]).abs().max()
            assert error <= tolerance * tensor.abs().max(), (identifier, name)


# -- what a pass leaves behind -----------------------------------------------------------------


def test_losses_are_those_of_forward_passes(model, data, tmp_path: Path) -> None:
    index = build_index(tmp_path, model, data, flips=True)
    expected = forward_losses(model, data, DRAWS, range(10), flips=True)
    found = torch.cat([index.losses(s) for s in index.shards()])
    assert found.shape == (10, 2, 4) and found.dtype == torch.float64
    # Other batches: float32 rounding of a mean over a few hundred squares.
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_examples_are_kept_as_they_were(built: Index, data) -> None:
    found = columns(built)
    assert built.ids == data.ids == list(found)
    for row, identifier in enumerate(data.ids):
        assert torch.equal(found[identifier]["latents"], data.latents([row])[0])
        for c in range(data.caption_counts[row]):
            assert torch.equal(found[identifier]["text"][c], data.text([row], c)[0])


@pytest.mark.parametrize(
    "options",
    [{"batch_size": 1}, {"batch_size": 1000}, {"shard_size": 3}, {"shard_size": 1000}],
    ids=str,
)
def test_batches_and_shards_change_rounding_only(built, model, data, tmp_path, options) -> None:
    assert_same(build_index(tmp_path, model, data, storage="float32", **options), built)


def test_order_and_subset_change_rounding_only(built, model, data, tmp_path: Path) -> None:
    ids = data.ids[::-1]
    backwards = build_index(tmp_path / "all", model, data.select(ids), storage="float32")
    assert backwards.ids == ids
    assert_same(backwards, built)
    few = build_index(tmp_path / "few", model, data.select(ids[2:7]), storage="float32")
    assert_same(few, built)


def test_two_builds_are_the_same_files(model, data, tmp_path: Path) -> None:
    for name in ("a", "b"):
        build_index(tmp_path / name, model, data, flips=True)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_a_finished_index_is_not_built_again(model, data, tmp_path: Path, monkeypatch) -> None:
    first = build_index(tmp_path, model, data)
    before = contents(tmp_path)

    def fail(*_args, **_options):
        raise Stopped

    monkeypatch.setattr(building, "example_factors", fail)
    again = build_index(tmp_path, model, data, batch_size=7)
    assert contents(tmp_path) == before and again.ids == first.ids
    opened = Index.open(tmp_path, model)
    assert opened.ids == first.ids and opened.manifest == first.manifest


def test_columns_are_a_choice_and_their_order_none(model, data, tmp_path: Path) -> None:
    index = build_index(tmp_path, model, data, columns=["outputs", "loss"])
    assert index.columns == ["examples", "loss", "outputs"]
    build_index(tmp_path, model, data, columns=["loss", "outputs", "loss"])
    with pytest.raises(ValueError, match="no column 'factors', only examples, loss, outputs"):
        index.components("factors", next(index.shards()))


def live_bytes() -> int:
    """Returns what the tensors that Python knows of hold."""
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in gc.get_objects() if type(t) is Tensor
    }  # fmt: skip
    return sum(storages.values())


class MadeOnDemand(EncodedDataset):
    """Examples that exist only while they are looked at."""

    def __init__(self, count: int) -> None:
        self.ids = [f"picture-{i}" for i in range(count)]
        self.caption_counts, self.has_flips = [1] * count, False

    @property
    def fingerprint(self) -> str:
        return str(len(self.ids))

    def latents(self, rows: Sequence[int], flipped: bool = False) -> Tensor:
        return torch.stack([torch.full((4, 8, 8), r / 100) for r in rows])

    def text(self, rows: Sequence[int], caption: int) -> Tensor:
        return torch.stack([torch.full((5, 12), r / 10) for r in rows])


def test_memory_does_not_grow_with_the_data_set(model, tmp_path: Path, monkeypatch) -> None:
    """Of the tensors that are alive at the end of a shard; the benchmark looks at the process."""
    peaks = []

    def noting(path: Path, write) -> None:
        if path.parent.name == "outputs":  # the last column of a shard
            peaks[-1] = max(peaks[-1], live_bytes())
        write_atomically(path, write)

    monkeypatch.setattr(tensor_files, "write_atomically", noting)
    before = live_bytes()
    for count in (8, 32):
        peaks.append(0)
        build_index(tmp_path / str(count), model, MadeOnDemand(count))
    small, large = (peak - before for peak in peaks)
    assert 0 < large <= 1.02 * small


# -- kills, races and damage -------------------------------------------------------------------


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int]]:
    """Runs the builders that are killed and that race, in a process of their own."""
    folder = tmp_path_factory.mktemp("killed")
    done = subprocess.run(
        [sys.executable, "-m", "tests.index.killed", str(folder)],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder, [int(line) for line in done.stdout.split()]


def test_a_build_killed_twenty_times_ends_with_the_same_bytes(killed, tmp_path: Path) -> None:
    folder, found = killed
    fill(tmp_path)
    whole = contents(tmp_path)
    assert len(found) == 2 * KILLS
    assert any(0 < count < 48 for count in found[:KILLS]), found  # kills fell into the pass
    for path in (folder / "killed").iterdir():
        assert seen(path) == whole, path.name


def seen(path: Path) -> dict[str, bytes]:
    """Returns all files but those that killed writers leave: these have a hidden name, and are
    never read."""
    return {name: text for name, text in contents(path).items() if "/." not in f"/{name}"}


def test_additions_and_deletions_that_are_killed_end_with_the_same_bytes(killed, tmp_path) -> None:
    """Each time in a new process, which knows nothing of what the last one began."""
    change(tmp_path)
    whole = contents(tmp_path)
    for path in (killed[0] / "changed").iterdir():
        assert seen(path) == whole, path.name


def test_two_builders_at_once_end_with_the_same_bytes(killed, tmp_path: Path) -> None:
    fill(tmp_path)
    assert contents(killed[0] / "raced") == contents(tmp_path)


def stop_after(files: int, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Lets that many files of columns be written, then fails."""
    left = files

    def write(path: Path, write) -> None:
        nonlocal left
        if path.suffix == ".safetensors":
            if left == 0:
                raise error
            left -= 1
        write_atomically(path, write)

    for module in (layout, tensor_files):
        monkeypatch.setattr(module, "write_atomically", write)


@pytest.mark.parametrize("files", [0, 1, 2, 5])
def test_a_stopped_build_goes_on(model, data, tmp_path: Path, monkeypatch, files: int) -> None:
    build_index(tmp_path / "whole", model, data)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_after(files, patch, Stopped())
        build_index(tmp_path / "stopped", model, data)
    with pytest.raises(ValueError, match=rf"{12 - files} of its shards are missing; run the same"):
        Index.open(tmp_path / "stopped", model)
    build_index(tmp_path / "stopped", model, data, batch_size=5)
    if files % 4 == 0:
        build_index(tmp_path / "stopped", model, data)
    whole, stopped = Index.open(tmp_path / "whole", model), Index.open(tmp_path / "stopped", model)
    assert_same(whole, stopped)


@pytest.fixture
def broken(built: Index, tmp_path: Path) -> Path:
    """A copy of a finished index, to be damaged."""
    not_pass = shutil.ignore_patterns("curvature")  # fitted by other tests
    shutil.copytree(built.path, tmp_path / "broken", ignore=not_pass)
    return tmp_path / "broken"


def rebuilt(path: Path, model, data, **options) -> Index:
    return build_index(path, model, data, **{"storage": "float32", **options})


@pytest.mark.parametrize("column", ["examples", "loss", "factors"])
@pytest.mark.parametrize("damage", ["missing", "cut short", "flipped", "another index's"])
def test_damaged_shards_are_refused(broken, model, data, tmp_path, column, damage: str) -> None:
    whole = contents(broken)
    index = Index.open(broken, model)
    shard = list(index.shards())[1]
    file = shard_path(broken, column, shard)
    text = file.read_bytes()
    if damage == "missing":
        file.unlink()
    elif damage == "cut short":
        file.write_bytes(text[:-9])
    elif damage == "flipped":
        file.write_bytes(text[:-9] + bytes([text[-9] ^ 4]) + text[-8:])
    else:
        other = rebuilt(tmp_path / "other", model, examples(9))
        shutil.copy(shard_path(other.path, column, shard), file)
    if damage == "missing":
        with pytest.raises(ValueError, match="1 of its shards are missing"):
            Index.open(broken, model)
    words = {"missing": "no such shard", "another index's": "belongs to another index or place"}
    with pytest.raises(ValueError, match=rf"00001\.safetensors.*{words.get(damage, 'is damaged')}"):
        {"examples": index.examples, "loss": index.losses,
         "factors": lambda s: index.components("factors", s)}[column](shard)  # fmt: skip
    others = {n: t for n, t in contents(broken).items() if n != str(file.relative_to(broken))}
    assert others == {n: t for n, t in whole.items() if n in others} and len(others) == 13
    # The way out that the message tells of.
    file.unlink(missing_ok=True)
    rebuilt(broken, model, data)
    assert contents(broken) == whole


def test_a_damaged_table_is_refused_and_made_again(broken: Path, model, data) -> None:
    whole = contents(broken)
    file = broken / "examples.parquet"
    for text in (whole["examples.parquet"][:-20], b""):
        file.write_bytes(text)
        with pytest.raises(ValueError, match=r"examples\.parquet is damaged .*delete it and run"):
            Index.open(broken, model)
    file.unlink()
    with pytest.raises(ValueError, match="table of examples is not complete; run the same"):
        Index.open(broken, model)
    rebuilt(broken, model, data)
    assert contents(broken) == whole


def test_no_flipped_bit_of_the_table_changes_ids(broken: Path, built: Index) -> None:
    file = broken / "examples.parquet"
    whole = file.read_bytes()
    refused = 0
    for place in range(0, len(whole), 3):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        file.write_bytes(damaged)
        try:
            assert read_ids(broken, built.manifest) in (built.ids, None)
        except ValueError as error:
            assert "is damaged" in str(error)
            refused += 1
    assert refused > len(whole) / 12  # the rest is of other columns


def other_model():
    other = small_model()
    with torch.no_grad():
        other.network.conv_in.bias[0] += 1e-3
    return other


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draws": Draws(seed=4, n=4)}, r"draws\.seed is 3 there, but 4"),
        ({"draws": Draws(seed=3, n=6)}, r"draws\.n is 4 there, but 6"),
        ({"storage": "int8"}, 'storage is "float32" there, but "int8"'),
        ({"shard_size": 5}, "shard_size is 4 there, but 5"),
        ({"flips": True}, "views is 1 there, but 2"),
        ({"columns": ["loss"]}, r'columns\[2\] is "factors" there, but null'),
        ({"on_error": "skip"}, 'on_error is "raise" there, but "skip"'),
    ],
)
def test_other_settings_are_refused(broken: Path, model, data, options, message: str) -> None:
    before = contents(broken)
    with pytest.raises(ValueError, match=message):
        rebuilt(broken, model, data, **options)
    assert contents(broken) == before


def test_another_model_is_refused(broken: Path, model, data) -> None:
    before, other = contents(broken), other_model()
    message = rf'model is "{model.fingerprint()}" there, but "{other.fingerprint()}"'
    with pytest.raises(ValueError, match=message):
        rebuilt(broken, other, data)
    with pytest.raises(ValueError, match=message):
        Index.open(broken, other)
    keys = small_model(parameters=["*attn2.to_k.weight"])
    with pytest.raises(ValueError, match=r'layers\[1\] is {"name": .*to_v.weight".* but null'):
        rebuilt(broken, keys, data)
    with pytest.raises(ValueError, match=r"2 parameters, .* 1 selected; .*to_v.* there, None here"):
        Index.open(broken, keys)
    double = small_model()
    double.network.double()
    with pytest.raises(ValueError, match='dtype is "float32" there, but "float64" is asked'):
        Index.open(broken, double)
    assert contents(broken) == before


def test_another_order_of_the_data_is_refused(broken: Path, model, data) -> None:
    before, other = contents(broken), data.select(data.ids[::-1])
    both = rf"10 examples, fingerprint {data.fingerprint}\), not of .*10, {other.fingerprint}"
    with pytest.raises(ValueError, match=rf"{both}\): ids, captions or their order differ"):
        rebuilt(broken, model, other)
    assert contents(broken) == before


def test_a_manifest_of_another_version_is_refused(broken: Path, model, data) -> None:
    file = broken / "manifest.json"
    about = json.loads(file.read_text())
    assert about["schema"] == SCHEMA
    file.write_text(json.dumps({**about, "schema": SCHEMA + 1}))
    before = contents(broken)
    for make in (lambda: rebuilt(broken, model, data), lambda: Index.open(broken, model)):
        with pytest.raises(ValueError, match=rf"schema is {SCHEMA + 1}, this .* reads {SCHEMA}"):
            make()
    assert contents(broken) == before


def test_a_manifest_of_other_settings_does_not_adopt_the_shards(broken: Path, model) -> None:
    manifest = read_manifest(broken)
    settings = {**manifest.settings, "draws": {**manifest.settings["draws"], "seed": 9}}
    write_manifest(broken, dataclasses.replace(manifest, settings=settings))
    index = Index.open(broken, model)
    with pytest.raises(ValueError, match="belongs to another index or place"):
        index.losses(next(index.shards()))


# -- what a file system refuses ----------------------------------------------------------------


@pytest.mark.parametrize("files", [0, 5])
def test_a_full_disk_leaves_finished_shards(model, data, tmp_path, monkeypatch, files) -> None:
    with monkeypatch.context() as patch:
        stop_after(files, patch, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        with pytest.raises(
            ValueError, match=r"cannot be written \(No space left on device\): make "
        ):
            build_index(tmp_path, model, data)
    assert len(list(tmp_path.rglob("*.safetensors"))) == files
    build_index(tmp_path, model, data)


def test_a_file_system_that_writes_only_half(model, data, tmp_path: Path) -> None:
    """A real limit, in the middle of a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2500, before[1]))
    try:
        with pytest.raises(ValueError, match=r"cannot be written \(.*File too large"):
            build_index(tmp_path, model, data)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.rglob("*.part")) and not list(tmp_path.rglob("*.safetensors"))
    build_index(tmp_path, model, data)


def test_a_folder_below_a_file(model, data, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    for path in (tmp_path / "file", tmp_path / "file" / "index"):
        with pytest.raises(ValueError, match=r"cannot be written \((File exists|Not a directory)"):
            build_index(path, model, data)
    assert (tmp_path / "file").read_text() == "precious"


def test_a_read_only_folder(built: Index, model, data) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "index"
        shutil.copytree(built.path, path, ignore=shutil.ignore_patterns("curvature"))
        removed = shard_path(path, "loss", next(built.shards()))
        removed.unlink()
        before = contents(path)
        everything = [Path(folder), path, *path.rglob("*")]
        for p in everything:
            p.chmod(0o555)
        # Root may write everywhere.
        root = os.geteuid() == 0
        if root:
            os.seteuid(65534)
        try:
            with pytest.raises(ValueError, match=r"cannot be written \(.*Permission denied"):
                rebuilt(path, model, data)
            with pytest.raises(ValueError, match=r"cannot be written \(.*Permission denied"):
                built_elsewhere = Path(folder) / "new"
                rebuilt(built_elsewhere, model, data)
            index = Index(path, model, read_manifest(path))
            with pytest.raises(ValueError, match=r"cannot be written \(.*Permission denied"):
                index.curvature("ekfac")
            with pytest.raises(ValueError, match=r"cannot be written \(.*Permission denied"):
                index.append(examples(12).select(["picture-11"]))
        finally:
            if root:
                os.seteuid(0)
            for p in everything:
                p.chmod(0o755)
        assert contents(path) == before


# -- what is refused at once -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draws": Draws(n=3)}, "draws = 3 do not make two halves; use an even number"),
        ({"columns": ["loss", "gradients"]}, "no column 'gradients'; there are examples, loss"),
        ({"storage": "int4"}, "storage 'int4' is not int8, float16 or float32"),
        ({"shard_size": 0}, "shard_size = 0 must be at least 1"),
    ],
)
def test_bad_settings_are_refused(model, data, tmp_path: Path, options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_index(tmp_path / "index", model, data, **options)
    assert not (tmp_path / "index").exists()


def test_flips_that_were_not_encoded_are_refused(model, data, tmp_path: Path) -> None:
    plain = EncodedDataset(
        data.ids, data.latents(range(10)), torch.zeros(1, 5, 12), [[0]] * 10, None
    )
    with pytest.raises(ValueError, match="flips were not encoded"):
        build_index(tmp_path, model, plain, flips=True)


@pytest.mark.parametrize("place", ["weights", "latents"])
def test_numbers_that_are_not_finite_name_the_example(data, tmp_path: Path, place: str) -> None:
    broken_model, latents = small_model(), data.latents(range(10))
    if place == "weights":
        with torch.no_grad():
            broken_model.network.conv_out.bias[0] = torch.nan
    else:
        latents[6, 0, 0, 0] = torch.inf
    some = EncodedDataset(data.ids, latents, torch.zeros(1, 5, 12), [[0]] * 10)
    name = "picture-0" if place == "weights" else "picture-6"
    with pytest.raises(ValueError, match=rf"example '{name}' is not finite: check the model with"):
        build_index(tmp_path, broken_model, some)
    assert len(list(tmp_path.glob("columns/loss/*"))) == (0 if place == "weights" else 1)


# -- pictures ----------------------------------------------------------------------------------


def test_pictures_are_encoded_and_their_metadata_kept(tiny_model, image_folder, tmp_path) -> None:
    pictures = load_dataset("imagefolder", data_dir=image_folder)
    index = build_index(tmp_path / "ix", tiny_model, pictures, draws=Draws(n=2), shard_size=5)
    assert index.ids == pictures.ids
    first = index.examples(next(index.shards()))
    expected = tiny_model.encode_images([pictures[i].image for i in range(5)])
    torch.testing.assert_close(first.latents(range(5)), expected, rtol=1e-5, atol=1e-6)
    state = tiny_model.encode_prompts([pictures.captions[3][0]])
    torch.testing.assert_close(first.text([3], 0), state, rtol=1e-5, atol=1e-6)
    import pyarrow.parquet as pq

    rows = pq.read_table(index.path / "examples.parquet").to_pylist()
    assert [r["id"] for r in rows] == pictures.ids
    assert rows[0]["captions"] == ["a red square"] and rows[0]["licence"] == "CC0"
    assert [r["unsee_shard"] for r in rows] == [0] * 5 + [1] * 5 + [2] * 2


def test_a_moved_folder_of_pictures_goes_on(tiny_model, image_folder, tmp_path: Path) -> None:
    options = {"draws": Draws(n=2), "columns": ["loss"]}
    pictures = load_dataset("imagefolder", data_dir=image_folder)
    build_index(tmp_path / "ix", tiny_model, pictures, **options)
    (tmp_path / "ix" / "columns" / "loss" / "00001.safetensors").unlink()
    moved = image_folder.rename(tmp_path / "elsewhere")
    build_index(tmp_path / "ix", tiny_model, load_dataset("imagefolder", data_dir=moved), **options)


def test_unreadable_pictures(tiny_model, image_folder: Path, tmp_path: Path) -> None:
    pictures = load_dataset("imagefolder", data_dir=image_folder)
    # One of the first shard, and every one of the second.
    bad = [pictures.ids[1], *pictures.ids[3:6]]
    for name in bad:
        (image_folder / name).write_bytes(b"no picture")
    options = {"draws": Draws(n=2), "shard_size": 3}
    with pytest.raises(ValueError, match=rf"{bad[0]} of pictures: cannot be read"):
        build_index(tmp_path / "raise", tiny_model, pictures, **options)
    index = build_index(tmp_path / "skip", tiny_model, pictures, on_error="skip", **options)
    assert index.ids == [i for i in pictures.ids if i not in bad]
    found = columns(Index.open(tmp_path / "skip", tiny_model))
    assert list(found) == index.ids
    some = build_index(tmp_path / "some", tiny_model, pictures.select(index.ids), **options)
    for identifier, expected in columns(some).items():
        # Pictures are encoded in other batches: float32 rounding, and then an int8 step.
        loss = found[identifier]["loss"]
        torch.testing.assert_close(loss, expected["loss"], rtol=1e-4, atol=0)
    assert index.curvature("ekfac").count == len(index.ids)


OF_PICTURES = {"draws": Draws(n=2), "shard_size": 4, "on_error": "skip", "columns": ["factors"]}


def picture_scores(index: Index) -> dict[str, float]:
    query = index.model.generate("a red square", seed=0, steps=2)
    scores = AbU(index, query_draws=Draws(1, 4), curvature="identity").attribute(query)
    return dict(zip(scores.ids, scores.values, strict=True))


@pytest.mark.parametrize("killed", [False, True])
@pytest.mark.parametrize("old", [False, True], ids=["new", "of an earlier version"])
def test_examples_made_again_with_fewer_rows_move_no_score(
    tiny_model, image_folder: Path, tmp_path: Path, monkeypatch, old: bool, killed: bool
) -> None:
    pictures = load_dataset("imagefolder", data_dir=image_folder)
    index = build_index(tmp_path, tiny_model, pictures, **OF_PICTURES)
    before = picture_scores(index)
    index.curvature("ekfac")
    if old:
        for shard in index.shards():
            tensors, _ = layout.read_shard(tmp_path, index.manifest, "factors", shard)
            layout.write_shard(tmp_path, index.manifest, "factors", shard, tensors)
    (image_folder / pictures.ids[0]).write_bytes(b"broken")
    shard_path(tmp_path, "examples", next(index.shards())).unlink()
    if killed:
        with monkeypatch.context() as patch, pytest.raises(Stopped):
            stop_after(1, patch, Stopped())  # the examples are there, the factors not yet
            build_index(tmp_path, tiny_model, pictures, **OF_PICTURES)
        with pytest.raises(ValueError, match="1 of its shards are missing"):
            Index.open(tmp_path, tiny_model)
    again = build_index(tmp_path, tiny_model, pictures, **OF_PICTURES)
    after = picture_scores(again)
    assert list(after) == again.ids == pictures.ids[1:]
    # Of other batches of the autoencoder: float32 rounding, then an int8 step.
    largest = max(abs(value) for value in before.values())
    assert all(abs(after[i] - before[i]) < 0.03 * largest for i in after)
    assert again.curvature("ekfac").count == 11


def test_examples_made_again_with_more_rows_are_all_there(
    tiny_model, image_folder: Path, tmp_path: Path
) -> None:
    pictures = load_dataset("imagefolder", data_dir=image_folder)
    whole = (image_folder / pictures.ids[0]).read_bytes()
    (image_folder / pictures.ids[0]).write_bytes(b"broken")
    index = build_index(tmp_path, tiny_model, pictures, **OF_PICTURES)
    assert index.ids == pictures.ids[1:]
    (image_folder / pictures.ids[0]).write_bytes(whole)
    shard_path(tmp_path, "examples", next(index.shards())).unlink()
    again = build_index(tmp_path, tiny_model, pictures, **OF_PICTURES)
    assert again.ids == pictures.ids == list(picture_scores(again))


def test_a_lost_shard_is_made_again_with_its_sketch(model, data, tmp_path: Path) -> None:
    options = {"columns": ["sketch"], "sketch": Sketch(length=64)}
    index = build_index(tmp_path, model, data, **options)
    before, shard = contents(tmp_path), next(index.shards())
    tensors, _ = layout.read_shard(tmp_path, index.manifest, "sketch", shard)
    layout.write_shard(tmp_path, index.manifest, "sketch", shard, tensors, {"rows": "of others"})
    assert build_index(tmp_path, model, data, **options).ids == data.ids
    assert contents(tmp_path) == before


@pytest.mark.parametrize("column", ["examples", "loss", "factors"])
@pytest.mark.parametrize("change", ["other ids", "fewer rows"])
def test_rows_of_other_examples_are_not_read(broken, model, column: str, change: str) -> None:
    """Whatever brought them there: scores would be those of a neighbour."""
    index = Index.open(broken, model)
    shard = next(index.shards())
    tensors, about = layout.read_shard(broken, index.manifest, column, shard)
    if column == "examples":
        ids = about["ids"]
        about = {**about, "ids": [*ids[1:], ids[0]] if change == "other ids" else ids[1:]}
    elif change == "other ids":
        about = {"rows": layout.rows_key(["somebody"])}
    else:
        about = {}
        keep = torch.arange(4) > 0
        tensors = (
            Components.of(tensors).select(keep).tensors if column == "factors"
            else {n: t[keep] for n, t in tensors.items()}
        )  # fmt: skip
    layout.write_shard(broken, index.manifest, column, shard, tensors, about)
    read = {"examples": index.text, "loss": index.losses,
            "factors": lambda s: index.components("factors", s)}[column]  # fmt: skip
    with pytest.raises(ValueError, match=r"00000\.safetensors: its .* those of the table are 4"):
        read(shard)
