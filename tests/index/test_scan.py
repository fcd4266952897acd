from __future__ import annotations

import pytest
import torch
from torch import Tensor

from unsee.curvature.diagonal import DiagonalFisher
from unsee.index import scan as module
from unsee.index.components import DIFFERENCE_WEIGHT, Components
from unsee.index.directions import Moments, directions, moments_of
from unsee.index.factors import Layer, Storage, dequantise, quantise
from unsee.index.scan import scan

WIDTH, RANK = 12, 3
LAYERS = [
    Layer("a", 8, WIDTH, None, True), Layer("b", 6, WIDTH, None, False),
    Layer("c", 7, RANK, "below", False),
]  # fmt: skip
WEIGHTS = {"below": torch.randn(RANK, WIDTH, generator=torch.Generator().manual_seed(9))}
CHANNELS = sum(layer.channels for layer in LAYERS)
VIEWS, COUNTS = 2, (5, 1, 4, 5, 9, 2, 5, 1, 5)

Query = dict[str, Tensor]


def stored(storage: Storage = "int8") -> Components:
    """Returns examples of few rows and of many, of small gradients and of large ones."""
    generator = torch.Generator().manual_seed(1)
    counts = torch.tensor(COUNTS)
    factors = torch.randn(VIEWS, sum(COUNTS), 2, CHANNELS, generator=generator)
    sizes = 10 ** torch.linspace(-2, 2, len(COUNTS))
    factors *= sizes.repeat_interleave(counts)[:, None, None]
    text = torch.randn(VIEWS, sum(COUNTS), WIDTH, generator=generator)
    return Components(quantise(factors, LAYERS, storage), text, counts)


def queries(count: int) -> list[Query]:
    generator = torch.Generator().manual_seed(2)
    return [
        {la.name: torch.randn(2, la.channels, la.width, generator=generator) for la in LAYERS}
        for _ in range(count)
    ]


def flat_moments() -> dict[str, Moments]:
    """All channels and inputs alike, in a turned basis."""
    generator = torch.Generator().manual_seed(3)
    found = {}
    for la in LAYERS:
        turned = [torch.linalg.qr(torch.randn(n, n, generator=generator)).Q
                  for n in (la.channels, la.width)]  # fmt: skip
        found[la.name] = Moments(torch.ones(la.channels), torch.ones(la.width), tuple(turned))
    return found


def explicit(examples: Components, asked: list[Query]) -> Tensor:
    """Forms every gradient, row by row, and multiplies it with every direction, in float64."""
    dense = dequantise(examples.factors, LAYERS).double()
    parts = dense.split([la.channels for la in LAYERS], dim=-1)
    found = torch.zeros(len(dense), len(examples.counts), 2, 2 * len(asked), dtype=torch.float64)
    for layer, m in zip(LAYERS, parts, strict=True):
        seen = examples.text.double()
        seen = seen if layer.reads is None else seen @ WEIGHTS["below"].double().T
        for view in range(len(dense)):
            for row, example in enumerate(examples.owners.tolist()):
                for half in (0, 1):
                    gradient = torch.outer(m[view, row, half], seen[view, row])
                    for q, query in enumerate(asked):
                        for h in (0, 1):
                            w = query[layer.name][h].double()
                            found[view, example, half, 2 * q + h] += (gradient * w).sum()
    return found


def assert_close(found: Tensor, expected: Tensor) -> None:
    """Relative to the largest of a row: sums of some hundred float32 products."""
    assert found.dtype == torch.float64 and found.shape == expected.shape
    error = (found - expected).abs().amax(dim=(0, 2, 3))
    assert (error <= 1e-5 * expected.abs().amax(dim=(0, 2, 3))).all()


@pytest.mark.parametrize("storage", ["int8", "float16", "float32"])
@pytest.mark.parametrize("by_tokens", [False, True])
@pytest.mark.parametrize("count", [1, 5])
def test_products_are_those_of_explicit_gradients(storage, by_tokens, count, monkeypatch) -> None:
    """By both roads; a tolerance of 1e-13 truncates nothing that float32 could see."""
    monkeypatch.setattr(module, "_truncation_pays", lambda *_: by_tokens)
    examples = stored(storage)
    asked = queries(count)
    prepared = directions(asked, LAYERS, WEIGHTS, flat_moments(), 1e-13)
    assert prepared.count == 2 * count and prepared.lost < 1e-12
    assert_close(scan(examples, LAYERS, prepared), explicit(examples, asked))


def test_without_moments_nothing_is_truncated() -> None:
    examples = stored()
    asked = queries(3)
    for prepared in (
        directions(asked, LAYERS, WEIGHTS), directions(asked, LAYERS, WEIGHTS, flat_moments(), 0),
    ):  # fmt: skip
        assert prepared.rank == 0 and prepared.lost == 0
        assert_close(scan(examples, LAYERS, prepared), explicit(examples, asked))


@pytest.mark.parametrize("by_tokens", [False, True])
def test_many_queries_are_one_after_another(by_tokens: bool, monkeypatch) -> None:
    monkeypatch.setattr(module, "_truncation_pays", lambda *_: by_tokens)
    examples = stored()
    asked = queries(6)
    together = scan(examples, LAYERS, directions(asked, LAYERS, WEIGHTS, flat_moments(), 0.02))
    for q, query in enumerate(asked):
        alone = directions([query], LAYERS, WEIGHTS, flat_moments(), 0.02)
        assert_close(together[..., 2 * q : 2 * q + 2], scan(examples, LAYERS, alone))


@pytest.mark.parametrize("by_tokens", [False, True])
def test_chunks_change_nothing(by_tokens: bool, monkeypatch) -> None:
    monkeypatch.setattr(module, "_truncation_pays", lambda *_: by_tokens)
    asked = directions(queries(2), LAYERS, WEIGHTS, flat_moments(), 1e-3)
    expected = scan(stored(), LAYERS, asked)
    monkeypatch.setattr(module, "at_once", lambda _: 2)
    assert_close(scan(stored(), LAYERS, asked), expected)


def test_no_examples_have_no_products() -> None:
    """As of a shard whose examples were all deleted."""
    none = stored().select(torch.zeros(len(COUNTS), dtype=torch.bool))
    asked = directions(queries(2), LAYERS, WEIGHTS, flat_moments(), 1e-3)
    assert scan(none, LAYERS, asked).shape == (VIEWS, 0, 2, 4)


def test_what_truncation_loses_is_what_it_says() -> None:
    """For gradients whose channels and inputs are independent, of known second moments."""
    layer = Layer("a", 16, 20, None, False)
    generator = torch.Generator().manual_seed(4)
    outputs, inputs = 2.0 ** -torch.arange(16), 1.5 ** -torch.arange(20)
    moments = {"a": Moments(outputs, inputs, None)}
    asked = [{"a": torch.randn(2, 16, 20, generator=generator)}]
    factors = torch.randn(1, 2000, 2, 16, generator=generator) * outputs
    text = torch.randn(1, 2000, 20, generator=generator) * inputs
    counts = torch.ones(2000, dtype=torch.long)
    examples = Components(quantise(factors, [layer], "float32"), text, counts)
    whole = scan(examples, [layer], directions(asked, [layer], {}))
    monkeypatch = pytest.MonkeyPatch()
    with monkeypatch.context() as patch:
        patch.setattr(module, "_truncation_pays", lambda *_: True)
        for tolerance in (1e-3, 1e-2, 1e-1):
            prepared = directions(asked, [layer], {}, moments, tolerance)
            assert 0 < prepared.lost <= tolerance and prepared.rank < 20
            error = scan(examples, [layer], prepared) - whole
            scores = float(whole.mean(3).square().mean())
            of_mean = float(error.mean(3).square().mean()) / scores
            of_difference = float((error[..., 0] - error[..., 1]).square().mean()) / 4 / scores
            assert of_mean <= 1.25 * prepared.lost
            # Standard errors are made of half the difference, and it is cut more coarsely.
            share = of_mean + DIFFERENCE_WEIGHT**2 * of_difference
            # 4,000 products: their share is known to some 5%.
            assert share == pytest.approx(prepared.lost, rel=0.25)


def test_a_layer_without_gradient_does_not_count(monkeypatch) -> None:
    """As the lower half of a LoRA whose upper half is still zero."""
    monkeypatch.setattr(module, "_truncation_pays", lambda *_: True)
    examples = stored("float32")
    examples.factors.values[..., :8] = 0
    asked = queries(1)
    asked[0]["a"] = torch.zeros_like(asked[0]["a"])
    values = {la.name: torch.ones(la.channels, la.width, dtype=torch.float64) for la in LAYERS}
    values["a"] *= 0
    prepared = directions(asked, LAYERS, WEIGHTS, moments_of(DiagonalFisher(values, 1)), 1e-13)
    assert_close(scan(examples, LAYERS, prepared), explicit(examples, asked))
