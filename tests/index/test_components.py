from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from unsee.index import components as module
from unsee.index.components import Components, decompose, token_factors
from unsee.index.factors import Layer, dequantise

LAYERS = [Layer("a", 8, 16, None, True), Layer("b", 6, 16, None, False)]
CHANNELS = sum(layer.channels for layer in LAYERS)
CAPTIONS = (1, 2, 1, 2, 1)
TOKENS, WIDTH, VIEWS = 6, 16, 2

# Stored numbers are float32: 6e-8 a rounding, of sums over some tokens.
ROUNDING = 1e-5


def made_up(fall: float = 0.3) -> tuple[Tensor, Tensor]:
    """Returns token factors whose importance falls from token to token, and text states."""
    generator = torch.Generator().manual_seed(0)
    shape = VIEWS, sum(CAPTIONS), 2, TOKENS, CHANNELS
    both = torch.randn(VIEWS, sum(CAPTIONS), 1, TOKENS, CHANNELS, generator=generator)
    factors = both + 0.3 * torch.randn(shape, generator=generator)
    factors *= fall ** torch.arange(TOKENS)[:, None]
    factors[..., 8:] *= 1e-4  # one layer is not to outvote the other
    return factors, torch.randn(sum(CAPTIONS), TOKENS, WIDTH, generator=generator)


def explicit(factors: Tensor, text: Tensor) -> Tensor:
    """Returns gradients [views, n, 2, width, channels], averaged over captions, in float64."""
    every = text.double().mT[:, None] @ factors.double()
    parts = every.split(list(CAPTIONS), dim=1)
    return torch.stack([p.mean(1) for p in parts], dim=1)


def of(components: Components) -> Tensor:
    """Returns the gradients of components, as `explicit` does."""
    rows = dequantise(components.factors, LAYERS).double()
    text = components.text.double()
    found = torch.zeros(len(rows), len(components.counts), 2, WIDTH, CHANNELS).double()
    for row, example in enumerate(components.owners.tolist()):
        found[:, example] += torch.einsum("vw,vhc->vhwc", text[:, row], rows[:, row])
    return found


def lost(found: Tensor, expected: Tensor) -> Tensor:
    """Returns the share [views, n] of the squared mean gradient that is gone, over layers."""
    shares = [
        (found - expected)[..., c].mean(2).square().sum((2, 3))
        / expected[..., c].mean(2).square().sum((2, 3))
        for c in (slice(0, 8), slice(8, CHANNELS))
    ]
    return torch.stack(shares).mean(0)


def test_without_tolerance_gradients_are_kept() -> None:
    factors, text = made_up()
    found = decompose(factors, text, CAPTIONS, LAYERS, 0.0, "float32")
    assert found.text.dtype == torch.float32 and found.factors.values.dtype == torch.float32
    # As many directions as there are tokens, or channels.
    assert found.counts.tolist() == [min(c * TOKENS, CHANNELS, WIDTH) for c in CAPTIONS]
    expected = explicit(factors, text)
    error = (of(found) - expected).abs().amax((2, 3))
    assert (error <= ROUNDING * expected.abs().amax((2, 3))).all()


@pytest.mark.parametrize("tolerance", [1e-5, 1e-3, 1e-1])
def test_what_is_left_out_is_within_the_tolerance(tolerance: float) -> None:
    factors, text = made_up()
    found = decompose(factors, text, CAPTIONS, LAYERS, tolerance, "float32")
    shares = lost(of(found), explicit(factors, text))
    assert (shares <= tolerance).all()
    assert (found.counts < torch.tensor([c * TOKENS for c in CAPTIONS])).all()
    # One component less, and some example would miss more.
    for example, count in enumerate(found.counts.tolist()):
        if count == 1:
            continue
        fewer = found.counts.clone()
        fewer[example] -= 1
        rows = torch.ones(int(found.counts.sum()), dtype=torch.bool)
        rows[int(found.counts[: example + 1].sum()) - 1] = False
        kept = {n: t if n == "counts" else t[:, rows] for n, t in found.tensors.items()}
        less = of(Components.of({**kept, "counts": fewer}))
        noise = module.DIFFERENCE_WEIGHT**2  # of the halves' difference, which counts too
        gone = lost(less, explicit(factors, text))[:, example].max()
        assert gone > tolerance * (1 - noise) or gone > 0.5 * tolerance


def test_halves_stay_apart() -> None:
    factors, text = made_up()
    found = of(decompose(factors, text, CAPTIONS, LAYERS, 1e-6, "float32"))
    expected = explicit(factors, text)
    a, b = ((g[:, :, 0] - g[:, :, 1]).flatten(2) for g in (found, expected))
    assert (torch.cosine_similarity(a, b, dim=2) > 0.999).all()


def test_directions_are_orthonormal_and_the_largest_come_first() -> None:
    factors, text = made_up()
    found = decompose(factors, text, CAPTIONS, LAYERS, 1e-4, "int8")
    assert found.text.dtype == torch.float16
    for view in range(VIEWS):
        for rows in found.text[view].float().split(found.counts.tolist()):
            # float16 rounds by 5e-4.
            torch.testing.assert_close(rows @ rows.T, torch.eye(len(rows)), atol=2e-3, rtol=0)


def test_storage_rounds_and_no_more() -> None:
    """An int8 step is 1/127 of a component's largest number; half of that, of some of them."""
    factors, text = made_up()
    expected = explicit(factors, text)
    for storage, bound in (("int8", 1e-4), ("float16", 2e-6)):
        found = of(decompose(factors, text, CAPTIONS, LAYERS, 0.0, storage))  # type: ignore[arg-type]
        assert lost(found, expected).max() <= bound


@pytest.mark.parametrize("chunk", [1, 10_000])
def test_chunks_and_company_change_nothing(chunk: int, monkeypatch) -> None:
    factors, text = made_up()
    together = of(decompose(factors, text, CAPTIONS, LAYERS, 1e-3, "float32"))
    monkeypatch.setattr(module, "CHUNK_NUMBERS", chunk)
    few = of(decompose(factors, text, CAPTIONS, LAYERS, 1e-3, "float32"))
    alone = of(decompose(factors[:, 3:4], text[3:4], [1], LAYERS, 1e-3, "float32"))
    for found, same in ((few, together), (alone, together[:, 2:3])):
        assert (found - same).abs().max() <= ROUNDING * same.abs().max()


def test_no_gradient_and_no_examples() -> None:
    factors, text = made_up()
    found = decompose(torch.zeros_like(factors), text, CAPTIONS, LAYERS, 1e-3, "int8")
    assert found.counts.tolist() == [1] * len(CAPTIONS) and not of(found).any()
    none = decompose(factors[:, :0], text[:0], [], LAYERS, 1e-3, "int8")
    assert len(none.counts) == 0 and none.factors.values.shape == (VIEWS, 0, 2, CHANNELS)


def test_small_gradients_do_not_underflow() -> None:
    factors, text = made_up()
    expected = explicit(factors * 1e-30, text)
    found = of(decompose(factors * 1e-30, text, CAPTIONS, LAYERS, 1e-3, "int8"))
    assert lost(found, expected).max() <= 2e-3


def assert_made_again(factors: Tensor, text: Tensor, found: Components) -> None:
    """Compares token factors of the first view, averaged over halves and captions."""
    rows = dequantise(found.factors, LAYERS)[0].mean(1)
    again = token_factors(rows, found.text[0], found.counts, text, CAPTIONS)
    shares = torch.tensor(CAPTIONS).repeat_interleave(torch.tensor(CAPTIONS))
    expected = factors[0].mean(1) / shares[:, None, None]
    assert (again - expected).abs().max() <= 1e-3 * expected.abs().max()


def test_token_factors_are_made_again() -> None:
    """Where tokens are independent they are what they were."""
    factors, text = made_up(fall=0.9)
    found = decompose(factors, text, CAPTIONS, LAYERS, 0.0, "float32")
    assert max(CAPTIONS) * TOKENS <= CHANNELS
    assert_made_again(factors, text, found)


def test_tokens_that_are_alike_get_alike_factors() -> None:
    """Padding: the network cannot tell equal states apart either."""
    factors, text = made_up()
    factors[..., 3:, :], text[:, 3:] = factors[..., 3:4, :], text[:, 3:4]
    found = decompose(factors, text, CAPTIONS, LAYERS, 0.0, "float32")
    assert found.counts.tolist() == [c * 4 for c in CAPTIONS]
    assert_made_again(factors, text, found)


def test_rectangles_hold_every_row_once() -> None:
    generator = np.random.default_rng(0)
    counts = torch.tensor(generator.integers(1, 14, 40))
    factors, text = made_up()
    some = decompose(factors, text, CAPTIONS, LAYERS, 0.0, "float32")
    components = Components(some.factors, some.text, counts)
    seen, rows = [], []
    for examples, places, real in components.groups(7):
        assert len(examples) <= 7 and places.shape == real.shape == (len(examples), places.shape[1])
        # No more than a fourth of the longest is in vain.
        assert (places.shape[1] - real.sum(1) <= 13 // 4).all()
        seen += examples.tolist()
        rows += places[real].tolist()
        owners = components.owners[places[real]]
        assert torch.equal(owners, examples.repeat_interleave(real.sum(1)))
    assert sorted(seen) == list(range(40)) and sorted(rows) == list(range(int(counts.sum())))
