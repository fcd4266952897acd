"""The diagonal Fisher of AbU: mean squared gradient of every weight, one draw at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..gradients import Gradients, squared_gradients, wide
from ..tensor_files import DamagedFile, read_tensors, write_tensors


@dataclass(frozen=True)
class DiagonalFisher:
    """Diagonal curvature from per-draw gradients (Wang et al., NeurIPS 2024, section 3).

    Attributes:
        values: name -> mean over (example, timestep, noise) of the squared gradient of the
            denoising loss (mean over latent elements), float64, of the parameter's shape.
        count: draws that the mean is over.
        settings: what fixed them.
    """

    values: Gradients
    count: int
    settings: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def fit(
        cls,
        network: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        losses: Iterable[Callable[[], Tensor]],
        settings: dict[str, Any] | None = None,
    ) -> DiagonalFisher:
        """Averages squared per-draw gradients.

        Args:
            network: holds the parameters.
            parameters: name -> parameter, requiring gradients.
            losses: one function per batch; each runs the network and returns [R] losses.
            settings: kept with the result.

        Raises:
            ValueError: no batch, or a gradient that is not finite.
        """
        totals = {n: wide(torch.zeros_like(p)) for n, p in parameters.items()}
        count = 0
        for loss in losses:
            rows = 0

            def counted(loss: Callable[[], Tensor] = loss) -> Tensor:
                nonlocal rows
                values = loss()
                rows = len(values)
                return values

            for name, square in squared_gradients(network, parameters, counted).items():
                totals[name] += square
            count += rows
        if count == 0:
            raise ValueError("Fisher: there is no example to fit it on")
        values = {name: total / count for name, total in totals.items()}
        broken = [n for n, v in values.items() if not torch.isfinite(v).all()]
        if broken:
            raise ValueError(
                f"Fisher: the squared gradient of {broken[0]} is not finite; check the model "
                "with `unsee doctor`, and use float32 rather than float16"
            )
        return cls(values, count, settings or {})

    def precondition(self, gradients: Mapping[str, Tensor], damping: float = 0.1) -> Gradients:
        """Divides gradients by the damped Fisher.

        Args:
            gradients: name -> gradient.
            damping: relative to each parameter's mean Fisher value. 0 is the published update;
                weights whose Fisher is exactly zero then stay where they are, where the
                published code returns infinities.

        Raises:
            ValueError: damping is negative, or a gradient has no Fisher of its shape.
        """
        if not damping >= 0:
            raise ValueError(f"damping = {damping} must not be negative")
        steps: Gradients = {}
        for name, gradient in gradients.items():
            if name not in self.values:
                raise ValueError(f"Fisher: fitted without {name}; fit it for the same selection")
            if self.values[name].shape != gradient.shape:
                raise ValueError(
                    f"Fisher: {name} is {tuple(self.values[name].shape)} in the Fisher but "
                    f"{tuple(gradient.shape)} in the model; fit it for this model"
                )
            fisher = self.values[name].to(gradient)
            damped = fisher + damping * fisher.mean()
            steps[name] = torch.where(damped > 0, gradient / damped, torch.zeros_like(gradient))
        return steps

    def save(self, path: Path) -> None:
        """Writes the values as float64 safetensors."""
        write_tensors(path, self.values, {"count": self.count, "settings": self.settings})

    @classmethod
    def load(cls, path: Path) -> DiagonalFisher:
        """Reads what `save` wrote.

        Raises:
            ValueError: missing, damaged (every byte is checked), or not a Fisher file.
        """
        try:
            values, about = read_tensors(path)
            return cls(values, about["count"], about["settings"])
        except FileNotFoundError:
            raise ValueError(f"Fisher file {str(path)!r}: no such file") from None
        except (DamagedFile, KeyError) as error:
            raise ValueError(
                f"Fisher file {str(path)!r} is damaged or of another kind ({error}): "
                "delete it and fit again"
            ) from None
