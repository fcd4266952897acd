"""TRAK from sketches, against the same formula with whole matrices."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import unsee.index.kernel as kernel_module
from tests.index.conftest import build_index, small_model
from unsee import TRAK, Draws, Index, Query, Sketch
from unsee.index.kernel import sketched_rows
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
    """Returns the rows of all examples, [N, length] float64."""
    rows = [dequantise_rows(index.sketches(measure, s)) for s in index.shards()]
    return torch.cat(rows).double().mean(1)


def asked(index: Index, query: Query, measure) -> torch.Tensor:
    return Sketcher(index.model, SKETCH).query(query, QUERY_DRAWS, 4)[1][measure].mean(0)


def without(rows: torch.Tensor, phi: torch.Tensor, row: int, absolute: float) -> torch.Tensor:
    """Returns the preconditioned query with one example left out of Φ: slow and obvious."""
    others = torch.cat([rows[:row], rows[row + 1 :]])
    matrix = others.T @ others + absolute * torch.eye(rows.shape[1]).double()
    return torch.linalg.solve(matrix, phi)


@pytest.mark.parametrize("measure", ["loss", "output_norm"])
@pytest.mark.parametrize("ridge", [0.01, 1.0])
def test_scores_are_those_of_the_formula(index: Index, measure, ridge: float) -> None:
    query = queries()[0]
    found = TRAK(index, measure, ridge, QUERY_DRAWS).attribute(query)
    rows, phi = means(index, measure), asked(index, query, measure)
    absolute = float(ridge * rows.square().sum(1).mean())
    expected = [float(rows[i] @ without(rows, phi, i, absolute)) for i in range(10)]
    # Directions are float32 in the scan.
    np.testing.assert_allclose(
        found.values, expected, rtol=1e-4, atol=1e-5 * np.max(np.abs(expected))
    )
    assert found.method == {"loss": "TRAK", "output_norm": "D-TRAK"}[measure]
    assert found.ids == index.ids


@pytest.mark.parametrize("own", [True, False])
def test_the_exact_kernel_says_the_same(index: Index, own: bool) -> None:
    rows, phi = means(index, "loss"), asked(index, queries()[0], "loss")
    trained = np.arange(10) < 7
    part = rows[:7]
    absolute = float(0.1 * part.square().sum(1).mean())
    whole = torch.linalg.solve(part.T @ part + absolute * torch.eye(64).double(), phi)
    expected = [float(rows[i] @ (whole if own or i >= 7 else without(part, phi, i, absolute)))
                for i in range(10)]  # fmt: skip
    found = trak_scores(
        (rows @ rows.T).numpy(), (rows @ phi[:, None]).numpy(), 0.1, trained, own
    )  # fmt: skip
    np.testing.assert_allclose(found[:, 0], expected, rtol=1e-6)


def test_many_queries_are_answered_as_one_is(index: Index) -> None:
    method, many = TRAK(index, query_draws=QUERY_DRAWS), queries(3)
    for query, together in zip(many, method.attribute_many(many), strict=True):
        alone = method.attribute(query)
        np.testing.assert_allclose(together.values, alone.values, rtol=1e-5)
        np.testing.assert_allclose(together.errors, alone.errors, rtol=1e-4)  # type: ignore[arg-type]
        some = method.attribute(query, ["picture-7", "picture-2"])
        assert some.ids == ["picture-7", "picture-2"]
        np.testing.assert_allclose(some.values, alone.values[[7, 2]])


@pytest.fixture(scope="module")
def sampled(tmp_path_factory: pytest.TempPathFactory) -> Index:
    """An index of sixty examples, whose kernel is of twelve."""
    data = examples(60, captions=(1,))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel_module, "FIT_EXAMPLES", 12)
        built = build_index(tmp_path_factory.mktemp("sampled"), small_model(), data, shard_size=7,
                            columns=("sketch",), sketch=SKETCH, storage="float32")  # fmt: skip
        built.kernel("output_norm")
    return built


def test_a_kernel_is_of_rows_spread_over_the_index(sampled: Index) -> None:
    kernel = sampled.kernel("output_norm")
    assert kernel.rows.tolist() == np.linspace(0, 59, 12).round().tolist() and kernel.share == 5
    rows = means(sampled, "output_norm")[kernel.rows]
    torch.testing.assert_close(sketched_rows(sampled, "output_norm", kernel.rows).double(), rows)
    torch.testing.assert_close(
        kernel.vectors @ torch.diag(kernel.values) @ kernel.vectors.T, rows @ rows.T
    )
    # Of the matrix with each row five times.
    phi = torch.randn(2, 64, generator=torch.Generator().manual_seed(0)).double()
    absolute = 0.1 * rows.square().sum(1).mean()
    matrix = 5 * rows.T @ rows + absolute * torch.eye(64).double()
    found = kernel.precondition(rows.float(), phi, 0.1)
    torch.testing.assert_close(found, torch.linalg.solve(matrix, phi.T).T, rtol=1e-4, atol=1e-6)
    explained = 5 * (rows @ torch.linalg.inv(matrix) * rows).sum(1)
    torch.testing.assert_close(kernel.leverage(0.1), explained, rtol=1e-4, atol=1e-6)


def test_examples_of_the_kernel_have_no_other_scale(sampled: Index) -> None:
    """Each is found by a query made of it, in the kernel or not, and none is small for it."""
    data, kernel = examples(60, captions=(1,)), sampled.kernel("output_norm")
    inside = np.zeros(60, dtype=bool)
    inside[kernel.rows] = True
    made = [Query(f"query {i}", data.latents([i])[0], data.text([i], 0)[0], "p", None)  # type: ignore[arg-type]
            for i in (0, 1, 16, 30, 32, 44)]  # fmt: skip
    method = TRAK(sampled, query_draws=Draws(seed=1, n=16))
    found = np.stack([s.values for s in method.attribute_many(made)])
    size = np.sqrt(np.square(found).mean(0))
    # As large as one another within the chance of twelve examples; the own term made it a tenth.
    assert 0.5 < size[inside].mean() / size[~inside].mean() < 2
    ranks = [s.rank_of(f"picture-{q.id[6:]}") for q, s in zip(
        made, method.attribute_many(made), strict=True)]  # fmt: skip
    assert np.median(ranks) <= 5  # of 60; four draws of a random network leave some chance


def test_errors_are_how_far_scores_move_with_other_draws(tmp_path: Path) -> None:
    """Eight indices of other draws, each asked with other draws of the query."""
    data, model, found, errors = examples(12, captions=(1,)), small_model(), [], []
    for seed in range(8):
        built = build_index(tmp_path / str(seed), model, data, draws=Draws(seed=10 + seed, n=8),
                            columns=("sketch",), sketch=Sketch(256), storage="float32")  # fmt: skip
        scores = TRAK(built, query_draws=Draws(seed=50 + seed, n=8)).attribute(queries()[0])
        found.append(scores.values)
        errors.append(scores.errors)
    moved = np.sqrt(np.stack(found).var(0, ddof=1).mean())
    said = np.sqrt(np.square(np.stack(errors)).mean())
    # Both are estimates from eight, and stratified halves overstate; unscaled errors are far off.
    assert 0.6 < said / moved < 2


def test_what_does_not_fit_is_refused(index: Index, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"ridge = 0 must be at least 0\.0001"):
        TRAK(index, ridge=0)
    with pytest.raises(ValueError, match="5 draws do not make two halves"):
        TRAK(index, query_draws=Draws(seed=1, n=5))
    part = build_index(tmp_path / "d", index.model, examples(4), columns=("sketch",),
                       sketch=Sketch(64), draws=Draws(0, 4, (0.96, 1.0)))  # fmt: skip
    with pytest.raises(ValueError, match=r"query_draws: .* n = 64 must .* ask for fewer"):
        TRAK(part)
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
    with pytest.raises(ValueError, match="candidates: the list is empty"):
        TRAK(one, query_draws=QUERY_DRAWS).attribute(queries()[0], [])
