"""Encoded data small enough to train on inside a test."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from unsee.data.latents import EncodedDataset

TOKENS, WIDTH = 12, 16


def make_data(n: int = 10, seed: int = 0) -> EncodedDataset:
    """Returns n examples of 4x8x8 latents; the first two have two captions."""
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn((n, 4, 8, 8), generator=generator)
    states = torch.randn((n + 2, TOKENS, WIDTH), generator=generator)
    captions = [[i, n + i] if i < 2 else [i] for i in range(n)]
    return EncodedDataset([f"example{i}" for i in range(n)], latents, states, captions)


def make_null_text() -> Tensor:
    """Returns a text state of the empty prompt."""
    return torch.randn((TOKENS, WIDTH), generator=torch.Generator().manual_seed(99))


@pytest.fixture
def data() -> EncodedDataset:
    return make_data()


@pytest.fixture
def null_text() -> Tensor:
    return make_null_text()
