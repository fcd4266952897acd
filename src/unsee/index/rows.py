"""Inner products of many stored rows with the rows of queries, in bounded memory."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from torch import Tensor

CHUNK_BYTES = 2**21
"""Of the float32 copy of some rows, for all threads: it stays in the cache until it is used. With
twice as much, two threads took six times as long for one query."""

DEVICE_CHUNK_BYTES = 2**28
"""The same on another device than the CPU, where large products pay."""


@torch.inference_mode()
def scan_rows(rows: Tensor | np.ndarray, queries: Tensor, chunk_bytes: int | None = None) -> Tensor:
    """Inner products of stored rows with queries, computed in float32.

    A few rows at a time become float32 in a buffer that is used again and again, and are
    multiplied from there (benchmarks/index.py, `rows`).

    Args:
        rows: [N, F] float16 (or another floating dtype); an array or memory map is read once, in
            order, and may be larger than the memory.
        queries: [Q, F] float32, on the device that is to do the work.
        chunk_bytes: of the buffer; by default `CHUNK_BYTES` on a CPU, and
            `DEVICE_CHUNK_BYTES` elsewhere.

    Returns:
        [N, Q] float32, on the device of the queries.

    Raises:
        ValueError: rows and queries differ in length.
    """
    if rows.ndim != 2 or queries.ndim != 2 or rows.shape[1] != queries.shape[1]:
        raise ValueError(
            f"rows [N, F] and queries [Q, F] are asked for, not {list(rows.shape)} and "
            f"{list(queries.shape)}"
        )
    source, device = _as_tensor(rows), queries.device
    if chunk_bytes is None:
        chunk_bytes = CHUNK_BYTES if device.type == "cpu" else DEVICE_CHUNK_BYTES
    count, length = source.shape
    size = max(1, min(count, chunk_bytes // (4 * max(1, length))))
    columns = queries.float().T.contiguous()  # [F, Q]
    found = torch.empty(count, len(queries), device=device)
    buffer = torch.empty(size, length, device=device)
    for first in range(0, count, size):
        part = source[first : first + size]
        wide = buffer[: len(part)]
        wide.copy_(part.to(device))  # moved as it is stored, made float32 there
        torch.mm(wide, columns, out=found[first : first + size])
    return found


def _as_tensor(rows: Tensor | np.ndarray) -> Tensor:
    if isinstance(rows, Tensor):
        return rows
    with warnings.catch_warnings():
        # A memory map that is open for reading cannot be written to; nothing here does.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(rows)
