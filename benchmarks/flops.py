"""Useful floating-point operations of a forward pass; a multiply-add counts as two."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


def _attention_flops(
    query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...], *_: Any, **__: Any
) -> int:
    """FLOPs of softmax(QKᵀ)V from shapes [B, heads, L, d]; the softmax itself counts nothing."""
    batch, heads, length, width = query
    return 2 * batch * heads * length * key[-2] * (width + value[-1])


# PyTorch's counter knows the attention kernels of GPUs, but not the one of the CPU: without this
# entry attention would silently count nothing here.
CPU_ATTENTION: dict[Any, Any] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops
}


def count(call: Callable[[], object]) -> FlopCounterMode:
    """Runs a call once, without gradients, and returns the counter that watched it."""
    counter = FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION)
    with torch.no_grad(), counter:
        call()
    return counter


def by_operation(call: Callable[[], object]) -> dict[str, int]:
    """Returns the FLOPs of one run of a call, operation -> FLOPs."""
    return {str(op): int(n) for op, n in count(call).get_flop_counts()["Global"].items()}


@dataclass(frozen=True)
class PassFlops:
    """FLOPs of one forward pass of one latent with one caption.

    Attributes:
        total: everything.
        text: keys and values of the text in cross-attention, which do not depend on the draw.
    """

    total: int
    text: int

    def useful(self, draws: int) -> float:
        """FLOPs per pass where `draws` passes share one caption: its keys and values count once."""
        return self.total - self.text + self.text / draws


def pass_flops(network: nn.Module, latents: Tensor, text: Tensor) -> PassFlops:
    """Counts one plain forward pass of a UNet.

    Args:
        network: a `UNet2DConditionModel`.
        latents: [1, C, h, w].
        text: [1, T, D].
    """
    counter = count(
        lambda: network(latents, torch.tensor([0]), encoder_hidden_states=text, return_dict=False)
    )
    modules = counter.get_flop_counts()
    keys_values = sum(
        sum(modules[name].values())
        for name in modules
        if name.endswith(("attn2.to_k", "attn2.to_v"))
    )
    return PassFlops(counter.get_total_flops(), keys_values)
