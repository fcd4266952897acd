"""Forward scoring: useful FLOP/s over what matrix products of the same dtype reach in the same run.

    python benchmarks/forward.py [--model demo|mscoco] [--dtype float32|bfloat16] [--json FILE]

benchmarks/README.md says what the numbers mean.
"""

from __future__ import annotations

import os

os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # the profiler's own chatter

import argparse
import dataclasses
import inspect
import json
import platform
import subprocess
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
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        print(json.dumps(work(json.loads(options.worker))), flush=True)
        return 0
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
    sizes = sorted({*case.sizes})
    middle = Setting(sizes[len(sizes) // 2 - 1])
    plain = [Setting(n) for n in sizes]
    last = [dataclasses.replace(s, layout="channels_last") for s in plain]
    other = [
        dataclasses.replace(middle, attention="math"),
        dataclasses.replace(middle, attention="explicit"),
        dataclasses.replace(middle, share_text=False),
        dataclasses.replace(middle, inference=True),
    ]
    peak = matmul_peak(torch.float32, threads, load=load)
    timings = compare(denoiser, case, plain + last + other, threads, seconds)
    best = min(timings, key=lambda timing: timing.best).setting
    singles = compare(denoiser, case, [best], 1, seconds / 20)
    peak = max(peak, matmul_peak(torch.float32, threads, load=load))
    single_peak = matmul_peak(torch.float32, 1)
    result: dict[str, Any] = {
        "gflop_per_pass": flops.total / 1e9,
        "gflop_text": flops.text / 1e9,
        "gflop_useful": useful / 1e9,
        "matmul_peak_gflops": {threads: peak / 1e9, 1: single_peak / 1e9},
        "processor_share": load.share,
    }
    print(f"matrix products: {peak / 1e9:.1f} GFLOP/s on {threads} threads, "
          f"{single_peak / 1e9:.1f} on 1")  # fmt: skip
    if load.share < 0.95:
        print(f"!! other programs run here: this one got {load.share:.0%} of the processors, and "
              "its numbers are not to be quoted")  # fmt: skip
    print(f"\n{'passes at once, layout, ...':42s}passes/s  images/s  GFLOP/s  of peak  to default")
    reference = timings[sizes.index(min(sizes, key=lambda n: abs(n - DEFAULT_PASSES)))]
    per_image = case.captions * case.draws
    result["settings"] = [
        row(timing, reference, useful, peak, per_image, threads) for timing in timings
    ] + [row(singles[0], None, useful, single_peak, per_image, 1)]
    result["processes"] = processes(case, best, threads, useful, peak, per_image)
    with laid_out(denoiser, best.layout):
        result["forward_losses"] = whole(case, denoiser, best, threads, useful, peak)
        result["operations"] = operations(case, denoiser, best, peak)
    return result


def row(
    timing: Timing,
    reference: Timing | None,
    useful: float,
    peak: float,
    per_image: int,
    threads: int,
) -> dict[str, Any]:
    """Prints one line about a setting and returns it."""
    setting = timing.setting
    words = [f"{setting.passes:4d}", setting.layout]
    words += [] if setting.attention == "default" else [f"{setting.attention} attention"]
    words += [] if setting.share_text else ["text not shared"]
    words += ["inference_mode"] if setting.inference else []
    words += ["1 thread"] if threads == 1 else []
    ratio = paired_ratio(timing, reference) if reference else None
    rate = 1 / timing.best
    print(
        f"{' '.join(words):42s}{rate:8.1f}{rate / per_image:10.2f}{rate * useful / 1e9:9.1f}"
        f"{rate * useful / peak:9.1%}" + (f"{ratio:9.2f}x" if ratio else "")
    )
    return {
        **dataclasses.asdict(setting),
        "threads": threads,
        "passes_per_second": rate,
        "images_per_second": rate / per_image,
        "gflops": rate * useful / 1e9,
        "share_of_peak": rate * useful / peak,
        "speed_to_default": ratio,
        "rounds": timing.rounds,
    }


def paired_ratio(timing: Timing, reference: Timing) -> float:
    """Returns how many times as fast a setting is: the median over rounds of each round's ratio."""
    ratios = [b / a for a, b in zip(timing.rounds, reference.rounds, strict=True)]
    return float(torch.tensor(ratios, dtype=torch.float64).quantile(0.5))


def whole(
    case: Case, denoiser: Any, best: Setting, threads: int, useful: float, peak: float
) -> list[dict[str, Any]]:
    """Prints and returns the speed of `forward_losses` itself, draws and bookkeeping included."""
    rows = []
    for passes in sorted({best.passes, DEFAULT_PASSES}):
        rate = 1 / end_to_end(denoiser, case, passes, threads)
        rows.append({
            "batch_size": passes,
            "layout": best.layout,
            "passes_per_second": rate,
            "share_of_peak": rate * useful / peak,
        })  # fmt: skip
        print(f"forward_losses, batch_size={passes}, {best.layout}: {rate:.1f} passes/s, "
              f"{rate * useful / peak:.1%} of peak")  # fmt: skip
    reached = max(entry["share_of_peak"] for entry in rows)
    aim = AIMS["float32"]
    print(f"aim {aim:.0%} of peak: {'reached' if reached >= aim else 'missed'} ({reached:.1%})")
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


def processes(
    case: Case, best: Setting, threads: int, useful: float, peak: float, per_image: int
) -> list[dict[str, Any]]:
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
        rows.append({"processes": count, "threads": each, "passes_per_second": rate,
                     "share_of_peak": rate * useful / peak})  # fmt: skip
        print(f"{f'{count} process(es) of {each} thread(s)':42s}{rate:8.1f}{rate / per_image:10.2f}"
              f"{rate * useful / 1e9:9.1f}{rate * useful / peak:9.1%}")  # fmt: skip
    return rows


def start(spec: dict[str, Any]) -> subprocess.Popen[str]:
    """Starts a process that does one piece of work."""
    return subprocess.Popen(
        [sys.executable, __file__, "--worker", json.dumps(spec)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(spec["threads"])},
    )


def released(running: list[subprocess.Popen[str]]) -> list[subprocess.Popen[str]]:
    """Lets all of some waiting processes go at once."""
    for process in running:
        process.stdin.write("go\n")  # type: ignore[union-attr]
        process.stdin.flush()  # type: ignore[union-attr]
    return running


def finished(process: subprocess.Popen[str], limit: float) -> Any | None:
    """Returns the last line that a process prints, or None where it takes too long."""
    try:
        out, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return None
    if process.returncode:
        raise RuntimeError(f"the measuring process ended with code {process.returncode}")
    return json.loads(out.splitlines()[-1])


def work(spec: dict[str, Any]) -> Any:
    """Does what another process of this benchmark asks for."""
    torch.set_num_threads(spec["threads"])
    if spec["task"] == "products":
        # Small ones: without hardware a product of 2,048 rows would take minutes.
        return {
            name: matmul_peak(getattr(torch, name), spec["threads"], (256,), 0.05) for name in AIMS
        }
    case = CASES[spec["model"]]
    if spec["task"] == "throughput":
        return throughput(case, Setting(**spec["setting"]), spec["seconds"])
    denoiser = case.build(torch.bfloat16)
    settings = [
        Setting(n, layout) for n in case.sizes for layout in ("contiguous", "channels_last")
    ]
    peak = matmul_peak(torch.bfloat16, spec["threads"])
    timings = compare(denoiser, case, settings, spec["threads"], spec["seconds"])
    return {"peak": peak, "rounds": [timing.rounds for timing in timings],
            "settings": [dataclasses.asdict(timing.setting) for timing in timings]}  # fmt: skip


def throughput(case: Case, setting: Setting, seconds: float) -> float:
    """Returns passes per second over some seconds, which begin when the parent process says so."""
    denoiser = case.build()
    batch = case.batch(setting.passes // case.draws)
    with laid_out(denoiser, setting.layout):
        score(denoiser, case.batch(1), setting)
        print("ready", flush=True)
        sys.stdin.readline()
        calls, began = 0, time.perf_counter()
        while time.perf_counter() - began < seconds:
            score(denoiser, batch, setting)
            calls += 1
        return calls * setting.passes / (time.perf_counter() - began)


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
        spec = {"task": "bfloat16", "model": name, "threads": threads, "seconds": seconds}
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
    peak, per_image = measured["peak"], case.captions * case.draws
    timings = [
        Timing(Setting(**setting), rounds)
        for setting, rounds in zip(measured["settings"], measured["rounds"], strict=True)
    ]
    print(f"{case.name}: matrix products {peak / 1e9:.1f} GFLOP/s on {threads} threads")
    rows = [row(timing, None, useful, peak, per_image, threads) for timing in timings]
    reached, aim = max(entry["share_of_peak"] for entry in rows), AIMS["bfloat16"]
    print(f"aim {aim:.0%} of peak: {'reached' if reached >= aim else 'missed'} ({reached:.1%})")
    return rows


if __name__ == "__main__":
    sys.exit(main())
