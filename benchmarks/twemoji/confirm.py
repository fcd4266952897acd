"""Confirms a choice on halves that were trained after it: python benchmarks/twemoji/confirm.py WORK

The default of AbU on an index was chosen when halves 1 to 8 and 33 to 40 were measured. This
judges it, and what it is held against, on all others, with settings as they were then. What was
thought of later has seen them all, and is shown beside it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from judge import stored

from unsee.evaluation.intervals import Estimate, lds_interval, paired_difference
from unsee.evaluation.twemoji import load_benchmark

SEEN = (*range(1, 9), *range(33, 41))
"""Halves that were measured when the choice was made."""

CHOICE = "index, EK-FAC loss + output norm, damping 0.1"
OTHERS = (
    "influence, diagonal per draw, damping 0.01",
    "AbU, damped Fisher, rise 0.01",
    "AbU, damped Fisher, rise 0.05",
    "AbU, undamped Fisher, rise 0.05",
    "AbU, damped Fisher, rise 0.25",
    "AbU, ten steps, damped Fisher, rise 0.25",
    "AbU, identity, rise 0.25",
    "AbU, EK-FAC averaged, rise 0.01",
    "AbU, EK-FAC averaged, rise 0.05",
    "AbU, EK-FAC averaged, rise 0.25",
    "AbU, ten steps, EK-FAC averaged, rise 0.25",
    "AbU, EK-FAC averaged, rise 1",
    "MUCS",
    "influence, EK-FAC averaged, damping 1",
    "influence, keys not centred, EK-FAC averaged, damping 1",
    "influence, linear layers, EK-FAC, damping 0.1",
    "loss + output norm, linear layers, damping 0.1",
    "index, EK-FAC loss, damping 0.1",
    "index to second order, EK-FAC loss, damping 0.1, rise 0.1",
    "index to second order, EK-FAC loss + output norm, damping 0.1, rise 0.02",
    "index of 32 draws, EK-FAC loss + output norm, damping 0.1",
    "index of 8 draws, EK-FAC loss + output norm, damping 0.1",
    "index of 8 draws from 0.5 to 1, EK-FAC loss + output norm, damping 0.1",
    "index of 2 draws from 0.75 to 1, EK-FAC loss + output norm, damping 0.1",
    "index at 25% of the training, damping 0.1",
    "index at 50% of the training, damping 0.1",
    "index at 75% of the training, damping 0.1",
    "index, 2 checkpoints, damping 0.1",
    "index, 4 checkpoints, damping 0.1",
    "TracIn, 4 checkpoints",
    "D-TRAK, all parameters, ridge 0.1",
    "D-TRAK without own term, all parameters, ridge 0.1",
    "D-TRAK, sketch of 16384, ridge 0.1",
    "EK-FAC averaged + output norm, EK-FAC, damping 0.1",
    "EK-FAC averaged + D-TRAK, K and V, damping 0.1",
)


FIRST, OUTPUTS = "index, EK-FAC loss, damping 0.1", "index, EK-FAC output norm, damping 0.1"
"""The two scores that are added up in the choice."""

FORWARD = ("AbU, EK-FAC averaged, rise 0.05", "AbU, EK-FAC averaged, rise 0.25",
           "AbU, damped Fisher, rise 0.05")  # fmt: skip
"""Real unlearning, which may take the place of the first."""

STEPS = (
    ("AbU, damped Fisher, rise 0.25", "AbU, damped Fisher, rise 0.05"),
    ("AbU, damped Fisher, rise 1", "AbU, damped Fisher, rise 0.25"),
    ("AbU, EK-FAC averaged, rise 0.05", "AbU, EK-FAC averaged, rise 0.01"),
    ("AbU, EK-FAC averaged, rise 0.25", "AbU, EK-FAC averaged, rise 0.05"),
    ("AbU, EK-FAC averaged, rise 1", "AbU, EK-FAC averaged, rise 0.25"),
    ("AbU, ten steps, EK-FAC averaged, rise 0.25", "AbU, EK-FAC averaged, rise 0.25"),
    ("AbU, damped Fisher, rise 0.05", "AbU, damped Fisher, rise 0.01"),
    ("AbU, ten steps, damped Fisher, rise 0.25", "AbU, damped Fisher, rise 0.25"),
    ("AbU, damped Fisher, rise 0.05", "AbU, undamped Fisher, rise 0.05"),
    ("AbU, damped Fisher, rise 0.25", "AbU, identity, rise 0.25"),
    ("index to second order, EK-FAC loss, damping 0.1, rise 0.1",
     "index, EK-FAC loss, damping 0.1"),
)  # fmt: skip
"""Steps that are larger, more or along another curvature, and what they are held against."""

SHORTLIST = 200


def standardised(scores: np.ndarray) -> np.ndarray:
    return scores / scores.std(1, keepdims=True)


def two_stages(methods: dict[str, np.ndarray], forward: str) -> dict[str, np.ndarray]:
    """Returns the choice with its loss gradients replaced by real unlearning: for every example,
    and for those alone that the choice ranks highest."""
    first, outputs, real = (standardised(methods[n]) for n in (FIRST, OUTPUTS, forward))
    best = np.argsort(-methods[CHOICE], axis=1)[:, :SHORTLIST]
    mixed = first.copy()
    np.put_along_axis(mixed, best, np.take_along_axis(real, best, 1), 1)
    mixed[~np.isfinite(real).all(1)] = np.nan  # a query that was not unlearned
    return {
        f"{forward} + output norm": real + outputs,
        f"the same for the first {SHORTLIST}": mixed + outputs,
    }


def print_steps(methods: dict[str, np.ndarray], masks: np.ndarray, losses: np.ndarray,
                queries: np.ndarray) -> None:  # fmt: skip
    """Prints what each larger step gains, over those of the queries that have both."""
    for larger, smaller in STEPS:
        if larger not in methods or smaller not in methods:
            continue
        a, b = methods[larger], methods[smaller]
        asked = queries & np.isfinite(a).all(1) & np.isfinite(b).all(1)
        if asked.sum() > 1:  # an interval needs two
            gain = paired_difference(a[asked], b[asked], masks, losses[:, asked])
            print(f"{larger} over {smaller}: {text(gain, True)}, {asked.sum()} queries")


def text(e: Estimate, signed: bool = False) -> str:
    form = "+.3f" if signed else ".3f"
    return f"{e.value:{form}} [{e.low:{form}}, {e.high:{form}}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    arguments = parser.parse_args()
    benchmark = load_benchmark(arguments.work / "encoded")
    outcomes = benchmark.outcomes()
    new = np.array([n not in SEEN for n in outcomes.numbers])
    masks, losses = outcomes.masks[new], outcomes.losses[new]
    methods = stored(arguments.work, benchmark)
    if missing := [n for n in (*OTHERS, *FORWARD) if n not in methods]:
        print(f"not scored, and left out: {'; '.join(dict.fromkeys(missing))}\n")
    print(
        f"{new.sum()} halves\n\n| method | queries | LDS | the default over it |\n|---|--:|---|---|"
    )
    choice = methods[CHOICE]
    compared = {name: methods[name] for name in (CHOICE, *OTHERS) if name in methods}
    for forward in (f for f in FORWARD if f in methods):
        compared |= {f"{name}, {forward}" if name.startswith("the same") else name: scores
                     for name, scores in two_stages(methods, forward).items()}  # fmt: skip
    for name, scores in compared.items():
        asked = np.isfinite(scores).all(1)  # real unlearning was done for some of the queries
        of = losses[:, asked]
        over = "-"
        if name != CHOICE:
            over = text(paired_difference(choice[asked], scores[asked], masks, of), True)
        lds = text(lds_interval(scores[asked], masks, of))
        print(f"| {name} | {asked.sum()} | {lds} | {over} |")
    print("\nJudged queries, the halves above")
    print_steps(methods, masks, losses, ~benchmark.tuning)
    print("\nQueries to tune on, halves to tune on")
    print_steps(methods, *outcomes.half(tune=True), benchmark.tuning)


if __name__ == "__main__":
    main()
