"""Kronecker-factored curvature of linear layers: K-FAC and EK-FAC.

For a weight W [out, in] and one loss, the gradient is the sum over tokens of g aᵀ, where a is the
layer's input and g the gradient of the loss with respect to its output. K-FAC (Martens and Grosse,
ICML 2015) takes the second moment of these gradients for a Kronecker product of A = E[a aᵀ] and
G = E[g gᵀ]. EK-FAC (George et al., NeurIPS 2018) keeps the eigenvectors of A and G, and measures
the second moment along them: it is the best diagonal in that basis.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..gradients import (
    Calls,
    GradientKind,
    Gradients,
    hooked_gradients,
    linear_owners,
    tokens,
    wide,
)
from ..tensor_files import DamagedFile, read_tensors, write_tensors


@dataclass(frozen=True)
class KroneckerCovariances:
    """Second moments of what linear layers see, not centred unless asked for.

    Attributes:
        inputs: name of a weight -> A [in, in] float64, mean over tokens of a aᵀ.
        outputs: name of a weight -> G [out, out] float64, mean over tokens of g gᵀ.
        tokens: name of a weight -> mean number of tokens of one loss.
        gradient: of which losses g is, see `kronecker_covariances`.
        count: losses (`per_draw`) or examples (`averaged`) that the means are over.
    """

    inputs: Gradients
    outputs: Gradients
    tokens: dict[str, float]
    gradient: GradientKind
    count: int


def kronecker_covariances(
    network: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    losses: Iterable[Callable[[], Tensor]],
    gradient: GradientKind = "per_draw",
    centre_inputs: Collection[str] = (),
) -> KroneckerCovariances:
    """Averages the second moments of the layers' inputs and output gradients.

    With the losses that a model is trained on, this is the empirical Fisher. For the generalised
    Gauss-Newton matrix of a squared error, averaged over the d elements of an output, give
    random linear functionals of the outputs in place of the losses: the residual is replaced by
    standard normal noise n, drawn anew for each row, and the value is (2/d)^½ · (n · output).
    Where values are averaged over D draws, multiply them by D^½ besides, or their variance falls.

    Args:
        network: holds the parameters; must treat the rows of a batch independently.
        parameters: name -> weight of an `nn.Linear` without its bias, requiring gradients.
        losses: one function per batch; each runs the network and returns its losses, [R], or
            [B, D] for B examples on D draws each, see `per_example_gradients`.
        gradient: `per_draw`: g is the gradient of the row's own loss. `averaged`: of the mean of
            an example's D losses. A layer whose input is the same in all draws (keys and values
            of cross-attention) then has one g for each token, the mean over draws, whether it
            was called on one row or on D; otherwise the draws count as further tokens.
        centre_inputs: names of weights whose inputs are taken relative to their mean over the
            tokens of their row. For keys of an attention: softmax does not see a constant added
            to all keys, so that their gradients sum to zero over tokens, and a constant in
            the inputs does not reach the gradient of the weight.

    Raises:
        ValueError: a parameter is not the weight of an `nn.Linear`, no loss depends on it, there
            is no batch, or a covariance is not finite.
    """
    _check_linear(network, parameters, centre_inputs)
    inputs = {n: wide(torch.zeros(p.shape[1], p.shape[1]).to(p)) for n, p in parameters.items()}
    outputs = {n: wide(torch.zeros(len(p), len(p)).to(p)) for n, p in parameters.items()}
    seen = dict.fromkeys(parameters, 0)
    count = 0
    for loss in losses:
        values, calls = hooked_gradients(network, parameters, loss, gradient)
        count += len(values)
        for name in parameters:
            seen_by = calls.get(name.rpartition(".")[0], [])
            for a, g in _pairs(name, seen_by, len(values), name in centre_inputs):
                inputs[name] += a.T @ a
                outputs[name] += g.T @ g
                seen[name] += len(a)
    if count == 0:
        raise ValueError("K-FAC: there is no example to fit it on")
    for name in parameters:
        if seen[name] == 0:
            raise ValueError(
                "K-FAC: no loss depends on the output, or the output is changed in place, of the "
                f"layer of {name}; leave it out of the selection, or use the diagonal Fisher"
            )
        inputs[name] /= seen[name]
        outputs[name] /= seen[name]
        _check_finite(f"a covariance of {name}", inputs[name], outputs[name])
    per_loss = {name: seen[name] / count for name in parameters}
    return KroneckerCovariances(inputs, outputs, per_loss, gradient, count)


def _check_finite(what: str, *values: Tensor) -> None:
    if not all(v.isfinite().all() for v in values):
        raise ValueError(
            f"K-FAC: {what} is not finite; check the model with `unsee doctor`, and use float32 "
            "rather than float16"
        )


def _check_linear(
    network: nn.Module, parameters: Mapping[str, nn.Parameter], centred: Collection[str]
) -> None:
    owners = linear_owners(network, parameters)
    for name in parameters:
        path, _, kind = name.rpartition(".")
        if kind != "weight" or path not in owners:
            owner = type(network.get_submodule(path)).__name__
            raise ValueError(
                f"K-FAC: {name} is the {kind} of a {owner}, and only the weight of an nn.Linear "
                "that shares it with no other module has Kronecker factors here; leave it out of "
                "the selection, or use the diagonal Fisher, which supports any parameter"
            )
    unknown = [name for name in centred if name not in parameters]
    if unknown:
        raise ValueError(
            f"K-FAC: centre_inputs has {unknown[0]!r}, which is none of the "
            f"{len(parameters)} selected parameters"
        )


def _pairs(name: str, calls: Calls, count: int, centred: bool) -> Iterable[tuple[Tensor, Tensor]]:
    """Yields inputs [n, in] and output gradients [n, out] of each call, float64."""
    for x, gradient in calls:
        a, g = wide(tokens(x)), wide(tokens(gradient))  # [rows, T, features]
        if centred:
            if a.shape[1] == 1:
                raise ValueError(
                    f"K-FAC: {name} sees one token in each row, which centred is zero; leave it "
                    "out of centre_inputs"
                )
            a = a - a.mean(1, keepdim=True)
        draws = len(x) // count
        if draws > 1 and _same_in_all_draws(x, draws):
            a, g = a[::draws], g.unflatten(0, (-1, draws)).sum(1)
        yield a.flatten(0, 1), g.flatten(0, 1)


def _same_in_all_draws(x: Tensor, draws: int) -> bool:
    """Whether the rows of each example are equal but for rounding.

    Equal inputs of a module before this one need not give equal bits, row by row.
    """
    rows = x.unflatten(0, (-1, draws))
    tolerance = max(1e-5, 8 * torch.finfo(x.dtype).eps)
    return bool((rows - rows[:, :1]).abs().max() <= tolerance * rows.abs().max())


@dataclass(frozen=True)
class _Kronecker:
    """Curvature that is diagonal in a basis of Kronecker products.

    Attributes:
        input_vectors: name -> Q_A [in, in] float64, the eigenvectors of A in its columns.
        output_vectors: name -> Q_G [out, out] float64, the eigenvectors of G in its columns.
        values: name -> Λ [out, in] float64, the second moment of Q_Gᵀ · gradient · Q_A.
        gradient: of which gradients: of single draws' losses or of their mean over draws.
        count: gradients that Λ is the mean over.
        settings: what fixed them.
    """

    input_vectors: Gradients
    output_vectors: Gradients
    values: Gradients
    gradient: GradientKind
    count: int
    settings: dict[str, Any] = field(default_factory=dict)

    def rotate(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns Q_Gᵀ · gradient · Q_A, in the gradients' own dtype and device.

        Inner products stay what they were. The preconditioned inner product of two gradients is
        that of their rotations, one of them divided by Λ + damping · mean(Λ): a rotation serves
        for any number of dampings.

        Args:
            gradients: name -> [out, in], or [B, out, in].

        Raises:
            ValueError: a gradient has no eigenvectors of its shape.
        """
        self._check(gradients)
        return {
            n: self.output_vectors[n].to(g).T @ g @ self.input_vectors[n].to(g)
            for n, g in gradients.items()
        }

    def precondition(
        self, gradients: Mapping[str, Tensor], damping: float = 0.1
    ) -> dict[str, Tensor]:
        """Divides gradients by the damped curvature: Q_G (rotated ⊘ (Λ + damping · mean Λ)) Q_Aᵀ.

        Args:
            gradients: name -> [out, in], or [B, out, in].
            damping: relative to each parameter's mean Λ. With 0, directions of a Λ of exactly
                zero stay where they are; those where it is zero but for rounding explode.

        Returns:
            name -> the same shape, dtype and device.

        Raises:
            ValueError: damping is negative, or a gradient has no eigenvectors of its shape.
        """
        if not damping >= 0:
            raise ValueError(f"damping = {damping} must not be negative")
        steps: dict[str, Tensor] = {}
        for name, rotated in self.rotate(gradients).items():
            # In float64: the squares of small gradients underflow in float32.
            dividend = wide(rotated)
            values = self.values[name].to(dividend.device)
            damped = values + damping * values.mean()
            divided = torch.where(damped > 0, dividend / damped, 0.0).to(rotated)
            left = self.output_vectors[name].to(rotated) @ divided
            steps[name] = left @ self.input_vectors[name].to(rotated).T
        return steps

    def _check(self, gradients: Mapping[str, Tensor]) -> None:
        for name, gradient in gradients.items():
            if name not in self.values:
                raise ValueError(
                    f"{type(self).__name__}: fitted without {name}; fit it for the same selection"
                )
            shape = tuple(self.values[name].shape)
            if gradient.dim() not in (2, 3) or tuple(gradient.shape[-2:]) != shape:
                raise ValueError(
                    f"{type(self).__name__}: {name} is {shape} in the curvature, but the gradient "
                    f"is {tuple(gradient.shape)}; fit it for this model"
                )

    def save(self, path: Path) -> None:
        """Writes vectors and values as float64 safetensors."""
        tensors = {
            f"{part}/{name}": tensor
            for part in ("input_vectors", "output_vectors", "values")
            for name, tensor in getattr(self, part).items()
        }
        about = {
            "kind": type(self).__name__,
            "gradient": self.gradient,
            "count": self.count,
            "settings": self.settings,
        }
        write_tensors(path, tensors, about)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Reads what `save` of the same class wrote.

        Raises:
            ValueError: missing, damaged (every byte is checked), or not a file of this curvature.
        """
        parts: dict[str, Gradients] = {"input_vectors": {}, "output_vectors": {}, "values": {}}
        try:
            tensors, about = read_tensors(path)
            if about["kind"] != cls.__name__:
                raise KeyError(about["kind"])
            for key, tensor in tensors.items():
                part, _, name = key.partition("/")
                parts[part][name] = tensor
            return cls(
                **parts,
                gradient=about["gradient"],
                count=about["count"],
                settings=about["settings"],
            )
        except FileNotFoundError:
            raise ValueError(f"{cls.__name__} file {str(path)!r}: no such file") from None
        except (DamagedFile, KeyError) as error:
            raise ValueError(
                f"{cls.__name__} file {str(path)!r} is damaged or of another kind ({error}): "
                "delete it and fit again"
            ) from None


class KFAC(_Kronecker):
    """K-FAC: Λ is the outer product of the eigenvalues of G and A (Martens and Grosse, 2015).

    It is multiplied by the number of tokens of a loss, since a gradient is a sum over tokens: the
    second moment of a sum of independent terms (Grosse and Martens, ICML 2016, for convolutions).
    """

    @classmethod
    def fit(cls, covariances: KroneckerCovariances, settings: dict[str, Any] | None = None) -> KFAC:
        """Takes eigenvectors and eigenvalues of the covariances.

        Args:
            covariances: of all parameters.
            settings: kept with the result.
        """
        a, g = _eigen(covariances.inputs), _eigen(covariances.outputs)
        values = {
            n: covariances.tokens[n] * torch.outer(g[n][0], a[n][0]) for n in covariances.inputs
        }
        return cls(
            {n: vectors for n, (_, vectors) in a.items()},
            {n: vectors for n, (_, vectors) in g.items()},
            values,
            covariances.gradient,
            covariances.count,
            settings or {},
        )


class EKFAC(_Kronecker):
    """EK-FAC: Λ is measured along the eigenvectors of G and A (George et al., NeurIPS 2018)."""

    @classmethod
    def fit(
        cls,
        covariances: KroneckerCovariances,
        gradients: Iterable[Mapping[str, Tensor]],
        settings: dict[str, Any] | None = None,
    ) -> EKFAC:
        """Averages the squares of gradients in the covariances' eigenbasis.

        Args:
            covariances: of all parameters; their eigenvectors are the basis.
            gradients: name -> [B, out, in] per-example gradients, of the kind that the
                covariances are of, as `per_example_gradients` returns them. Batches may differ in
                size and hold some of the parameters, if each has as many gradients in the end.
            settings: kept with the result.

        Raises:
            ValueError: no gradient, more of one parameter than of another, a shape that does not
                fit the covariances, or squares that are not finite.
        """
        a = {n: vectors for n, (_, vectors) in _eigen(covariances.inputs).items()}
        g = {n: vectors for n, (_, vectors) in _eigen(covariances.outputs).items()}
        totals = {n: torch.zeros(len(g[n]), len(a[n])).to(g[n]) for n in a}
        basis = cls(a, g, totals, covariances.gradient, 0)
        counts = dict.fromkeys(totals, 0)
        for batch in gradients:
            for name, rotated in basis.rotate(batch).items():
                rows = wide(rotated).reshape(-1, *rotated.shape[-2:])
                totals[name] += rows.square().sum(0)
                counts[name] += len(rows)
        if not any(counts.values()):
            raise ValueError("EKFAC: there is no gradient to fit it on")
        fewest, most = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
        if counts[fewest] != counts[most]:
            raise ValueError(
                f"EKFAC: {counts[fewest]} gradients of {fewest}, but {counts[most]} of {most}; "
                "give one of each parameter for every example"
            )
        values = {n: total / counts[n] for n, total in totals.items()}
        for name, value in values.items():
            _check_finite(f"the squared gradient of {name}", value)
        return cls(a, g, values, covariances.gradient, counts[fewest], settings or {})


def _eigen(covariances: Gradients) -> dict[str, tuple[Tensor, Tensor]]:
    """Returns name -> (eigenvalues, ascending and not negative; eigenvectors in columns)."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    shared: dict[int, tuple[Tensor, Tensor]] = {}  # layers that see the same have one matrix
    for name, covariance in covariances.items():
        if id(covariance) not in shared:
            values, vectors = torch.linalg.eigh(wide(covariance))
            # Of a second moment, they are negative by rounding only.
            shared[id(covariance)] = values.clamp_min(0), vectors
        found[name] = shared[id(covariance)]
    return found
