from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.test_progress import on_terminal
from unsee.draws import stable_seed
from unsee.training.loop import (
    CHECKPOINT,
    BatchOrder,
    Optimization,
    seeded_weights,
    snapshot_path,
    train,
)

from ..reference.training import averaged_weights

FAST = Optimization(steps=30, batch_size=4, learning_rate=0.05, warmup=5, checkpoint_seconds=0)
INPUTS = torch.randn((11, 3), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
TARGETS = INPUTS @ torch.tensor([[1.0], [-2.0], [0.5]], dtype=torch.float64)


class Stopped(Exception):
    """Ends a run from inside its loss, as a crash would."""


def make_network(seed: int = 0) -> nn.Module:
    with seeded_weights(seed):
        return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)).double()


def noisy_loss(
    network: nn.Module, stop_at: int | None = None
) -> Callable[[Tensor, torch.Generator], Tensor]:
    calls = 0

    def loss_of(positions: Tensor, generator: torch.Generator) -> Tensor:
        nonlocal calls
        if calls == stop_at:
            raise Stopped
        calls += 1
        noise = torch.randn((len(positions), 3), generator=generator, dtype=torch.float64)
        error = network(INPUTS[positions] + 0.1 * noise) - TARGETS[positions]
        return error.square().mean()

    return loss_of


def run(
    directory: Path,
    optimization: Optimization = FAST,
    stop_at: int | None = None,
    description: dict | None = None,
) -> list[Tensor]:
    network = make_network(optimization.seed)
    order = BatchOrder(torch.arange(len(INPUTS)), optimization.batch_size, optimization.seed)
    loss_of = noisy_loss(network, stop_at)
    train(network, loss_of, order, optimization, directory, description or {"width": (8, 1)})
    return [p.detach().clone() for p in network.parameters()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# -- the settings ---------------------------------------------------------------------------


def test_learning_rate_rises_linearly_then_falls_as_a_cosine() -> None:
    factor = Optimization(steps=1000, warmup=100, final_fraction=0.02).learning_rate_factor
    assert [factor(s) for s in (0, 49, 99)] == [0.01, 0.5, 1.0]
    assert factor(100) == 1.0
    assert factor(550) == pytest.approx(0.51)  # half way: the mean of 1 and 0.02
    assert factor(325) == pytest.approx(0.02 + 0.98 * (1 + 2**-0.5) / 2)  # cos(45 degrees)
    # The last step is one before the end of the cosine, whose slope there is nearly flat.
    assert factor(999) == pytest.approx(0.02, abs=1e-5)
    assert Optimization(steps=10, warmup=0).learning_rate_factor(0) == 1.0


@pytest.mark.parametrize(
    "wrong", [{"steps": -1}, {"batch_size": 0}, {"learning_rate": 0.0}, {"ema_decay": 1.0}]
)
def test_settings_out_of_range_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Optimization(**{"steps": 10, **wrong})


# -- the order of examples ------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3, 7, 20])
def test_an_epoch_sees_each_kept_example_once(batch_size: int) -> None:
    keep = torch.tensor([2, 3, 5, 7, 11, 13, 17])
    order = BatchOrder(keep, batch_size, seed=0)
    seen = torch.cat([order.batch(step) for step in range(7 * 3)]).tolist()
    epochs = [tuple(seen[i : i + 7]) for i in range(0, len(seen), 7)]
    assert all(sorted(epoch) == keep.tolist() for epoch in epochs)
    assert len(set(epochs)) > 1  # shuffled anew


def test_a_batch_does_not_depend_on_what_was_asked_before() -> None:
    keep = torch.arange(10)
    forward = BatchOrder(keep, 4, seed=3)
    batches = [forward.batch(step) for step in range(12)]
    for step in (11, 0, 7, 2):
        assert torch.equal(BatchOrder(keep, 4, seed=3).batch(step), batches[step])
        assert torch.equal(forward.batch(step), batches[step])
    assert not torch.equal(BatchOrder(keep, 4, seed=4).batch(0), batches[0])


def test_an_order_needs_an_example() -> None:
    with pytest.raises(ValueError, match="leaves no example"):
        BatchOrder(torch.empty(0, dtype=torch.int64), 4, 0)


def test_initial_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    weights = [make_network(1)[0].weight, make_network(1)[0].weight, make_network(2)[0].weight]
    assert torch.equal(torch.rand(2), expected)  # the caller's random numbers go on as before
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


# -- training -------------------------------------------------------------------------------


def test_the_averaged_weights_are_those_of_the_written_out_loop(tmp_path: Path) -> None:
    optimization = dataclasses.replace(FAST, ema_decay=0.6, weight_decay=0.1, clip_norm=0.3)
    network = make_network()
    order = BatchOrder(torch.arange(len(INPUTS)), 4, 0)
    loss_of = noisy_loss(network)

    def loss_of_step(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(stable_seed(0, "step", step))
        return loss_of(order.batch(step), generator)

    expected = averaged_weights(list(network.parameters()), loss_of_step, optimization)
    found = run(tmp_path, optimization)
    for e, f in zip(expected, found, strict=True):
        # float64, the same sums in another order, over 30 steps
        torch.testing.assert_close(f, e, rtol=1e-9, atol=1e-12)


def test_equal_seeds_give_equal_weights(tmp_path: Path) -> None:
    first = run(tmp_path / "a")
    assert same(first, run(tmp_path / "b"))
    assert not same(first, run(tmp_path / "c", dataclasses.replace(FAST, seed=1)))


@pytest.mark.parametrize("stop_at", [1, 17, 29])
def test_an_interrupted_run_ends_with_the_same_weights(tmp_path: Path, stop_at: int) -> None:
    whole = run(tmp_path / "whole")
    with pytest.raises(Stopped):
        run(tmp_path / "cut", stop_at=stop_at)
    assert torch.load(tmp_path / "cut" / CHECKPOINT, weights_only=True)["step"] == stop_at
    assert same(whole, run(tmp_path / "cut", stop_at=30 - stop_at))  # the rest, and no step more


def test_snapshots_are_the_averaged_weights_on_the_way(tmp_path: Path) -> None:
    plain = run(tmp_path / "plain")
    asked = dataclasses.replace(FAST, snapshots=(10, 30))
    assert same(plain, run(tmp_path / "whole", asked))  # they change nothing
    with pytest.raises(Stopped):
        run(tmp_path / "cut", asked, stop_at=20)
    run(tmp_path / "cut", asked)
    kept = load_file(snapshot_path(tmp_path / "whole", 30))
    assert list(kept) == ["0.bias", "0.weight", "2.bias", "2.weight"]
    assert all(torch.equal(kept[n], p) for n, p in zip(
        ("0.weight", "0.bias", "2.weight", "2.bias"), plain, strict=True))  # fmt: skip
    early = load_file(snapshot_path(tmp_path / "whole", 10))
    assert not torch.equal(early["0.weight"], kept["0.weight"])
    for step in (10, 30):
        paths = (snapshot_path(tmp_path / name, step) for name in ("whole", "cut"))
        assert len({path.read_bytes() for path in paths}) == 1
    # What was passed without a snapshot cannot have one.
    with pytest.raises(ValueError, match="snapshot-000010"):
        run(tmp_path / "plain", asked)
    with pytest.raises(ValueError, match="no snapshot after step 31 of 30"):
        dataclasses.replace(FAST, snapshots=(31,))


def test_a_finished_run_is_not_repeated(tmp_path: Path) -> None:
    weights = run(tmp_path)
    assert same(weights, run(tmp_path, stop_at=0))


def test_checkpoints_keep_their_distance(tmp_path: Path) -> None:
    seldom = dataclasses.replace(FAST, checkpoint_seconds=1e9)
    with pytest.raises(Stopped):
        run(tmp_path, seldom, stop_at=29)
    assert not (tmp_path / CHECKPOINT).exists()
    run(tmp_path, seldom)
    assert [p.name for p in tmp_path.iterdir()] == [CHECKPOINT]


def test_only_the_given_parameters_move(tmp_path: Path) -> None:
    network, before = make_network(), make_network()
    order = BatchOrder(torch.arange(len(INPUTS)), 4, 0)
    train(network, noisy_loss(network), order, FAST, tmp_path, {}, list(network[2].parameters()))
    assert torch.equal(network[0].weight, before[0].weight)
    assert not torch.equal(network[2].weight, before[2].weight)
    assert not network.training


# -- what is refused ------------------------------------------------------------------------


def test_other_settings_are_refused_with_both_values(tmp_path: Path) -> None:
    run(tmp_path)
    with pytest.raises(
        ValueError, match=r"made with learning_rate = 0\.05; .* learning_rate = 0\.1:"
    ):
        run(tmp_path, dataclasses.replace(FAST, learning_rate=0.1))
    with pytest.raises(
        ValueError, match=r"with seed = 0, width = \(8, 1\); .* seed = 1, width = 9:"
    ):
        run(tmp_path, dataclasses.replace(FAST, seed=1), description={"width": 9})
    with pytest.raises(ValueError, match=r"width = \(8, 1\); this run has width = None"):
        run(tmp_path, description={"other": None})


def test_settings_from_json_equal_those_of_python(tmp_path: Path) -> None:
    run(tmp_path)
    assert torch.load(tmp_path / CHECKPOINT, weights_only=True)["settings"]["width"] == (8, 1)
    run(tmp_path, stop_at=0, description={"width": [8, 1]})


def test_how_often_to_save_may_change(tmp_path: Path) -> None:
    run(tmp_path)
    run(tmp_path, dataclasses.replace(FAST, checkpoint_seconds=60), stop_at=0)


def test_a_setting_the_checkpoint_does_not_know_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(tmp_path)
    with caplog.at_level(logging.WARNING):
        run(tmp_path, stop_at=0, description={"width": (8, 1), "colours": 3})
    assert "does not say colours: taken as 3" in caplog.text


@pytest.mark.parametrize("part", [0.0, 0.3, 0.9, 0.999])
def test_a_checkpoint_cut_short_is_named(tmp_path: Path, part: float) -> None:
    run(tmp_path)
    path = tmp_path / CHECKPOINT
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * part)])
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))} cannot be read.*delete it"):
        run(tmp_path)


def test_other_files_are_no_checkpoints(tmp_path: Path) -> None:
    (tmp_path / CHECKPOINT).write_text("hello")
    with pytest.raises(ValueError, match="cannot be read"):
        run(tmp_path)
    torch.save({"settings": {}, "step": 3}, tmp_path / CHECKPOINT)
    with pytest.raises(ValueError, match="has no 'ema'"):
        run(tmp_path)


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_named_and_not_taken(tmp_path: Path, broken: str) -> None:
    network = make_network()
    healthy = noisy_loss(network)
    calls = 0

    def loss_of(positions: Tensor, generator: torch.Generator) -> Tensor:
        nonlocal calls
        calls += 1
        loss = healthy(positions, generator)
        if calls <= 7:
            return loss
        # The square root of zero is finite; its gradient is not.
        return loss * float("nan") if broken == "loss" else loss + (loss - loss.detach()).sqrt()

    order = BatchOrder(torch.arange(len(INPUTS)), 4, 0)
    with pytest.raises(ValueError, match=r"(nan|inf).* at step 7 of .*learning rate"):
        train(network, loss_of, order, FAST, tmp_path, {"width": (8, 1)})
    assert not network.training
    # What was computed before is kept, and good.
    assert same(run(tmp_path), run(tmp_path.parent / f"{tmp_path.name}-whole"))


def test_there_must_be_something_to_train(tmp_path: Path) -> None:
    network = make_network().requires_grad_(False)
    order = BatchOrder(torch.arange(3), 2, 0)
    with pytest.raises(ValueError, match="no parameter to train"):
        train(network, noisy_loss(network), order, FAST, tmp_path, {})
    with pytest.raises(ValueError, match=r"float16.*float32"):
        train(make_network().half(), noisy_loss(network), order, FAST, tmp_path, {})


# -- the progress bar -----------------------------------------------------------------------


def test_a_terminal_gets_a_bar_with_an_estimate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = on_terminal(monkeypatch, lambda: run(tmp_path / "emoji"))
    assert "emoji: 100%" in shown
    assert re.search(r"30/30 \[\d\d:\d\d<\d\d:\d\d, .*step/s", shown)  # elapsed < remaining, speed


def test_a_log_file_gets_no_bar(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path)
    captured = capsys.readouterr()
    assert captured.err == ""
    assert captured.out == ""
