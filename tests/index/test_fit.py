from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.methods.conftest import examples
from unsee.curvature.diagonal import DiagonalFisher
from unsee.curvature.kfac import EKFAC, KFAC, KroneckerCovariances, kronecker_covariances
from unsee.data.batches import gather
from unsee.data.latents import EncodedDataset
from unsee.draws import Draws
from unsee.index import fit
from unsee.index.factors import example_factors, text_layers
from unsee.index.fisher import fit_diagonal_fisher
from unsee.index.fit import CurvatureName, Sample
from unsee.index.index import Index
from unsee.methods.example_gradients import GradientMatrix, example_gradients
from unsee.models.unet import UNetDenoiser

from .conftest import DRAWS, build_index, small_model

# Stored factors and products are float32: 6e-8 a rounding, of sums over some tokens.
ROUNDING = 1e-5


@pytest.fixture(scope="module")
def double() -> UNetDenoiser:
    model = small_model()
    model.network.double()
    return model


def lora_model() -> UNetDenoiser:
    peft = pytest.importorskip("peft")
    model = small_model()
    torch.manual_seed(3)
    model.network.add_adapter(
        peft.LoraConfig(r=3, target_modules=["attn2.to_k", "attn2.to_v"], init_lora_weights=False)
    )
    model.network.double()
    return UNetDenoiser(model.network, model.schedule, parameters="lora")


def stored(path: Path, model: UNetDenoiser, data: EncodedDataset, **options) -> Index:
    return build_index(path, model, data, storage="float32", **options)


def explicit(model: UNetDenoiser, data: EncodedDataset, column: str = "factors") -> GradientMatrix:
    measure = {"factors": "loss", "outputs": "output_norm"}[column]
    return example_gradients(model, data, DRAWS, measure=measure)  # type: ignore[arg-type]


def slow_covariances(model: UNetDenoiser, data: EncodedDataset) -> KroneckerCovariances:
    """By the hooks of `unsee.curvature`, for examples of one caption."""

    def losses() -> Iterator[Callable[[], Tensor]]:
        for row in range(len(data.ids)):
            batch = gather(data, DRAWS, [(0, row, 0)])
            yield lambda batch=batch: model.loss(*batch)

    keys = [name for name in model.parameters if ".to_k" in name]
    with model.gradients_on():
        return kronecker_covariances(model.network, model.parameters, losses(), "averaged", keys)


def assert_same_steps(found, expected, gradients: GradientMatrix, tolerance: float = 1e-4) -> None:
    """Compares what curvatures make of some gradients, relative to the largest entry.

    Vectors of equal curvatures may have other signs, or be turned where values are nearly equal.
    """
    for name in gradients.names:
        g = {name: gradients.of(name)[3].double()}
        for damping in (0.01, 1.0):
            a = found.precondition(g, damping)[name]
            b = expected.precondition(g, damping)[name]
            assert (a - b).abs().max() <= tolerance * b.abs().max(), (name, damping)


@pytest.mark.parametrize("make", [None, lora_model], ids=["weights", "lora"])
def test_curvature_is_that_of_explicit_gradients(double, tmp_path: Path, make) -> None:
    model = make() if make else double
    data = examples(10, captions=(1,))
    index, gradients = stored(tmp_path, model, data), explicit(model, data)
    covariances = slow_covariances(model, data)
    kfac = index.curvature("kfac")
    assert isinstance(kfac, KFAC) and kfac.gradient == "averaged" and kfac.count == 10
    expected = KFAC.fit(covariances)
    for name, values in expected.values.items():
        # Eigenvalues, in ascending order.
        error = (kfac.values[name] - values).abs().max()
        assert error <= ROUNDING * values.abs().max(), name
    assert_same_steps(kfac, expected, gradients)
    ekfac = index.curvature("ekfac")
    assert isinstance(ekfac, EKFAC) and ekfac.gradient == "averaged" and ekfac.count == 10
    rows = {name: gradients.of(name).double() for name in gradients.names}
    assert_same_steps(ekfac, EKFAC.fit(covariances, [rows]), gradients)


@pytest.mark.parametrize("column", ["factors", "outputs"])
def test_diagonal_is_the_mean_square_of_gradients(double, tmp_path: Path, column: str) -> None:
    data = examples(10)  # of one caption or two
    found = stored(tmp_path, double, data).curvature("diagonal", column)
    assert isinstance(found, DiagonalFisher) and found.count == 10
    gradients = explicit(double, data, column)
    for name in gradients.names:
        expected = gradients.of(name).double().square().mean(0)
        error = (found.values[name] - expected).abs().max()
        assert error <= ROUNDING * expected.max(), name


def test_an_example_of_several_captions_is_their_mean(double, tmp_path: Path) -> None:
    """Its tokens are those of all captions, its factors those of the mean loss over them.

    Ten tokens in twelve dimensions: their factors can be made again from the gradient.
    """
    data = examples(8, captions=(1, 2))
    index, layers = stored(tmp_path, double, data), text_layers(double)
    a = {la.name: torch.zeros(la.width, la.width, dtype=torch.float64) for la in layers}
    g = {la.name: torch.zeros(la.channels, la.channels, dtype=torch.float64) for la in layers}
    tokens = 0
    for row, captions in enumerate(data.caption_counts):
        for caption in range(captions):
            batch = gather(data, DRAWS, [(0, row, caption)])
            with double.gradients_on():
                _, factors = example_factors(double, layers, batch)
            m = factors["loss"][0].mean(0) / captions  # [T, channels]
            parts = m.split([la.channels for la in layers], dim=-1)
            for t in range(len(m)):
                tokens += 1
                for layer, part in zip(layers, parts, strict=True):
                    c = batch[1][0].double()
                    seen = c[t] - c.mean(0) if layer.centred else c[t]
                    a[layer.name] += torch.outer(seen, seen)
                    g[layer.name] += torch.outer(part[t], part[t])
    slow = KroneckerCovariances(
        {n: x / tokens for n, x in a.items()}, {n: x / tokens for n, x in g.items()},
        dict.fromkeys(a, tokens / 8), "averaged", 8,
    )  # fmt: skip
    gradients = explicit(double, data)
    kfac, expected = index.curvature("kfac"), KFAC.fit(slow)
    for name, values in expected.values.items():
        error = (kfac.values[name] - values).abs().max()
        assert error <= ROUNDING * values.abs().max(), name
    assert_same_steps(kfac, expected, gradients)
    rows = {name: gradients.of(name).double() for name in gradients.names}
    assert_same_steps(index.curvature("ekfac"), EKFAC.fit(slow, [rows]), gradients)


def test_per_draw_is_the_published_fisher(double, tmp_path: Path) -> None:
    data = examples(10)
    found = stored(tmp_path, double, data).curvature("diagonal_per_draw")
    expected = fit_diagonal_fisher(double, data, Draws(seed=-1, n=2))
    assert isinstance(found, DiagonalFisher)
    assert found.count == expected.count == 2 * sum(data.caption_counts)
    for name, values in expected.values.items():
        # The very same passes; latents and texts come back from the index bit by bit.
        torch.testing.assert_close(found.values[name], values, rtol=1e-12, atol=0)


def test_mirrored_views_are_left_out(model, data, built: Index, tmp_path: Path) -> None:
    both = stored(tmp_path, model, data, flips=True)
    expected, found = built.curvature("diagonal"), both.curvature("diagonal")
    for name, values in expected.values.items():
        torch.testing.assert_close(found.values[name], values, rtol=1e-4, atol=0)


def test_a_sample_is_everything_where_there_is_no_more(built: Index) -> None:
    """The stored numbers of every shard as they are, bit by bit."""
    sample = Sample(built, "factors")
    assert sample.examples == len(built.ids) == 10
    assert [(s.number, rows) for s, rows in sample.rows] == [
        (0, [0, 1, 2, 3]), (1, [0, 1, 2, 3]), (2, [0, 1])
    ]  # fmt: skip
    for shard, (stored, _, _), (text, _) in zip(
        built.shards(), sample.gradients(), sample.tokens(), strict=True
    ):
        whole = built.components("factors", shard).tensors
        assert all(torch.equal(t, whole[name]) for name, t in stored.tensors.items())
        assert torch.equal(text, built.text(shard))


def test_a_sample_is_chosen_by_id_alone(built: Index, monkeypatch) -> None:
    monkeypatch.setattr(fit, "FIT_EXAMPLES", 6)
    ids = fit.chosen(built.ids, 6)
    assert len(ids) == 6 and ids == [i for i in built.ids if i in ids]
    assert set(fit.chosen(built.ids[::-1], 6)) == set(ids)
    # Others that come do not bring back one that was left out.
    more = [*built.ids, *(f"other-{i}" for i in range(10))]
    assert set(fit.chosen(more, 6)) & set(built.ids) <= set(ids)
    sample = Sample(built, "factors")
    assert sample.examples == 6
    found = [built.examples(s).ids[r] for s, rows in sample.rows for r in rows]
    assert found == ids


def test_a_curvature_tells_what_it_was_fitted_on(built: Index, monkeypatch) -> None:
    monkeypatch.setattr(fit, "FIT_EXAMPLES", 6)
    key = fit.ids_hash(fit.chosen(built.ids, 6))
    fitted = fit.fit_curvature(built, "diagonal", "factors")
    assert fitted.count == 6
    assert fitted.settings == {"column": "factors", "examples": 6, "ids": key}
    per_draw = fit.fit_curvature(built, "diagonal_per_draw", "factors")
    assert per_draw.settings["examples"] == 6 and per_draw.settings["ids"] == key
    assert fit.ids_hash(built.ids[::-1]) == fit.ids_hash(built.ids) != key


@pytest.mark.parametrize("name", ["diagonal", "diagonal_per_draw", "kfac", "ekfac"])
def test_a_sample_does_not_move_with_shards_or_order(
    double, tmp_path: Path, monkeypatch, name: CurvatureName
) -> None:
    monkeypatch.setattr(fit, "FIT_EXAMPLES", 7)
    data = examples(12)
    kinds = {"one": (data, 1), "three": (data, 3), "all": (data, 1000),
             "backwards": (data.select(data.ids[::-1]), 5)}  # fmt: skip
    indices = [stored(tmp_path / kind, double, some, shard_size=size, columns=["factors"])
               for kind, (some, size) in kinds.items()]  # fmt: skip
    grown = stored(tmp_path / "grown", double, data.select(data.ids[:4]), columns=["factors"])
    for identifier in data.ids[4:]:
        grown = grown.append(data.select([identifier]))
    expected, *others = [index.curvature(name) for index in (*indices, grown)]
    gradients = explicit(double, data)
    for found in others:
        assert found.count == expected.count
        assert found.settings == expected.settings
        assert_same_steps(found, expected, gradients)


def test_chunks_change_nothing(built: Index, monkeypatch) -> None:
    """However few gradients are formed at a time."""
    expected = fit.fit_curvature(built, "ekfac", "factors")
    monkeypatch.setattr(fit, "at_once", lambda _: 3)
    found = fit.fit_curvature(built, "ekfac", "factors")
    for name, values in expected.values.items():
        torch.testing.assert_close(found.values[name], values, rtol=1e-5, atol=0)


def test_small_gradients_do_not_underflow(double, tmp_path: Path) -> None:
    """Squares of 1e-25 are nothing in float32."""
    model = small_model()
    model.network.double()
    with torch.no_grad():
        model.network.conv_out.weight *= 1e-22
    data = examples(6)
    index = stored(tmp_path, model, data)
    gradients = explicit(model, data)
    found = index.curvature("diagonal")
    for name in gradients.names:
        expected = gradients.of(name).double().square().mean(0)
        assert 0 < expected.max() < 1e-40
        assert (found.values[name] - expected).abs().max() <= ROUNDING * expected.max()


def test_unknown_curvatures_and_columns_are_refused(built: Index, model, data, tmp_path) -> None:
    with pytest.raises(ValueError, match="curvature 'hessian': use ekfac, kfac, diagonal or"):
        built.curvature("hessian")  # type: ignore[arg-type]
    index = stored(tmp_path, model, data, columns=["loss"])
    with pytest.raises(ValueError, match="it has no column 'factors', only examples, loss"):
        index.curvature("ekfac")
