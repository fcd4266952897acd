"""Probes: the second order of a step, against Jacobians by differences."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.methods.conftest import examples
from tests.models.test_unet import build
from unsee.data.batches import gather
from unsee.data.latents import EncodedDataset
from unsee.draws import Draws, random_functionals
from unsee.index.factors import dequantise
from unsee.index.index import Index
from unsee.methods.indexed import AbU, query_gradients
from unsee.methods.products import second_order
from unsee.query import Query

from .conftest import DRAWS, build_index

COLUMNS = ("loss", "factors", "probes")
EXACT = {"columns": COLUMNS, "storage": "float32"}
QUERY_DRAWS = Draws(seed=1, n=4)


def whole(index: Index, column: str) -> list[dict[str, torch.Tensor]]:
    """Returns each example's gradients, weight -> [2, channels, width] float64, first view."""
    found = []
    for shard in index.shards():
        stored = index.components(column, shard)
        factors = dequantise(stored.factors, index.layers)[0].double()
        text = stored.text[0].double()
        for example in range(len(stored.counts)):
            rows = stored.owners == example
            parts = factors[rows].split([la.channels for la in index.layers], dim=-1)
            found.append({la.name: torch.einsum("rhc,rw->hcw", part, text[rows])
                          for la, part in zip(index.layers, parts, strict=True)})  # fmt: skip
    return found


def test_probes_are_gradients_of_random_functionals(model, data, tmp_path: Path) -> None:
    """Of every example and half, by one backward pass for each caption."""
    index = build_index(tmp_path, model, data.select(data.ids[:3]), **EXACT)
    for row, probe in enumerate(whole(index, "probes")):
        for half in range(2):
            total = {n: torch.zeros_like(p).double() for n, p in model.parameters.items()}
            for caption in range(data.caption_counts[row]):
                latents, text, t, e = gather(data, DRAWS, [(0, row, caption)])
                v = random_functionals(data.ids[row], caption, tuple(e.shape[1:]))[None]
                with model.gradients_on():
                    outputs, _ = model.predict(latents, text, t[:, half::2], e[:, half::2])
                    value = (outputs * v[:, half::2]).sum() * (2 / outputs[0, 0].numel()) ** 0.5
                    got = torch.autograd.grad(value, list(model.parameters.values()))
                for name, gradient in zip(model.parameters, got, strict=True):
                    # A sum over draws and captions of independent functionals.
                    total[name] += gradient.double() / (2 * data.caption_counts[row]) ** 0.5
            for name, expected in total.items():
                # Components leave out 1e-13 of the square; float32 gradients of other batches.
                torch.testing.assert_close(probe[name][half], expected, rtol=1e-3,
                                           atol=1e-4 * float(expected.abs().max()))  # fmt: skip


def bent(model, batch, step: dict[str, torch.Tensor], size: float = 1e-4) -> float:
    """Returns δᵀGδ of one example, the mean over its draws, from differences of outputs."""
    outputs = []
    for sign in (1, -1):
        moved = {n: p.detach() + sign * size * step[n] for n, p in model.parameters.items()}
        with torch.no_grad(), model.replaced(moved):
            outputs.append(model.predict(*batch)[0])
    slope = (outputs[0] - outputs[1]) / (2 * size)
    return float(2 * slope.square().mean())


def test_squares_are_the_gauss_newton_term_on_average(tmp_path: Path) -> None:
    """Three hundred copies of two examples, one with two captions, each with its own draws."""
    model = build("text in the middle only", prediction="v_prediction")
    model.network.double()
    few, copies = examples(2), 300
    latents = few.latents([i % 2 for i in range(copies)]).double()
    states = torch.cat([few.text([0], 0), few.text([1], 0), few.text([1], 1)]).double()
    data = EncodedDataset(
        [f"copy {i}" for i in range(copies)], latents, states,
        [[0] if i % 2 == 0 else [1, 2] for i in range(copies)],
    )  # fmt: skip
    index = build_index(tmp_path, model, data, shard_size=100, **EXACT)
    generator = torch.Generator().manual_seed(1)
    step = {n: torch.randn(p.shape, generator=generator).double()
            for n, p in model.parameters.items()}  # fmt: skip
    squares, truth = [], []
    for row, probe in enumerate(whole(index, "probes")):
        products = sum((g * step[n]).sum((1, 2)) for n, g in probe.items())
        assert isinstance(products, torch.Tensor)
        squares.append(float(products.square().mean()))
        captions = range(data.caption_counts[row])
        truth.append(np.mean([bent(model, gather(data, DRAWS, [(0, row, c)]), step)
                              for c in captions]))  # fmt: skip
    error = np.std(np.array(squares) - truth, ddof=1) / copies**0.5
    assert error < 0.1 * np.mean(truth)  # it says something
    assert abs(np.mean(squares) - np.mean(truth)) < 4 * error


@pytest.fixture(scope="module")
def probed(tmp_path_factory: pytest.TempPathFactory, model, data) -> Index:
    return build_index(tmp_path_factory.mktemp("probed"), model, data, **EXACT)


@pytest.fixture(scope="module")
def query(data) -> Query:
    return Query("query", data.latents([4])[0] * 0.9, data.text([4], 0)[0], "p", None)  # type: ignore[arg-type]


@pytest.mark.parametrize("rise", [0.01, 0.2])
def test_scores_are_of_second_order(probed: Index, query: Query, rise: float) -> None:
    options = {"curvature": "identity", "query_draws": QUERY_DRAWS, "tolerance": 0.0, "rise": rise}
    found = AbU(probed, **options).attribute(query)  # type: ignore[arg-type]
    asked = query_gradients(probed, query, QUERY_DRAWS, ["loss"])["loss"]
    mean = {n: g.double() for n, g in asked.mean.items()}
    size = rise * asked.loss / sum(float(g.square().sum()) for g in mean.values())
    expected = []
    for gradient, probe in zip(whole(probed, "factors"), whole(probed, "probes"), strict=True):
        first = sum(float((g.mean(0) * mean[n]).sum()) for n, g in gradient.items())
        second = sum((p * mean[n]).sum((1, 2)) for n, p in probe.items())
        assert isinstance(second, torch.Tensor)
        expected.append(size * first + 0.5 * size**2 * float(second.square().mean()))
    scale = np.abs(expected).max()
    np.testing.assert_allclose(found.values, expected, atol=1e-4 * scale)  # float32 scan
    assert found.method == "AbU, second order"
    alone = AbU(probed, columns=["factors"], **options).attribute(query)  # type: ignore[arg-type]
    assert alone.method == "AbU, first order"
    share = np.abs(found.values - alone.values).max() / scale
    assert share > 0.5 if rise == 0.2 else share > 0.01  # it grows with the step


def test_the_square_keeps_the_halves_of_the_query() -> None:
    generator = np.random.default_rng(0)
    products = generator.normal(size=(3, 1, 2, 2, 2))
    found = second_order(products)
    mean = products.mean(-1)
    np.testing.assert_allclose(found.mean(-1), 0.5 * mean**2)
    # Of two halves that differ by little, the difference is that of their squares.
    near = mean[..., None] + 1e-6 * generator.normal(size=products.shape)
    squares = 0.5 * near**2
    np.testing.assert_allclose(
        np.diff(second_order(near), axis=-1), np.diff(squares, axis=-1), atol=1e-11
    )


def test_probes_need_factors(probed: Index, model, data, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'probes' adds to what 'factors' says: name both"):
        AbU(probed, columns=["probes"])
    alone = build_index(tmp_path, model, data, columns=("probes",))
    with pytest.raises(ValueError, match="'probes' adds to what 'factors' says: name both"):
        AbU(alone)


def test_examples_come_and_go(probed: Index, query: Query, model, data, tmp_path: Path) -> None:
    index = build_index(tmp_path, model, data.select(data.ids[:7]), **EXACT)
    index = index.append(data.select(data.ids[7:])).delete([data.ids[2]])
    method = {"curvature": "identity", "query_draws": QUERY_DRAWS}
    found, whole_ = (AbU(i, **method).attribute(query) for i in (index, probed))  # type: ignore[arg-type]
    np.testing.assert_allclose(found.values, np.delete(whole_.values, 2), rtol=1e-3, atol=1e-5)
