from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.index.conftest import DRAWS, build_index, small_model
from tests.methods.conftest import examples
from unsee.draws import Draws
from unsee.index.index import Index
from unsee.methods.example_gradients import example_gradients
from unsee.methods.products import errors_of_norms
from unsee.methods.self_influence import self_influence
from unsee.models.unet import UNetDenoiser


class Half:
    """Draws with even numbers, or with odd ones."""

    def __init__(self, draws: Draws, first: int) -> None:
        self.draws, self.first, self.n = draws, first, draws.n // 2

    def of(self, example_id: str, shape: tuple[int, ...], caption: int = 0, flipped: bool = False):
        timesteps, noise = self.draws.of(example_id, shape, caption, flipped)
        return timesteps[self.first :: 2], noise[self.first :: 2]


@pytest.fixture(scope="module")
def model() -> UNetDenoiser:
    return small_model()


@pytest.fixture(scope="module")
def index(model: UNetDenoiser, tmp_path_factory: pytest.TempPathFactory) -> Index:
    return build_index(tmp_path_factory.mktemp("index"), model, examples(8), storage="float32")


@pytest.mark.parametrize("curvature", ["identity", "diagonal", "ekfac"])
def test_it_is_the_product_of_explicit_halves(model, index: Index, curvature) -> None:
    halves = [example_gradients(model, examples(8), Half(DRAWS, first)) for first in (0, 1)]
    expected = []
    for row in range(8):
        even, odd = ({n: h.of(n)[row].double() for n in h.names} for h in halves)
        if curvature != "identity":
            odd = index.curvature(curvature).precondition(odd, 0.1)
        expected.append(sum(float((even[n] * odd[n]).sum()) for n in even))
    found = self_influence(index, curvature)
    # Gradients are float32 sums of some thousand products.
    np.testing.assert_allclose(found.values, expected, atol=1e-4 * np.abs(expected).max())
    assert found.errors is not None and (found.errors > 0).all()


def test_errors_are_as_large_as_what_other_draws_do(model, tmp_path: Path) -> None:
    values, squares = [], []
    for seed in range(12):
        index = build_index(
            tmp_path / str(seed), model, examples(12, captions=(1,)), draws=Draws(100 + seed, 16),
            storage="float32", columns=["factors"], shard_size=12,
        )  # fmt: skip
        found = self_influence(index, "identity")
        assert found.errors is not None
        values.append(found.values)
        squares.append(np.square(found.errors))
    ratio = np.sqrt(np.mean(squares) / np.var(values, axis=0, ddof=1).mean())
    # A variance of twelve draws is known to 40%, the mean of twelve such, few of which are large,
    # to a fifth; its root to a tenth.
    assert 0.7 < ratio < 1.4


@pytest.mark.parametrize("noise", [0.1, 1.0, 5.0])
def test_errors_of_gaussian_gradients_are_right_on_average(noise: float) -> None:
    """Whatever the size of gradients, and though even draws see larger ones than odd ones."""
    random = np.random.default_rng(0)
    count, width = 4000, 40
    sizes = np.exp(random.normal(size=(2, 1, 1)))
    gradient = random.normal(size=width) / np.sqrt(width)
    halves = gradient + noise * random.normal(size=(2, count, width)) / np.sqrt(width)
    even, odd = halves * np.array([1.1, 1.0])[:, None, None]
    for size in sizes.flatten():
        products = np.einsum("nw,nw->n", size * even, size * odd)
        errors = errors_of_norms(*(np.square(size * h).sum(1) for h in (even, odd)))
        # 4,000 squares of nearly normal numbers are known to 3%, their root to half of that; that
        # one half is larger by a tenth makes 1% of the rest.
        assert 0.93 < np.sqrt(np.square(errors).mean()) / products.std() < 1.07


def test_errors_of_nothing_and_of_one() -> None:
    assert errors_of_norms(np.zeros(3), np.zeros(3)).tolist() == [0, 0, 0]
    assert errors_of_norms(np.array([3.0]), np.array([1.0])).tolist() == [1]


def test_no_negative_damping(index: Index) -> None:
    for curvature in ("identity", "ekfac"):
        with pytest.raises(ValueError, match=r"damping = -0\.1 must not be negative"):
            self_influence(index, curvature, damping=-0.1)
