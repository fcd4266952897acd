"""Ways of comparing an example's losses before and after unlearning."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from tests.methods.conftest import Setting
from unsee.methods.unlearning import changes
from unsee.query import Query

GENERATOR = np.random.Generator(np.random.Philox(key=3))
BEFORE = GENERATOR.uniform(0.5, 1.5, (5, 2, 4))
AFTER = GENERATOR.uniform(0.5, 1.5, (5, 2, 4))


def slow(change: str, row: int, view: int, draw: int) -> float:
    rise = AFTER[row, view, draw] - BEFORE[row, view, draw]
    if change == "difference":
        return rise
    if change == "ratio":
        return rise / (AFTER[row, view, draw] + BEFORE[row, view, draw])
    others = [AFTER[r, v, draw] - BEFORE[r, v, draw] for r in range(5) for v in range(2)]
    return rise / (sum(o**2 for o in others) / len(others)) ** 0.5


@pytest.mark.parametrize("change", ["difference", "ratio", "timestep"])
def test_each_draw_is_compared_by_itself(change) -> None:
    expected = [[[slow(change, r, v, d) for d in range(4)] for v in range(2)] for r in range(5)]
    assert changes(BEFORE, AFTER, change) == pytest.approx(np.array(expected), rel=1e-12)


@pytest.mark.parametrize("change", ["difference", "ratio", "timestep"])
def test_nothing_changed_is_no_score(change) -> None:
    assert not changes(np.zeros((3, 1, 2)), np.zeros((3, 1, 2)), change).any()


def test_one_pass_serves_every_comparison(double: Setting, query: Query, tmp_path: Path) -> None:
    method = double.abu(rise=0.05, cache=tmp_path)
    unlearned = method.unlearn(query)
    plain = method.attribute(query)
    files = sorted(tmp_path.rglob("*.npy"))
    ratio = dataclasses.replace(method, change="ratio").attribute(query, unlearned=unlearned)
    assert sorted(tmp_path.rglob("*.npy")) == files
    assert ratio.settings["change"] == "ratio"
    before = method.losses(range(len(plain)))
    after = method.losses(range(len(plain)), unlearned.weights)
    assert plain.values.tolist() == (after - before).mean(2).max(1).tolist()
    expected = ((after - before) / (after + before)).mean(2).max(1)
    assert ratio.values == pytest.approx(expected, rel=1e-12)
