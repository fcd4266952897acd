from __future__ import annotations

import dataclasses
import errno
import json
from pathlib import Path

import pytest
import torch

from unsee.index.layout import (
    SCHEMA,
    Manifest,
    Part,
    Shard,
    create_manifest,
    curvature_path,
    list_others,
    read_manifest,
    read_shard,
    remove_files,
    shard_path,
    write_manifest,
    write_shard,
)

SETTINGS = {
    "model": "abc", "draws": {"seed": 0, "n": 4},
    "layers": [{"name": "a", "width": 2}, {"name": "b", "width": 2}],
    "columns": ["examples", "loss"],
}  # fmt: skip
SHARDS = [Shard(0, 0, 0, 2), Shard(1, 0, 2, 4, edition=1)]
MANIFEST = Manifest(SETTINGS, {"torch": "2"}, [Part("emoji", "f00", 4)], SHARDS, ["gone"])
TENSORS = {
    "values": torch.arange(6, dtype=torch.int8).reshape(2, 3),
    "scales": torch.tensor([0.5, 0.25]),
    "losses": torch.ones(2, 1, 2, dtype=torch.float64),
}
ABOUT = {"ids": ["picture-3", "a\u2028b"], "captions": [1, 2]}


def changed(**settings: object) -> Manifest:
    return dataclasses.replace(MANIFEST, settings={**SETTINGS, **settings})


def test_a_manifest_comes_back(tmp_path: Path) -> None:
    write_manifest(tmp_path, MANIFEST)
    assert read_manifest(tmp_path) == MANIFEST
    assert [p.name for p in tmp_path.iterdir()] == ["manifest.json"]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"model": "other"}, r'model is "abc" there, but "other" is asked for'),
        ({"draws": {"seed": 1, "n": 4}}, r"draws\.seed is 0 there, but 1"),
        ({"draws": {"seed": 0, "n": 4, "x": 1}}, r"draws\.x is null there, but 1"),
        ({"layers": [{"name": "a", "width": 2}, {"name": "c", "width": 2}]},
         r'layers\[1\]\.name is "b" there, but "c"'),
        ({"layers": [{"name": "a", "width": 2}]},
         r'layers\[1\] is {"name": "b", "width": 2} there, but null'),
        ({"new": True}, "new is null there, but true"),
    ],
)  # fmt: skip
def test_other_settings_are_named_with_both_values(asked: dict, message: str) -> None:
    with pytest.raises(ValueError, match=rf"index '/ix': {message}.*another folder"):
        MANIFEST.check({**SETTINGS, **asked}, Path("/ix"))
    MANIFEST.check({**SETTINGS, "columns": ("examples", "loss")}, Path("/ix"))


def test_every_flipped_bit_of_a_manifest_is_seen(tmp_path: Path) -> None:
    write_manifest(tmp_path, MANIFEST)
    file = tmp_path / "manifest.json"
    whole = file.read_bytes()
    unseen = []
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        file.write_bytes(damaged)
        try:
            if read_manifest(tmp_path) != MANIFEST:
                unseen.append(place)
        except ValueError as error:
            assert "manifest.json is damaged" in str(error) or "its schema is" in str(error)
    assert unseen == []  # white space may change, what it says may not


@pytest.mark.parametrize("text", ["", "{", "null", "[]", "7", "{}", '{"schema": 3}'])
def test_a_manifest_cut_short_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match=r"manifest\.json is damaged .*restore it, or build again"):
        read_manifest(tmp_path)


def test_another_schema_is_refused_with_both_versions(tmp_path: Path) -> None:
    write_manifest(tmp_path, MANIFEST)
    file = tmp_path / "manifest.json"
    about = {**json.loads(file.read_text()), "schema": 99}
    file.write_text(json.dumps(about))
    with pytest.raises(
        ValueError, match=rf"its schema is 99, this version of unsee reads {SCHEMA}"
    ):
        read_manifest(tmp_path)


def test_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no manifest\.json there; build it with `unsee index`"):
        read_manifest(tmp_path)


def test_a_manifest_is_replaced_only_as_it_was_read(tmp_path: Path) -> None:
    write_manifest(tmp_path, MANIFEST)
    other, mine = changed(model="other"), changed(model="mine")
    write_manifest(tmp_path, other, MANIFEST)
    with pytest.raises(ValueError, match=rf"was {MANIFEST.content}, now it is {other.content}"):
        write_manifest(tmp_path, mine, MANIFEST)
    assert read_manifest(tmp_path) == other
    assert [p.name for p in tmp_path.iterdir()] == ["manifest.json"]


@pytest.mark.parametrize("links", [True, False])
def test_only_one_first_manifest_is_made(tmp_path: Path, monkeypatch, links: bool) -> None:
    if not links:

        def refuse(*_: object) -> None:
            raise OSError(errno.EPERM, "no links here")

        monkeypatch.setattr("os.link", refuse)
    assert create_manifest(tmp_path, MANIFEST)
    assert not create_manifest(tmp_path, changed(model="other"))
    assert read_manifest(tmp_path) == MANIFEST
    assert [p.name for p in tmp_path.iterdir()] == ["manifest.json"]


# -- shards ------------------------------------------------------------------------------------


def written(path: Path, manifest: Manifest = MANIFEST, shard: Shard = SHARDS[0]) -> Path:
    write_shard(path, manifest, "loss", shard, TENSORS, ABOUT)
    return shard_path(path, "loss", shard)


def test_a_shard_comes_back(tmp_path: Path) -> None:
    file = written(tmp_path)
    assert file == tmp_path / "columns" / "loss" / "00000.safetensors"
    tensors, about = read_shard(tmp_path, MANIFEST, "loss", SHARDS[0])
    assert about == ABOUT and tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[n], t) for n, t in TENSORS.items())
    assert written(tmp_path, shard=SHARDS[1]).name == "00001.1.safetensors"
    assert len(list(tmp_path.rglob("*.*"))) == 2  # nothing temporary is left


def test_the_same_shard_is_the_same_file(tmp_path: Path) -> None:
    files = {written(tmp_path).read_bytes() for _ in range(20)}
    assert len(files) == 1


def test_empty_tensors_and_views_come_back(tmp_path: Path) -> None:
    tensors = {"empty": torch.empty(0), "none": torch.zeros(1, 0, 2), "view": torch.eye(3)[:, 1:].T}
    write_shard(tmp_path, MANIFEST, "loss", SHARDS[0], tensors)
    found, about = read_shard(tmp_path, MANIFEST, "loss", SHARDS[0])
    assert about == {} and all(torch.equal(found[n], t) for n, t in tensors.items())


def test_every_flipped_bit_of_a_shard_is_seen(tmp_path: Path) -> None:
    file = written(tmp_path)
    whole = file.read_bytes()
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"00000\.safetensors (is damaged|belongs to another)"):
            read_shard(tmp_path, MANIFEST, "loss", SHARDS[0])


@pytest.mark.parametrize("length", [0, 5, 100, -1])
def test_a_shard_cut_short_is_refused(tmp_path: Path, length: int) -> None:
    file = written(tmp_path)
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(ValueError, match=r"is damaged .*delete it and run the same `unsee index`"):
        read_shard(tmp_path, MANIFEST, "loss", SHARDS[0])


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"loss/00000\.safetensors: no such shard; run the same"):
        read_shard(tmp_path, MANIFEST, "loss", SHARDS[0])


@pytest.mark.parametrize(
    "other",
    [
        changed(model="other"),
        dataclasses.replace(MANIFEST, parts=[Part("emoji", "other", 4)]),
        dataclasses.replace(MANIFEST, parts=[Part("emoji", "f00", 5)]),
    ],
    ids=["settings", "data", "count"],
)
def test_a_shard_of_another_index_is_refused(tmp_path: Path, other: Manifest) -> None:
    written(tmp_path, other)
    keys = rf"{other.key_of(SHARDS[0])} .*{MANIFEST.key_of(SHARDS[0])}"
    with pytest.raises(ValueError, match=rf"belongs to another index or place: its key is {keys}"):
        read_shard(tmp_path, MANIFEST, "loss", SHARDS[0])


def test_a_shard_in_the_place_of_another_is_refused(tmp_path: Path) -> None:
    second = written(tmp_path, shard=SHARDS[1])
    second.rename(shard_path(tmp_path, "loss", SHARDS[0]))
    with pytest.raises(ValueError, match="belongs to another index or place"):
        read_shard(tmp_path, MANIFEST, "loss", SHARDS[0])
    file = written(tmp_path)
    (tmp_path / "columns" / "examples").mkdir()
    file.rename(shard_path(tmp_path, "examples", SHARDS[0]))
    with pytest.raises(ValueError, match=r"of column 'loss', that of this place .* of 'examples'"):
        read_shard(tmp_path, MANIFEST, "examples", SHARDS[0])


def test_names_and_metadata_of_the_data_set_do_not_matter(tmp_path: Path) -> None:
    """A folder of pictures may be moved, and an index be read by another version."""
    written(tmp_path)
    other = dataclasses.replace(
        MANIFEST, environment={}, parts=[Part("moved", "f00", 4), Part("more", "1", 2)]
    )
    read_shard(tmp_path, other, "loss", SHARDS[0])


def test_only_what_belongs_to_the_rows_is_kept(tmp_path: Path) -> None:
    write_manifest(tmp_path, MANIFEST)
    kept = {tmp_path / "manifest.json", written(tmp_path), written(tmp_path, shard=SHARDS[1])}
    kept.add(curvature_path(tmp_path, MANIFEST, "factors-ekfac"))
    shards = [dataclasses.replace(SHARDS[0], edition=1), SHARDS[1]]
    later = dataclasses.replace(MANIFEST, shards=shards)
    others = [
        written(tmp_path, later, shards[0]),
        curvature_path(tmp_path, later, "factors-ekfac"),
        tmp_path / "columns" / "loss" / ".00000.safetensors.7.part",
        tmp_path / ".examples.parquet.7.part",
    ]
    (tmp_path / "curvature").mkdir()
    for file in [*others[1:], curvature_path(tmp_path, MANIFEST, "factors-ekfac")]:
        file.write_bytes(b"")
    remove_files(list_others(tmp_path, MANIFEST))
    assert {p for p in tmp_path.rglob("*") if p.is_file()} == kept
