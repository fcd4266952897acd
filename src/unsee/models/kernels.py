"""Kernels that are exact enough for differences of losses."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, cast

import torch


@contextlib.contextmanager
def exact_kernels() -> Iterator[None]:
    """Switches off TensorFloat-32 on CUDA in a `with` block, and restores the settings after.

    It would cost three digits of a small difference of losses.
    """
    cudnn = torch.backends.cudnn
    try:
        before, _ = torch.get_float32_matmul_precision(), cudnn.allow_tf32
    except RuntimeError:
        # Somebody chose a precision in the words of torch 2.9: the older ones refuse to answer.
        with _ieee():
            yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        with cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def _ieee() -> Iterator[None]:
    """The same in the words of torch 2.9."""
    matmul, cudnn = torch.backends.cuda.matmul, cast(Any, torch.backends.cudnn)
    before = matmul.fp32_precision, cudnn.conv.fp32_precision, cudnn.deterministic
    try:
        matmul.fp32_precision, cudnn.conv.fp32_precision, cudnn.deterministic = "ieee", "ieee", True
        yield
    finally:
        matmul.fp32_precision, cudnn.conv.fp32_precision, cudnn.deterministic = before
