"""Timesteps and noise that belong to an example, never to the batch it happens to be in."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor


def stable_seed(*parts: object) -> int:
    """Returns a 63-bit seed that is the same on every machine for the same parts."""
    text = "\x1f".join(f"{type(p).__name__}:{p}" for p in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def random_functionals(example_id: str, caption: int, shape: tuple[int, ...]) -> Tensor:
    """Returns standard normal numbers [*shape] float32, one functional of the output for each draw.

    Gradients of a functional with such weights have Jᵀ J, summed over the output's elements, as
    their second moment. Keyed as draws are, but the same for all seeds.
    """
    key = stable_seed("gauss-newton", example_id, caption)
    normal = np.random.Generator(np.random.Philox(key=key)).standard_normal(shape)
    return torch.from_numpy(normal.astype(np.float32))


Timesteps = Literal["stratified", "grid"] | tuple[float, float]
"""How timesteps are chosen, see `Draws`."""


class DrawSource(Protocol):
    """Anything that gives an example its timesteps and noise."""

    @property
    def n(self) -> int:
        """Draws for each example and caption."""
        ...

    def of(
        self, example_id: str, shape: tuple[int, ...], caption: int = 0, flipped: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Returns timesteps [n] int64 and noise [n, *shape] float32, on the CPU."""
        ...


@dataclass(frozen=True)
class Draws:
    """`n` draws of (timestep, noise) for every example and caption.

    A draw is keyed by a hash of (seed, example id, draw number), so it does not move with batch
    size, shard, subset, order, device or number of workers. Draw numbers of the second caption
    follow those of the first. A flipped view gets the same noise, itself flipped: original and
    mirror image then differ in what is in the picture, not in luck.

    Attributes:
        seed: two seeds give independent draws.
        n: draws for each example and caption.
        timesteps: `"stratified"` draws one timestep uniformly from each of `n` equal parts of
            the noise schedule; `"grid"` takes 0, T/n, 2T/n ... as the AbU paper does; a pair of
            shares, as (0.5, 1.0), stratifies that part of the schedule (0 is no noise).
        num_train_timesteps: T, the length of the model's training schedule.
    """

    seed: int = 0
    n: int = 10
    timesteps: Timesteps = "stratified"
    num_train_timesteps: int = 1000

    def __post_init__(self) -> None:
        if isinstance(self.timesteps, list | tuple):  # a list where it was read from JSON
            part = tuple(float(share) for share in self.timesteps)
            if len(part) != 2 or not 0 <= part[0] < part[1] <= 1:
                raise ValueError(
                    f"draws: timesteps = {self.timesteps} is no part of the schedule; give two "
                    "rising shares from 0 to 1"
                )
            object.__setattr__(self, "timesteps", part)
        elif self.timesteps not in ("stratified", "grid"):
            raise ValueError(
                f"draws: timesteps = {self.timesteps!r} is not 'stratified', 'grid' or a pair of "
                "shares"
            )
        low, high = self._bounds
        if not 1 <= self.n <= high - low:
            where = "num_train_timesteps" if high - low == self.num_train_timesteps else "the part"
            raise ValueError(f"draws: n = {self.n} must be from 1 to {where} = {high - low}")

    @property
    def _bounds(self) -> tuple[int, int]:
        """First timestep, and the one behind the last."""
        first, last = (0.0, 1.0) if isinstance(self.timesteps, str) else self.timesteps
        return round(first * self.num_train_timesteps), round(last * self.num_train_timesteps)

    def of(
        self, example_id: str, shape: tuple[int, ...], caption: int = 0, flipped: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Returns timesteps [n] int64 and noise [n, *shape] float32, on the CPU.

        Args:
            example_id: the example (or query) that the draws belong to.
            shape: shape of one latent.
            caption: position of the caption among the example's captions.
            flipped: mirrors the noise left to right (last axis).
        """
        timesteps = torch.empty(self.n, dtype=torch.int64)
        low, high = self._bounds
        noise = np.empty((self.n, *shape), dtype=np.float32)
        for d in range(self.n):
            key = stable_seed(self.seed, example_id, caption * self.n + d)
            # Philox is counter based, and numpy's float32 ziggurat is table driven: the same
            # numbers on every processor, which torch's vectorised Box-Muller does not promise.
            generator = np.random.Generator(np.random.Philox(key=key))
            place = 0.0 if self.timesteps == "grid" else float(generator.random())
            timestep = low + int((d + place) * (high - low) / self.n)
            timesteps[d] = min(timestep, high - 1)  # d + place may round up
            generator.standard_normal(dtype=np.float32, out=noise[d])
        tensor = torch.from_numpy(noise)
        return timesteps, tensor.flip(-1) if flipped else tensor
