"""Leave-K-out: which examples are removed, and what the models without them say."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from ..draws import stable_seed
from .intervals import Estimate, check_level, counterfactual_effect, mean_interval
from .metrics import check_finite

FULL, RANDOM = "none", "random"
"""Names, in place of a method's, of the model on everything and of random removal."""

TOGETHER = "together"
"""Name, in place of a query's, of removal for all queries at once."""

MEASURES = ("loss", "mse", "ssim", "latent_cosine")
"""Columns of outcomes, see `deviation.Outcome`."""


@dataclass(frozen=True)
class Removal:
    """One training without some examples.

    Attributes:
        name: of the run, good as the name of a folder.
        method: that named the examples, or "random".
        query: for which it named them; empty for random removal, which serves all queries.
        ids: what is removed.
    """

    name: str
    method: str
    query: str
    ids: tuple[str, ...]


def count_of(k: str, examples: int) -> int:
    """Returns how many of `examples` are meant by a number ("34") or a share ("2%").

    Raises:
        ValueError: neither, less than one, or so many that no example stays.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(%?)", k.strip())
    if found is None or (not found[2] and "." in found[1]):
        raise ValueError(f"K = {k!r} is neither a number such as 34 nor a share such as 2%")
    count = round(float(found[1]) * examples / 100) if found[2] else int(found[1])
    if not 1 <= count < examples:
        raise ValueError(f"K = {k} is {count} of {examples} examples; it must be from 1 to "
                         f"{examples - 1}")  # fmt: skip
    return count


def plan_removals(
    orders: Mapping[str, Mapping[str, Sequence[str]]],
    ids: Sequence[str],
    k: int,
    *,
    random: int = 4,
    seed: int = 0,
) -> list[Removal]:
    """Returns the trainings of a leave-K-out experiment, in an order that makes a part useful.

    Random removal comes first, then the queries one by one, each with all methods.

    Args:
        orders: method -> query -> ids, most influential first; every method has all queries.
        ids: of all examples that the model was trained on.
        k: how many are removed.
        random: how many random sets of K are removed; all queries share them.
        seed: of the random sets.

    Raises:
        ValueError: a K that removes nothing or everything; a ranking that a method lacks, of fewer
            than K ids, with an id that is not there or there twice; no random sets; or two methods
            or queries whose runs would have the same name.
    """
    _check(orders, ids, k)
    if random < 1:
        raise ValueError(f"leave out: {random} random sets; at least 1 is compared with")
    known = set(ids)
    runs = [Removal(f"{RANDOM}-{r}", RANDOM, "", _random(ids, k, seed, r))
            for r in range(1, random + 1)]  # fmt: skip
    for query in next(iter(orders.values()), {}):
        for method, order in orders.items():
            removed = tuple(order[query][:k])
            if len(removed) < k:
                raise ValueError(
                    f"leave out: K = {k}, but {method!r} ranks {len(removed)} examples for "
                    f"{query!r}"
                )
            unknown = [i for i in removed if i not in known]
            if unknown:
                raise ValueError(
                    f"leave out: {unknown[0]!r}, ranked by {method!r} for {query!r}, is not among "
                    f"the {len(ids)} examples"
                )
            runs.append(Removal(f"{_plain(method)}--{_plain(query)}", method, query, removed))
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        twice = next(n for n in names if names.count(n) > 1)
        raise ValueError(f"leave out: two runs would be called {twice!r}: rename a method or query")
    return runs


def plan_together(
    orders: Mapping[str, Mapping[str, Sequence[str]]],
    ids: Sequence[str],
    total: int,
    *,
    random: int = 2,
    seed: int = 0,
) -> list[Removal]:
    """Returns one training for each method, without what it names for all queries together.

    The queries' first examples are taken, then their second ones, until `total` different ones are
    removed: every method removes as many, however much its rankings overlap. One training then
    says something of every query, in the manner of MUCS's evaluation; but what is removed for
    one query counts for the others too.

    Args:
        orders: method -> query -> ids, most influential first; every method has all queries.
        ids: of all examples that the model was trained on.
        total: how many are removed.
        random: how many random sets of as many.
        seed: of the random sets.

    Raises:
        ValueError: see `plan_removals`; or the rankings do not name so many.
    """
    _check(orders, ids, total)
    found = plan_removals({}, ids, total, random=random, seed=seed)
    for method, of_query in orders.items():
        removed: dict[str, None] = {}
        for place in zip(*of_query.values(), strict=False):
            for identifier in place:
                if len(removed) < total:
                    removed[identifier] = None
        if len(removed) < total or not set(removed) <= set(ids):
            raise ValueError(
                f"leave out: the rankings of {method!r} name {len(removed)} different examples "
                f"that were trained on, not {total}"
            )
        name = f"{TOGETHER}--{_plain(method)}"
        found.append(Removal(name, method, TOGETHER, tuple(removed)))
    return found


def _check(orders: Mapping[str, Mapping[str, Sequence[str]]], ids: Sequence[str], k: int) -> None:
    if not isinstance(k, int | np.integer) or not 1 <= k < len(ids):
        raise ValueError(
            f"leave out: K = {k!r} must be a whole number from 1 to {len(ids) - 1}, so that one of "
            f"the {len(ids)} examples stays"
        )
    queries = list(dict.fromkeys(q for order in orders.values() for q in order))
    for method, order in orders.items():
        for query in queries:
            if query not in order:
                raise ValueError(f"leave out: {method!r} has no ranking for {query!r}")
            if len(set(order[query])) < len(order[query]):
                twice = next(i for i, n in Counter(order[query]).items() if n > 1)
                raise ValueError(f"leave out: {method!r} ranks {twice!r} twice for {query!r}")


def _random(ids: Sequence[str], k: int, seed: int, number: int) -> tuple[str, ...]:
    key = stable_seed("leave out", seed, k, number)
    order = np.random.Generator(np.random.Philox(key=key)).permutation(len(ids))
    return tuple(ids[row] for row in sorted(int(r) for r in order[:k]))


def _plain(name: str) -> str:
    return re.sub(r"[^\w.+-]+", "-", name).strip("-.") or "_"


@dataclass(frozen=True)
class Effect:
    """What removing examples does to one measure.

    Attributes:
        k: how many were removed.
        measure: one of `MEASURES`.
        method: that named them, or "random".
        queries: how many it was asked for.
        removals: how many random removals it is compared with.
        change: mean over queries of the measure without the query's own top K, minus that under
            the model on everything.
        excess: the change minus that of random removal; None for random removal itself.
    """

    k: int
    measure: str
    method: str
    queries: int
    removals: int
    change: Estimate
    excess: Estimate | None


@dataclass(frozen=True)
class Difference:
    """What removing the examples of one method does, rather than those of another.

    Attributes:
        k: how many were removed.
        measure: one of `MEASURES`.
        one: a method.
        other: a method.
        queries: that both were asked for.
        difference: mean over queries of the measure without the examples of `one`, minus that
            without those of `other`.
    """

    k: int
    measure: str
    one: str
    other: str
    queries: int
    difference: Estimate


def leave_out_effects(rows: Sequence[Mapping[str, Any]], *, level: float = 0.95) -> list[Effect]:
    """Compares methods with random removal, as far as the runs are finished.

    Args:
        rows: one for each run and query, with `run`, `method`, `k`, `removed_for` (the query
            whose top K is removed), `query` (that is measured), and `MEASURES`.
        level: of the intervals; with a single query they are unbounded.

    Returns:
        For each K, measure and method that has a finished query; random removal first, over all
        queries that any method has.

    Raises:
        ValueError: a query was not measured under the model on everything, or a measure that is
            not finite.
    """
    check_level(level)
    full = {r["query"]: r for r in rows if r["method"] == FULL}
    found = []
    for k in sorted({r["k"] for r in rows if r["method"] != FULL}):
        of = [r for r in rows if r["k"] == k and r["method"] != FULL]
        chance: dict[str, dict[str, Mapping[str, Any]]] = {}
        for r in of:
            if r["method"] == RANDOM:
                chance.setdefault(r["run"], {})[r["query"]] = r
        methods: dict[str, dict[str, Mapping[str, Any]]] = {}
        for r in of:
            if r["method"] != RANDOM and r["removed_for"] == r["query"]:
                methods.setdefault(r["method"], {})[r["query"]] = r
        asked = {q for own in methods.values() for q in own} or set(full)
        for measure in MEASURES:
            if chance:
                found.append(_effect(k, measure, RANDOM, sorted(asked), full, chance, None, level))
            for method, own in methods.items():
                found.append(_effect(k, measure, method, sorted(own), full, chance, own, level))
    return found


def leave_out_differences(
    rows: Sequence[Mapping[str, Any]], *, measure: str = "loss", level: float = 0.95
) -> list[Difference]:
    """Compares methods with one another, query by query.

    Args:
        rows: as for `leave_out_effects`.
        measure: one of `MEASURES`.
        level: of the intervals, which are Student's t over queries; one query has no interval.

    Returns:
        For each K and each pair of methods that have two finished queries in common, the mean
        difference between the measure without the examples of the one and of the other. Methods
        that removed examples for all queries together are compared with such only, and the
        interval is unbounded: there is one training of each.
    """
    found = []
    for k in sorted({r["k"] for r in rows}):
        methods: dict[str, dict[str, Mapping[str, Any]]] = {}
        for r in rows:
            if r["k"] == k and r["removed_for"] == r["query"]:
                methods.setdefault(r["method"], {})[r["query"]] = r
        for (one, a), (other, b) in combinations(methods.items(), 2):
            shared = sorted(a.keys() & b.keys())
            if len(shared) < 2 or _serves_many(a) != _serves_many(b):
                continue
            apart = np.array([a[q][measure] - b[q][measure] for q in shared])
            difference = mean_interval(apart, level=level)
            if _serves_many(a):  # one training each: how much those differ is not known
                difference = Estimate(difference.value, -np.inf, np.inf, level)
            found.append(Difference(k, measure, one, other, len(shared), difference))
    return found


def _effect(
    k: int, measure: str, method: str, queries: list[str],
    full: Mapping[str, Mapping[str, Any]], chance: Mapping[str, Mapping[str, Mapping[str, Any]]],
    own: Mapping[str, Mapping[str, Any]] | None, level: float,
) -> Effect:  # fmt: skip
    missing = [q for q in queries if q not in full]
    if missing:
        raise ValueError(f"leave out: {missing[0]!r} was not measured under the full model")
    before = np.array([full[q][measure] for q in queries])
    # Of the random removals those that all these queries were measured under.
    whole = [run for run in chance.values() if all(q in run for q in queries)]
    random = np.array([[run[q][measure] for run in whole] for q in queries])
    after = random.mean(1) if own is None else np.array([own[q][measure] for q in queries])
    for values in (before, after, random):
        check_finite(f"leave out: {measure} of {method!r}", values)
    if len(queries) == 1:
        change = _point(after - before, level)
        excess = _point(after - random.mean(1), level) if whole else None
    elif whole:
        together = own is not None and _serves_many(own)
        both = counterfactual_effect(after, before, random, together=together, level=level)
        change, excess = both.random if own is None else both.removed, both.excess
    else:
        change, excess = mean_interval(after - before, level=level), None
    return Effect(
        k, measure, method, len(queries), len(whole), change, None if own is None else excess
    )


def _serves_many(own: Mapping[str, Mapping[str, Any]]) -> bool:
    """Says whether some training removed examples for several queries: see `plan_together`."""
    return len({row["run"] for row in own.values()}) < len(own)


def _point(value: np.ndarray, level: float) -> Estimate:
    """One query says nothing about others."""
    return Estimate(float(value[0]), -np.inf, np.inf, level)


def table_of(effects: Sequence[Effect]) -> list[str]:
    """Returns the lines of a table in Markdown."""
    lines = ["| K | measure | removed | queries | change | over random removal |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    for e in effects:
        over = "-" if e.excess is None else _signed(e.excess)
        lines.append(
            f"| {e.k} | {e.measure.replace('_', ' ')} | {e.method} | {e.queries} | "
            f"{_signed(e.change)} | {over} |"
        )
    return lines


def table_of_differences(differences: Sequence[Difference]) -> list[str]:
    """Returns the lines of a table in Markdown."""
    lines = ["| K | measure | removed | rather than | queries | difference |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    return lines + [
        f"| {d.k} | {d.measure.replace('_', ' ')} | {d.one} | {d.other} | {d.queries} | "
        f"{_signed(d.difference)} |"
        for d in differences
    ]


def _signed(estimate: Estimate) -> str:
    text = f"{estimate.value:+.4f}"
    if np.isfinite([estimate.low, estimate.high]).all():
        text += f" [{estimate.low:+.4f}, {estimate.high:+.4f}]"
    return text
