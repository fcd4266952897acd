"""Forward scoring: useful FLOP/s over what matrix products of the same dtype reach in the same run.

    python benchmarks/forward.py [--model demo|mscoco] [--dtype float32|bfloat16] [--json FILE]

benchmarks/README.md says what the numbers mean.
"""

from __future__ import annotations

import os

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own chatter

import argparse
import dataclasses
import inspect
import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch
from flops import by_operation, pass_flops
from scoring import (
    CASES,
    Case,
    Load,
    Setting,
    Timing,
    compare,
    end_to_end,
    laid_out,
    matmul_peak,
    processors,
    score,
    time_by_operation,
)
from workers import finished, released, start

from unsee.methods.forward import forward_losses

AIMS = {"float32": 0.50, "bfloat16": 0.30}
DEFAULT_PASSES = inspect.signature(forward_losses).parameters["batch_size"].default
# A processor without bfloat16 arithmetic emulates it, and a convolution can take a hundred times
# as long as in float32: nothing in bfloat16 runs without a limit, or in this process.
PROBE_LIMIT, BFLOAT16_LIMIT = 60, 120
OPERATIONS = {
    "aten.convolution": "convolution",
    "aten.addmm": "linear",
    "aten.mm": "linear",
    "aten._scaled_dot_product_flash_attention_for_cpu": "attention",
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=list(CASES), help="one of the two; both by default")
    parser.add_argument("--dtype", choices=list(AIMS), help="one of the two; both by default")
    parser.add_argument(
        "--seconds", type=float, default=40, help="for the comparison of settings of each model"
    )
    parser.add_argument(
        "--threads", type=int, default=processors(), help="at most; all processors by default"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="writes every number there")
    options = parser.parse_args(arguments)
    began = time.perf_counter()
    report: dict[str, Any] = {"machine": machine()}
    print(", ".join(f"{key} {value}" for key, value in report["machine"].items()))
    models = [options.model] if options.model else list(CASES)
    if options.dtype != "bfloat16":
        report["float32"] = {
            name: float32(CASES[name], options.threads, options.seconds) for name in models
        }
    if options.dtype != "float32":
        report["bfloat16"] = bfloat16(models, options.threads, options.seconds / 2)
    report["seconds"] = time.perf_counter() - began
    print(f"\n{report['seconds']:.0f} s in all")
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


def machine() -> dict[str, Any]:
    name = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.is_file():
        lines = information.read_text(encoding="utf-8").splitlines()
        name = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), name)
    return {
        "processor": name,
        "cores": processors(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
    }


@dataclasses.dataclass(frozen=True)
class Scale:
    """What turns forward passes per second into everything else.

    Attributes:
        useful: FLOPs of a pass.
        peak: FLOP/s of matrix products.
        passes: of one picture.
    """

    useful: float
    peak: float
    passes: int

    def numbers(self, rate: float) -> dict[str, float]:
        """Returns what a number of passes per second amounts to."""
        return {
            "passes_per_second": rate,
            "images_per_second": rate / self.passes,
            "gflops": rate * self.useful / 1e9,
            "share_of_peak": rate * self.useful / self.peak,
        }

    def line(self, what: str, rate: float, *ratios: float | None) -> dict[str, float]:
        """Prints one line of the table and returns its numbers."""
        n = self.numbers(rate)
        print(
            f"{what:40s}{rate:9.1f}{n['images_per_second']:10.2f}{n['gflops']:9.1f}"
            f"{n['share_of_peak']:9.1%}" + "".join(f"{r:11.2f}" for r in ratios if r is not None)
        )
        return n


HEADING = f"\n{'':40s} passes/s  images/s  GFLOP/s  of peak"


def judge(rates: list[float], scale: Scale, dtype: str) -> None:
    """Prints whether the best of some speeds reaches the aim."""
    reached, aim = scale.numbers(max(rates))["share_of_peak"], AIMS[dtype]
    print(f"aim {aim:.0%} of peak: {'reached' if reached >= aim else 'missed'} ({reached:.1%})")


# -- float32 ------------------------------------------------------------------------------------


def float32(case: Case, threads: int, seconds: float) -> dict[str, Any]:
    """Measures one model in this process, prints what comes out and returns it."""
    denoiser, load = case.build(), Load()
    latents, text, _, _ = case.batch(1)
    flops = pass_flops(denoiser.network, latents[:1], text[:1])
    useful = flops.useful(case.draws)
    print(
        f"\n== {case.name}, float32: a pass has {flops.total / 1e9:.4f} GFLOP, of which keys and "
        f"values of the text {flops.text / 1e9:.4f}; "
        f"useful at {case.draws} draws: {useful / 1e9:.4f}"
    )
    peak = matmul_peak(torch.float32, threads, load=load)
    timings = compare(denoiser, case, settings_of(case), threads, seconds)
    best = min(timings, key=lambda timing: timing.best).setting
    single = compare(denoiser, case, [best], 1, seconds / 20)[0]
    peak = max(peak, matmul_peak(torch.float32, threads, load=load))
    scale = Scale(useful, peak, case.captions * case.draws)
    alone = dataclasses.replace(scale, peak=matmul_peak(torch.float32, 1))
    print(f"matrix products: {peak / 1e9:.1f} GFLOP/s on {threads} threads, "
          f"{alone.peak / 1e9:.1f} on 1")  # fmt: skip
    if load.share < 0.95:
        print(f"!! other programs run here: this one got {load.share:.0%} of the processors, and "
              "its numbers are not to be quoted")  # fmt: skip
    print(f"{HEADING} to default   to plain")
    rows = [row(timing, timings, scale) for timing in timings]
    rows.append({**scale_row(f"{words(best)}, 1 thread", single, alone), "threads": 1})
    result = {
        "gflop_per_pass": flops.total / 1e9,
        "gflop_text": flops.text / 1e9,
        "gflop_useful": useful / 1e9,
        "matmul_peak_gflops": peak / 1e9,
        "matmul_peak_gflops_one_thread": alone.peak / 1e9,
        "processor_share": load.share,
        "settings": rows,
        "processes": processes(case, best, threads, scale),
        "forward_losses": whole(case, denoiser, best, threads, scale),
    }
    with laid_out(denoiser, best.layout):
        result["operations"] = operations(case, denoiser, best, peak)
    return result


def settings_of(case: Case) -> list[Setting]:
    """Returns every batch size in both layouts, then one size in other ways."""
    plain = [Setting(n) for n in case.sizes]
    middle = plain[len(plain) // 2 - 1]
    return [
        *plain,
        *(dataclasses.replace(setting, layout="channels_last") for setting in plain),
        dataclasses.replace(middle, attention="math"),
        dataclasses.replace(middle, attention="explicit"),
        dataclasses.replace(middle, share_text=False),
        dataclasses.replace(middle, inference=True),
    ]


def words(setting: Setting) -> str:
    """Says how a setting differs from the plain one of its size."""
    parts = [f"{setting.passes:4d} passes"]
    parts += [] if setting.layout == "contiguous" else [setting.layout]
    parts += [] if setting.attention == "default" else [f"{setting.attention} attention"]
    parts += [] if setting.share_text else ["text not shared"]
    parts += ["inference_mode"] if setting.inference else []
    return ", ".join(parts)


def row(timing: Timing, timings: list[Timing], scale: Scale) -> dict[str, Any]:
    """Prints one line about a setting, against the default and the plain one of its size."""
    plain = [other for other in timings if other.setting == Setting(other.setting.passes)]
    default = min(plain, key=lambda other: abs(other.setting.passes - DEFAULT_PASSES))
    same = next(other for other in plain if other.setting.passes == timing.setting.passes)
    ratios = paired_ratio(timing, default), paired_ratio(timing, same)
    row = scale_row(words(timing.setting), timing, scale, *ratios)
    return {**row, "speed_to_default": ratios[0], "speed_to_plain": ratios[1]}


def scale_row(what: str, timing: Timing, scale: Scale, *ratios: float) -> dict[str, Any]:
    """Prints one line about a setting and returns it."""
    numbers = scale.line(what, 1 / timing.best, *ratios)
    return {**dataclasses.asdict(timing.setting), **numbers, "rounds": timing.rounds}


def paired_ratio(timing: Timing, reference: Timing) -> float:
    """Returns how many times as fast a setting is: the median over rounds of each round's ratio."""
    ratios = [b / a for a, b in zip(timing.rounds, reference.rounds, strict=True)]
    return float(torch.tensor(ratios, dtype=torch.float64).quantile(0.5))


def whole(
    case: Case, denoiser: Any, best: Setting, threads: int, scale: Scale
) -> list[dict[str, Any]]:
    """Prints and returns the speed of `forward_losses` itself, draws and bookkeeping included."""
    rows = []
    for setting in (Setting(DEFAULT_PASSES), Setting(best.passes, best.layout)):
        with laid_out(denoiser, setting.layout):
            rate = 1 / end_to_end(denoiser, case, setting.passes, threads)
        numbers = scale.line(f"forward_losses,{words(setting)}", rate)
        rows.append({"batch_size": setting.passes, "layout": setting.layout, **numbers})
    judge([entry["passes_per_second"] for entry in rows], scale, "float32")
    return rows


def operations(case: Case, denoiser: Any, best: Setting, peak: float) -> list[dict[str, Any]]:
    """Prints and returns where the time of a pass goes, and how fast its products run."""
    batch = case.batch(best.passes // case.draws)
    counted: dict[str, float] = {}
    for operation, n in by_operation(lambda: score(denoiser, batch, best)).items():
        family = OPERATIONS.get(operation, "other")
        counted[family] = counted.get(family, 0.0) + n
    spent = time_by_operation(lambda: score(denoiser, batch, best))
    total, rows = sum(spent.values()), []
    print("\ntime by operation      ms/pass    share  GFLOP/s  of peak")
    for family, seconds in spent.items():
        speed = counted.get(family, 0.0) / seconds if seconds else 0.0
        rows.append({
            "operation": family,
            "milliseconds_per_pass": seconds / best.passes * 1e3,
            "share": seconds / total,
            "gflops": speed / 1e9,
            "share_of_peak": speed / peak,
        })  # fmt: skip
        print(f"{family:20s}{seconds / best.passes * 1e3:10.4f}{seconds / total:9.1%}"
              + (f"{speed / 1e9:9.1f}{speed / peak:9.1%}" if speed else ""))  # fmt: skip
    return rows


# -- other processes ----------------------------------------------------------------------------


def processes(case: Case, best: Setting, threads: int, scale: Scale) -> list[dict[str, Any]]:
    """Prints and returns the throughput of one process on all processors and of one on each.

    Both are fresh processes that work for the same time, so that they may be compared.
    """
    rows = []
    for count, each in ((1, threads), (threads, 1)) if threads > 1 else ():
        spec = {"task": "throughput", "model": case.name, "setting": dataclasses.asdict(best),
                "threads": each, "seconds": 4}  # fmt: skip
        running = [start(spec) for _ in range(count)]
        for process in running:
            process.stdout.readline()  # type: ignore[union-attr]  # loaded and warm
        rate = sum(json.loads(process.communicate()[0]) for process in released(running))
        numbers = scale.line(f"{count} process(es) of {each} thread(s)", rate)
        rows.append({"processes": count, "threads": each, **numbers})
    return rows


def bfloat16(models: list[str], threads: int, seconds: float) -> dict[str, Any]:
    """Measures bfloat16 where the processor has it; says so where it has not."""
    print("\n== bfloat16")
    products = finished(start({"task": "products", "threads": threads}), PROBE_LIMIT)
    lack = lacks_bfloat16(products)
    result: dict[str, Any] = {"hardware": lack is None, "products_gflops": products}
    if lack:
        print(lack)
        return result
    for name in models:
        spec = {"task": "settings", "model": name, "dtype": "bfloat16",
                "threads": threads, "seconds": seconds}  # fmt: skip
        measured = finished(start(spec), seconds + BFLOAT16_LIMIT)
        if measured is None:
            print(f"{name}: more than {seconds + BFLOAT16_LIMIT:.0f} s: given up")
            result[name] = None
            continue
        result[name] = bfloat16_rows(CASES[name], measured, threads)
    return result


def lacks_bfloat16(products: dict[str, float] | None) -> str | None:
    """Returns what shows that the processor only emulates bfloat16, or None where it does not.

    Args:
        products: FLOP/s of a small matrix product in float32 and in bfloat16; None for one that
            was given up.
    """
    if products is None:
        return f"no bfloat16 hardware here: a product of 256 rows took more than {PROBE_LIMIT} s"
    wide, half = products["float32"], products["bfloat16"]
    if half >= wide:
        return None
    return (
        f"no bfloat16 hardware here: products of 256 rows run at {half / wide:.3f} of float32's "
        f"speed ({half / 1e9:.2f} of {wide / 1e9:.1f} GFLOP/s)"
    )


def bfloat16_rows(case: Case, measured: dict[str, Any], threads: int) -> list[dict[str, Any]]:
    """Prints and returns what a process measured in bfloat16."""
    denoiser = case.build()
    latents, text, _, _ = case.batch(1)
    useful = pass_flops(denoiser.network, latents[:1], text[:1]).useful(case.draws)
    scale = Scale(useful, measured["peak"], case.captions * case.draws)
    print(f"\n{case.name}: matrix products {scale.peak / 1e9:.1f} GFLOP/s on {threads} threads")
    print(HEADING)
    rows = [
        scale_row(words(Setting(**setting)), Timing(Setting(**setting), rounds), scale)
        for setting, rounds in zip(measured["settings"], measured["rounds"], strict=True)
    ]
    judge([entry["passes_per_second"] for entry in rows], scale, "bfloat16")
    return rows


if __name__ == "__main__":
    sys.exit(main())
