"""What is timed: two denoisers, ways of running them, and matrix products to hold them against."""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from unsee.data.latents import EncodedDataset
from unsee.draws import Draws
from unsee.methods.forward import forward_losses
from unsee.models.unet import UNetDenoiser
from unsee.training.text_to_image import UNetRecipe, build_scheduler, build_unet

Batch = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Case:
    """A model and the work that scoring one training picture with it takes.

    Attributes:
        name: for the report.
        latent: (C, h, w).
        text: (tokens, width) of a caption's text state.
        captions: per picture.
        draws: per caption.
        sizes: batch sizes to try, in forward passes; multiples of `draws`.
    """

    name: str
    latent: tuple[int, int, int]
    text: tuple[int, int]
    captions: int
    draws: int
    sizes: tuple[int, ...]

    def build(self, dtype: torch.dtype = torch.float32) -> UNetDenoiser:
        """Returns the denoiser with random weights: what they are does not change the time."""
        torch.manual_seed(0)
        if self.name == "mscoco":
            unet, scheduler = _mscoco_unet(), DDPMScheduler(1000)
        else:
            recipe = UNetRecipe()
            unet = build_unet(recipe, self.latent[0], self.latent[1], self.text[1])
            scheduler = build_scheduler(recipe)
        return UNetDenoiser(unet if dtype == torch.float32 else unet.to(dtype), scheduler)

    def batch(self, captions: int) -> Batch:
        """Returns random arguments of `Denoiser.loss` for some captions, `draws` each."""
        generator = torch.Generator().manual_seed(1)
        return (
            torch.randn(captions, *self.latent, generator=generator),
            torch.randn(captions, *self.text, generator=generator),
            torch.randint(0, 1000, (captions, self.draws), generator=generator),
            torch.randn(captions, self.draws, *self.latent, generator=generator),
        )


CASES = {
    "demo": Case("demo", (8, 8, 8), (20, 384), 1, 10, (20, 40, 80, 160, 320, 640)),
    "mscoco": Case("mscoco", (4, 16, 16), (77, 1024), 5, 20, (20, 40, 80, 160)),
}


def _mscoco_unet() -> UNet2DConditionModel:
    """The UNet of the published MSCOCO experiment of Attribution by Unlearning."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        layers_per_block=2,
        block_out_channels=(128, 256, 256, 256),
        cross_attention_dim=1024,
        attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    )


@dataclass(frozen=True)
class Setting:
    """One way of running the same forward passes.

    Attributes:
        passes: at once.
        layout: memory format of the network's weights, which its activations follow.
        attention: PyTorch's own choice of kernel, its reference kernel, or two matrix products
            with a softmax between them.
        share_text: keys and values of a caption once for all its draws, as the library does.
        inference: `torch.inference_mode` in place of `torch.no_grad`.
    """

    passes: int
    layout: Literal["contiguous", "channels_last"] = "contiguous"
    attention: Literal["default", "math", "explicit"] = "default"
    share_text: bool = True
    inference: bool = False


class ExplicitAttention(TorchFunctionMode):
    """Replaces `scaled_dot_product_attention` by products and a softmax, inside a `with` block."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        query, key, value = args[:3]
        weights = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
        return weights.softmax(-1) @ value


@contextlib.contextmanager
def laid_out(denoiser: UNetDenoiser, layout: str) -> Iterator[None]:
    """Gives the network's weights a memory format inside a `with` block."""
    formats = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
    denoiser.network.to(memory_format=formats[layout])
    try:
        yield
    finally:
        denoiser.network.to(memory_format=torch.contiguous_format)


def score(denoiser: UNetDenoiser, batch: Batch, setting: Setting) -> Tensor:
    """Returns the losses [B, D] of a batch in the way that a setting says, but for its layout."""
    latents, text, timesteps, noise = batch
    draws = timesteps.shape[1]
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode() if setting.inference else torch.no_grad())
        if setting.attention == "math":
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if setting.attention == "explicit":
            stack.enter_context(ExplicitAttention())
        if setting.share_text:
            return denoiser.loss(latents, text, timesteps, noise)
        # One draw each of B*D examples: nothing is left to share.
        losses = denoiser.loss(
            latents.repeat_interleave(draws, 0),
            text.repeat_interleave(draws, 0),
            timesteps.reshape(-1, 1),
            noise.flatten(0, 1)[:, None],
        )
        return losses.reshape(timesteps.shape)


@dataclass
class Timing:
    """Seconds per forward pass of a setting, one number for each round."""

    setting: Setting
    rounds: list[float] = field(default_factory=list)

    @property
    def best(self) -> float:
        """Seconds per pass with the least disturbance."""
        return min(self.rounds)


@dataclass
class Load:
    """How much of the processors this process got while it was being timed."""

    wall: float = 0.0
    processor: float = 0.0

    @property
    def share(self) -> float:
        """Processor time over time on the wall and threads: 1 on a machine of one's own."""
        return self.processor / self.wall if self.wall else 1.0

    @contextlib.contextmanager
    def watch(self, threads: int) -> Iterator[None]:
        """Adds what passes inside the block."""
        wall, processor = time.perf_counter(), time.process_time()
        yield
        self.wall += (time.perf_counter() - wall) * threads
        self.processor += time.process_time() - processor


def matmul_peak(
    dtype: torch.dtype,
    threads: int,
    sizes: Sequence[int] = (512, 768, 1024, 1536, 2048),
    seconds: float = 0.6,
    load: Load | None = None,
) -> float:
    """Returns FLOP/s of the fastest of some square matrix products, in this dtype.

    Args:
        dtype: of all three matrices.
        threads: to use.
        sizes: numbers of rows and columns.
        seconds: for each size; one product at least.
        load: notes what share of the processors was there.
    """
    best = 0.0
    with torch.no_grad(), _threads(threads):
        for n in sizes:
            a, b = torch.randn(n, n).to(dtype), torch.randn(n, n).to(dtype)
            out = torch.empty(n, n, dtype=dtype)
            # Small products in groups of a billion operations: the clock has to see them.
            group = max(1, round(1e9 / (2 * n**3))) if seconds >= 0.1 else 1
            end = time.perf_counter() + seconds
            while True:
                start = time.perf_counter()
                with (load or Load()).watch(threads):
                    for _ in range(group):
                        torch.mm(a, b, out=out)
                best = max(best, group * 2 * n**3 / (time.perf_counter() - start))
                if time.perf_counter() > end:
                    break
    return best


@contextlib.contextmanager
def _threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def compare(
    denoiser: UNetDenoiser,
    case: Case,
    settings: Sequence[Setting],
    threads: int,
    seconds: float,
    slice_seconds: float = 0.3,
) -> list[Timing]:
    """Times settings in turn, round after round, so that a disturbance hits all alike.

    Args:
        denoiser: the model.
        case: its inputs.
        settings: what to compare.
        threads: to use.
        seconds: no new round starts after these; two rounds at least.
        slice_seconds: for each setting in each round; one call at least.
    """
    timings = [Timing(setting) for setting in settings]
    end = time.perf_counter() + seconds
    with _threads(threads):
        for number in itertools.count():
            if number >= 2 and time.perf_counter() > end:
                return timings
            # Every other round runs backwards: no setting is always behind the same one.
            for timing in timings if number % 2 == 0 else reversed(timings):
                batch = case.batch(timing.setting.passes // case.draws)
                with laid_out(denoiser, timing.setting.layout):
                    timing.rounds.append(
                        _seconds_per_pass(denoiser, batch, timing.setting, slice_seconds)
                    )
    raise AssertionError("unreachable")


def _seconds_per_pass(
    denoiser: UNetDenoiser, batch: Batch, setting: Setting, slice_seconds: float
) -> float:
    fastest, start = float("inf"), time.perf_counter()
    while True:
        before = time.perf_counter()
        score(denoiser, batch, setting)
        after = time.perf_counter()
        fastest = min(fastest, (after - before) / setting.passes)
        if after - start > slice_seconds:
            return fastest


def end_to_end(denoiser: UNetDenoiser, case: Case, batch_size: int, threads: int) -> float:
    """Returns seconds per pass of `forward_losses`: draws, gathering and bookkeeping included.

    The better of two runs over enough pictures for a batch, and for a second or so.
    """
    pictures = max(1, -(-max(batch_size, 4 * case.sizes[1]) // (case.captions * case.draws)))
    latents, states, _, _ = case.batch(pictures * case.captions)
    rows = [list(range(i, i + case.captions)) for i in range(0, len(states), case.captions)]
    data = EncodedDataset([str(i) for i in range(pictures)], latents[:pictures], states, rows)
    draws, seconds = Draws(n=case.draws), []
    with _threads(threads):
        for _ in range(2):
            start = time.perf_counter()
            forward_losses(denoiser, data, draws, range(pictures), batch_size=batch_size)
            seconds.append(time.perf_counter() - start)
    return min(seconds) / (pictures * case.captions * case.draws)


FAMILIES = {
    "mkldnn_convolution": "convolution",
    "addmm": "linear",
    "mm": "linear",
    "bmm": "linear",
    "_scaled_dot_product_flash_attention_for_cpu": "attention",
    "gelu": "gated GELU",
    "mul": "gated GELU",
    "silu": "SiLU",
    "native_group_norm": "group norm",
    "native_layer_norm": "layer norm",
    "copy_": "copies",
    "cat": "copies",
    "add": "sums",
    "div": "sums",
}


def time_by_operation(call: Callable[[], object]) -> dict[str, float]:
    """Returns seconds of one run by family of operations, the slowest first; without gradients."""
    with torch.no_grad():
        call()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            call()
    spent: dict[str, float] = {}
    for event in profile.key_averages():
        family = FAMILIES.get(event.key.removeprefix("aten::"), "other")
        spent[family] = spent.get(family, 0.0) + event.self_cpu_time_total / 1e6
    return dict(sorted(spent.items(), key=lambda item: -item[1]))


def processors() -> int:
    """Returns how many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
