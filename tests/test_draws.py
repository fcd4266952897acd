from __future__ import annotations

import dataclasses
import itertools
import json
import random

import numpy as np
import pytest
import torch

from unsee.draws import Draws, stable_seed

SHAPE = (4, 8, 8)


def same(a: tuple[torch.Tensor, torch.Tensor], b: tuple[torch.Tensor, torch.Tensor]) -> bool:
    return torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def test_the_same_key_gives_the_same_bits():
    first = Draws(seed=3, n=5).of("a", SHAPE)
    assert same(first, Draws(seed=3, n=5).of("a", SHAPE))
    assert first[0].dtype == torch.int64 and first[0].shape == (5,)
    assert first[1].dtype == torch.float32 and first[1].shape == (5, *SHAPE)


def test_another_seed_id_or_caption_gives_other_draws():
    base = Draws(seed=3, n=5).of("a", SHAPE)
    others = [
        Draws(seed=4, n=5).of("a", SHAPE),
        Draws(seed=3, n=5).of("b", SHAPE),
        Draws(seed=3, n=5).of("a", SHAPE, caption=1),
    ]
    for (_, x), (_, y) in itertools.combinations([base, *others], 2):
        # independent normal numbers agree nowhere, not even draw by draw
        assert not (x == y).any()


def test_draws_of_one_example_differ_from_each_other():
    _, noise = Draws(n=6).of("a", SHAPE)
    assert len({draw.numpy().tobytes() for draw in noise}) == 6


def test_order_and_company_do_not_matter():
    draws, ids = Draws(seed=1, n=3), [f"example {i}" for i in range(20)]
    alone = {i: draws.of(i, SHAPE) for i in ids}
    shuffled = ids.copy()
    random.Random(0).shuffle(shuffled)
    torch.manual_seed(7)  # global generators have no say in it
    np.random.seed(7)
    for identifier in shuffled:
        assert same(alone[identifier], draws.of(identifier, SHAPE))


def test_numbers_agree_across_machines():
    """Committed numbers: another machine or library version must produce the same."""
    timesteps, noise = Draws(seed=3, n=4).of("1f600", (2, 2))
    assert timesteps.tolist() == GOLDEN_TIMESTEPS
    assert noise[0].flatten().tolist() == np.float32(GOLDEN_FIRST).tolist()
    assert noise[3].flatten().tolist() == np.float32(GOLDEN_LAST).tolist()
    assert stable_seed(3, "1f600", 0) == GOLDEN_SEED


GOLDEN_TIMESTEPS = [108, 271, 692, 836]
GOLDEN_FIRST = [1.9427216, 2.0535848, 0.68877476, 0.28621396]
GOLDEN_LAST = [-0.31899488, -0.19029018, 0.43283007, 0.19028674]
GOLDEN_SEED = 547168010660997217


def test_seeds_tell_types_and_boundaries_apart():
    assert stable_seed(1, "2") != stable_seed("1", "2") != stable_seed("12")
    assert stable_seed("ab", "c") != stable_seed("a", "bc")
    assert 0 <= stable_seed("anything") < 2**63


@pytest.mark.parametrize("n", [1, 3, 7, 10, 1000])
def test_stratified_timesteps_take_one_from_each_part(n):
    for identifier in ("a", "b", "c"):
        timesteps, _ = Draws(n=n).of(identifier, (1,))
        for d, t in enumerate(timesteps.tolist()):
            assert int(d * 1000 / n) <= t <= (d + 1) * 1000 / n
        assert timesteps.min() >= 0 and timesteps.max() <= 999


def test_stratified_timesteps_reach_the_whole_schedule():
    seen = torch.cat([Draws(n=10).of(f"{i}", (1,))[0] for i in range(1000)])
    # 10,000 uniform numbers: each tenth holds exactly 1,000, and the two ends are met within 10
    assert torch.histc(seen.float(), 10, 0, 1000).tolist() == [1000] * 10
    assert seen.min() < 10 and seen.max() >= 990
    # mean of 10,000 stratified draws: standard error 28.9 / 100
    assert abs(seen.double().mean() - 499.5) < 5 * 0.289


@pytest.mark.parametrize(
    ("n", "expected"),
    [(1, [0]), (3, [0, 333, 666]), (4, [0, 250, 500, 750]), (20, list(range(0, 1000, 50)))],
)
def test_grid_is_the_papers(n, expected):
    timesteps, _ = Draws(n=n, timesteps="grid").of("a", (1,))
    assert timesteps.tolist() == expected


def test_another_schedule_length():
    timesteps, _ = Draws(n=4, timesteps="grid", num_train_timesteps=100).of("a", (1,))
    assert timesteps.tolist() == [0, 25, 50, 75]


def test_flipped_noise_is_mirrored_noise():
    t, noise = Draws(n=3).of("a", SHAPE)
    t_flipped, flipped = Draws(n=3).of("a", SHAPE, flipped=True)
    assert torch.equal(t, t_flipped)
    assert torch.equal(flipped, noise.flip(-1))
    assert not torch.equal(flipped, noise)


def test_more_draws_keep_the_noise_of_fewer():
    _, few = Draws(n=3).of("a", SHAPE)
    _, many = Draws(n=8).of("a", SHAPE)
    assert torch.equal(many[:3], few)


def test_noise_is_standard_normal():
    _, noise = Draws(n=50).of("a", (4, 16, 16))
    values = noise.double().flatten()  # 51,200 numbers
    # five standard errors of mean, variance and fourth moment (1, 2 and 96 over n)
    n = len(values)
    assert abs(values.mean()) < 5 * (1 / n) ** 0.5
    assert abs(values.var() - 1) < 5 * (2 / n) ** 0.5
    assert abs((values**4).mean() - 3) < 5 * (96 / n) ** 0.5


@pytest.mark.parametrize("n", [0, -1, 1001])
def test_a_number_of_draws_out_of_range_is_refused(n):
    with pytest.raises(ValueError, match=rf"n = {n} must be from 1 to .* 1000"):
        Draws(n=n)


def test_an_unknown_timestep_plan_is_refused():
    with pytest.raises(ValueError, match="'random' is not 'stratified', 'grid' or a pair"):
        Draws(timesteps="random")  # type: ignore[arg-type]


def test_a_part_of_the_schedule_is_stratified():
    draws = Draws(seed=2, n=5, timesteps=(0.75, 1.0))
    for example in map(str, range(50)):
        timesteps, noise = draws.of(example, (2,))
        assert [int((t - 750) // 50) for t in timesteps] == [0, 1, 2, 3, 4]
        # The noise is that of the same draws of the whole schedule.
        torch.testing.assert_close(noise, Draws(seed=2, n=5).of(example, (2,))[1])
    seen = torch.cat([draws.of(str(i), (2,))[0] for i in range(500)])
    assert seen.min() == 750 and seen.max() == 999


def test_the_whole_as_a_part_is_the_whole():
    whole, part = Draws(n=7), Draws(n=7, timesteps=(0, 1))
    assert torch.equal(whole.of("a", (2,))[0], part.of("a", (2,))[0])


def test_a_part_comes_back_from_json():
    draws = Draws(n=4, timesteps=(0.5, 1))
    assert Draws(**json.loads(json.dumps(dataclasses.asdict(draws)))) == draws
    assert hash(draws) == hash(Draws(n=4, timesteps=[0.5, 1.0]))


@pytest.mark.parametrize("part", [(0.5, 0.5), (0.8, 0.2), (-0.1, 1), (0, 1.1), (0.5,), (0, 0.5, 1)])
def test_no_part_is_refused(part):
    with pytest.raises(ValueError, match=r"is no part of the schedule; give two rising shares"):
        Draws(timesteps=part)


def test_more_draws_than_the_part_has_timesteps_are_refused():
    with pytest.raises(ValueError, match="n = 101 must be from 1 to the part = 100"):
        Draws(n=101, timesteps=(0.9, 1))
