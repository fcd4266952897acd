"""TRAK from sketches, against the same formula with whole matrices."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import unsee.index.kernel as kernel_module
from tests.index.conftest import build_index, small_model
from unsee import TRAK, Draws, Index, Query, Sketch
from unsee.index.sketch import Sketcher, dequantise_rows
from unsee.methods.trak import trak_scores

from .conftest import examples

SKETCH = Sketch(64, measures=("output_norm", "loss"))
QUERY_DRAWS = Draws(seed=1, n=4)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    path = tmp_path_factory.mktemp("sketched")
    return build_index(path, small_model(), examples(10), columns=("sketch",), sketch=SKETCH,
                       storage="float32")  # fmt: skip


def queries(count: int = 1) -> list[Query]:
    data = examples(10)
    return [Query(f"query {i}", data.latents([4 + i])[0] * 0.9, data.text([4 + i], 0)[0], "p", None)  # type: ignore[arg-type]
            for i in range(count)]  # fmt: skip


def means(index: Index, measure) -> torch.Tensor:
    return (
        torch.cat([dequantise_rows(index.sketches(measure, s)) for s in index.shards()])
        .double()[:, 0]
        .mean(1)
    )


def asked(index: Index, query: Query, measure) -> torch.Tensor:
    return Sketcher(index.model, SKETCH).query(query, QUERY_DRAWS, 4)[1][measure].mean(0)


@pytest.mark.parametrize("measure", ["loss", "output_norm"])
@pytest.mark.parametrize("ridge", [0.01, 1.0])
def test_scores_are_those_of_the_formula(index: Index, measure, ridge: float) -> None:
    query = queries()[0]
    found = TRAK(index, measure, ridge, QUERY_DRAWS).attribute(query)
    rows, phi = means(index, measure), asked(index, query, measure)
    absolute = ridge * rows.square().sum(1).mean()
    inverse = torch.linalg.inv(rows.T @ rows + absolute * torch.eye(64).double())
    expected = (rows @ inverse @ phi).numpy()
    # Eigenvectors are kept in float32; a small ridge magnifies that a hundred times.
    np.testing.assert_allclose(found.values, expected, atol=1e-5 / ridge * np.abs(expected).max())
    # ... which is what the exact kernel makes of the same rows.
    exact = trak_scores((rows @ rows.T).numpy(), (rows @ phi[:, None]).numpy(), ridge)[:, 0]
    np.testing.assert_allclose(expected, exact, rtol=1e-6, atol=1e-9 * np.abs(exact).max())
    assert found.method == {"loss": "TRAK", "output_norm": "D-TRAK"}[measure]
    assert found.errors is not None and (found.errors > 0).all()
    assert found.ids == index.ids


def test_many_queries_are_answered_as_one_is(index: Index) -> None:
    method, many = TRAK(index, query_draws=QUERY_DRAWS), queries(3)
    for query, together in zip(many, method.attribute_many(many), strict=True):
        alone = method.attribute(query)
        np.testing.assert_allclose(together.values, alone.values, rtol=1e-5)
        np.testing.assert_allclose(together.errors, alone.errors, rtol=1e-4)  # type: ignore[arg-type]
        some = method.attribute(query, ["picture-7", "picture-2"])
        assert some.ids == ["picture-7", "picture-2"]
        np.testing.assert_allclose(some.values, alone.values[[7, 2]])


def test_a_kernel_of_some_stands_for_all(index: Index, monkeypatch, tmp_path: Path) -> None:
    """Two shards of three; each row counts as often as there are examples for it."""
    monkeypatch.setattr(kernel_module, "FIT_EXAMPLES", 8)
    data = examples(10)
    few = build_index(tmp_path, index.model, data, columns=("sketch",), sketch=SKETCH,
                      storage="float32")  # fmt: skip
    query = queries()[0]
    found = TRAK(few, ridge=0.1, query_draws=QUERY_DRAWS).attribute(query)
    rows, phi = means(few, "output_norm"), asked(few, query, "output_norm")
    assert few.kernel("output_norm").shards == ["00000", "00002"]
    sample = rows[[0, 1, 2, 3, 8, 9]]
    absolute = 0.1 * sample.square().sum(1).mean()
    matrix = 10 / 6 * sample.T @ sample + absolute * torch.eye(64).double()
    expected = (rows @ torch.linalg.solve(matrix, phi)).numpy()
    np.testing.assert_allclose(found.values, expected, atol=1e-4 * np.abs(expected).max())


def test_the_larger_of_two_views_counts(tmp_path: Path) -> None:
    """The picture itself, mirrored, is asked about: its own mirrored view answers."""
    data = examples(10)
    index = build_index(tmp_path, small_model(), data, columns=("sketch",), sketch=SKETCH,
                        storage="float32", flips=True)  # fmt: skip
    mirrored = Query(
        "mirrored", data.latents([5], flipped=True)[0], data.text([5], 0)[0], "p", None
    )  # type: ignore[arg-type]
    method = TRAK(index, query_draws=Draws(seed=1, n=64))
    products = method._products(
        index.kernel("output_norm").precondition(
            [means(index, "output_norm")[p : p + 4] for p in (0, 4, 8)],
            Sketcher(index.model, SKETCH).query(mirrored, method.used_query_draws, 64)[1][
                "output_norm"],
            method.ridge,
        ), 1,
    )  # fmt: skip
    views = products[:, :, 0].mean((2, 3))
    np.testing.assert_allclose(method.attribute(mirrored).values, views.max(1), rtol=1e-5)
    assert (views[:, 0] != views[:, 1]).all()


def test_what_does_not_fit_is_refused(index: Index, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"ridge = 0 must be positive"):
        TRAK(index, ridge=0)
    with pytest.raises(ValueError, match="5 draws do not make two halves"):
        TRAK(index, query_draws=Draws(seed=1, n=5))
    with pytest.raises(ValueError, match="there is no query"):
        TRAK(index).attribute_many([])
    with pytest.raises(ValueError, match="candidate 'nobody' is not in the index"):
        TRAK(index, query_draws=QUERY_DRAWS).attribute(queries()[0], ["nobody"])
    plain = build_index(tmp_path / "a", index.model, examples(4), columns=("loss",))
    with pytest.raises(ValueError, match="no column 'sketch', only examples, loss; build another"):
        TRAK(plain)
    one = build_index(tmp_path / "b", index.model, examples(4), columns=("sketch",),
                      sketch=Sketch(64))  # fmt: skip
    with pytest.raises(ValueError, match="not of the measure 'loss', only of output_norm"):
        TRAK(one, "loss")
    frozen = build_index(tmp_path / "c", index.model, examples(4), columns=("sketch",),
                         sketch=Sketch(64, "conv_in.bias"))  # fmt: skip
    with pytest.raises(ValueError, match="candidates: the list is empty"):
        TRAK(frozen, query_draws=QUERY_DRAWS).attribute(queries()[0], [])
