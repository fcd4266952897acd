"""A small denoiser, encoded examples and a query, without a pipeline."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from PIL import Image

from tests.models.test_unet import build
from unsee.curvature.diagonal import DiagonalFisher
from unsee.data.latents import EncodedDataset
from unsee.draws import Draws
from unsee.index.fisher import fit_diagonal_fisher
from unsee.methods.unlearning import ForwardAbU
from unsee.models.unet import UNetDenoiser
from unsee.query import Query


def examples(count: int = 16, captions: tuple[int, ...] = (1, 2, 1)) -> EncodedDataset:
    """Random latents and texts; example i has captions[i % len(captions)] captions."""
    generator = torch.Generator().manual_seed(5)
    latents = torch.randn(count, 4, 8, 8, generator=generator)
    rows, total = [], 0
    for i in range(count):
        n = captions[i % len(captions)]
        rows.append(list(range(total, total + n)))
        total += n
    states = torch.randn(total, 5, 12, generator=generator)
    return EncodedDataset(
        [f"picture-{i}" for i in range(count)], latents, states, rows, latents.flip(-1)
    )


@pytest.fixture(scope="module")
def data() -> EncodedDataset:
    return examples()


@pytest.fixture(scope="module")
def query(data: EncodedDataset) -> Query:
    """A picture much like one of the examples, with its caption."""
    generator = torch.Generator().manual_seed(6)
    latents = data.latents([4])[0] + 0.3 * torch.randn(4, 8, 8, generator=generator)
    picture = Image.new("RGB", (64, 64))
    return Query("query", latents, data.text([4], 0)[0], "a prompt", picture)


@dataclasses.dataclass
class Setting:
    """A model of one precision with its Fisher, and the means to ask it."""

    model: UNetDenoiser
    fisher: DiagonalFisher
    data: EncodedDataset

    def abu(self, **options: Any) -> ForwardAbU:
        # Keys and values of a network that was never trained cannot raise its loss by the
        # default of 25%.
        defaults = {"draws": Draws(n=4), "query_draws": Draws(seed=1, n=10), "rise": 0.05}
        data = options.pop("data", self.data)
        return ForwardAbU(self.model, data, self.fisher, **{**defaults, **options})


def setting(data: EncodedDataset, prepare: Callable[[torch.nn.Module], object]) -> Setting:
    model = build(prediction="v_prediction")
    prepare(model.network)
    fisher = fit_diagonal_fisher(model, data.select(data.ids[:8]), Draws(seed=-1, n=2))
    return Setting(model, fisher, data)


@pytest.fixture(scope="module")
def double(data: EncodedDataset) -> Setting:
    """In float64, where 1e-9 can be asked for."""
    return setting(data, lambda network: network.double())


@pytest.fixture(scope="module")
def single(data: EncodedDataset) -> Setting:
    return setting(data, lambda network: network.float())
