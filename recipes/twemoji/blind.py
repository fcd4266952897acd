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


def make_questions(groups: Sequence[Sequence[str]], seed: int) -> list[Question]:
    """Makes one question of each group of captions; chance says which of them is the right one.

    Every caption is in one group only, and each of a group is the right one with equal
    probability. So neither the wording nor the answers to other questions tell anything: every
    picture has to be answered from the picture.

    The same seed asks the same questions of every model.

    Raises:
        ValueError: a group has not as many captions as there are letters, or a caption comes
            twice.
    """
    every = [caption for group in groups for caption in group]
    if any(len(group) != len(LETTERS) for group in groups) or len(set(every)) < len(every):
        raise ValueError(f"a group needs {len(LETTERS)} captions that are in no other group")
    order = list(groups)
    random.Random(stable_seed(seed, "order")).shuffle(order)
    questions = []
    for number, group in enumerate(order, start=1):
        captions = list(group)
        random.Random(stable_seed(seed, "letters", *group)).shuffle(captions)
        prompt = random.Random(stable_seed(seed, "right", *group)).choice(captions)
        questions.append(Question(number, prompt, tuple(captions)))
    return questions


def question_text(questions: Sequence[Question]) -> str:
    """Returns what the person who takes the test gets beside the pictures: no answers."""
    lines = [
        "Each picture question_NN.png was made by a small model for one of the five captions "
        "beside it.",
        "Say which. The other four were not used for any picture, no caption comes twice, and the "
        "right one of",
        "each five was drawn by lot: no answer helps with another. Write a JSON object from number "
        "to letter,",
        'with a pick for every picture: {"1": "C", "2": "A", ...}.',
    ]
    for question in questions:
        lines += ["", f"{question.number}."]
        lines += [f"   {x}  {c}" for x, c in zip(LETTERS, question.captions, strict=True)]
    return "\n".join(lines) + "\n"


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
