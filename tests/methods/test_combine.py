from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import rankdata

from unsee.methods.base import Scores
from unsee.methods.combine import combine, combined_values, sharpened

A = np.array([3.0, -1.0, 2.0, 2.0])
B = np.array([100.0, 300.0, 0.0, -50.0])


def scores(values: np.ndarray, ids: str = "wxyz", method: str = "one") -> Scores:
    return Scores(list(ids), values, method, {"a": 1})


def test_plain_is_the_weighted_mean() -> None:
    assert combined_values([A, B], "plain").tolist() == ((A + B) / 2).tolist()
    got = combined_values([A, B], "plain", weights=[0.9, 0.1])
    assert got == pytest.approx(0.9 * A + 0.1 * B, rel=1e-12)


def test_standardised_scores_have_no_unit() -> None:
    expected = (A - A.mean()) / A.std() + (B - B.mean()) / B.std()
    assert combined_values([A, B]) == pytest.approx(expected / 2, rel=1e-12)
    assert combined_values([7 * A + 3, 0.01 * B]) == pytest.approx(expected / 2, rel=1e-12)


def test_scaled_scores_keep_their_zero() -> None:
    expected = (A / A.std() + B / B.std()) / 2
    assert combined_values([7 * A, 0.01 * B], "scaled") == pytest.approx(expected, rel=1e-12)


def test_errors_of_a_sum_are_those_of_parts_that_err_alike() -> None:
    a = Scores(list("wxyz"), A, "one", errors=np.array([0.1, 0.2, 0.3, 0.4]))
    b = Scores(list("ywzx"), B[[2, 0, 3, 1]], "one", errors=np.array([3.0, 1.0, 4.0, 2.0]))
    got = combine([a, b], "plain", weights=[3, 1])
    assert got.method == "one"
    assert got.errors == pytest.approx([0.325, 0.65, 0.975, 1.3], rel=1e-12)
    got = combine([a, b], "scaled")
    expected = [(0.1 * i / A.std() + i / B.std()) / 2 for i in (1, 2, 3, 4)]
    assert got.errors == pytest.approx(expected, rel=1e-12)
    assert combine([a, b], "standardised").errors is None
    assert combine([a, b], "plain", power=2).errors is None
    assert combine([a, scores(B)], "plain").errors is None


def test_ranks_share_ties_and_see_no_size() -> None:
    expected = (rankdata(A) - 1 + rankdata(B) - 1) / (2 * 3)
    assert combined_values([A, B], "ranks") == pytest.approx(expected, rel=1e-12)
    assert combined_values([np.exp(A), B**3], "ranks") == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("how", ["plain", "scaled", "standardised", "ranks"])
def test_queries_are_combined_one_by_one(how) -> None:
    both = combined_values([np.stack([A, B], 1), np.stack([B, A], 1)], how)
    assert both[:, 0] == pytest.approx(combined_values([A, B], how), rel=1e-12)
    assert both[:, 1] == pytest.approx(combined_values([B, A], how), rel=1e-12)


def test_scores_are_matched_by_id() -> None:
    shuffled = scores(B[[2, 0, 3, 1]], "ywzx", "two")
    got = combine([scores(A), shuffled], "plain")
    assert got.ids == list("wxyz")
    assert got.values.tolist() == ((A + B) / 2).tolist()
    assert got.method == "one + two"
    assert got.settings["parts"][1] == {"method": "two", "settings": {"a": 1}}


def test_sharpened_scores_keep_sign_and_order() -> None:
    got = sharpened(A, 1.5)
    assert got == pytest.approx([3**1.5, -1, 2**1.5, 2**1.5], rel=1e-12)
    assert np.argsort(got, kind="stable").tolist() == np.argsort(A, kind="stable").tolist()
    assert combined_values([A, B], "plain", power=2) == pytest.approx(
        (A * np.abs(A) + B * np.abs(B)) / 2, rel=1e-12
    )
    assert combine([scores(A)], "plain", power=2).settings["power"] == 2
    with pytest.raises(ValueError, match="power = 0"):
        sharpened(A, 0)


def test_what_cannot_be_combined_is_refused() -> None:
    with pytest.raises(ValueError, match="no scores"):
        combine([])
    with pytest.raises(ValueError, match="not the same ones"):
        combine([scores(A), scores(B, "wxyv")])
    with pytest.raises(ValueError, match="weights"):
        combine([scores(A), scores(B)], weights=[1])
    with pytest.raises(ValueError, match="weights"):
        combine([scores(A), scores(B)], weights=[1, -1])
    with pytest.raises(ValueError, match="same score"):
        combine([scores(A), scores(np.ones(4))])
