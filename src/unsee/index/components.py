"""An example's gradient as few components, each a factor and a direction of the text.

The gradient in layer l is the sum over tokens of M_l[t] ⊗ c[t]. A caption has few directions that
matter, padding and all, and they are the same for every layer: the gradients of all layers,
beside one another, are a matrix [width, channels of all layers] of low rank. Its leading left
singular vectors, orthonormal, take the place of the tokens, and what they leave out is known.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .factors import Layer, Quantised, Storage, quantise

DIFFERENCE_WEIGHT = 0.3
"""Of half the difference of the two halves of draws, beside their mean. Only standard errors are
made of it: it may be as much coarser."""

ROUNDING = 1e-13
"""Share of a squared gradient that is left out even where nothing may be."""

RANK_TOLERANCE = 1e-6
"""Of squared singular values of a text, relative to the largest, when tokens are made again."""

CHUNK_NUMBERS = 20_000_000
"""float64 numbers that exist at the same time while gradients are decomposed."""


@dataclass(frozen=True)
class Components:
    """Gradients of n examples: that of an example is the sum over its R_i rows of factor ⊗ text.

    Attributes:
        factors: [views, R, 2, channels] for the R = ΣR_i rows of all, in two halves of the draws.
        text: [views, R, width] float32 or float16.
        counts: [n] int64, the R_i; the same in all views.
    """

    factors: Quantised
    text: Tensor
    counts: Tensor

    @property
    def owners(self) -> Tensor:
        """[R] int64, the example of each row."""
        return torch.arange(len(self.counts)).repeat_interleave(self.counts)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What is stored, by name."""
        return {"values": self.factors.values, "scales": self.factors.scales, "text": self.text,
                "counts": self.counts}  # fmt: skip

    @classmethod
    def of(cls, tensors: dict[str, Tensor]) -> Components:
        """Returns what `tensors` holds."""
        factors = Quantised(tensors["values"], tensors["scales"])
        return cls(factors, tensors["text"], tensors["counts"])

    @classmethod
    def joined(cls, parts: Sequence[Components]) -> Components:
        """Returns the components of several lists of examples, one behind another."""
        if len(parts) == 1:
            return parts[0]
        values, scales, text = (
            torch.cat(list(every), dim=1)
            for every in zip(*((p.factors.values, p.factors.scales, p.text) for p in parts),
                             strict=True)
        )  # fmt: skip
        return cls(Quantised(values, scales), text, torch.cat([p.counts for p in parts]))

    def select(self, keep: Tensor) -> Components:
        """Returns the components of some examples, by a mask [n]."""
        rows = keep.repeat_interleave(self.counts)
        factors = Quantised(self.factors.values[:, rows], self.factors.scales[:, rows])
        return Components(factors, self.text[:, rows], self.counts[keep])

    def groups(self, most: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yields examples of about as many rows each, as rectangles.

        Args:
            most: examples in a rectangle.

        Yields:
            examples [r], rows [r, length] of each, and which of them are real [r, length]; others
            stand in for rows that an example does not have.
        """
        if not len(self.counts):
            return
        starts = self.counts.cumsum(0) - self.counts
        step = max(1, int(self.counts.max()) // 4)
        lengths = (self.counts + step - 1) // step * step
        for length in lengths.unique().tolist():
            for part in (lengths == length).nonzero()[:, 0].split(most):
                places = torch.arange(length)
                real = places < self.counts[part, None]
                yield part, torch.where(real, starts[part, None] + places, 0), real


def decompose(
    factors: Tensor, text: Tensor, captions: Sequence[int], layers: Sequence[Layer],
    tolerance: float, storage: Storage, difference_weight: float = DIFFERENCE_WEIGHT,
) -> Components:  # fmt: skip
    """Returns the components of n examples, their captions averaged.

    Args:
        factors: token factors [views, C, 2, T, channels] of C captions, those of an example behind
            one another.
        text: [C, T, width] text states.
        captions: [n] of each example.
        layers: whose channels they are.
        tolerance: share of an example's squared gradient, averaged over the layers that have one,
            that may be left out.
        storage: of the factors; text is kept in float16, or float32 with float32.
        difference_weight: of half the difference of the halves, beside their mean.
    """
    sizes = torch.tensor(captions, dtype=torch.long)
    starts = sizes.cumsum(0) - sizes
    views, channels, width = len(factors), factors.shape[-1], text.shape[-1]
    found: list[tuple[Tensor, Tensor]] = [(torch.empty(0), torch.empty(0))] * len(sizes)
    for count in sizes.unique().tolist():
        tokens = count * text.shape[1]
        chunk = max(1, CHUNK_NUMBERS // (views * tokens * (5 * channels + tokens) + tokens * width))
        for part in (sizes == count).nonzero()[:, 0].split(chunk):
            rows = starts[part, None] + torch.arange(count)
            of = factors[:, rows].transpose(2, 3).flatten(3, 4).double() / count
            basis, inside = _text_basis(text[rows].flatten(1, 2).double())
            vectors, kept = _leading(
                inside.mT[None, :, None] @ of, layers, tolerance, difference_weight
            )
            for i, example in enumerate(part.tolist()):
                u = vectors[:, i, :, : kept[i]].mT  # [views, r, tokens]
                sides = (u[:, None] @ inside[i].mT @ of[:, i]).transpose(1, 2), u @ basis[i]
                found[example] = sides[0].float(), sides[1].float()
    stored = torch.float32 if storage == "float32" else torch.float16
    rows_of = [
        torch.cat([side[i] for side in found], dim=1) if found else torch.empty(views, 0, *shape)
        for i, shape in enumerate(((2, channels), (width,)))
    ]
    counts = torch.tensor([side[1].shape[1] for side in found], dtype=torch.long)
    return Components(quantise(rows_of[0], layers, storage), rows_of[1].to(stored), counts)


def _text_basis(states: Tensor) -> tuple[Tensor, Tensor]:
    """Returns orthonormal directions of states [n, T, width], and what makes factors of them.

    The directions are [n, T, width], zero where there are fewer than T; the factors are [n, T, T],
    transposed, times those of the tokens.
    """
    squares, vectors = torch.linalg.eigh(states @ states.mT)
    there = squares > torch.finfo(torch.float32).eps ** 2 * squares[:, -1:]
    roots = squares.clamp_min(0).sqrt() * there
    inverse = torch.where(there, 1 / roots, 0.0)
    return (vectors * inverse[:, None]).mT @ states, vectors * roots[:, None]


def _leading(
    sides: Tensor, layers: Sequence[Layer], tolerance: float, difference_weight: float
) -> tuple[Tensor, list[int]]:
    """Returns left singular vectors [views, n, T, T] of [views, n, 2, T, channels].

    The leading ones come first; also returned is how many each example needs.
    """
    mean, difference = sides.mean(2), (sides[:, :, 0] - sides[:, :, 1]) / 2
    sizes = [layer.channels for layer in layers]
    gram, total = torch.zeros(()), torch.zeros(())
    # Each layer counts alike: curvature divides by its size.
    for m, d in zip(mean.split(sizes, dim=-1), difference.split(sizes, dim=-1), strict=True):
        norm = m.square().sum((2, 3))
        scale = torch.where(norm > 0, 1 / norm, 0.0)[..., None, None]
        gram = gram + scale * (m @ m.mT + difference_weight**2 * d @ d.mT)
        total = total + (norm > 0)
    values, vectors = torch.linalg.eigh(gram)
    left_out = values.clamp_min(0).cumsum(-1).flip(-1)  # where so many are kept, less one
    needed = (left_out > max(tolerance, ROUNDING) * total[..., None]).sum(-1)
    return vectors.flip(-1), needed.amax(0).clamp_min(1).tolist()


def token_factors(
    factors: Tensor, directions: Tensor, counts: Tensor, text: Tensor, captions: Sequence[int]
) -> Tensor:
    """Makes the token factors again, as far as the components have them.

    Of all factors that give the same gradients these are the smallest: tokens that are alike have
    alike ones, as in the network.

    Args:
        factors: [R, channels] of the rows of n examples.
        directions: [R, width] of the text.
        counts: [n] rows of each example.
        text: [C, T, width] of their captions.
        captions: [n] of each example.

    Returns:
        [C, T, channels] float32, of the mean over captions.
    """
    parts = []
    every = zip(factors.split(counts.tolist()), directions.split(counts.tolist()),
                text.split(list(captions)), strict=True)  # fmt: skip
    for factor, direction, states in every:
        tokens = states.flatten(0, 1).double()
        inverse = torch.linalg.pinv(tokens @ tokens.mT, rtol=RANK_TOLERANCE, hermitian=True)
        made = inverse @ (tokens @ direction.double().mT) @ factor.double()
        parts.append(made.float().unflatten(0, states.shape[:2]))
    return torch.cat(parts)
