from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from tests.methods.conftest import Setting
from tests.reference import mucs as reference
from unsee.draws import Draws
from unsee.methods.mucs import MUCS, SharedDraws
from unsee.methods.unlearning import query_loss
from unsee.models.unet import UNetDenoiser
from unsee.query import Query

RATE, DRAWS = 1e-2, SharedDraws(seed=4, n=3, first=200)


def method(setting: Setting, **options: Any) -> MUCS:
    defaults: dict[str, Any] = {"batch_size": 4, "max_steps": 3, "draws": DRAWS}
    return MUCS(setting.model, setting.data, RATE, **{**defaults, **options})


def test_scores_are_those_of_the_slow_reference(
    double: Setting, query: Query, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, retain = double.model, double.data.select(double.data.ids[2:])
    mucs = method(double, retain=retain, stop=1.0)
    # An untrained network is at its bound from the start: one that half of the draws exceed.
    monkeypatch.setattr(MUCS, "bound", lambda self, q: query_loss(model, q, self.query_draws))
    assert len(mucs.unlearn(query).step_sizes) == 3
    got = mucs.attribute(query)
    after = reference.unlearned(
        model.network, model.schedule, list(model.parameters), query, retain,
        mucs.bound(query), 3, 4, RATE,
    )  # fmt: skip
    for name, value in mucs.unlearn(query).weights.items():
        # float64, but AdamW divides by the root of small squares
        torch.testing.assert_close(value, after.get_parameter(name).detach(), rtol=1e-6, atol=1e-9)
    timesteps, noise = DRAWS.of("any", tuple(query.latents.shape))
    expected = reference.skew(model.network, after, model.schedule, double.data, timesteps, noise)
    assert got.values == pytest.approx(np.array(expected), rel=1e-5, abs=1e-9)
    assert got.ids == double.data.ids


def test_the_model_is_left_as_it_is(double: Setting, query: Query) -> None:
    before = {n: p.clone() for n, p in double.model.network.state_dict().items()}
    required = [p.requires_grad for p in double.model.network.parameters()]
    method(double).attribute(query)
    assert all(torch.equal(p, before[n]) for n, p in double.model.network.state_dict().items())
    assert [p.requires_grad for p in double.model.network.parameters()] == required
    assert all(p.grad is None for p in double.model.network.parameters())


def test_forgetting_stops_at_the_bound(double: Setting, query: Query) -> None:
    """The loss of a network that says nothing; an untrained one is there already."""
    mucs = method(double)
    timesteps, noise = mucs.query_draws.of(query.id, tuple(query.latents.shape))
    _, target = double.model.predict(
        query.latents[None], query.text[None], timesteps[None], noise[None]
    )
    assert mucs.bound(query) == pytest.approx(float(target.square().mean()), rel=1e-6)
    unlearned = mucs.unlearn(query)
    assert unlearned.step_sizes == []
    assert unlearned.loss_before == unlearned.loss_after >= mucs.stop * mucs.bound(query)
    with pytest.raises(ValueError, match="stop = 0"):
        method(double, stop=0)


def test_a_box_has_a_bound_of_its_own(double: Setting, query: Query) -> None:
    mucs, mask = method(double), torch.zeros(8, 8)
    mask[:3, 2:] = 1
    timesteps, noise = mucs.query_draws.of(query.id, tuple(query.latents.shape))
    _, target = double.model.predict(
        query.latents[None], query.text[None], timesteps[None], noise[None]
    )
    boxed = dataclasses.replace(query, mask=mask)
    assert mucs.bound(boxed) == pytest.approx(float(target[..., :3, 2:].square().mean()))


def test_a_short_schedule_is_drawn_from_alone(double: Setting, query: Query) -> None:
    mucs = method(double)
    scheduler = DDPMScheduler(num_train_timesteps=50)
    short = UNetDenoiser(double.model.network, scheduler, "cross-attn-kv")
    few = SharedDraws(seed=4, n=3, num_train_timesteps=50)
    drawn = dataclasses.replace(
        mucs, model=short, draws=few, query_draws=Draws(1, 4, num_train_timesteps=50)
    )
    assert np.isfinite(drawn.attribute(query).values).all()


def test_candidates_batches_and_resumption_change_nothing(
    double: Setting, query: Query, tmp_path: Path
) -> None:
    whole = method(double, cache=tmp_path).attribute(query)
    files = sorted(tmp_path.rglob("*.npy"))
    again = method(double, cache=tmp_path).attribute(query)
    assert sorted(tmp_path.rglob("*.npy")) == files
    assert again.values.tolist() == whole.values.tolist()
    few = method(double, forward_batch=2).attribute(query, ["picture-3", "picture-1"])
    assert few.ids == ["picture-3", "picture-1"]
    # float64; another batch size sums in another order
    assert few.values == pytest.approx(whole.values[[3, 1]], rel=1e-6, abs=1e-10)
    with pytest.raises(ValueError, match="'nobody' is no training example"):
        method(double).attribute(query, ["nobody"])


def test_shared_draws_are_the_same_for_everybody() -> None:
    t, e = DRAWS.of("one", (2, 3, 3))
    other_t, other_e = DRAWS.of("other", (2, 3, 3), caption=1)
    assert torch.equal(t, other_t) and torch.equal(e, other_e)
    assert t.min() >= 200 and t.max() < 1000
    assert torch.equal(DRAWS.of("one", (2, 3, 3), flipped=True)[1], e.flip(-1))
