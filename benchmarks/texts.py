"""Text states of real sentences, for a text encoder of any width.

What an index keeps of an example depends on its text: captions are mostly padding, and words that
many share. Random states would hide that.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from unsee.data.dataset import load_dataset
from unsee.training.pipeline import load_text_encoder

WORDINGS = (
    "a photo of {a} next to {b} in the late afternoon",
    "{b} and {a} can be seen together on a wooden table",
    "someone has left {a} close to {b}, beside the window",
    "there is {b} with {a} behind it in this picture",
    "a close view of {a} while {b} stands to one side",
)
"""Of one made-up picture, as long as captions of MS-COCO (some eleven words)."""

BATCH = 64


def sentences(count: int, captions: int, seed: int = 0) -> list[str]:
    """Returns the captions of `count` pictures, one after another: names of emoji, or several
    sentences with two of them."""
    names = [c[0] for c in load_dataset("twemoji").captions]
    generator = torch.Generator().manual_seed(seed)
    order = torch.randint(len(names), (2, count), generator=generator).tolist()
    if captions == 1:
        return [names[a] for a in order[0]]
    return [
        WORDINGS[c % len(WORDINGS)].format(a=names[a], b=names[b])
        for a, b in zip(*order, strict=True)
        for c in range(captions)
    ]


@cache
def _lifted(width: int, to: int) -> Tensor:
    """Returns a fixed matrix [width, to] with orthonormal rows: inner products stay."""
    if width == to:
        return torch.eye(width)
    generator = torch.Generator().manual_seed(0)
    return torch.linalg.qr(torch.randn(to, width, generator=generator)).Q.T.contiguous()


@torch.no_grad()
def text_states(texts: list[str], tokens: int, width: int) -> Tensor:
    """Returns states [len(texts), tokens, width] of the sentence encoder, padding included, turned
    into the width that is asked for."""
    encoder, tokenizer = load_text_encoder("minilm", tokens)
    parts, threads = [], torch.get_num_threads()
    torch.set_num_threads(1)  # an index that was kept is then found again with any number of them
    try:
        for first in range(0, len(texts), BATCH):
            batch = tokenizer(
                texts[first : first + BATCH], padding="max_length", truncation=True,
                max_length=tokens, return_tensors="pt",
            )  # fmt: skip
            states = encoder(**batch).last_hidden_state
            parts.append(states @ _lifted(states.shape[-1], width))
    finally:
        torch.set_num_threads(threads)
    return torch.cat(parts)
