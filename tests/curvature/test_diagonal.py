from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tests.reference.gradients import row_gradients
from unsee.curvature.diagonal import DiagonalFisher

ROWS = 11


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 2)).double()


@pytest.fixture
def batch() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(ROWS, 3).double()


def losses(net: nn.Module, batch: torch.Tensor, size: int):
    """One function for each batch of `size` rows, the last one smaller."""
    return [lambda rows=rows: net(rows).square().mean(1) for rows in batch.split(size)]


def fit(net: nn.Module, batch: torch.Tensor, size: int = 4) -> DiagonalFisher:
    return DiagonalFisher.fit(net, dict(net.named_parameters()), losses(net, batch, size), {"a": 1})


def test_it_is_the_mean_squared_gradient(net, batch):
    fisher = fit(net, batch)
    per_row = row_gradients(lambda: net(batch).square().mean(1), dict(net.named_parameters()))
    assert fisher.count == ROWS and fisher.settings == {"a": 1}
    for name, gradients in per_row.items():
        # float64: two orders of summation of eleven terms
        torch.testing.assert_close(
            fisher.values[name], gradients.square().mean(0), rtol=1e-12, atol=1e-18
        )


@pytest.mark.parametrize("size", [1, 3, 5, 11, 100])
def test_batches_of_unequal_size_weigh_by_their_rows(net, batch, size):
    whole, parts = fit(net, batch, ROWS), fit(net, batch, size)
    assert parts.count == ROWS
    for name in whole.values:
        torch.testing.assert_close(parts.values[name], whole.values[name], rtol=1e-12, atol=1e-18)


def test_nothing_to_fit_on_is_an_error(net):
    with pytest.raises(ValueError, match="no example"):
        DiagonalFisher.fit(net, dict(net.named_parameters()), [])


def test_a_gradient_that_is_not_finite_is_named(net, batch):
    batch[2, 0] = torch.inf
    with pytest.raises(ValueError, match=r"squared gradient of 0\.weight is not finite"):
        fit(net, batch)


def test_save_and_load_keep_every_bit(net, batch, tmp_path: Path):
    fisher, path = fit(net, batch), tmp_path / "deep" / "fisher.safetensors"
    fisher.save(path)
    loaded = DiagonalFisher.load(path)
    assert loaded.count == fisher.count and loaded.settings == fisher.settings
    assert loaded.values.keys() == fisher.values.keys()
    for name, value in fisher.values.items():
        assert loaded.values[name].dtype == torch.float64
        assert torch.equal(loaded.values[name], value)
    assert [p.name for p in path.parent.iterdir()] == ["fisher.safetensors"]


@pytest.mark.parametrize("length", [0, 5, 100, -1])
def test_a_file_that_was_cut_short_is_named(net, batch, tmp_path: Path, length):
    path = tmp_path / "fisher.safetensors"
    fit(net, batch).save(path)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ValueError, match=r"fisher\.safetensors.* is damaged .* fit again"):
        DiagonalFisher.load(path)


@pytest.mark.parametrize("about", [None, {"unsee": "{"}, {"unsee": "{}"}, {"other": "x"}])
def test_another_safetensors_file_is_refused(tmp_path: Path, about):
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.zeros(2)}, path, metadata=about)
    with pytest.raises(ValueError, match=r"model\.safetensors.* another kind"):
        DiagonalFisher.load(path)


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match=r"nothing\.safetensors': no such file"):
        DiagonalFisher.load(tmp_path / "nothing.safetensors")


def test_preconditioning_divides_by_the_damped_fisher():
    fisher = DiagonalFisher({"w": torch.tensor([1.0, 3.0]).double()}, 1)
    gradient = {"w": torch.tensor([2.0, -6.0]).double()}
    assert torch.equal(fisher.precondition(gradient, 0)["w"], torch.tensor([2.0, -2.0]).double())
    # mean Fisher 2, damping 0.5: [1, 3] + 1
    assert torch.equal(fisher.precondition(gradient, 0.5)["w"], torch.tensor([1.0, -1.5]).double())


def test_damping_is_relative_to_each_parameter():
    """A model whose loss is scaled by c has a Fisher scaled by c squared, layer by layer."""
    small = DiagonalFisher({"w": torch.tensor([1.0, 3.0]).double()}, 1)
    large = DiagonalFisher({"w": torch.tensor([100.0, 300.0]).double()}, 1)
    gradient = {"w": torch.tensor([2.0, -6.0]).double()}
    ratio = small.precondition(gradient, 0.1)["w"] / large.precondition(gradient, 0.1)["w"]
    # one division and one sum in float64
    torch.testing.assert_close(ratio, torch.full((2,), 100.0).double(), rtol=1e-14, atol=0)


def test_undamped_weights_without_curvature_stay():
    fisher = DiagonalFisher({"w": torch.tensor([0.0, 2.0, 0.0]).double()}, 1)
    step = fisher.precondition({"w": torch.tensor([5.0, 4.0, 0.0]).double()}, damping=0)["w"]
    assert step.tolist() == [0.0, 2.0, 0.0]


def test_a_parameter_without_any_curvature_stays():
    fisher = DiagonalFisher({"w": torch.zeros(3).double()}, 1)
    step = fisher.precondition({"w": torch.ones(3).double()}, damping=0.1)["w"]
    assert step.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("damping", [-0.1, float("nan")])
def test_negative_damping_is_refused(damping):
    fisher = DiagonalFisher({"w": torch.ones(1).double()}, 1)
    with pytest.raises(ValueError, match=f"damping = {damping} must not be negative"):
        fisher.precondition({"w": torch.ones(1).double()}, damping)


def test_another_selection_or_model_is_refused():
    fisher = DiagonalFisher({"w": torch.ones(3).double()}, 1)
    with pytest.raises(ValueError, match="fitted without v"):
        fisher.precondition({"v": torch.ones(3).double()})
    with pytest.raises(ValueError, match=r"w is \(3,\) in the Fisher but \(1,\) in the model"):
        fisher.precondition({"w": torch.ones(1).double()})
