from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.reference import gradients as reference
from unsee.gradients import mean_gradient, per_example_gradients, squared_gradients

ROWS = 5


class Net(nn.Module):
    """One of everything that a denoiser may hold; rows are independent."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 4)  # no token axis
        self.tokens = nn.Linear(4, 6, bias=False)  # [R, tokens, features]
        self.grid = nn.Linear(6, 4)  # [R, h, w, features]
        self.twice = nn.Linear(4, 4)  # called twice
        self.unused = nn.Linear(4, 4)
        self.dropped = nn.Linear(4, 4)  # called, but nothing depends on it
        self.norm = nn.LayerNorm(4)
        self.conv = nn.Conv2d(4, 2, 2)
        self.scale = nn.Parameter(torch.randn(2))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        state = self.embed(x)[:, None] + y  # [R, 4 tokens, 4]
        state = self.tokens(state.tanh())
        state = self.grid(state.unflatten(1, (2, 2)))
        state = self.twice(self.twice(state).sin())
        self.dropped(state)
        image = self.conv(self.norm(state).permute(0, 3, 1, 2)).flatten(1)  # [R, 2]
        return (image * self.scale).square().mean(1)


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().double()


@pytest.fixture
def loss(net: Net) -> Callable[[], Tensor]:
    torch.manual_seed(1)
    x, y = torch.randn(ROWS, 3).double(), torch.randn(ROWS, 4, 4).double()
    return lambda: net(x, y)


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 1e-10):
    """In float64, other summation orders of a few dozen terms differ by some 1e-15 relative."""
    assert list(found) == list(expected)
    for name in expected:
        assert found[name].dtype == torch.float64 and found[name].shape == expected[name].shape
        torch.testing.assert_close(found[name], expected[name], rtol=rtol, atol=1e-14, msg=name)


@pytest.mark.parametrize("chunk", [1, 2, 3, 16])
def test_all_parameters_at_once(net, loss, chunk):
    parameters = dict(net.named_parameters())
    found = squared_gradients(net, parameters, loss, chunk=chunk)
    assert_equal(found, reference.squared_gradients(loss, parameters))
    assert not found["unused.weight"].any() and not found["dropped.bias"].any()
    assert found["conv.weight"].all() and found["twice.bias"].all()


@pytest.mark.parametrize(
    "names",
    [
        ["embed.weight"],
        ["embed.bias"],
        ["tokens.weight"],
        ["grid.weight", "grid.bias"],
        ["twice.weight", "twice.bias"],
        ["conv.weight", "conv.bias"],  # no Linear at all
        ["scale"],  # a parameter of the network itself
        ["unused.weight"],
        ["scale", "twice.weight", "norm.weight", "embed.bias"],  # the order is kept
    ],
)
def test_any_selection(net, loss, names):
    parameters = {name: net.get_parameter(name) for name in names}
    found = squared_gradients(net, parameters, loss)
    assert_equal(found, reference.squared_gradients(loss, parameters))


def test_only_the_selected_parameters_need_gradients(net, loss):
    net.requires_grad_(False)
    net.twice.weight.requires_grad_(True)
    parameters = {"twice.weight": net.twice.weight}
    found = squared_gradients(net, parameters, loss)
    assert_equal(found, reference.squared_gradients(loss, parameters))


class Attention(nn.Module):
    """The attention uses the weight of its last layer without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(3, 1, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x[:, None], x[:, None], x[:, None])[0]


def tied() -> nn.Module:
    net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    net[2].weight = net[0].weight
    return net


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(nn.Linear(3, 4), nn.LeakyReLU(inplace=True), nn.Linear(4, 2)),
        lambda: nn.Sequential(nn.Unflatten(1, (1, 3)), nn.Linear(3, 4), nn.LeakyReLU(inplace=True)),
        Attention,
        tied,
    ],
)
def test_what_hooks_do_not_see_is_exact(make):
    """Outputs changed in place, weights used without a call or by two modules."""
    torch.manual_seed(0)
    net = make().double()
    x = torch.randn(ROWS, 3).double()
    parameters = dict(net.named_parameters())

    def loss() -> Tensor:
        return net(x).flatten(1).square().mean(1)

    expected = reference.row_gradients(loss, parameters)
    assert_equal(per_example_gradients(net, parameters, loss), expected)
    squares = reference.squared_gradients(loss, parameters)
    assert_equal(squared_gradients(net, parameters, loss), squares)


def test_the_square_of_a_row_is_not_the_square_of_the_sum(net, loss):
    parameters = {"tokens.weight": net.tokens.weight}
    per_row = reference.row_gradients(loss, parameters)["tokens.weight"]
    found = squared_gradients(net, parameters, loss)["tokens.weight"]
    assert not torch.allclose(found, per_row.sum(0).square())


def test_float32_is_squared_and_summed_in_float64():
    """Squares of 1e-25 underflow in float32."""
    net = nn.Linear(2, 1, bias=False)
    x = torch.full((3, 2), 1e-25)
    found = squared_gradients(net, {"weight": net.weight}, lambda: net(x)[:, 0])
    expected = torch.full((1, 2), 3e-50, dtype=torch.float64)
    # 1e-25 itself is rounded to 7 digits in float32
    torch.testing.assert_close(found["weight"], expected, atol=0, rtol=1e-6)


def test_no_trace_is_left(net, loss):
    before = loss().detach()
    squared_gradients(net, dict(net.named_parameters()), loss)
    assert all(not m._forward_hooks and not m._backward_hooks for m in net.modules())
    assert all(p.grad is None for p in net.parameters())
    assert torch.equal(loss().detach(), before)


def test_hooks_are_removed_when_the_loss_fails(net):
    def broken() -> Tensor:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        squared_gradients(net, dict(net.named_parameters()), broken)
    assert all(not m._forward_hooks for m in net.modules())


def test_a_module_that_does_not_see_rows_is_refused():
    """Its rows would be squared after having been added up: a wrong number without a word."""
    net = nn.Linear(2, 1)
    x = torch.randn(6, 2)
    with pytest.raises(ValueError, match=r"3 losses, but .* 6 rows"):
        squared_gradients(
            net, {"weight": net.weight}, lambda: net(x).unflatten(0, (3, 2)).sum((1, 2))
        )


def test_mean_gradient(net, loss):
    parameters = dict(net.named_parameters())
    found = mean_gradient(loss(), parameters)
    expected = {n: g.mean(0) for n, g in reference.row_gradients(loss, parameters).items()}
    assert_equal(found, expected)
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("chunk", [1, 2, 16])
@pytest.mark.parametrize(
    "names",
    [
        None,
        ["tokens.weight"],  # no slow parameter: the graph may be freed
        ["scale", "twice.weight", "norm.weight", "embed.bias"],
        ["conv.weight"],
    ],
)
def test_gradients_of_single_losses(net, loss, names, chunk):
    parameters = {n: p for n, p in net.named_parameters() if names is None or n in names}
    found = per_example_gradients(net, parameters, loss, chunk=chunk)
    assert_equal(found, reference.row_gradients(loss, parameters))
    assert all(not m._forward_hooks for m in net.modules())
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("chunk", [1, 2, 16])
def test_gradients_of_examples_averaged_over_draws(net, chunk):
    """Three examples on two draws each, the second input being the same for both."""
    torch.manual_seed(2)
    x, y = torch.randn(6, 3).double(), torch.randn(3, 4, 4).double().repeat_interleave(2, 0)
    parameters = dict(net.named_parameters())

    def loss() -> Tensor:
        return net(x, y).unflatten(0, (3, 2))

    found = per_example_gradients(net, parameters, loss, "averaged", chunk)
    assert_equal(found, reference.row_gradients(lambda: loss().mean(1), parameters))
    single = per_example_gradients(net, parameters, loss, chunk=chunk)
    assert_equal({n: g.unflatten(0, (3, 2)).mean(1) for n, g in single.items()}, found)


@pytest.mark.parametrize("chunk", [1, 2, 16])
def test_a_row_may_serve_all_draws_of_an_example(chunk):
    """As keys and values of one text do."""
    torch.manual_seed(0)
    text, image = nn.Linear(3, 4).double(), nn.Linear(2, 4).double()
    net = nn.ModuleDict({"text": text, "image": image})
    x, y = torch.randn(3, 5, 3).double(), torch.randn(6, 5, 2).double()
    parameters = dict(net.named_parameters())

    def loss() -> Tensor:
        states = image(y).unflatten(0, (3, 2)) * text(x)[:, None]  # [B, D, T, 4]
        return states.square().mean((2, 3))

    found = per_example_gradients(net, parameters, loss, "averaged", chunk)
    assert_equal(found, reference.row_gradients(lambda: loss().mean(1), parameters))
    with pytest.raises(ValueError, match=r"6 losses, but text was called on 3 rows"):
        per_example_gradients(net, parameters, loss)


def test_gradients_have_the_dtype_of_their_parameters():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    x = torch.randn(2, 3)
    found = per_example_gradients(net, dict(net.named_parameters()), lambda: net(x).sum(1))
    assert {g.dtype for g in found.values()} == {torch.float32}


def test_losses_without_draws_have_no_average(net, loss):
    with pytest.raises(ValueError, match=r"averaged gradients: the losses are \(5,\), .*\[B, D\]"):
        per_example_gradients(net, dict(net.named_parameters()), loss, "averaged")


def test_averages_of_losses_do_not_hide_the_draws(net):
    """Losses that were averaged before: the modules saw more rows than there are losses."""
    x, y = torch.randn(6, 3).double(), torch.randn(6, 4, 4).double()
    with pytest.raises(ValueError, match=r"3 losses, but .* 6 rows"):
        per_example_gradients(
            net, dict(net.named_parameters()), lambda: net(x, y).unflatten(0, (3, 2)).mean(1)
        )


@pytest.mark.skipif(not torch.mps.is_available(), reason="needs Apple's mps, which has no float64")
def test_a_device_without_float64_gives_the_gradients_of_the_cpu():
    def gradients(device: str) -> list[Tensor]:
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
        rows = torch.randn(ROWS, 3)
        chosen = dict(network.to(device).named_parameters())

        def loss() -> Tensor:
            return network(rows.to(device)).pow(3).mean(1)

        mean, squared = mean_gradient(loss(), chosen), squared_gradients(network, chosen, loss)
        return [*mean.values(), *squared.values()]

    for found, expected in zip(gradients("mps"), gradients("cpu"), strict=True):
        assert found.dtype == torch.float64
        # float32 on both sides, summed in another order
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-6)
