from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr

from tests.methods.conftest import Setting
from unsee.data.latents import EncodedDataset
from unsee.draws import Draws
from unsee.methods.example_gradients import Measure, QueryExamples, example_gradients
from unsee.methods.influence import Influence, influence_scores, second_order_scores
from unsee.methods.trak import trak_kernel, trak_scores
from unsee.query import Query

DRAWS = Draws(seed=3, n=6)
# Rows are stored in float32, whose relative rounding is 6e-8; sums of a few such rows.
FLOAT32 = 1e-5


def slow_gradient(setting: Setting, row: int, measure: str) -> torch.Tensor:
    """The mean over captions and draws of one number after another, each differentiated alone."""
    model, data = setting.model, setting.data
    parts = []
    with model.gradients_on():
        for caption in range(data.caption_counts[row]):
            latents, text = data.latents([row]), data.text([row], caption)
            timesteps, noise = DRAWS.of(data.ids[row], tuple(latents.shape[1:]), caption)
            for t, e in zip(timesteps, noise, strict=True):
                if measure == "loss":
                    value = model.loss(latents, text, t[None, None], e[None, None])
                else:
                    value = model.predict(latents, text, t[None, None], e[None, None])[0].square()
                got = torch.autograd.grad(value.mean(), list(model.parameters.values()))
                parts.append(torch.cat([g.flatten() for g in got]))
    return torch.stack(parts).mean(0)


@pytest.mark.parametrize("measure", ["loss", "output_norm"])
def test_rows_are_means_of_single_gradients(double: Setting, measure: str) -> None:
    some = double.data.select(double.data.ids[:3])
    got = example_gradients(double.model, some, DRAWS, measure=measure)  # type: ignore[arg-type]
    for row in range(3):
        expected = slow_gradient(double, row, measure)
        error = np.abs(got.shards[0][row] - expected.numpy()).max()
        assert error <= FLOAT32 * float(expected.abs().max())


def test_parameters_are_where_the_names_say(double: Setting) -> None:
    some = double.data.select(double.data.ids[:2])
    got = example_gradients(double.model, some, DRAWS)
    name = got.names[1]
    assert got.of(name).shape == (2, *double.model.parameters[name].shape)
    assert torch.equal(got.only([name]).of(name), got.of(name))
    with pytest.raises(ValueError, match="none of 'absent'"):
        got.only(["absent"])


def test_batches_shards_and_resumption_change_nothing(double: Setting, tmp_path: Path) -> None:
    some = double.data.select(double.data.ids[:5])
    plain = np.concatenate(example_gradients(double.model, some, DRAWS).shards)
    small = example_gradients(double.model, some, DRAWS, batch_size=2, shard_size=2)
    assert np.abs(np.concatenate(small.shards) - plain).max() <= FLOAT32 * np.abs(plain).max()
    kept = example_gradients(double.model, some, DRAWS, shard_size=2, cache=tmp_path)
    files = sorted(tmp_path.rglob("*.npy"))
    assert len(files) == 3
    files[1].unlink()
    resumed = example_gradients(double.model, some, DRAWS, shard_size=2, cache=tmp_path)
    for a, b in zip(kept.shards, resumed.shards, strict=True):
        assert np.array_equal(a, b)
    other = example_gradients(double.model, some, Draws(seed=4, n=6), cache=tmp_path)
    assert not np.array_equal(np.concatenate(other.shards), plain)


def test_gauss_newton_rows_have_its_second_moment(double: Setting) -> None:
    """Over many independent functionals, the mean square of one column is that of (2/d)·JᵀJ."""
    model, data = double.model, double.data
    one = data.select(data.ids[:1])
    latents, text = one.latents([0]), one.text([0], 0)
    squares, expected = [], []
    name = list(model.parameters)[-1]
    for seed in range(40):
        draws = Draws(seed=seed, n=2)
        row = example_gradients(model, one, draws, measure="gauss_newton")
        squares.append(float(row.of(name).double().square().sum()))
        if seed < 4:  # the Jacobian hardly depends on the noise, and is slow
            timesteps, noise = draws.of(one.ids[0], tuple(latents.shape[1:]))
            with model.gradients_on():
                out = model.predict(latents, text, timesteps[None], noise[None])[0].flatten(2)
                for d in range(2):
                    total = 0.0
                    for element in out[0, d][::8]:
                        (g,) = torch.autograd.grad(
                            element, [model.parameters[name]], retain_graph=True
                        )
                        total += float(g.square().sum())
                    expected.append(2 * total * 8 / out.shape[2])
    # The functional is keyed by the example: only draws vary here, and every 8th element is
    # looked at. A half covers both; a factor of D = 2 would be outside.
    assert np.mean(squares) == pytest.approx(np.mean(expected), rel=0.5)


def test_small_unlearning_steps_are_influence(double: Setting, query: Query) -> None:
    """AbU's score is, to first order, the influence with the same curvature."""
    draws, query_draws = Draws(n=4), Draws(seed=1, n=10)
    method = double.abu(draws=draws, query_draws=query_draws, rise=1e-5)
    unlearned = method.attribute(query).values
    gradients = example_gradients(double.model, double.data, draws)
    influence = Influence(double.model, gradients, double.fisher, 0.1, query_draws)
    first_order = influence.attribute(query).values
    # What is left is of second order in a step of 1e-5 of the loss, and float32 storage.
    assert pearsonr(unlearned, first_order).statistic > 0.99999


@pytest.mark.parametrize("measure", ["loss", "output_norm"])
def test_a_box_is_asked_about_alone(double: Setting, query: Query, measure: Measure) -> None:
    mask = torch.zeros(8, 8)
    mask[2:5, :4] = 1
    boxed, draws = dataclasses.replace(query, mask=mask), Draws(seed=1, n=2)
    (row,) = example_gradients(double.model, QueryExamples([boxed]), draws, measure=measure).shards
    timesteps, noise = draws.of(query.id, tuple(query.latents.shape))
    with double.model.gradients_on():
        outputs, target = double.model.predict(
            query.latents[None], query.text[None], timesteps[None], noise[None]
        )
        error = outputs - target if measure == "loss" else outputs
        got = torch.autograd.grad(
            error[..., 2:5, :4].square().mean(), list(double.model.parameters.values())
        )
    expected = torch.cat([g.flatten() for g in got]).numpy()
    # rows are kept in float32
    assert row[0] == pytest.approx(expected, rel=1e-5, abs=1e-7)


def test_candidates_are_scored_alike(double: Setting, query: Query) -> None:
    gradients = example_gradients(double.model, double.data, DRAWS)
    influence = Influence(double.model, gradients, None, query_draws=Draws(seed=1, n=8))
    everything = influence.attribute(query)
    few = influence.attribute(query, candidates=["picture-3", "picture-1"])
    assert few.ids == ["picture-3", "picture-1"]
    assert few.values.tolist() == everything.values[[3, 1]].tolist()
    with pytest.raises(ValueError, match="candidate 'nobody' has no stored gradient"):
        influence.attribute(query, candidates=["nobody"])


def test_trak_is_ridge_regression_on_gradients(double: Setting, query: Query) -> None:
    gradients = example_gradients(double.model, double.data, DRAWS)
    asked = example_gradients(double.model, QueryExamples([query]), Draws(seed=1, n=8))
    trained = np.arange(len(gradients)) % 4 != 0
    phi = np.concatenate(gradients.shards).astype(np.float64)
    query_row = asked.shards[0].astype(np.float64)
    inside = phi[trained]
    ridge = 0.1 * np.square(inside).sum(1).mean()
    inverse = np.linalg.inv(inside.T @ inside + ridge * np.eye(phi.shape[1]))
    expected = phi @ inverse @ query_row.T
    got = trak_scores(trak_kernel(gradients), gradients.products(asked), 0.1, trained)
    # Inner products are taken in float32.
    assert np.abs(got - expected).max() <= 1e-4 * np.abs(expected).max()


def test_trak_is_that_of_its_authors() -> None:
    """Their package works with whole rows and divides by a scale of its own; ours with inner
    products. Both are float32."""
    computers = pytest.importorskip("trak.score_computers")
    generator = torch.Generator().manual_seed(0)
    phi, asked = (torch.randn(n, 12, generator=generator) for n in (30, 4))
    ridge = float(phi.square().sum(1).mean())
    theirs = computers.BasicScoreComputer(torch.float32, torch.device("cpu"), lambda_reg=ridge)
    expected = torch.zeros(30, 4)
    theirs.get_scores(theirs.get_x_xtx_inv(phi, theirs.get_xtx(phi)), asked, expected)
    got = trak_scores((phi @ phi.T).double().numpy(), (phi @ asked.T).double().numpy(), 1.0)
    scale = float((expected.numpy() * got).sum() / np.square(got).sum())
    assert scale > 0
    np.testing.assert_allclose(scale * got, expected, rtol=1e-3, atol=1e-4 * expected.max())


def test_trak_refuses_what_it_cannot_use() -> None:
    with pytest.raises(ValueError, match="ridge = 0 must be positive"):
        trak_scores(np.eye(3), np.ones((3, 1)), 0)
    with pytest.raises(ValueError, match=r"kernel \(2, 2\) for 3 examples"):
        trak_scores(np.eye(2), np.ones((3, 1)), 1)


@pytest.mark.parametrize("normalise", ["gradient", "parameters", "loss"])
def test_normalised_scores_do_not_know_the_gradient_length(
    double: Setting, query: Query, normalise
) -> None:
    gradients = example_gradients(double.model, double.data, DRAWS)
    asked = example_gradients(double.model, QueryExamples([query]), Draws(seed=1, n=8))
    plain = influence_scores(gradients, asked, double.fisher)
    got = influence_scores(gradients, asked, double.fisher, normalise=normalise)
    lengths = []
    for row in range(len(gradients)):
        g = {n: gradients.of(n)[row].double() for n in gradients.names}
        h = double.fisher.precondition(g, 0.1)
        a, b = {"gradient": (g, g), "parameters": (h, h), "loss": (g, h)}[normalise]
        lengths.append(sum(float((a[n] * b[n]).sum()) for n in g) ** 0.5)
    assert np.allclose(got, plain / np.array(lengths)[:, None], rtol=FLOAT32)
    with_one_doubled = dataclasses.replace(
        gradients, shards=[s * np.where(np.arange(len(s)) == 2, 5, 1)[:, None].astype(np.float32)
                           for s in gradients.shards]
    )  # fmt: skip
    same = influence_scores(with_one_doubled, asked, double.fisher, normalise=normalise)
    assert np.allclose(same, got, rtol=FLOAT32)


def test_the_second_order_term_is_how_far_predictions_move(double: Setting, query: Query) -> None:
    """Over many functionals, the mean is ‖Jδ‖²/d, which a small step measures."""
    model, data, draws, size = double.model, double.data, Draws(n=2), 1e-4
    # The functional is keyed by the example: one picture under many names.
    names = [f"copy-{i}" for i in range(200)]
    latents = data.latents([0]).expand(len(names), -1, -1, -1).contiguous()
    copies = EncodedDataset(names, latents, data.text([0], 0), [[0]] * len(names))
    asked = example_gradients(model, QueryExamples([query]), Draws(seed=1, n=8))
    functionals = example_gradients(model, copies, draws, measure="gauss_newton")
    estimates = second_order_scores(functionals, asked, None)[:, 0]
    moved = {n: p.detach() + size * asked.of(n)[0] for n, p in model.parameters.items()}
    truths = []
    for name in names[:20]:  # hardly depends on the draws
        t, e = draws.of(name, tuple(latents.shape[1:]))
        batch = latents[:1], copies.text([0], 0), t[None], e[None]
        with torch.no_grad():
            old, _ = model.predict(*batch)
            with model.replaced(moved):
                new, _ = model.predict(*batch)
        truths.append(float(((new - old) / size).square().mean()))
    # 200 independent functionals leave a relative error of (2/200)^½ = 0.1.
    assert estimates.mean() == pytest.approx(np.mean(truths), rel=0.35)
