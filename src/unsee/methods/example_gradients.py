"""Gradients of training examples, averaged over draws: what first-order methods are made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..data.batches import gather
from ..data.latents import EncodedExamples
from ..draws import DrawSource, random_functionals, stable_seed
from ..files import settings_key, write_atomically
from ..index.factors import Measure, gauss_newton, mean_square
from ..models.base import Denoiser
from ..progress import Progress
from ..query import Query
from .forward import load_array, save_array


@dataclass(frozen=True)
class GradientMatrix:
    """One row of numbers for each example: its gradient in all selected parameters.

    Attributes:
        ids: of the examples.
        names: parameters, in the order of the columns.
        shapes: of the parameters.
        shards: [n, P] float32 each, in the order of `ids`; memory-mapped where they come from a
            cache.
    """

    ids: list[str]
    names: list[str]
    shapes: list[tuple[int, ...]]
    shards: list[np.ndarray]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def slices(self) -> dict[str, slice]:
        """Columns of each parameter."""
        ends = np.cumsum([0, *(int(np.prod(s)) for s in self.shapes)]).tolist()
        return {n: slice(ends[i], ends[i + 1]) for i, n in enumerate(self.names)}

    def of(self, name: str) -> Tensor:
        """Returns the gradients [n, *shape] float32 of one parameter."""
        columns = self.slices[name]
        rows = np.concatenate([np.asarray(s[:, columns]) for s in self.shards])
        return torch.from_numpy(rows).unflatten(1, self.shapes[self.names.index(name)])

    def only(self, names: Sequence[str]) -> GradientMatrix:
        """Returns the matrix of some of the parameters, copied into memory.

        Raises:
            ValueError: a name that is not there.
        """
        missing = [n for n in names if n not in self.names]
        if missing:
            raise ValueError(f"gradients: none of {missing[0]!r}; they are of {len(self.names)}")
        slices = self.slices
        shards = [np.concatenate([s[:, slices[n]] for n in names], axis=1) for s in self.shards]
        shapes = [self.shapes[self.names.index(n)] for n in names]
        return GradientMatrix(self.ids, list(names), shapes, shards)

    def products(self, other: GradientMatrix) -> np.ndarray:
        """Returns the inner products [n, m] float64 of the rows of two matrices."""
        if self.names != other.names or self.shapes != other.shapes:
            raise ValueError("gradients: inner products of two different sets of parameters")
        blocks = [
            [torch.from_numpy(np.asarray(a)) @ torch.from_numpy(np.asarray(b)).T
             for b in other.shards]
            for a in self.shards
        ]  # fmt: skip
        return torch.cat([torch.cat(row, dim=1) for row in blocks]).double().numpy()


class QueryExamples:
    """Queries, seen as examples with one caption each."""

    def __init__(self, queries: Sequence[Query]) -> None:
        if not queries:
            raise ValueError("there is no query")
        self.queries = list(queries)
        self.ids = [q.id for q in queries]
        self.caption_counts = [1] * len(queries)
        self.has_flips = True

    @property
    def fingerprint(self) -> str:
        """A hash of what the gradients depend on."""
        parts = [t.contiguous().numpy().tobytes().hex() for q in self.queries
                 for t in (q.latents, q.text, q.mask) if t is not None]  # fmt: skip
        return f"{stable_seed(*self.ids, *parts):016x}"

    def latents(self, rows: Sequence[int], flipped: bool = False) -> Tensor:
        """Returns [n, C, h, w] float32."""
        latents = torch.stack([self.queries[r].latents for r in rows])
        return latents.flip(-1) if flipped else latents

    def text(self, rows: Sequence[int], caption: int) -> Tensor:
        """Returns [n, T, D] float32."""
        return torch.stack([self.queries[r].text for r in rows])


def example_gradients(
    model: Denoiser,
    data: EncodedExamples,
    draws: DrawSource,
    *,
    measure: Measure = "loss",
    batch_size: int = 64,
    shard_size: int = 128,
    cache: Path | None = None,
) -> GradientMatrix:
    """Differentiates the mean over draws and captions, one backward pass per example and caption.

    Args:
        model: its selected parameters are differentiated.
        data: examples.
        draws: their timesteps and noise.
        measure: what is differentiated.
        batch_size: passes at once.
        shard_size: examples per file of `cache`.
        cache: folder for finished shards; a second call with the same settings continues there.

    Raises:
        ValueError: a gradient is not finite; names the example.
    """
    names = list(model.parameters)
    shapes = [tuple(p.shape) for p in model.parameters.values()]
    width = sum(p.numel() for p in model.parameters.values())
    settings = {"model": model.fingerprint(), "data": data.fingerprint, "draws": repr(draws),
                "measure": measure, "names": names, "shard_size": shard_size}  # fmt: skip
    folder = cache / f"gradients-{measure}-{settings_key(settings)}" if cache else None
    starts = range(0, len(data.ids), shard_size)
    shards = []
    bar = Progress(len(data.ids), f"gradients ({measure})", "example")
    for number, first in enumerate(starts):
        rows = range(first, min(first + shard_size, len(data.ids)))
        path = folder / f"{number:05d}-of-{len(starts):05d}.npy" if folder else None
        if path is not None and path.is_file():
            bar.skip(len(rows))
            shards.append(load_array(path, (len(rows), width), mapped=True))
            continue
        shard = np.empty((len(rows), width), dtype=np.float32)
        with model.gradients_on():
            for place, row in enumerate(rows):
                shard[place] = _gradient(model, data, draws, row, measure, batch_size)
                bar.update()
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, lambda p, shard=shard: save_array(p, shard))
            shard = load_array(path, shard.shape, mapped=True)
        shards.append(shard)
    bar.close()
    return GradientMatrix(list(data.ids), names, shapes, shards)


def _gradient(
    model: Denoiser,
    data: EncodedExamples,
    draws: DrawSource,
    row: int,
    measure: Measure,
    batch_size: int,
) -> np.ndarray:
    """Returns [P] float32."""
    captions = data.caption_counts[row]
    mask = data.queries[row].mask if isinstance(data, QueryExamples) else None
    total: list[Tensor] = []
    for caption in range(captions):
        latents, text, timesteps, noise = gather(data, draws, [(0, row, caption)])
        functional = (
            random_functionals(data.ids[row], caption, tuple(noise.shape))
            if measure == "gauss_newton"
            else None
        )
        for d in range(0, draws.n, batch_size):
            part = slice(d, d + batch_size)
            values = _values(
                model, latents, text, timesteps[:, part], noise[:, part], measure,
                None if functional is None else functional[:, part], mask,
            )  # fmt: skip
            # An average of random functionals has the variance of one draw when it is divided
            # by the root of their number.
            count = draws.n * captions if measure != "gauss_newton" else (draws.n * captions) ** 0.5
            got = _differentiated(model.parameters, values.sum() / count)
            total = [a + b for a, b in zip(total, got, strict=True)] if total else got
    flat = torch.cat([g.flatten() for g in total]).float().cpu().numpy()
    if not np.isfinite(flat).all():
        raise ValueError(
            f"the gradient of example {data.ids[row]!r} is not finite: check the model with "
            "`unsee doctor`; a float16 model may need float32"
        )
    return flat


def _values(
    model: Denoiser, latents: Tensor, text: Tensor, timesteps: Tensor, noise: Tensor,
    measure: Measure, functional: Tensor | None, mask: Tensor | None,
) -> Tensor:  # fmt: skip
    """Returns [1, D] numbers to differentiate, of the cells of the mask."""
    if measure == "loss":
        return model.loss(latents, text, timesteps, noise, mask)
    outputs, _ = model.predict(latents, text, timesteps, noise)
    if measure == "output_norm":
        return mean_square(outputs, mask)
    assert functional is not None
    if mask is not None:
        raise ValueError("random functionals are of the whole output: ask without a box")
    return gauss_newton(outputs, functional)


def _differentiated(parameters: Mapping[str, torch.nn.Parameter], value: Tensor) -> list[Tensor]:
    got = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
    return [torch.zeros_like(p) if g is None else g
            for p, g in zip(parameters.values(), got, strict=True)]  # fmt: skip
