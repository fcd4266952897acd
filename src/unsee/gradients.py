"""Gradients by hooks: averaged over draws, or squared one example at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

Gradients = dict[str, Tensor]
"""Parameter name -> float64 tensor of the parameter's shape."""


def mean_gradient(loss: Tensor, parameters: Mapping[str, nn.Parameter]) -> Gradients:
    """Returns the gradient of `loss.mean()` in float64, without touching `.grad`."""
    values = torch.autograd.grad(loss.mean(), list(parameters.values()), allow_unused=True)
    return {
        name: (torch.zeros_like(p) if g is None else g).double()
        for (name, p), g in zip(parameters.items(), values, strict=True)
    }


def squared_gradients(
    network: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    loss: Callable[[], Tensor],
    chunk: int = 16,
) -> Gradients:
    """Sums the squared gradients of single losses over a batch.

    Weights and biases of `nn.Linear` modules come from one backward pass with hooks; anything
    else from one backward pass per row, which is slow and exact.

    Args:
        network: holds the parameters; must treat the rows of a batch independently.
        parameters: name -> parameter, requiring gradients.
        loss: runs the network and returns one loss per row, [R]. Row r may depend on row r of
            the modules' inputs only, which must have R as first dimension.
        chunk: rows whose weight gradients exist at the same time.

    Returns:
        name -> sum over rows of (d loss_r / d parameter)**2, float64.

    Raises:
        ValueError: a module's input does not have R as first dimension.
    """
    modules = _linear_owners(network, parameters)
    with _recorded(modules) as tape:
        losses = loss()
    others = {n: p for n, p in parameters.items() if n.rpartition(".")[0] not in modules}
    sums = _looped_squares(losses, others)
    outputs = [output for calls in tape.values() for _, output in calls]
    gradients = torch.autograd.grad(losses.sum(), outputs, allow_unused=True) if outputs else ()
    at = iter(gradients)
    for path, calls in tape.items():
        pairs = [(x.detach(), next(at)) for x, _ in calls]
        for x, _ in pairs:
            if len(x) != len(losses):
                raise ValueError(
                    f"squared gradients: {len(losses)} losses, but {path or 'the network'} was "
                    f"called on {len(x)} rows: it must see one row for each loss"
                )
        used = [(x, g) for x, g in pairs if g is not None]
        for kind in ("weight", "bias"):
            name = f"{path}.{kind}" if path else kind
            if name in parameters:
                sums[name] = _linear_squares(used, parameters[name], kind, chunk)
    return {name: sums[name] for name in parameters}


def _linear_owners(
    network: nn.Module, parameters: Mapping[str, nn.Parameter]
) -> dict[str, nn.Linear]:
    owners = {name.rpartition(".")[0] for name in parameters}
    return {
        path: module
        for path, module in network.named_modules()
        if path in owners and isinstance(module, nn.Linear)
    }


@contextlib.contextmanager
def _recorded(
    modules: Mapping[str, nn.Linear],
) -> Iterator[dict[str, list[tuple[Tensor, Tensor]]]]:
    """Records (input, output) of every call of the modules inside a `with` block."""
    tape: dict[str, list[tuple[Tensor, Tensor]]] = {path: [] for path in modules}

    def recorder(path: str) -> Callable[..., None]:
        def record(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            tape[path].append((inputs[0], output))

        return record

    handles = [m.register_forward_hook(recorder(path)) for path, m in modules.items()]
    try:
        yield tape
    finally:
        for handle in handles:
            handle.remove()


def _linear_squares(
    calls: list[tuple[Tensor, Tensor]], parameter: nn.Parameter, kind: str, chunk: int
) -> Tensor:
    total = torch.zeros_like(parameter, dtype=torch.float64)
    rows = calls[0][0].shape[0] if calls else 0
    for first in range(0, rows, chunk):
        gradient: Tensor | None = None
        for x, g in calls:
            # (rows, ..., features) -> (rows, tokens, features): one token where there is no axis
            a, b = x[first : first + chunk], g[first : first + chunk]
            a = a.flatten(1, -2) if a.dim() > 2 else a[:, None]
            b = b.flatten(1, -2) if b.dim() > 2 else b[:, None]
            one = torch.einsum("rto,rti->roi", b, a) if kind == "weight" else b.sum(1)
            gradient = one if gradient is None else gradient + one
        assert gradient is not None
        # Squared in the network's own type, which is three times as fast as in float64; relative
        # to the largest, so that the squares of small gradients do not underflow.
        scale = gradient.abs().max().clamp_min(torch.finfo(gradient.dtype).tiny)
        total += (gradient / scale).square().sum(0).double() * scale.double().square()
    return total


def _looped_squares(losses: Tensor, parameters: Mapping[str, nn.Parameter]) -> Gradients:
    totals = {n: torch.zeros_like(p, dtype=torch.float64) for n, p in parameters.items()}
    for row in losses if totals else ():
        # The graph is kept: the next row goes through it again.
        gradients = torch.autograd.grad(
            row, list(parameters.values()), retain_graph=True, allow_unused=True
        )
        for total, gradient in zip(totals.values(), gradients, strict=True):
            if gradient is not None:
                total += gradient.double().square()
    return totals
