import numpy as np
import pytest

from unsee.evaluation.intervals import counterfactual_effect
from unsee.evaluation.leave_out import (
    FULL,
    MEASURES,
    RANDOM,
    count_of,
    leave_out_differences,
    leave_out_effects,
    plan_removals,
    plan_together,
    table_of,
    table_of_differences,
)

IDS = [f"example-{i}" for i in range(50)]
QUERIES = ["a", "b", "c"]


@pytest.fixture
def orders():
    rng = np.random.default_rng(0)
    return {m: {q: rng.permutation(IDS).tolist() for q in QUERIES} for m in ("one", "two")}


@pytest.mark.parametrize(
    ("k", "examples", "count"),
    [("34", 1708, 34), ("2%", 1708, 34), ("0.5%", 1000, 5), (" 49 ", 50, 49), ("1%", 50, None)],
)
def test_k_is_a_number_or_a_share(k, examples, count):
    if count is None:
        with pytest.raises(ValueError, match="is 0 of 50 examples; it must be from 1 to 49"):
            count_of(k, examples)
    else:
        assert count_of(k, examples) == count


@pytest.mark.parametrize("k", ["", "two", "-3", "3.5", "2 %%", "nan", "%"])
def test_other_k_is_refused(k):
    with pytest.raises(ValueError, match="is neither a number such as 34 nor a share such as 2%"):
        count_of(k, 100)


@pytest.mark.parametrize("k", ["0", "50", "51", "100%", "0%"])
def test_k_that_leaves_nothing_or_all(k):
    with pytest.raises(ValueError, match="it must be from 1 to 49"):
        count_of(k, 50)


def test_a_part_of_the_plan_is_a_smaller_experiment(orders):
    plan = plan_removals(orders, IDS, 5, random=2)
    assert [r.name for r in plan] == [
        "random-1", "random-2", "one--a", "two--a", "one--b", "two--b", "one--c", "two--c",
    ]  # fmt: skip
    for removal in plan[2:]:
        assert list(removal.ids) == orders[removal.method][removal.query][:5]
    first, second = plan[0].ids, plan[1].ids
    assert len(set(first)) == len(set(second)) == 5
    assert first != second
    assert plan_removals(orders, IDS, 5, random=3)[:2] == plan[:2]
    assert plan_removals(orders, IDS, 5, random=2, seed=1)[0].ids != first


@pytest.mark.parametrize("planned", [plan_removals, plan_together])
def test_k_and_rankings_are_checked_before_anything_is_trained(planned, orders):
    for k in (0, -1, 50, 51, 2.5, "3"):
        with pytest.raises(ValueError, match=r"must be a whole number from 1 to 49"):
            planned(orders, IDS, k)
    twice = {"one": {"a": [IDS[1], IDS[2], IDS[1]]}}
    with pytest.raises(ValueError, match="'one' ranks 'example-1' twice for 'a'"):
        planned(twice, IDS, 2)
    with pytest.raises(ValueError, match="'two' has no ranking for 'c'"):
        planned({**orders, "two": {q: orders["two"][q] for q in "ab"}}, IDS, 2)
    assert planned(orders, IDS, np.int64(2))


def test_what_is_not_finite_is_named(rows):
    with pytest.raises(ValueError, match="level = 95"):
        leave_out_effects(rows, level=95)
    one = [dict(r) for r in rows if r["query"] == "a"]
    next(r for r in one if r["method"] == "one")["loss"] = float("nan")
    with pytest.raises(ValueError, match="loss of 'one': nan"):
        leave_out_effects(one)


def test_random_removal_is_uniform():
    """Each of 50 examples is among the 5 of a set with probability 0.1."""
    plan = plan_removals({}, IDS, 5, random=2000)
    counts = np.array([sum(i in run.ids for run in plan) for i in IDS])
    # 200 expected, standard deviation 13.4
    assert abs(counts - 200).max() < 5 * 13.4


def test_plan_refuses(orders):
    with pytest.raises(ValueError, match="'one' ranks 3 examples for 'b'"):
        plan_removals({"one": {**orders["one"], "b": IDS[:3]}}, IDS, 5)
    with pytest.raises(ValueError, match="'x', ranked by 'one' for 'a', is not among the 50"):
        plan_removals({"one": {"a": ["x", *IDS]}}, IDS, 5)
    with pytest.raises(ValueError, match="0 random sets"):
        plan_removals(orders, IDS, 5, random=0)
    with pytest.raises(ValueError, match="two runs would be called 'a-b--a'"):
        plan_removals({"a b": {"a": IDS}, "a, b": {"a": IDS}}, IDS, 5)


def outcome(run, method, query, value, removed_for=""):
    return {"run": run, "method": method, "k": 0 if method == "none" else 5, "query": query,
            "removed_for": removed_for, **dict.fromkeys(MEASURES, value)}  # fmt: skip


@pytest.fixture
def values():
    rng = np.random.default_rng(1)
    return rng.normal(size=3), 1 + rng.normal(size=3), rng.normal(size=(3, 4))


@pytest.fixture
def rows(values):
    full, without, random = values
    rows = [outcome("none", "none", q, v) for q, v in zip(QUERIES, full, strict=True)]
    for r in range(4):
        rows += [outcome(f"random-{r}", "random", q, random[i, r]) for i, q in enumerate(QUERIES)]
    for i, target in enumerate(QUERIES):
        for q in QUERIES:  # other queries are measured too, and do not count
            value = without[i] if q == target else 1e6
            rows.append(outcome(f"one--{target}", "one", q, value, target))
    return rows


def test_effects_are_those_of_counterfactual_effect(rows, values):
    full, without, random = values
    want = counterfactual_effect(without, full, random)
    got = leave_out_effects(rows)
    assert [(e.measure, e.method) for e in got[:4]] == [
        ("loss", "random"), ("loss", "one"), ("mse", "random"), ("mse", "one"),
    ]  # fmt: skip
    assert len(got) == 2 * len(MEASURES)
    assert (got[0].change, got[0].excess) == (want.random, None)
    assert (got[1].change, got[1].excess) == (want.removed, want.excess)
    assert (got[1].k, got[1].queries, got[1].removals) == (5, 3, 4)
    lines = table_of(got)
    assert len(lines) == 2 + len(got)
    assert lines[3].startswith(f"| 5 | loss | one | 3 | {want.removed.value:+.4f} [")


def test_effects_of_a_part(rows, values):
    full, without, random = values
    part = [r for r in rows if r["removed_for"] not in ("b", "c") and r["run"] != "random-3"]
    got = leave_out_effects(part)
    assert got[1].queries == 1
    assert got[1].removals == 3
    assert got[1].change.value == pytest.approx(without[0] - full[0])
    assert got[1].excess.value == pytest.approx(without[0] - random[0, :3].mean())
    assert np.isinf(got[1].excess.high)
    assert "inf" not in "".join(table_of(got))
    no_random = [r for r in rows if r["method"] != "random"]
    (first, *_) = leave_out_effects(no_random)
    assert (first.method, first.removals, first.excess) == ("one", 0, None)
    only_random = [r for r in rows if r["method"] in ("random", "none")]
    assert [(e.method, e.queries) for e in leave_out_effects(only_random)[:1]] == [("random", 3)]
    assert leave_out_effects([r for r in rows if r["method"] == "none"]) == []
    with pytest.raises(ValueError, match="'a' was not measured under the full model"):
        leave_out_effects([r for r in rows if r["method"] != "none"])


def test_methods_are_compared_query_by_query() -> None:
    loss = {"one": {"a": 3.0, "b": 5.0, "c": 1.0}, "two": {"a": 1.0, "b": 4.0}, "few": {"a": 0.0}}
    rows = [
        {"run": f"{m}-{q}", "method": m, "k": 2, "removed_for": q, "query": measured,
         "loss": value + (0 if measured == q else 100)}
        for m, own in loss.items() for q, value in own.items() for measured in "abc"
    ]  # fmt: skip
    rows.append({**rows[0], "method": RANDOM, "removed_for": ""})
    rows.append({**rows[0], "method": FULL, "k": 0, "removed_for": ""})
    (found,) = leave_out_differences(rows)
    assert (found.k, found.one, found.other, found.queries) == (2, "one", "two", 2)
    assert found.difference.value == pytest.approx(1.5)
    # Student's t of one degree of freedom: 12.706, times the standard error of 2 and 1.
    assert found.difference.low == pytest.approx(1.5 - 12.706 * 0.5, abs=1e-3)
    assert "| 2 | loss | one | two | 2 | +1.5000" in table_of_differences([found])[2]


def test_removal_together_is_compared_with_its_like_and_has_no_interval() -> None:
    def rows(method: str, runs: list[str], values: list[float]) -> list[dict]:
        return [{"run": run, "method": method, "k": 2, "removed_for": q, "query": q, "loss": v}
                for run, q, v in zip(runs, "ab", values, strict=True)]  # fmt: skip

    found = leave_out_differences(
        rows("one", ["all-1"] * 2, [3.0, 5.0]) + rows("two", ["all-2"] * 2, [1.0, 4.0])
        + rows("apart", ["a", "b"], [0.0, 0.0])
    )  # fmt: skip
    assert [(d.one, d.other, d.difference.value) for d in found] == [("one", "two", 1.5)]
    assert found[0].difference.high == np.inf


def test_together_every_method_removes_as_many_in_turns_over_queries() -> None:
    ids = [f"i{n}" for n in range(20)]
    orders = {
        "alike": {"a": ids[:10], "b": ids[:10]},
        "apart": {"a": ids[:10], "b": ids[10:]},
    }
    random, alike, apart = plan_together(orders, ids, 6, random=1)
    assert random.method == RANDOM and len(set(random.ids)) == 6
    assert set(alike.ids) == set(ids[:6])
    assert apart.ids == ("i0", "i10", "i1", "i11", "i2", "i12")
    with pytest.raises(ValueError, match="name 10 different"):
        plan_together({"alike": orders["alike"]}, ids, 12)
