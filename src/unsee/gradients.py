"""Gradients by hooks: of a mean, of every example, or squared one loss at a time."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

Gradients = dict[str, Tensor]
"""Parameter name -> float64 tensor of the parameter's shape."""

GradientKind = Literal["per_draw", "averaged"]
"""Of what a gradient is.

`per_draw`: of one loss, for one example, timestep and noise. `averaged`: of the mean of an
example's losses over its draws. Their second moments are different matrices.
"""

Calls = list[tuple[Tensor, Tensor]]
"""(input, gradient with respect to the output) of every call of a module, rows first."""


def wide(tensor: Tensor) -> Tensor:
    """Returns a tensor in float64, on the CPU where its device (Apple's mps) has none."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


def mean_gradient(loss: Tensor, parameters: Mapping[str, nn.Parameter]) -> Gradients:
    """Returns the gradient of `loss.mean()` in float64, without touching `.grad`."""
    values = torch.autograd.grad(loss.mean(), list(parameters.values()), allow_unused=True)
    return {
        name: wide(torch.zeros_like(p) if g is None else g)
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
    else (and what is shared between modules) from one backward pass per row: slow and exact.

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
    losses, calls = hooked_gradients(network, parameters, loss)
    sums = {n: wide(torch.zeros_like(p)) for n, p in parameters.items()}
    for name in parameters:
        path, _, kind = name.rpartition(".")
        for part in (
            _linear_gradients(calls[path], kind, len(losses), chunk) if path in calls else ()
        ):
            # Squared in the network's own type, which is three times as fast as in float64;
            # relative to the largest, so that the squares of small gradients do not underflow.
            scale = part.abs().max().clamp_min(torch.finfo(part.dtype).tiny)
            sums[name] += wide((part / scale).square().sum(0)) * wide(scale).square()
    others = {n: p for n, p in parameters.items() if n.rpartition(".")[0] not in calls}
    for _, gradients in _looped_gradients(losses, others):
        for name, gradient in gradients.items():
            sums[name] += wide(gradient).square()
    return sums


def per_example_gradients(
    network: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    loss: Callable[[], Tensor],
    gradient: GradientKind = "per_draw",
    chunk: int = 16,
) -> dict[str, Tensor]:
    """Returns the gradient of every loss, or of every example's mean loss.

    Weights and biases of `nn.Linear` modules come from one backward pass with hooks; anything
    else (and what is shared between modules) from one backward pass per row: slow and exact.

    Args:
        network: holds the parameters; must treat the rows of a batch independently.
        parameters: name -> parameter, requiring gradients.
        loss: runs the network and returns its losses, [R], or [B, D] for B examples on D draws
            each. The modules must see R or B·D rows, the draws of an example together.
        gradient: `per_draw` for one gradient for each loss; `averaged` for one for each of the
            B examples, of the mean of its D losses. A module may then see B rows, each of
            which serves all draws of an example, or holds them as further tokens.
        chunk: rows that are computed at the same time.

    Returns:
        name -> [R, *shape], [B·D, *shape] or (averaged) [B, *shape], in the parameter's dtype.

    Raises:
        ValueError: the losses have another number of dimensions, or a module sees other rows.
    """
    losses, calls = hooked_gradients(network, parameters, loss, gradient)
    found: dict[str, Tensor] = {
        n: torch.zeros((len(losses), *p.shape), dtype=p.dtype, device=p.device)
        for n, p in parameters.items()
    }
    for name in parameters:
        path, _, kind = name.rpartition(".")
        first = 0
        for part in (
            _linear_gradients(calls[path], kind, len(losses), chunk) if path in calls else ()
        ):
            found[name][first : first + len(part)] = part
            first += len(part)
    others = {n: p for n, p in parameters.items() if n.rpartition(".")[0] not in calls}
    means = losses.mean(1) if gradient == "averaged" else losses  # [B] or [R]
    for row, gradients in _looped_gradients(means, others):
        for name, value in gradients.items():
            found[name][row] = value
    return found


def hooked_gradients(
    network: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    loss: Callable[[], Tensor],
    gradient: GradientKind = "per_draw",
) -> tuple[Tensor, dict[str, Calls]]:
    """Runs a loss and one backward pass, and records what the chosen `nn.Linear` modules saw.

    Args:
        network: holds the parameters; must treat the rows of a batch independently.
        parameters: name -> parameter, requiring gradients.
        loss: see `per_example_gradients`.
        gradient: what is differentiated: the sum of all losses, whose gradient with respect to
            a row of an output is that of the row's own loss, or the sum of the examples' means.

    Returns:
        losses: [R] or (averaged) [B, D]; their graph is there only where some of the parameters
            belong to no `nn.Linear`.
        calls: path -> (input, gradient) of each call of an `nn.Linear` that owns one of the
            parameters, without the calls on whose output nothing depends. A module whose output
            was changed in place is left out: its gradient is not to be had any more.

    Raises:
        ValueError: the losses have another number of dimensions, or a module sees other rows.
    """
    with recorded(linear_owners(network, parameters)) as tape:
        losses = loss()
    tape = {p: calls for p, calls in tape.items() if all(o._version == v for _, o, v in calls)}
    if gradient == "per_draw" and losses.dim() == 2:
        losses = losses.flatten()
    if losses.dim() != (2 if gradient == "averaged" else 1):
        raise ValueError(
            f"{gradient} gradients: the losses are {tuple(losses.shape)}, but must be "
            f"{'[B, D]' if gradient == 'averaged' else '[R] or [B, D]'}"
        )
    total = losses.mean(1).sum() if gradient == "averaged" else losses.sum()
    outputs = [output for calls in tape.values() for _, output, _ in calls]
    # The graph is freed here unless there are parameters whose rows go through it one by one.
    kept = any(name.rpartition(".")[0] not in tape for name in parameters)
    values = (
        torch.autograd.grad(total, outputs, retain_graph=kept, allow_unused=True) if outputs else ()
    )
    at = iter(values)
    seen: dict[str, Calls] = {}
    for path, calls in tape.items():
        pairs = [(x.detach(), next(at)) for x, _, _ in calls]
        for x, _ in pairs:
            if len(x) not in (len(losses), losses.numel()):
                raise ValueError(
                    f"{gradient} gradients: {losses.numel()} losses, but "
                    f"{path or 'the network'} was called on {len(x)} rows: it must see one row "
                    f"for each {'example or ' if gradient == 'averaged' else ''}loss; repeat the "
                    "rows that several losses share"
                )
        seen[path] = [(x, g) for x, g in pairs if g is not None]
    return losses, seen


def linear_owners(
    network: nn.Module, parameters: Mapping[str, nn.Parameter]
) -> dict[str, nn.Linear]:
    """Returns path -> module for the owners of parameters whose calls tell the whole gradient.

    They are of the class `nn.Linear` itself, since others may use their weight without a call
    (`nn.MultiheadAttention` does so), and share no parameter with another module.
    """
    owners = {name.rpartition(".")[0] for name in parameters}
    users = Counter(id(p) for m in network.modules() for p in m.parameters(recurse=False))
    return {
        path: module
        for path, module in network.named_modules()
        if path in owners
        and type(module) is nn.Linear
        and all(users[id(p)] == 1 for p in module.parameters())
    }


@contextlib.contextmanager
def recorded(
    modules: Mapping[str, nn.Linear],
) -> Iterator[dict[str, list[tuple[Tensor, Tensor, int]]]]:
    """Records (input, output, version of the output) of every call inside a `with` block."""
    tape: dict[str, list[tuple[Tensor, Tensor, int]]] = {path: [] for path in modules}

    def recorder(path: str) -> Callable[..., None]:
        def record(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            tape[path].append((inputs[0], output, output._version))

        return record

    handles = [m.register_forward_hook(recorder(path)) for path, m in modules.items()]
    try:
        yield tape
    finally:
        for handle in handles:
            handle.remove()


def _linear_gradients(calls: Calls, kind: str, count: int, chunk: int) -> Iterator[Tensor]:
    """Yields gradients [at most chunk, *shape] of a module's weight or bias, `count` in all.

    Each is the sum over the calls, the tokens and the rows of one loss or example.
    """
    for first in range(0, count if calls else 0, chunk):
        gradient: Tensor | None = None
        for x, g in calls:
            rows = len(x) // count
            part = slice(first * rows, (first + chunk) * rows)
            a, b = tokens(x[part], rows), tokens(g[part], rows)
            one = torch.einsum("rto,rti->roi", b, a) if kind == "weight" else b.sum(1)
            gradient = one if gradient is None else gradient + one
        assert gradient is not None
        yield gradient


def tokens(x: Tensor, rows: int = 1) -> Tensor:
    """Returns [n·rows, ..., features] as [n, rows·tokens, features].

    There is one token in a row where there is no axis for it.
    """
    return x.reshape(len(x) // rows, -1, x.shape[-1])


def _looped_gradients(
    losses: Tensor, parameters: Mapping[str, nn.Parameter]
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Yields (row, its gradients), leaving out parameters that the row does not depend on."""
    for row, value in enumerate(losses) if parameters else ():
        # The graph is kept: the next row goes through it again.
        found = torch.autograd.grad(
            value, list(parameters.values()), retain_graph=True, allow_unused=True
        )
        named = zip(parameters, found, strict=True)
        yield row, {name: gradient for name, gradient in named if gradient is not None}
