import numpy as np
import pytest

from unsee.evaluation.datamodels import datamodels, left_out_errors
from unsee.evaluation.metrics import lds

SUBSETS, EXAMPLES, QUERIES = 20, 30, 3
ALPHAS = (0.1, 1.0, 10.0, 100.0)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def masks(rng):
    return rng.random((SUBSETS, EXAMPLES)) < 0.5


@pytest.fixture
def outcomes(rng, masks):
    return 2 - masks @ rng.normal(size=(EXAMPLES, QUERIES)) + rng.normal(size=(SUBSETS, QUERIES))


def ridge_slowly(x, y, alpha):
    """Coefficients and intercept by the normal equations, the intercept not penalised."""
    design = np.column_stack([x, np.ones(len(x))])
    penalty = alpha * np.diag([1.0] * x.shape[1] + [0.0])
    solution = np.linalg.solve(design.T @ design + penalty, design.T @ y)
    return solution[:-1], solution[-1]


def test_agrees_with_the_normal_equations(masks, outcomes):
    want, _ = ridge_slowly(masks.astype(float), outcomes, 10.0)
    # other systems of equations, condition about 100
    np.testing.assert_allclose(datamodels(masks, outcomes, [10.0]), -want.T, rtol=1e-9, atol=1e-12)


def test_agrees_with_sklearn(masks, outcomes):
    linear = pytest.importorskip("sklearn.linear_model")
    want = linear.Ridge(alpha=3.0).fit(masks.astype(float), outcomes).coef_
    np.testing.assert_allclose(datamodels(masks, outcomes, [3.0]), -want, rtol=1e-9, atol=1e-12)


def test_left_out_errors_agree_with_leaving_out(masks, outcomes):
    x = masks.astype(float)
    want = np.zeros((len(ALPHAS), QUERIES))
    for a, alpha in enumerate(ALPHAS):
        for m in range(SUBSETS):
            others = np.arange(SUBSETS) != m
            w, intercept = ridge_slowly(x[others], outcomes[others], alpha)
            want[a] += (outcomes[m] - x[m] @ w - intercept) ** 2 / SUBSETS
    want /= outcomes.var(0)
    # the smallest alpha leaves a system of condition 10^3
    np.testing.assert_allclose(left_out_errors(masks, outcomes, ALPHAS), want, rtol=1e-8)


def test_takes_the_alpha_of_the_least_error(masks, outcomes):
    best = ALPHAS[int(np.argmin(left_out_errors(masks, outcomes, ALPHAS).mean(1)))]
    assert (datamodels(masks, outcomes, ALPHAS) == datamodels(masks, outcomes, [best])).all()


def test_finds_what_lowers_the_loss(rng):
    """Higher means that removal raises the loss; judged on subsets that it was not fitted to."""
    truth = rng.normal(size=(QUERIES, EXAMPLES))
    masks = rng.random((400, EXAMPLES)) < 0.5
    losses = 1 - masks @ truth.T + rng.normal(size=(400, QUERIES))
    scores = datamodels(masks[:200], losses[:200])
    # 200 subsets for 30 examples: far from the bound, which the noise sets near 0.94
    assert (lds(scores, masks[200:], losses[200:]) > 0.85).all()


def test_an_example_in_every_subset_has_no_score(masks, outcomes):
    masks[:, 4] = True
    assert (datamodels(masks, outcomes)[:, 4] == 0).all()


def test_refuses(masks, outcomes):
    for alphas in ([], [0.0], [-1.0, 2.0], [np.nan]):
        with pytest.raises(ValueError, match="must be positive numbers"):
            datamodels(masks, outcomes, alphas)
    with pytest.raises(ValueError, match="masks hold 19 subsets, outcomes 20"):
        datamodels(masks[1:], outcomes)
    outcomes[:, 1] = 4
    with pytest.raises(ValueError, match="query 1 has equal values"):
        datamodels(masks, outcomes)
    outcomes[2, 0] = np.nan
    with pytest.raises(ValueError, match="nan at subset 2, query 0"):
        datamodels(masks, outcomes)
