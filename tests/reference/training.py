"""AdamW, clipping, the learning rate and the moving average, written out one step at a time."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from unsee.training.loop import Optimization


def averaged_weights(
    parameters: list[nn.Parameter],
    loss_of_step: Callable[[int], Tensor],
    optimization: Optimization,
) -> list[Tensor]:
    """Trains the parameters in place and returns their exponential moving average."""
    o = optimization
    first = [torch.zeros_like(p) for p in parameters]
    second = [torch.zeros_like(p) for p in parameters]
    average = [p.detach().clone() for p in parameters]
    for step in range(o.steps):
        gradients = torch.autograd.grad(loss_of_step(step), parameters)
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients))
        shrink = min(1.0, o.clip_norm / (norm + 1e-6))
        if step < o.warmup:
            rate = o.learning_rate * (step + 1) / o.warmup
        else:
            turn = math.pi * (step - o.warmup) / (o.steps - o.warmup)
            low = o.learning_rate * o.final_fraction
            rate = low + (o.learning_rate - low) * (1 + math.cos(turn)) / 2
        decay = min(o.ema_decay, (1 + step) / (10 + step)) if step > 0 else 0.0
        with torch.no_grad():
            for i, parameter in enumerate(parameters):
                gradient = gradients[i] * shrink
                first[i] = 0.9 * first[i] + 0.1 * gradient
                second[i] = 0.999 * second[i] + 0.001 * gradient**2
                mean = first[i] / (1 - 0.9 ** (step + 1))
                scale = (second[i] / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8
                new = parameter * (1 - rate * o.weight_decay) - rate * mean / scale
                parameter.copy_(new)
                average[i] = decay * average[i] + (1 - decay) * new
    return average
