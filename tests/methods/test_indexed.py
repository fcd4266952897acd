from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import pearsonr, spearmanr

from tests.index.conftest import DRAWS, build_index, small_model
from tests.methods.conftest import Setting, examples
from unsee.data.latents import EncodedDataset
from unsee.draws import Draws
from unsee.index import fit
from unsee.index.index import Index
from unsee.methods.base import Scores
from unsee.methods.example_gradients import QueryExamples, example_gradients
from unsee.methods.indexed import AbU, query_gradients
from unsee.methods.influence import influence_scores
from unsee.methods.products import with_errors
from unsee.methods.unlearning import ForwardAbU, query_gradient
from unsee.models.unet import UNetDenoiser
from unsee.query import Query

QUERY_DRAWS = Draws(seed=1, n=10)
MEASURES = {"factors": "loss", "outputs": "output_norm"}
# Gradients and products are float32, 6e-8 a rounding; a score is a sum of some thousand products
# that cancel. Relative to the largest score.
FLOAT32 = 1e-4


@pytest.fixture(scope="module")
def exact(double: Setting, tmp_path_factory: pytest.TempPathFactory) -> Index:
    """An index of the float64 model with factors in float32, not truncated when scanned."""
    path = tmp_path_factory.mktemp("exact")
    return build_index(path, double.model, double.data, storage="float32")


def abu(index: Index, **options) -> AbU:
    defaults = {"columns": ["factors"], "query_draws": QUERY_DRAWS, "tolerance": 0.0}
    return AbU(index, **{**defaults, **options})


def other_queries(data: EncodedDataset, query: Query) -> list[Query]:
    latents = data.latents([1, 2])
    return [
        dataclasses.replace(query, id=f"query-{i}", latents=latents[i], text=data.text([i], 0)[0])
        for i in range(2)
    ]


def assert_close(found: np.ndarray, expected: np.ndarray, tolerance: float = FLOAT32) -> None:
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


# -- what the scores are -----------------------------------------------------------------------


@pytest.mark.parametrize("column", ["factors", "outputs"])
@pytest.mark.parametrize(
    "curvature", ["identity", "diagonal", "diagonal_per_draw", "kfac", "ekfac"]
)
def test_scores_are_influence_times_a_step(exact, double, query, curvature, column: str) -> None:
    found = abu(exact, curvature=curvature, columns=[column]).attribute(query)
    measure = MEASURES[column]
    gradients = example_gradients(double.model, double.data, DRAWS, measure=measure)
    asked = example_gradients(double.model, QueryExamples([query]), QUERY_DRAWS, measure=measure)
    c = None if curvature == "identity" else exact.curvature(curvature, column)
    expected = influence_scores(gradients, asked, c, 0.1)[:, 0]
    assert found.ids == double.data.ids
    assert_close(found.values, expected * found.settings["step_sizes"][column])


def test_scores_of_lora_weights(query, data: EncodedDataset, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = small_model()
    torch.manual_seed(3)
    model.network.add_adapter(
        peft.LoraConfig(r=3, target_modules=["attn2.to_k", "attn2.to_v"], init_lora_weights=False)
    )
    model.network.double()
    lora = UNetDenoiser(model.network, model.schedule, parameters="lora")
    index = build_index(tmp_path, lora, data, storage="float32")
    gradients = example_gradients(lora, data, DRAWS)
    asked = example_gradients(lora, QueryExamples([query]), QUERY_DRAWS)
    for tolerance in (0.0, 1e-12):
        found = abu(index, tolerance=tolerance).attribute(query)
        expected = influence_scores(gradients, asked, index.curvature("ekfac"), 0.1)[:, 0]
        assert_close(found.values, expected * found.settings["step_sizes"]["factors"])


def test_scores_of_a_lora_that_was_not_trained(query, data: EncodedDataset, tmp_path: Path) -> None:
    """Its upper half is zero, and so is the gradient of its lower half."""
    peft = pytest.importorskip("peft")
    model = small_model()
    model.network.add_adapter(peft.LoraConfig(r=3, target_modules=["attn2.to_k", "attn2.to_v"]))
    lora = UNetDenoiser(model.network, model.schedule, parameters="lora")
    index = build_index(tmp_path, lora, data)
    for curvature in ("identity", "diagonal", "kfac", "ekfac"):
        found = AbU(index, curvature=curvature, query_draws=QUERY_DRAWS).attribute(query)
        assert np.isfinite(found.values).all() and found.values.std() > 0


@pytest.mark.parametrize("curvature", ["diagonal", "ekfac"])
def test_stored_in_few_bytes_scores_keep_their_order(
    exact, double, query, tmp_path: Path, curvature: str
) -> None:
    """int8 moves a factor by up to 1/254 of its token's largest; 16 examples are ranked."""
    small = build_index(tmp_path / "int8", double.model, double.data)
    half = build_index(tmp_path / "half", double.model, double.data, storage="float16")
    expected = abu(exact, curvature=curvature).attribute(query).values
    found = abu(small, curvature=curvature).attribute(query).values
    assert pearsonr(found, expected).statistic > 0.999
    assert spearmanr(found, expected).statistic > 0.98
    assert_close(abu(half, curvature=curvature).attribute(query).values, expected, 5e-3)
    assert small.nbytes["factors"] < 0.5 * exact.nbytes["factors"]


def test_a_cheaper_scan_gives_up_little(exact, query: Query) -> None:
    """The share 1e-4 of squares is 1e-2 of the size of scores; a few times that for one of 16."""
    expected = abu(exact).attribute(query).values
    found = abu(exact, tolerance=1e-4).attribute(query).values
    assert_close(found, expected, 0.05)
    assert pearsonr(found, expected).statistic > 0.999


@pytest.mark.parametrize("curvature", ["diagonal_per_draw", "ekfac"])
def test_small_steps_of_unlearning_are_first_order(exact, double, query, curvature: str) -> None:
    """The same curvature, draws and rise; real unlearning by forward passes in float64."""
    forward = ForwardAbU(
        double.model, double.data, exact.curvature(curvature), rise=1e-5, draws=DRAWS,
        query_draws=QUERY_DRAWS,
    ).attribute(query)  # fmt: skip
    found = abu(exact, curvature=curvature, rise=1e-5).attribute(query)
    # Second order terms are 1e-5 of the loss; float32 storage.
    assert pearsonr(found.values, forward.values).statistic > 0.99999
    # The search for a step ends within 1% of the rise that was asked for.
    slope = float(found.values @ forward.values / (found.values @ found.values))
    assert slope == pytest.approx(1, abs=0.015)


@pytest.mark.parametrize("column", ["factors", "outputs"])
def test_a_query_among_the_examples_scores_its_own_rise(double, query, tmp_path, column) -> None:
    """Its score is its own loss's rise: `rise` times the loss, whatever the curvature."""
    data = double.data.select(double.data.ids[:6])
    index = build_index(tmp_path, double.model, data, storage="float32")
    own = dataclasses.replace(query, id="picture-3", latents=data.latents([3])[0],
                              text=data.text([3], 0)[0])  # fmt: skip
    assert data.caption_counts[3] == 1
    timesteps, noise = DRAWS.of(own.id, (4, 8, 8))
    losses = double.model.loss(own.latents[None], own.text[None], timesteps[None], noise[None])
    loss = float(losses.mean().detach())
    for curvature in ("identity", "ekfac", "diagonal"):
        for rise in (0.05, 0.3):
            method = abu(index, curvature=curvature, rise=rise, query_draws=DRAWS, columns=[column])
            found = method.attribute(own)
            assert found.settings["loss_of_query"] == pytest.approx(loss, rel=1e-6)
            assert found.values[3] == pytest.approx(rise * loss, rel=1e-4)


def test_what_is_really_unlearned_goes_further_by_default(exact: Index) -> None:
    assert abu(exact).used_rise == 0.05
    assert abu(exact, forward=True).used_rise == 0.25
    assert abu(exact, forward=True, rise=0.1).used_rise == 0.1


def test_rise_is_a_factor(exact, query: Query) -> None:
    one = abu(exact, rise=0.01).attribute(query)
    ten = abu(exact, rise=0.1).attribute(query)
    assert one.errors is not None and ten.errors is not None
    np.testing.assert_allclose(ten.values, 10 * one.values, rtol=1e-5)
    np.testing.assert_allclose(ten.errors, 10 * one.errors, rtol=1e-4)


def test_two_columns_are_added_in_units_of_their_spread(exact, query: Query) -> None:
    parts = [abu(exact, columns=[c]).attribute(query) for c in MEASURES]
    found = abu(exact, columns=None).attribute(query)
    assert abu(exact, columns=None).used_columns == list(MEASURES)
    assert_close(found.values, sum(p.values / p.values.std() for p in parts))  # type: ignore[arg-type]
    # Nothing of a step is left in it.
    assert_close(abu(exact, columns=None, rise=0.5).attribute(query).values, found.values)


class Mirrored:
    """The draws of mirrored views."""

    n = DRAWS.n

    def of(self, example_id: str, shape: tuple[int, ...], caption: int = 0, flipped: bool = False):
        return DRAWS.of(example_id, shape, caption, flipped=True)


def test_the_larger_view_counts(exact, double, query, tmp_path: Path) -> None:
    index = build_index(tmp_path, double.model, double.data, storage="float32", flips=True)
    method = abu(index, curvature="ekfac")
    found = method.attribute(query)
    asked = example_gradients(double.model, QueryExamples([query]), QUERY_DRAWS)
    rows = range(len(double.data.ids))
    flipped = EncodedDataset(
        double.data.ids, double.data.latents(rows, flipped=True), double.data._states,
        double.data._caption_rows,
    )  # fmt: skip
    views = [
        influence_scores(example_gradients(double.model, some, draws), asked,
                         index.curvature("ekfac"), 0.1)[:, 0]
        for some, draws in ((double.data, DRAWS), (flipped, Mirrored()))
    ]  # fmt: skip
    larger = np.maximum(*views)
    assert (larger != views[0]).any() and (larger != views[1]).any()
    assert_close(found.values, larger * found.settings["step_sizes"]["factors"])


def test_a_masked_query_is_differentiated_in_its_cells(exact, double, query: Query) -> None:
    mask = torch.zeros(8, 8)
    mask[2:5, 1:4] = 1
    masked = dataclasses.replace(query, mask=mask, box=(8, 16, 32, 40))
    found = query_gradients(exact, masked, QUERY_DRAWS, ["loss"])["loss"]
    expected = query_gradient(double.model, masked, QUERY_DRAWS)
    for name, g in found.mean.items():
        assert (g - expected[name]).abs().max() <= 1e-6 * expected[name].abs().max()
    scores = abu(exact).attribute(masked)
    assert scores.settings["box"] == masked.box
    plain = abu(exact).attribute(query)
    assert spearmanr(scores.values, plain.values).statistic < 0.99


# -- what they do not depend on ----------------------------------------------------------------


def test_many_queries_are_one_after_another(exact, double, query: Query) -> None:
    queries = [query, *other_queries(double.data, query)]
    for options in ({}, {"columns": None}, {"tolerance": 1e-4}):
        method = abu(exact, **options)
        together = method.attribute_many(queries)
        for asked, found in zip(queries, together, strict=True):
            alone = method.attribute(asked)
            assert found.query is asked and alone.errors is not None and found.errors is not None
            # The cheaper scan may be chosen for one number of queries and not for another.
            tolerance = 0.05 if "tolerance" in options else FLOAT32
            assert_close(found.values, alone.values, tolerance)
            assert_close(found.errors, alone.errors, tolerance)


def test_batches_of_the_query_change_nothing(exact, query: Query) -> None:
    expected = abu(exact).attribute(query)
    for size in (1, 3, 4, 1000):
        found = abu(exact, batch_size=size).attribute(query)
        assert_close(found.values, expected.values)
        assert found.errors is not None and expected.errors is not None
        assert_close(found.errors, expected.errors)


@pytest.mark.parametrize("asked", [None, 2])
def test_the_batch_size_is_that_of_forward_passes_too(exact, query, monkeypatch, asked) -> None:
    """By default, whatever forward re-evaluation takes."""
    seen = []

    def losses(*_: object, batch_size: int, **__: object) -> None:
        seen.append(batch_size)
        raise InterruptedError

    monkeypatch.setattr("unsee.methods.unlearning.forward_losses", losses)
    # Losses before are not those of the index, so that they are the first to be computed.
    monkeypatch.setattr("unsee.methods.two_stage.environment_of", lambda _: {})
    with pytest.raises(InterruptedError):
        abu(exact, forward=True, batch_size=asked).attribute(query, candidates=["picture-1"])
    assert seen == [asked or 80]


@pytest.mark.parametrize(
    "options", [{"batch_size": 4}, {"shard_size": 3}, {"shard_size": 1000}], ids=str
)
def test_scores_do_not_move_with_batches_or_shards(exact, double, query, tmp_path, options):
    index = build_index(tmp_path, double.model, double.data, storage="float32", **options)
    for columns in (["factors"], None):
        expected = abu(exact, columns=columns).attribute(query).values
        assert_close(abu(index, columns=columns).attribute(query).values, expected)


def test_nor_where_curvature_is_fitted_on_a_sample(double, query, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(fit, "FIT_EXAMPLES", 7)
    backwards = double.data.select(double.data.ids[::-1])
    found = []
    for name, data, size in (("2", double.data, 2), ("5", double.data, 5), ("-", backwards, 1000)):
        path = tmp_path / name
        index = build_index(path, double.model, data, storage="float32", shard_size=size)
        scores = abu(index, columns=None).attribute(query)
        found.append(scores.values[[scores.ids.index(i) for i in double.data.ids]])
    for other in found[1:]:
        assert_close(other, found[0])


def test_scores_do_not_move_with_the_order_of_the_data(exact, double, query, tmp_path) -> None:
    backwards = double.data.select(double.data.ids[::-1])
    index = build_index(tmp_path, double.model, backwards, storage="float32")
    for columns in (["factors"], None):
        expected = abu(exact, columns=columns).attribute(query)
        found = abu(index, columns=columns).attribute(query)
        assert found.ids == expected.ids[::-1]
        assert_close(found.values[::-1], expected.values)


def test_of_a_subset_scores_are_those_of_the_whole(exact, double, query, tmp_path: Path) -> None:
    """Where the curvature is the same; its sample is what is there."""
    some = double.data.select(double.data.ids[3:9])
    index = build_index(tmp_path, double.model, some, storage="float32")
    expected = abu(exact, curvature="identity").attribute(query, candidates=some.ids)
    found = abu(index, curvature="identity").attribute(query)
    assert_close(found.values, expected.values)


def test_candidates_are_scored_alike(exact, query: Query) -> None:
    everything = abu(exact, columns=None).attribute(query)
    few = abu(exact, columns=None).attribute(query, candidates=["picture-7", "picture-0"])
    assert few.ids == ["picture-7", "picture-0"]
    assert few.errors is not None and everything.errors is not None
    assert few.values.tolist() == everything.values[[7, 0]].tolist()
    assert few.errors.tolist() == everything.errors[[7, 0]].tolist()


def test_the_settings_tell_what_was_done(exact, query: Query, tmp_path: Path) -> None:
    found = abu(exact, damping=0.3, rise=0.02).attribute(query)
    about = found.settings
    assert (about["curvature"], about["damping"]) == ("ekfac", 0.3)
    assert about["columns"] == ["factors"] and about["loss_of_query"] > 0
    assert about["query_draws"] == repr(QUERY_DRAWS) and about["draws"] == repr(DRAWS)
    found.save(tmp_path / "scores.parquet")
    loaded = Scores.load(tmp_path / "scores.parquet")
    assert loaded.settings == about
    assert loaded.errors is not None and found.errors is not None
    assert loaded.errors.tolist() == found.errors[found.order].tolist()


# -- how sure they are -------------------------------------------------------------------------


def test_errors_are_of_the_view_that_counts() -> None:
    products = np.zeros((2, 2, 2, 2))
    products[0, 0] = [[3, 5], [5, 7]]  # halves of the example differ by 2, those of the query too
    products[0, 1] = -100
    products[1, 1] = [[1, 1], [9, 9]]
    values, errors = with_errors(products)
    assert values.tolist() == [5, 5]
    # Variances 1 + 1 and 16 + 0, each averaged with their mean.
    np.testing.assert_allclose(errors, np.sqrt([(2 + 9) / 2, (16 + 9) / 2]))


@pytest.mark.parametrize(("of_example", "of_query"), [(1, 0), (0, 1), (0.3, 0.3), (3, 3)])
def test_errors_of_gaussian_gradients_are_right_on_average(of_example, of_query) -> None:
    """Also where the product of both noises is most of it."""
    random = np.random.default_rng(0)
    count, width = 4000, 40
    example, query = random.normal(size=(2, width))
    a = example + of_example * random.normal(size=(count, 2, width))
    b = query + of_query * random.normal(size=(count, 2, width))
    products = np.einsum("nhw,nkw->nhk", a, b)[:, None]
    values, errors = with_errors(products)
    # 4,000 squares of nearly normal numbers are known to 2% or 3%, their roots to half of that.
    # What is negative by chance counts as nothing, which is a little too much on average.
    ratio = np.sqrt(np.square(errors).mean()) / values.std()
    assert 0.95 < ratio < 1.12


def test_errors_are_as_large_as_what_other_draws_do(tmp_path: Path) -> None:
    """Over ten draws of the examples, times sixteen of a query, of a real network."""
    model, data, draws = small_model(), examples(12, captions=(1,)), 16
    # The query looks like an example, so that there is a score beside the noise; its draws
    # belong to its id.
    picture = Image.new("RGB", (64, 64))
    queries = [Query(f"query-{i}", data.latents([4])[0], data.text([4], 0)[0], "p", picture)
               for i in range(16)]  # fmt: skip
    values, squares = [], []
    for seed in range(10):
        index = build_index(
            tmp_path / str(seed), model, data, draws=Draws(seed=100 + seed, n=draws),
            storage="float32", columns=["factors"], shard_size=12,
        )  # fmt: skip
        method = abu(index, curvature="identity", query_draws=Draws(seed=1, n=draws))
        for found in method.attribute_many(queries):
            # Without the step, which is another for every query, and the same for all examples.
            size = found.settings["step_sizes"]["factors"]
            assert found.errors is not None
            values.append(found.values / size)
            squares.append(np.square(found.errors / size))
    ratio = np.sqrt(np.mean(squares) / np.var(values, axis=0, ddof=1).mean())
    # Ten draws of the examples' noise tell its size to a quarter. The halves have timesteps of
    # their own besides, which makes errors larger, by 2% with 1,500 pairs of draws.
    assert 0.75 < ratio < 1.4


# -- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"query_draws": Draws(n=3)}, "query_draws: 3 draws do not make two halves"),
        ({"rise": 0}, "rise = 0 must be positive"),
        ({"rise": -0.1}, r"rise = -0\.1 must be positive"),
        ({"rise": float("nan")}, "rise = nan must be positive"),
        ({"columns": ["loss"]}, "'loss' is no column of gradients in the index; it has factors"),
        ({"columns": ["sketch"]}, "'sketch' is no column of gradients in the index"),
        ({"columns": []}, "no column of gradients"),
        ({"damping": -1}, "damping = -1 must not be negative"),
        ({"damping": -1, "curvature": "identity"}, "damping = -1 must not be negative"),
        ({"shortlist": 0}, "shortlist = 0 must be at least 1"),
        ({"shortlist": -5, "forward": True}, "shortlist = -5 must be at least 1"),
        ({"batch_size": 0}, "batch_size = 0 must be at least 1"),
    ],
)
def test_bad_options_are_refused(exact, options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        abu(exact, **options)


def test_bad_questions_are_refused(exact, query: Query) -> None:
    with pytest.raises(ValueError, match="candidate 'nobody' is not in the index"):
        abu(exact).attribute(query, candidates=["picture-1", "nobody"])
    with pytest.raises(ValueError, match="candidates: the list is empty; leave it out"):
        abu(exact).attribute(query, candidates=[])
    with pytest.raises(ValueError, match="candidates: the list is empty; leave it out, and the"):
        abu(exact, forward=True).attribute(query, candidates=[])
    with pytest.raises(ValueError, match="there is no query"):
        abu(exact).attribute_many([])
    with pytest.raises(ValueError, match="curvature 'newton': use ekfac, kfac, diagonal"):
        abu(exact, curvature="newton").attribute(query)


def test_queries_that_are_not_finite_are_refused(exact, query: Query) -> None:
    broken = dataclasses.replace(query, latents=query.latents * torch.nan)
    with pytest.raises(ValueError, match=r"the loss of the query 'query' is nan: check the model"):
        abu(exact).attribute(broken)
    # A text of nothing: keys and values do not count, and neither do their weights.
    empty = dataclasses.replace(query, text=query.text * 0)
    with pytest.raises(ValueError, match="query has no finite gradient in the selected parameters"):
        abu(exact, curvature="identity").attribute(empty)


def test_a_model_that_broke_after_the_build_is_refused(query, data, tmp_path: Path) -> None:
    model = small_model()
    index = build_index(tmp_path, model, data)
    with torch.no_grad():
        model.network.conv_out.bias[0] = torch.nan
    with pytest.raises(ValueError, match="the loss of the query 'query' is nan"):
        abu(index, curvature="identity").attribute(query)
    with pytest.raises(ValueError, match=r'model is ".*" there, but ".*" is asked for'):
        Index.open(tmp_path, model)


def test_an_index_without_gradients_is_refused(model_of_losses: Index) -> None:
    with pytest.raises(ValueError, match="no column of gradients: build it with `factors`"):
        AbU(model_of_losses)
    with pytest.raises(ValueError, match=r"'factors' is no column of gradients .* it has none"):
        AbU(model_of_losses, columns=["factors"])


@pytest.fixture
def model_of_losses(data: EncodedDataset, tmp_path: Path) -> Index:
    return build_index(tmp_path, small_model(), data, columns=["loss"])


def test_a_single_example_has_a_score(data: EncodedDataset, query, tmp_path: Path) -> None:
    index = build_index(tmp_path, small_model(), data.select(["picture-4"]))
    for columns in (["factors"], None):
        found = abu(index, columns=columns, curvature="diagonal").attribute(query)
        assert found.ids == ["picture-4"] and np.isfinite(found.values).all()
