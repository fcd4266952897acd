"""The captions that the demo model is judged on: fixed before there was a model."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

from unsee.draws import stable_seed

SELECTION_SEED = 0
"""Fixes which captions of the data set are chosen; apart from the seed of the pictures' noise."""

NOVEL = (
    "a blue heart with a star",
    "a green apple with a smiling face",
    "a red car on a road",
    "a purple cat face",
    "a yellow fish",
    "a red flag with a white star",
    "a pink house with a tree",
    "a blue bird with a heart",
    "a black dog face",
    "a green star",
    "an orange square with a white arrow",
    "a man with a red hat",
    "a woman with green hair",
    "a crying face with sunglasses",
    "a yellow flower in a blue circle",
    "a clock with a smiling face",
    "a purple circle with a white cross",
    "a tree with red apples",
    "a green book with a red heart",
    "a full moon with a hat",
)
"""Twenty compositions that are no caption of the data set."""

GROUPS = (
    ("a blue heart with a star", "a red heart with a star", "a blue circle with a star",
     "a blue heart with an arrow", "a red circle with an arrow"),
    ("a green apple with a smiling face", "a red apple with a crying face",
     "a green pear with a smiling face", "a red pear with a crying face",
     "a green apple with a heart"),
    ("a red car on a road", "a blue car on a road", "a red bus on a road",
     "a red car with a flag", "a blue bicycle on a road"),
    ("a purple cat face", "a blue dog face", "a purple rabbit face", "a green cat face",
     "a purple cat with a crown"),
    ("a yellow fish", "a green fish", "a yellow bird", "a yellow fish with a hat",
     "a red bird with a hat"),
    ("a red flag with a white star", "a blue flag with a white star",
     "a red flag with a white circle", "a green flag with a yellow star",
     "a blue flag with a yellow circle"),
    ("a pink house with a tree", "a blue house with a tree", "a pink house with a heart",
     "a red house with a flag", "a pink castle with a tree"),
    ("a blue bird with a heart", "a red bird with a heart", "a blue fish with a heart",
     "a blue bird with a hat", "a red fish with a star"),
    ("a black dog face", "a white dog face", "a black bear face", "a black dog with a red hat",
     "a white bear with a red hat"),
    ("a green star", "a green heart with a star", "a purple star", "a green triangle",
     "a purple triangle with a star"),
    ("an orange square with a white arrow", "an orange square with a white cross",
     "a blue square with a white heart", "an orange circle with a white arrow",
     "a blue circle with a white heart"),
    ("a man with a red hat", "a man with a blue hat", "a woman with a red hat",
     "a man with a red heart", "a woman with a blue heart"),
    ("a woman with green hair", "a man with green hair", "a woman with blue hair",
     "a woman with a green dress", "a man with a blue shirt"),
    ("a crying face with sunglasses", "an angry face with sunglasses",
     "a crying face with a red hat", "a smiling face with a red hat",
     "a sleeping face with a heart"),
    ("a yellow flower in a blue circle", "a red flower in a blue circle",
     "a yellow flower in a green square", "a yellow star in a blue circle",
     "a red star in a green square"),
    ("a clock with a smiling face", "a clock with a crying face", "a balloon with a smiling face",
     "a clock with a heart", "a balloon with a heart"),
    ("a purple circle with a white cross", "a green circle with a white cross",
     "a purple circle with a white star", "a purple square with a white cross",
     "a green square with a white star"),
    ("a tree with red apples", "a tree with yellow flowers", "a basket with red apples",
     "a tree with a red heart", "a basket with yellow flowers"),
    ("a green book with a red heart", "a green book with a yellow star",
     "a blue book with a yellow star", "a green envelope with a red heart",
     "a blue envelope with a red heart"),
    ("a full moon with a hat", "a full moon with sunglasses", "a sun with a hat",
     "a full moon with a crown", "a sun with a crown"),
)  # fmt: skip
"""Twenty groups of five compositions for the blind test, a hundred in all, none of them a caption
of the data set: chosen before a picture of any group was looked at."""


def plain(caption: str) -> str:
    """Returns a caption in lower case, without article and outer blanks, for comparison."""
    words = caption.lower().split()
    return " ".join(words[1:] if words and words[0] in ("a", "an", "the") else words)


def check_novel(prompts: Sequence[str], captions: Sequence[str]) -> None:
    """Refuses prompts that the data set has a picture for.

    Raises:
        ValueError: a prompt is a caption, but for case and article, or appears twice.
    """
    known = {plain(caption): caption for caption in captions}
    for prompt in prompts:
        if plain(prompt) in known:
            raise ValueError(
                f"novel prompt {prompt!r} is the caption {known[plain(prompt)]!r} of the data "
                "set: choose another"
            )
    if len({plain(prompt) for prompt in prompts}) < len(prompts):
        raise ValueError("novel prompts: one of them appears twice")


def stratified_rows(
    ids: Sequence[str], captions: Sequence[str], categories: Sequence[str], n: int
) -> list[int]:
    """Chooses `n` examples, each category in proportion to its size.

    An example's place in its category is a hash of its id, so the choice does not depend on the
    order of the data set. Captions that several examples share are left out: they have no picture
    of their own. The order runs through the categories evenly, hence the first forty of two
    hundred are spread over the categories as well as the two hundred are.

    Args:
        ids: of all examples.
        captions: of all examples.
        categories: of all examples.
        n: how many to choose.

    Returns:
        `n` positions in `ids`.

    Raises:
        ValueError: there are fewer examples with a caption of their own than `n`.
    """
    shared = Counter(captions)
    members: dict[str, list[int]] = defaultdict(list)
    for row, (caption, category) in enumerate(zip(captions, categories, strict=True)):
        if shared[caption] == 1:
            members[category].append(row)
    available = sum(len(rows) for rows in members.values())
    if available < n:
        raise ValueError(f"cannot choose {n} captions: {available} examples have their own caption")
    placed = []
    for category, count in _quotas({c: len(rows) for c, rows in members.items()}, n).items():
        rows = sorted(members[category], key=lambda row: stable_seed(SELECTION_SEED, ids[row]))
        placed += [((i + 0.5) / count, category, row) for i, row in enumerate(rows[:count])]
    return [row for _, _, row in sorted(placed)]


def _quotas(sizes: dict[str, int], n: int) -> dict[str, int]:
    """Shares `n` out in proportion to `sizes`: whole parts first, then the largest remainders."""
    total = sum(sizes.values())
    quotas = {name: n * size // total for name, size in sizes.items()}
    by_remainder = sorted(sizes, key=lambda name: (-(n * sizes[name] % total), name))
    for name in by_remainder[: n - sum(quotas.values())]:
        quotas[name] += 1
    return quotas
