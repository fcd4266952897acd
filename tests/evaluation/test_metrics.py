import math

import numpy as np
import pytest

from unsee.evaluation.metrics import (
    average_precision,
    average_ranks,
    decoy_share,
    lds,
    map_at_k,
    noise_ceiling,
    recall_at_k,
    spearman,
    subset_predictions,
)

QUERIES, EXAMPLES, SUBSETS = 4, 12, 9


def ranks_slowly(values):
    return [sum(v < w for v in values) + (sum(v == w for v in values) + 1) / 2 for w in values]


def spearman_slowly(a, b):
    return np.corrcoef(ranks_slowly(a), ranks_slowly(b))[0, 1]


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def scores(rng):
    return rng.normal(size=(QUERIES, EXAMPLES))


@pytest.fixture
def masks(rng):
    return rng.random((SUBSETS, EXAMPLES)) < 0.5


@pytest.fixture
def outcomes(rng):
    return rng.normal(size=(SUBSETS, QUERIES))


# -- rank correlation ---------------------------------------------------------------------------


def test_equal_values_share_the_mean_of_their_ranks():
    assert average_ranks(np.array([3, 1, 3, 3, 0])).tolist() == [4, 2, 4, 4, 1]


def test_ranks_agree_with_counting(rng):
    values = rng.integers(0, 6, size=(3, 5, 11))
    want = np.array([[ranks_slowly(row) for row in block] for block in values])
    assert (average_ranks(values) == want).all()  # multiples of a half: exact


@pytest.mark.parametrize(
    ("a", "b", "want"),
    [
        ([1, 2, 3], [10, 100, 101], 1),
        ([1, 2, 3], [3, 2, 1], -1),
        ([1, 2, 3], [1, 3, 2], 0.5),  # 1 - 6 * (1 + 1) / (3 * 8)
        ([1, 2, 3, 4], [2, 1, 4, 3], 0.6),  # 1 - 6 * 4 / (4 * 15)
        ([1, 1, 2], [1, 2, 3], math.sqrt(3) / 2),  # ranks 1.5 1.5 3: 1.5 / sqrt(1.5 * 2)
    ],
)
def test_spearman_by_hand(a, b, want):
    assert spearman(np.array(a), np.array(b)) == pytest.approx(want, rel=1e-15)


def test_spearman_of_a_monotone_function_is_exactly_one(rng):
    a = rng.integers(0, 50, size=(20, 37))
    assert (spearman(a, a**3.0) == 1).all()
    assert (spearman(a, -(a**3.0)) == -1).all()


def test_spearman_broadcasts_and_agrees_with_a_loop(rng):
    a, b = rng.integers(0, 9, size=(3, 1, 15)), rng.integers(0, 9, size=(4, 15))
    want = [[spearman_slowly(x[0], y) for y in b] for x in a]
    # np.corrcoef rounds in another order
    np.testing.assert_allclose(spearman(a, b), want, rtol=1e-13, atol=1e-15)


def test_spearman_agrees_with_scipy(rng):
    stats = pytest.importorskip("scipy.stats")
    a, b = rng.integers(0, 20, size=(30, 16)), rng.normal(size=(30, 16))
    want = [stats.spearmanr(x, y).statistic for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(spearman(a, b), want, rtol=1e-13, atol=1e-15)


def test_spearman_names_constant_input(rng):
    a = rng.normal(size=(2, 3, 5))
    b = a.copy()
    b[1, 2] = 7
    with pytest.raises(ValueError, match=r"spearman: b is constant at \[1, 2\]"):
        spearman(a, b)
    with pytest.raises(ValueError, match="spearman: a is constant, so"):
        spearman(np.ones(4), np.arange(4))


def test_spearman_refuses_what_has_no_ranks():
    with pytest.raises(ValueError, match="a has 3 values and b has 4"):
        spearman(np.arange(3), np.arange(4))
    with pytest.raises(ValueError, match="at least 2"):
        spearman(np.arange(1), np.arange(1))
    with pytest.raises(ValueError, match=r"spearman: b: nan at position \[1\]"):
        spearman(np.arange(3), np.array([0, np.nan, 1]))


# -- linear datamodelling score -----------------------------------------------------------------


def test_lds_of_a_perfect_prediction_is_one(scores, masks):
    """Losses fall by the scores of the examples that a model was trained on."""
    losses = 5 - masks @ scores.T
    assert (lds(scores, masks, losses) == 1).all()
    assert (lds(-scores, masks, losses) == -1).all()
    assert (lds(scores, masks, -losses, sign=1) == 1).all()


def test_lds_by_hand():
    masks = np.array([[1, 1, 0], [1, 0, 1], [0, 1, 1]], dtype=bool)
    scores = np.array([[3.0, 1.0, 0.0]])  # predicts losses -4, -3, -1: ranks 1, 2, 3
    losses = np.array([[0.1], [0.3], [0.2]])  # ranks 1, 3, 2
    assert subset_predictions(scores, masks, losses).tolist() == [[-4, -3, -1]]
    assert lds(scores, masks, losses).tolist() == [0.5]


def test_lds_agrees_with_a_loop(scores, masks, outcomes):
    want = []
    for q in range(QUERIES):
        predicted = [-sum(scores[q][masks[m]]) for m in range(SUBSETS)]
        want.append(spearman_slowly(predicted, outcomes[:, q]))
    np.testing.assert_allclose(lds(scores, masks, outcomes), want, rtol=1e-13, atol=1e-15)


def test_lds_agrees_with_dattri(rng, scores, outcomes):
    metric = pytest.importorskip("dattri.metric")
    torch = pytest.importorskip("torch")
    chosen = np.array([np.sort(rng.permutation(EXAMPLES)[:6]) for _ in range(SUBSETS)])
    masks = np.zeros((SUBSETS, EXAMPLES), dtype=bool)
    np.put_along_axis(masks, chosen, True, 1)
    truth = torch.from_numpy(outcomes), torch.from_numpy(chosen)
    want, _ = metric.lds(torch.from_numpy(scores.T), truth)  # sums of scores, no sign
    np.testing.assert_allclose(lds(scores, masks, outcomes, sign=1), want, rtol=1e-13)
    np.testing.assert_allclose(lds(scores, masks, outcomes), -want.numpy(), rtol=1e-13)


def test_lds_ignores_scores_of_examples_in_no_subset(scores, masks, outcomes):
    masks[:, 3] = False
    want = lds(scores, masks, outcomes)
    scores[:, 3] = 1e3
    assert (lds(scores, masks, outcomes) == want).all()


def test_lds_of_integers_and_float32(scores, masks, outcomes):
    whole = np.round(scores * 100).astype(np.int64)
    assert (lds(whole, masks, outcomes) == lds(whole.astype(np.float32), masks, outcomes)).all()


def broken_nan_outcome(scores, masks, outcomes):
    outcomes[5, 2] = np.nan
    return scores, masks, outcomes


def broken_infinite_score(scores, masks, outcomes):
    scores[1, 7] = np.inf
    return scores, masks, outcomes


def broken_constant_scores(scores, masks, outcomes):
    scores[2] = 0.1  # sums of it may differ by rounding
    return scores, masks, outcomes


def broken_constant_where_it_matters(scores, masks, outcomes):
    masks[:, 0] = False
    scores[3, 1:] = 0.1
    return scores, masks, outcomes


def broken_constant_outcomes(scores, masks, outcomes):
    outcomes[:, 1] = 3.0
    return scores, masks, outcomes


def broken_one_example_that_is_always_there(scores, masks, outcomes):
    masks[:] = masks[:1]
    return scores, masks, outcomes


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (broken_nan_outcome, "outcomes: nan at subset 5, query 2"),
        (broken_infinite_score, "lds: scores: inf at query 1, example 7"),
        (broken_constant_scores, "lds: scores: query 2 has equal values"),
        (broken_constant_where_it_matters, "lds: scores: query 3 has equal values"),
        (broken_constant_outcomes, "outcomes: query 1 has equal values for all subsets"),
        (broken_one_example_that_is_always_there, "all subsets hold the same examples"),
        (lambda s, m, o: (s, m[:, :-1], o), "outcomes have 4 queries and masks have 11 examples"),
        (lambda s, m, o: (s[:-1], m, o), r"lds: scores are \[3, 12\], but"),
        (lambda s, m, o: (s, m[:-1], o), "masks hold 8 subsets, outcomes 9"),
        (lambda s, m, o: (s, m[:2], o[:2]), "2 subsets; at least 3"),
        (lambda s, m, o: (s, m.astype(int), o), r"masks are int64 \[9, 12\], not bool"),
        (lambda s, m, o: (s, m & (np.arange(9) != 4)[:, None], o), "subset 4 holds no example"),
        (lambda s, m, o: (s, m, o[:, 0]), r"outcomes \[9\], not \[subsets, queries\]"),
    ],
)
def test_lds_refuses(broken, message, scores, masks, outcomes):
    with pytest.raises(ValueError, match=message):
        lds(*broken(scores, masks, outcomes))


def test_lds_refuses_a_sign_that_is_none(scores, masks, outcomes):
    with pytest.raises(ValueError, match="sign = 0 must be -1"):
        lds(scores, masks, outcomes, sign=0)


def test_a_prediction_that_no_subset_differs_in_is_named(scores, masks, outcomes):
    scores[0] = 0
    scores[0, 0] = 1
    masks[:, 0] = True
    masks[0, 1:] = False
    with pytest.raises(ValueError, match="query 0 has equal values"):
        lds(scores, masks, outcomes)


# -- noise ceiling ------------------------------------------------------------------------------


def test_noise_ceiling_by_hand():
    first = np.array([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]])
    second = np.array([[1.0, 9.0], [3.0, 8.0], [2.0, 7.0]])
    assert noise_ceiling(first, second).tolist() == [0.5, -1.0]


@pytest.mark.parametrize("trainings", [1, 2])
def test_perfect_prediction_reaches_the_root_of_the_reliability(rng, trainings):
    """The relation that the docstring states, on normal outcomes with normal noise."""
    expected = rng.normal(size=(20_000, 1))
    first, second = (expected + 0.8 * rng.normal(size=(20_000, 1)) for _ in range(2))
    r = noise_ceiling(first, second)[0]
    outcome = first if trainings == 1 else (first + second) / 2
    reached = spearman(expected.T, outcome.T)[0]
    ceiling = math.sqrt(r if trainings == 1 else 2 * r / (1 + r))
    # Spearman is not Pearson: about 0.01 apart here; sampling error is below 0.005
    assert reached == pytest.approx(ceiling, abs=0.02)


def test_noise_ceiling_refuses(outcomes):
    with pytest.raises(ValueError, match=r"first seed are \[9, 4\], of the second \[8, 4\]"):
        noise_ceiling(outcomes, outcomes[:-1])
    with pytest.raises(ValueError, match="2 subsets; at least 3"):
        noise_ceiling(outcomes[:2], outcomes[:2])
    bad = outcomes.copy()
    bad[3, 1] = np.nan
    with pytest.raises(ValueError, match="second: nan at subset 3, query 1"):
        noise_ceiling(outcomes, bad)
    bad[:, 2] = bad[3, 1] = 0
    with pytest.raises(ValueError, match="first: query 2 has equal values"):
        noise_ceiling(bad, outcomes)


# -- rankings -----------------------------------------------------------------------------------


def test_rankings_by_hand():
    scores = np.array([[0.9, 0.1, 0.8, 0.5]])  # order: 0, 2, 3, 1
    positives = np.array([[False, True, True, False]])  # at ranks 2 and 4
    assert recall_at_k(scores, positives, 1).tolist() == [0]
    assert recall_at_k(scores, positives, 2).tolist() == [0.5]
    assert recall_at_k(scores, positives, 4).tolist() == [1]
    assert average_precision(scores, positives).tolist() == [(1 / 2 + 2 / 4) / 2]
    assert decoy_share(scores, positives[0], 3).tolist() == [1 / 3]


def test_recall_is_not_capped():
    assert recall_at_k(np.array([[3.0, 2.0, 1.0]]), np.array([[True, True, True]]), 1) == 1 / 3


def test_rankings_agree_with_loops(rng, scores):
    positives = rng.random(scores.shape) < 0.4
    positives[:, 0] = True
    decoys = rng.random(EXAMPLES) < 0.3
    for q in range(QUERIES):
        order = sorted(range(EXAMPLES), key=lambda i: -scores[q, i])
        found, precisions = 0, []
        for rank, i in enumerate(order, start=1):
            if positives[q, i]:
                found += 1
                precisions.append(found / rank)
        want = sum(precisions) / len(precisions)
        assert average_precision(scores, positives)[q] == pytest.approx(want, rel=1e-14)
        hits = sum(positives[q, i] for i in order[:5])
        assert recall_at_k(scores, positives, 5)[q] == hits / positives[q].sum()
        assert decoy_share(scores, decoys, 5)[q] == sum(decoys[i] for i in order[:5]) / 5


def test_average_precision_agrees_with_sklearn(rng, scores):
    metrics = pytest.importorskip("sklearn.metrics")
    positives = rng.random(scores.shape) < 0.5
    want = [metrics.average_precision_score(p, s) for p, s in zip(positives, scores, strict=True)]
    np.testing.assert_allclose(average_precision(scores, positives), want, rtol=1e-13)


def test_map_at_k_takes_the_teachers_top(rng, scores):
    teacher = rng.normal(size=scores.shape)
    positives = np.zeros(scores.shape, dtype=bool)
    for q in range(QUERIES):
        positives[q, sorted(range(EXAMPLES), key=lambda i: -teacher[q, i])[:4]] = True
    assert (map_at_k(scores, teacher, 4) == average_precision(scores, positives)).all()
    assert (map_at_k(teacher, teacher, 4) == 1).all()


def test_equal_scores_count_against_the_method():
    scores = np.array([[1.0, 1.0, 1.0, 0.0]])
    for place in range(3):  # whatever the order of the examples
        positives = np.arange(4)[None] == place
        assert recall_at_k(scores, positives, 2) == 0
        assert average_precision(scores, positives) == pytest.approx(1 / 3)
        assert decoy_share(scores, positives[0], 1) == 1


def test_scores_that_say_nothing_are_refused():
    scores, positives = np.zeros((1, 4)), np.array([[True, False, False, False]])
    for judge in (
        lambda: recall_at_k(scores, positives, 1),
        lambda: average_precision(scores, positives),
        lambda: map_at_k(np.arange(4.0)[None], scores, 2),
        lambda: decoy_share(scores, positives[0], 2),
    ):
        with pytest.raises(ValueError, match="query 0 has equal values for all examples"):
            judge()


def test_rankings_refuse(scores):
    positives = np.ones(scores.shape, dtype=bool)
    decoys = positives[0]
    with pytest.raises(ValueError, match="k = 13 is no whole number from 1 to 12"):
        recall_at_k(scores, positives, 13)
    with pytest.raises(ValueError, match="k = 0 is no whole number from 1 to 12"):
        decoy_share(scores, decoys, 0)
    with pytest.raises(ValueError, match=r"k = 2.5 is no whole number"):
        recall_at_k(scores, positives, 2.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"k = 2.0 is no whole number"):
        decoy_share(scores, decoys, 2.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"mAP\(k\), teacher: k = 13"):
        map_at_k(scores, scores, 13)
    with pytest.raises(ValueError, match="no example is a decoy"):
        decoy_share(scores, ~decoys, 2)
    with pytest.raises(ValueError, match=r"decoys are bool \[11\]"):
        decoy_share(scores, decoys[1:], 2)
    with pytest.raises(ValueError, match=r"positives are float64 \[4, 12\]"):
        average_precision(scores, scores)
    with pytest.raises(ValueError, match="scores are \\[12\\], not"):
        average_precision(scores[0], positives[0])
    positives[2] = False
    with pytest.raises(ValueError, match="query 2 has no positives"):
        average_precision(scores, positives)
    scores[3, 1] = np.nan
    with pytest.raises(ValueError, match="nan at query 3, example 1"):
        decoy_share(scores, decoys, 2)
