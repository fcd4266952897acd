from __future__ import annotations

from pathlib import Path

import pytest
import torch

from unsee.tensor_files import DamagedFile, read_tensors, write_tensors

TENSORS = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.arange(4, dtype=torch.int8)}
ABOUT = {"count": 3, "settings": {"names": ["x", "y"]}}


def test_what_is_written_is_read_and_the_same_file_every_time(tmp_path: Path) -> None:
    write_tensors(tmp_path / "new" / "one.safetensors", TENSORS, ABOUT)
    write_tensors(tmp_path / "two.safetensors", TENSORS, ABOUT)
    first = (tmp_path / "new" / "one.safetensors").read_bytes()
    assert first == (tmp_path / "two.safetensors").read_bytes()
    tensors, about = read_tensors(tmp_path / "two.safetensors")
    assert about == ABOUT and tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)


def test_every_flipped_bit_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "some.safetensors"
    write_tensors(path, TENSORS, ABOUT)
    content = path.read_bytes()
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        try:
            tensors, about = read_tensors(path)
        except DamagedFile:
            continue
        # White space in the header may change, what it says may not.
        assert about == ABOUT
        assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)


def test_a_missing_file_is_no_damaged_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_tensors(tmp_path / "none.safetensors")
