from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from unsee.index.rows import scan_rows

N, F, Q = 23, 40, 3


def products(rows: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """Sums in float64, one product after the other."""
    found = np.zeros((len(rows), len(queries)))
    for i, row in enumerate(rows):
        for j, query in enumerate(queries):
            found[i, j] = sum(float(a) * float(b) for a, b in zip(row, query, strict=True))
    return found


@pytest.fixture
def rows() -> Tensor:
    return torch.randn(N, F, generator=torch.Generator().manual_seed(0)).half()


@pytest.fixture
def queries() -> Tensor:
    return torch.randn(Q, F, generator=torch.Generator().manual_seed(1))


# One row at a time, a chunk that does not divide the rows, all of them, and the default.
@pytest.mark.parametrize("chunk_bytes", [1, 4 * F * 5, 4 * F * N, None])
def test_every_product_is_that_of_a_loop(rows, queries, chunk_bytes) -> None:
    found = scan_rows(rows, queries, chunk_bytes)
    assert found.dtype == torch.float32 and found.shape == (N, Q)
    # float32 sums of 40 products near 1: some roundings of 6e-8 of a number near 10.
    np.testing.assert_allclose(found, products(rows.numpy(), queries.numpy()), atol=1e-5)


def test_the_chunk_changes_rounding_only(rows, queries) -> None:
    whole = scan_rows(rows, queries)
    for chunk_bytes in (1, 4 * F * 4, 4 * F * 7):
        torch.testing.assert_close(scan_rows(rows, queries, chunk_bytes), whole, rtol=0, atol=1e-5)


def test_a_memory_map_for_reading_is_an_array_like_another(rows, queries, tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", rows.numpy())
    mapped = np.load(tmp_path / "rows.npy", mmap_mode="r")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(scan_rows(mapped, queries), scan_rows(rows, queries))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_count_as_they_are_stored(rows, queries, dtype) -> None:
    """Only the sum is rounded: a row in float16 is exactly that row in float32."""
    stored = rows.to(dtype)
    assert torch.equal(scan_rows(stored, queries), scan_rows(stored.float(), queries))


def test_no_rows_and_no_queries(rows, queries) -> None:
    assert scan_rows(rows[:0], queries).shape == (0, Q)
    assert scan_rows(rows, queries[:0]).shape == (N, 0)


def test_rows_of_another_length_are_refused(rows, queries) -> None:
    with pytest.raises(ValueError, match=r"are asked for, not \[23, 40\] and \[3, 39\]"):
        scan_rows(rows, queries[:, 1:])
    with pytest.raises(ValueError, match=r"not \[40\] and \[3, 40\]"):
        scan_rows(rows[0], queries)
