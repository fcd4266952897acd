"""A blind test: shown a picture and five captions, which one was it made for?"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from unsee.draws import stable_seed

LETTERS = "ABCDE"
AIM = 12


@dataclass(frozen=True)
class Question:
    """One numbered picture with lettered captions.

    Attributes:
        number: from 1.
        prompt: what the picture was made for.
        captions: as many as `LETTERS`; `prompt` is one of them.
    """

    number: int
    prompt: str
    captions: tuple[str, ...]

    @property
    def answer(self) -> str:
        """The letter of the right caption."""
        return LETTERS[self.captions.index(self.prompt)]


def make_questions(prompts: Sequence[str], seed: int) -> list[Question]:
    """Shuffles the prompts and gives each four wrong captions from among the others.

    The same seed asks the same questions of every model.
    """
    order = list(prompts)
    random.Random(stable_seed(seed, "order")).shuffle(order)
    questions = []
    for number, prompt in enumerate(order, start=1):
        chance = random.Random(stable_seed(seed, "captions", prompt))
        others = sorted(p for p in prompts if p != prompt)
        captions = [prompt, *chance.sample(others, len(LETTERS) - 1)]
        chance.shuffle(captions)
        questions.append(Question(number, prompt, tuple(captions)))
    return questions


def question_sheet(questions: Sequence[Question]) -> dict[str, Any]:
    """Returns what the person who takes the test gets beside the pictures: no answers."""
    return {
        "task": "For each numbered picture, pick the letter of the caption it was made for. "
        'Write a JSON object from number to letter: {"1": "C", "2": "A", ...}.',
        "pictures": {str(q.number): dict(zip(LETTERS, q.captions, strict=True)) for q in questions},
    }


def grade(answers: Mapping[str, str], picks: Mapping[str, str]) -> dict[str, Any]:
    """Scores picks against answers; a picture without a pick counts as wrong.

    Args:
        answers: number -> letter.
        picks: number -> letter.

    Returns:
        How many are right, of how many, what guessing would give, how likely guessing is to do
        as well, and the wrong picks.

    Raises:
        ValueError: a pick for a picture that is not in the test, or one that is no letter of it.
    """
    for number, pick in picks.items():
        if number not in answers:
            raise ValueError(f"picks: the test has no picture {number!r}, only 1 to {len(answers)}")
        if not isinstance(pick, str) or pick not in tuple(LETTERS):
            raise ValueError(
                f"picks: picture {number} has {pick!r}, not one of {', '.join(LETTERS)}"
            )
    wrong = {
        k: {"pick": picks.get(k), "answer": a} for k, a in answers.items() if picks.get(k) != a
    }
    right, n, p = len(answers) - len(wrong), len(answers), 1 / len(LETTERS)
    tail = sum(math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(right, n + 1))
    return {
        "right": right,
        "of": n,
        "aim": AIM,
        "by_guessing": n * p,
        "probability_of_guessing_as_well": tail,
        "wrong": wrong,
    }
