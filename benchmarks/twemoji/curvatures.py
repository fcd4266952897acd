"""Curvatures of the benchmark's model in the keys and values of cross-attention, for score.py and
unlearn.py; kept in WORK/curvature."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from unsee.curvature.diagonal import DiagonalFisher
from unsee.curvature.kfac import EKFAC, KFAC, KroneckerCovariances, kronecker_covariances
from unsee.data.batches import gather
from unsee.draws import Draws
from unsee.evaluation.twemoji import Benchmark
from unsee.gradients import GradientKind, per_example_gradients
from unsee.index.fisher import fit_diagonal_fisher
from unsee.methods.example_gradients import GradientMatrix
from unsee.models.unet import UNetDenoiser

Fitted = DiagonalFisher | KFAC | EKFAC

FIT_EXAMPLES, FIT_DRAWS = 512, Draws(seed=20, n=8)


def kv_names(gradients: GradientMatrix) -> list[str]:
    """Returns the names of the cross-attention's key and value weights."""
    return [n for n in gradients.names if ".attn2." in n and ("to_k" in n or "to_v" in n)]


def curvatures(
    benchmark: Benchmark, work: Path, gradients: GradientMatrix
) -> dict[str, Fitted | None]:
    """Fits every curvature from gradients of the loss, and keeps it; or reads what was kept.

    Args:
        benchmark: its members are what is fitted on, but for the Fisher per draw: that sees the
            decoys too, as whoever does not know them would have it.
        work: where curvatures are kept.
        gradients: of all examples, averaged over draws, K and V only.
    """
    if (kept := _read(work)) is not None:
        return {"identity": None, **kept}
    narrow = _narrow(benchmark, gradients)
    found: dict[str, Fitted | None] = {"identity": None}
    found["diagonal per draw"] = fit_diagonal_fisher(narrow, benchmark.data, Draws(seed=21, n=2))
    found["diagonal averaged"] = diagonal(gradients, benchmark.members)
    covariances = _covariances(benchmark, narrow, "per_draw")
    found["K-FAC per_draw"] = KFAC.fit(covariances)
    found["EK-FAC per_draw"] = EKFAC.fit(covariances, _per_draw(benchmark, narrow))
    found["K-FAC averaged"], found["EK-FAC averaged"] = averaged(benchmark, gradients)
    _keep(found, work)
    return found


KINDS: dict[str, type[DiagonalFisher | KFAC | EKFAC]] = {
    "diagonal per draw": DiagonalFisher, "diagonal averaged": DiagonalFisher,
    "K-FAC per_draw": KFAC, "EK-FAC per_draw": EKFAC,
    "K-FAC averaged": KFAC, "EK-FAC averaged": EKFAC,
}  # fmt: skip


def _read(work: Path) -> dict[str, Fitted] | None:
    paths = {name: work / "curvature" / f"{name}.safetensors" for name in KINDS}
    if not all(path.is_file() for path in paths.values()):
        return None
    return {name: KINDS[name].load(path) for name, path in paths.items()}


def averaged(
    benchmark: Benchmark, gradients: GradientMatrix, centred: bool = True
) -> tuple[KFAC, EKFAC]:
    """Fits K-FAC and EK-FAC from averaged gradients; see `curvatures`.

    Args:
        benchmark: its members are what is fitted on.
        gradients: of all examples, averaged over draws, K and V only.
        centred: whether the inputs of keys are, see `kronecker_covariances`.
    """
    rows = torch.from_numpy(np.flatnonzero(benchmark.members))
    model = _narrow(benchmark, gradients)
    covariances = _covariances(benchmark, model, "averaged", centred=centred)
    parts = ({n: gradients.of(n)[rows]} for n in gradients.names)
    return KFAC.fit(covariances), EKFAC.fit(covariances, parts)


def _narrow(benchmark: Benchmark, gradients: GradientMatrix) -> UNetDenoiser:
    """Returns the model with the parameters selected that the gradients are of."""
    model = benchmark.model
    return UNetDenoiser(model.network, model.schedule, gradients.names)


def gauss_newton(benchmark: Benchmark, work: Path, sampled: GradientMatrix) -> dict[str, Fitted]:
    """Fits the generalised Gauss-Newton matrix of the loss (Mlodozeniec et al., ICLR 2025).

    Args:
        benchmark: its members are what is fitted on.
        work: where curvatures are kept.
        sampled: gradients of random functionals of the output, of all examples, K and V only.
    """
    members = torch.from_numpy(np.flatnonzero(benchmark.members))
    covariances = _covariances(benchmark, _narrow(benchmark, sampled), "per_draw", functionals=True)
    rows = ({n: sampled.of(n)[members]} for n in sampled.names)
    found: dict[str, Fitted] = {
        "diagonal Gauss-Newton": diagonal(sampled, benchmark.members),
        "K-FAC Gauss-Newton": KFAC.fit(covariances),
        "EK-FAC Gauss-Newton": EKFAC.fit(covariances, rows),
    }
    _keep(found, work)
    return found


def refitted(basis: EKFAC, gradients: GradientMatrix, members: np.ndarray) -> EKFAC:
    """Returns EK-FAC with the second moments of other gradients in the same eigenbasis."""
    rows = torch.from_numpy(np.flatnonzero(members))
    values = {}
    for n in gradients.names:
        rotated = basis.rotate({n: gradients.of(n)[rows]})[n]
        values[n] = rotated.double().square().mean(0)
    return dataclasses.replace(basis, values=values, count=len(rows))


def diagonal(gradients: GradientMatrix, members: np.ndarray) -> DiagonalFisher:
    """Returns the mean squares of the members' gradients."""
    rows = torch.from_numpy(np.flatnonzero(members))
    squares = {n: gradients.of(n)[rows].double().square().mean(0) for n in gradients.names}
    return DiagonalFisher(squares, len(rows))


def _keep(found: dict, work: Path) -> None:
    for name, curvature in found.items():
        if curvature is not None:
            curvature.save(work / "curvature" / f"{name}.safetensors")


def _covariances(
    benchmark: Benchmark,
    model: UNetDenoiser,
    kind: GradientKind,
    functionals: bool = False,
    centred: bool = True,
) -> KroneckerCovariances:
    keys = [n for n in model.parameters if centred and "to_k" in n]
    batches = _batches(benchmark, model, averaged=kind == "averaged", functionals=functionals)
    with model.gradients_on():
        return kronecker_covariances(
            model.network, model.parameters, batches, kind, centre_inputs=keys
        )


def _per_draw(benchmark: Benchmark, model: UNetDenoiser) -> Iterator[dict[str, torch.Tensor]]:
    with model.gradients_on():
        for loss in _batches(benchmark, model):
            yield per_example_gradients(model.network, model.parameters, loss)


def _batches(
    benchmark: Benchmark,
    model: UNetDenoiser,
    examples: int = 8,
    averaged: bool = False,
    functionals: bool = False,
) -> Iterator[Callable[[], torch.Tensor]]:
    """Losses, or random functionals of the output, of a spread sample of the members."""
    rows = np.flatnonzero(benchmark.members)
    rows = rows[np.linspace(0, len(rows) - 1, FIT_EXAMPLES).astype(int)]
    for first in range(0, len(rows), examples):
        jobs = [(0, int(r), 0) for r in rows[first : first + examples]]
        latents, text, t, e = gather(benchmark.data, FIT_DRAWS, jobs)
        # One row for each draw: hooks need a draw's own keys and values.
        latents, text = (x.repeat_interleave(FIT_DRAWS.n, 0) for x in (latents, text))
        batch = (latents, text, t.flatten()[:, None], e.flatten(0, 1)[:, None])
        shape = (len(jobs), FIT_DRAWS.n) if averaged else (-1,)
        generator = torch.Generator().manual_seed(first)

        def values(batch=batch, shape=shape, generator=generator) -> torch.Tensor:
            if not functionals:
                return model.loss(*batch)[:, 0].reshape(shape)
            outputs, _ = model.predict(*batch)
            normal = torch.randn(outputs.shape, generator=generator)
            scale = (2 / outputs[0, 0].numel()) ** 0.5  # see kronecker_covariances
            return scale * (outputs * normal).sum(dim=(1, 2, 3, 4))

        yield values
