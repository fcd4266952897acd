"""Measurements in processes of their own: several at once, or one that may have to be given up.

Started by forward.py with a specification in JSON as the only argument; the last line that it
prints is the answer, in JSON.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from typing import Any

import torch
from scoring import CASES, Case, Setting, compare, laid_out, matmul_peak, score


def start(spec: dict[str, Any]) -> subprocess.Popen[str]:
    """Starts a process that does one piece of work."""
    return subprocess.Popen(
        [sys.executable, __file__, json.dumps(spec)],
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
            name: matmul_peak(getattr(torch, name), spec["threads"], (256,), 0.05)
            for name in ("float32", "bfloat16")
        }
    case = CASES[spec["model"]]
    if spec["task"] == "throughput":
        return throughput(case, Setting(**spec["setting"]), spec["seconds"])
    dtype = getattr(torch, spec["dtype"])
    denoiser = case.build(dtype)
    settings = [
        Setting(n, layout) for n in case.sizes for layout in ("contiguous", "channels_last")
    ]
    peak = matmul_peak(dtype, spec["threads"])
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


if __name__ == "__main__":
    print(json.dumps(work(json.loads(sys.argv[1]))), flush=True)
