"""A sketch: a gradient in any parameters, projected at random onto a row of some thousand numbers.

Token factors hold the whole gradient of layers that read nothing but text. Of any other layer
(convolutions, self-attention, a transformer's joint attention) an average over draws has no such
form, and a row for each example is all that can be kept. Every weight is added to one place of the
row, chosen at random, with a random sign (a count sketch, Charikar et al. 2002): inner products of
rows are those of the gradients, in expectation over places and signs, for one addition a weight.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..data.batches import gather
from ..data.latents import EncodedDataset
from ..draws import Draws, stable_seed
from ..gradients import wide
from ..models.base import Denoiser
from ..query import Query
from .factors import HALVES, Measure, Storage, mean_square


@dataclass(frozen=True)
class Sketch:
    """What a row holds.

    Attributes:
        length: numbers in a row. What is lost is noise, the less the longer the row
            (docs/benchmark.md has what that costs).
        parameters: whose gradient, a preset or patterns; those of the factors do not matter here.
        measures: what is differentiated, one row for each.
        seed: of places and signs.
    """

    length: int = 16384
    parameters: str | tuple[str, ...] = "all"
    measures: tuple[Measure, ...] = ("output_norm",)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ValueError(f"sketch: length = {self.length} must be at least 1")
        if not self.measures or set(self.measures) - {"loss", "output_norm"}:
            raise ValueError(
                f"sketch: measures = {self.measures!r}; use a tuple of loss, output_norm or both"
            )
        if len(set(self.measures)) < len(self.measures):
            raise ValueError(f"sketch: measures = {self.measures!r} name one twice")

    @classmethod
    def of(cls, about: dict) -> Sketch:
        """Returns the sketch of a manifest's record."""
        chosen = about["parameters"]
        return cls(
            about["length"], chosen if isinstance(chosen, str) else tuple(chosen),
            tuple(about["measures"]), about["seed"],
        )  # fmt: skip


@dataclass(frozen=True)
class StoredRows:
    """Rows as they are stored.

    Attributes:
        values: [n, 2, length] int8, float16 or float32, in two halves of the draws.
        scales: [n, 2] float32; a row is its values times its scale.
    """

    values: Tensor
    scales: Tensor

    def select(self, places: Sequence[int]) -> StoredRows:
        """Returns some of the examples."""
        return StoredRows(self.values[list(places)], self.scales[list(places)])


class Sketcher:
    """Makes the rows of examples and queries; its places and signs take five bytes a weight.

    Args:
        model: whose gradients; its own selection does not matter.
        sketch: what a row holds.

    Raises:
        ValueError: the sketch's parameters match nothing.
    """

    def __init__(self, model: Denoiser, sketch: Sketch) -> None:
        self.sketch = sketch
        self.model = model.selecting(sketch.parameters)
        self._places: list[Tensor] = []
        self._signs: list[Tensor] = []
        for name, parameter in self.model.parameters.items():
            # Keyed by name: what else is selected moves no weight to another place.
            key = stable_seed(sketch.seed, "sketch", name)
            generator = np.random.Generator(np.random.Philox(key=key))
            count = parameter.numel()
            places = generator.integers(0, sketch.length, count, dtype=np.int32)
            signs = generator.integers(0, 2, count, dtype=np.int8) * 2 - 1
            device = wide(torch.empty(0, device=parameter.device)).device
            self._places.append(torch.from_numpy(places).to(device))
            self._signs.append(torch.from_numpy(signs).to(device))

    def examples(
        self, encoded: EncodedDataset, draws: Draws, batch_size: int
    ) -> dict[Measure, Tensor]:
        """Returns measure -> rows [n, 2, length] float32: means over captions and half the draws.

        One backward pass for each half and measure: a gradient in all weights is too large to be
        held for several examples.

        Raises:
            ValueError: a gradient that is not finite.
        """
        found: dict[Measure, Tensor] = {
            m: torch.zeros(len(encoded.ids), HALVES, self.sketch.length)
            for m in self.sketch.measures
        }
        with self.model.gradients_on():
            for row, identifier in enumerate(encoded.ids):
                count = encoded.caption_counts[row]
                for caption in range(count):
                    batch = gather(encoded, draws, [(row, row, caption)])
                    for measure, value in self._halves(batch, None, batch_size)[1].items():
                        found[measure][row] += (value / count).float()
                for rows in found.values():
                    if not rows[row].isfinite().all():
                        raise ValueError(
                            f"the gradient of example {identifier!r} is not finite: check the "
                            "model with `unsee doctor`; a float16 model may need float32"
                        )
        return found

    def query(
        self, query: Query, draws: Draws, batch_size: int
    ) -> tuple[float, dict[Measure, Tensor]]:
        """Returns a query's loss, and measure -> rows [2, length] float64.

        With a mask, averages are over its cells.

        Raises:
            ValueError: a gradient that is not finite.
        """
        timesteps, noise = draws.of(query.id, tuple(query.latents.shape))
        batch = query.latents[None], query.text[None], timesteps[None], noise[None]
        with self.model.gradients_on():
            loss, found = self._halves(batch, query.mask, batch_size)
        if not all(rows.isfinite().all() for rows in found.values()):
            raise ValueError(
                f"the gradient of the query {query.id!r} is not finite: check the model with "
                "`unsee doctor`; a float16 model may need float32"
            )
        return loss, found

    def _halves(
        self, batch: tuple[Tensor, Tensor, Tensor, Tensor], mask: Tensor | None, batch_size: int
    ) -> tuple[float, dict[Measure, Tensor]]:
        """Returns the mean loss, and measure -> [2, length] float64 on the CPU, of one example."""
        latents, text, timesteps, noise = batch
        found: dict[Measure, Tensor] = {
            m: torch.zeros(HALVES, self.sketch.length, dtype=torch.float64)
            for m in self.sketch.measures
        }
        total = 0.0
        for half in range(HALVES):
            t, e = timesteps[:, half::HALVES], noise[:, half::HALVES]
            for first in range(0, t.shape[1], batch_size):
                part = slice(first, first + batch_size)
                outputs, targets = self.model.predict(latents, text, t[:, part], e[:, part])
                losses = mean_square(outputs - targets, mask)
                total += float(wide(losses.detach()).sum())
                for number, measure in enumerate(self.sketch.measures):
                    values = losses if measure == "loss" else mean_square(outputs, mask)
                    if not values.requires_grad:
                        raise ValueError(
                            f"sketch: the model's output does not depend on the parameters "
                            f"{self.sketch.parameters!r}; choose others, or `all`"
                        )
                    # Not the mean of a part: the last one may be smaller.
                    gradients = torch.autograd.grad(
                        values.sum() / t.shape[1], list(self.model.parameters.values()),
                        retain_graph=number + 1 < len(self.sketch.measures), allow_unused=True,
                    )  # fmt: skip
                    found[measure][half] += self._project(gradients)
        return total / timesteps.shape[1], found

    def _project(self, gradients: Sequence[Tensor | None]) -> Tensor:
        """Returns [length] float64."""
        device = self._places[0].device
        # A CPU adds one after another. CUDA adds in any order: float64 hides it.
        dtype = torch.float64 if device.type == "cuda" else torch.float32
        total = torch.zeros(self.sketch.length, dtype=torch.float64, device=device)
        for gradient, places, signs in zip(gradients, self._places, self._signs, strict=True):
            if gradient is not None:
                part = torch.zeros(self.sketch.length, dtype=dtype, device=device)
                flat = gradient.detach().flatten().to(device, dtype)
                total += part.index_add_(0, places, flat * signs)
        return total.cpu()


def sketch_settings(model: Denoiser, sketch: Sketch) -> dict:
    """Returns what fixes the rows, for a manifest."""
    weights = sum(p.numel() for p in model.selecting(sketch.parameters).parameters.values())
    return {**dataclasses.asdict(sketch), "weights": weights}


def quantise_rows(rows: Tensor, storage: Storage) -> StoredRows:
    """Rounds rows [..., length], relative to the largest number of each; scales are [...]."""
    largest = rows.float().abs().amax(-1)
    if storage == "float32":
        return StoredRows(rows.float(), torch.ones_like(largest))
    scales = (largest / (127 if storage == "int8" else 1)).clamp_min(
        torch.finfo(torch.float32).tiny
    )
    divided = rows.float() / scales[..., None]
    return StoredRows(
        divided.round().to(torch.int8) if storage == "int8" else divided.half(), scales
    )


def dequantise_rows(stored: StoredRows) -> Tensor:
    """Returns rows [..., length] float32."""
    return stored.values.float() * stored.scales[..., None]
