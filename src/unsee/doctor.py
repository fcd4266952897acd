"""Checks a model and a data set before a long run, and tells what a file or folder holds."""

from __future__ import annotations

import json
import os
import platform
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from . import __version__
from .data.dataset import ImageDataset
from .data.latents import EncodedDataset, encode_dataset
from .draws import Draws
from .index.describe import describe_index
from .index.fisher import fit_diagonal_fisher
from .methods.base import Scores
from .methods.forward import forward_losses, noise_floor
from .models.base import Denoiser

SAMPLE = 64
"""Examples that are encoded and timed."""


@dataclass(frozen=True)
class Finding:
    """One thing that was checked.

    Attributes:
        name: what was checked.
        ok: whether a run would go well as far as this is concerned.
        detail: what was found, with numbers, and what to do where it is not ok.
    """

    name: str
    ok: bool
    detail: str

    def __str__(self) -> str:
        return f"{'ok  ' if self.ok else 'BAD '} {self.name}: {self.detail}"


def examine(
    model: Denoiser,
    data: ImageDataset,
    out: Path,
    *,
    draws: int = 10,
    query_draws: int = 200,
    flips: bool = False,
    batch_size: int = 80,
    seed: int = 0,
    fisher_draws: int = 2,
    fisher_examples: int = 2000,
    finished: bool = True,
) -> list[Finding]:
    """Checks everything that would make a long run fail late.

    Args:
        model: the denoiser.
        data: its training set; every picture is opened.
        out: where the run would write.
        draws, query_draws, flips, batch_size, seed: of the run, see `attributor`.
        fisher_draws, fisher_examples: of the run, see `prepare`.
        finished: the weights are those that the model's record of its training is of.
    """
    findings = [_check_pictures(data)]
    if not findings[0].ok:
        return findings
    findings.append(_check_captions(model, data))
    spread = np.linspace(0, len(data) - 1, min(SAMPLE, len(data))).astype(int)
    sample = encode_dataset(model, data.select([data.ids[i] for i in spread]))
    plan = Draws(seed, draws, num_train_timesteps=model.num_train_timesteps)
    started = time.monotonic()
    try:
        losses = forward_losses(model, sample, plan, range(len(sample.ids)), batch_size=batch_size)
    except ValueError as error:
        return [*findings, Finding("loss", False, str(error))]
    forward = (time.monotonic() - started) / losses.size
    findings.append(_check_loss(losses, _training_record(model) if finished else None))
    findings.append(_check_floor(model, sample, plan, batch_size, float(losses.mean())))
    started = time.monotonic()
    few = sample.select(sample.ids[:8])
    fit_diagonal_fisher(model, few, Draws(seed, 4, num_train_timesteps=model.num_train_timesteps))
    backward = (time.monotonic() - started) / (4 * len(few.ids))

    captions = float(np.mean([len(c) for c in data.captions]))
    passes = len(data) * captions * draws * (2 if flips else 1)
    # The search for the step evaluates the query's loss a handful of times.
    fixed = min(len(data), fisher_examples) * captions * fisher_draws * backward + passes * forward
    query = passes * forward + query_draws * (backward + 8 * forward)
    findings.append(_check_room(sample, len(data), passes, out, flips))
    findings.append(
        Finding(
            "time", True,
            f"about {_duration(fixed)} once (Fisher, losses before) and {_duration(query)} for "
            f"each picture; {1 / forward:.0f} forward passes a second here",
        )
    )  # fmt: skip
    return findings


def _check_pictures(data: ImageDataset) -> Finding:
    bad = []
    for position in range(len(data)):
        try:
            _ = data[position].image
        except ValueError as error:
            bad.append(str(error))
    if bad:
        return Finding("pictures", False, f"{len(bad)} of {len(data)} cannot be read: {bad[0]}; "
                       "remove them, or use --skip-bad")  # fmt: skip
    return Finding("pictures", True, f"all {len(data)} of {data.name} can be read")


def _check_captions(model: Denoiser, data: ImageDataset) -> Finding:
    tokenizer = getattr(model.pipeline, "tokenizer", None)
    texts = [c for captions in data.captions for c in captions]
    detail = f"{len(texts)} captions, {len(set(texts))} of them distinct"
    if tokenizer is None:
        return Finding("captions", True, detail)
    lengths = [len(ids) for ids in tokenizer(texts).input_ids]
    limit = tokenizer.model_max_length
    cut = sum(n > limit for n in lengths)
    detail += f"; the longest has {max(lengths)} tokens, the encoder takes {limit}"
    return Finding("captions", True, detail + (f", so {cut} are cut" if cut else ""))


def _check_loss(losses: np.ndarray, record: dict | None) -> Finding:
    mean = float(losses.mean())
    if record and "loss" in record:
        expected = float(record["loss"])
        ok = 0.5 * expected < mean < 2 * expected
        detail = f"{mean:.4f} on training examples; {expected:.4f} was recorded after training"
    else:
        # Predicting zero leaves the variance of the target, about 1 for unit-variance latents.
        ok = mean < 0.8
        detail = f"{mean:.4f} on training examples; a network that predicts nothing has about 1"
    if not ok:
        detail += ": is this the model's own training data, its own scaling, the right captions?"
    return Finding("loss", ok, detail)


def _training_record(model: Denoiser) -> dict | None:
    source = getattr(model.pipeline, "name_or_path", None) or getattr(
        getattr(model.pipeline, "config", None), "_name_or_path", None
    )
    path = Path(str(source)) / "training.json"
    return json.loads(path.read_text(encoding="utf-8")) if source and path.is_file() else None


def _check_floor(
    model: Denoiser, sample: EncodedDataset, plan: Draws, batch_size: int, loss: float
) -> Finding:
    floor = noise_floor(model, sample, plan, range(len(sample.ids)), batch_size)
    # A score is a small part of a loss: below a thousandth of it a step must still be seen.
    ok = floor < 1e-3 * loss
    detail = f"rounding moves a score by up to {floor:.1e}; steps that move less are refused"
    return Finding("noise floor", ok, detail + ("" if ok else "; use --dtype float32"))


def _check_room(
    sample: EncodedDataset, examples: int, passes: float, out: Path, flips: bool
) -> Finding:
    each = sample.latents([0])[0].numel() * 4 * (2 if flips else 1)
    text = sample.text([0], 0)[0].numel() * 4 * max(sample.caption_counts)
    memory_needed = examples * (each + text)
    disk_needed = examples * each + 2 * 8 * passes
    existing = next(p for p in [out.resolve(), *out.resolve().parents] if p.exists())
    disk = shutil.disk_usage(existing).free
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    ok = memory_needed < 0.7 * memory and disk_needed < disk and os.access(existing, os.W_OK)
    detail = (
        f"needs {_size(memory_needed)} of {_size(memory)} memory for the encoded data and "
        f"{_size(disk_needed)} of {_size(disk)} disk at {existing}"
    )
    if not os.access(existing, os.W_OK):
        detail += ", which cannot be written to"
    return Finding("room", ok, detail)


def describe(path: Path | None) -> list[str]:
    """Tells versions and devices, or what a score file, results folder or model folder holds.

    Raises:
        ValueError: nothing there that unsee knows.
    """
    if path is None:
        return _versions()
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder")
    if path.is_file():
        return _describe_scores(path)
    if (path / "manifest.json").is_file():
        return describe_index(path)
    files = sorted(path.glob("scores*.parquet"))
    found = [line for file in files for line in _describe_scores(file)]
    if (path / "training.json").is_file():
        record = json.loads((path / "training.json").read_text(encoding="utf-8"))
        found += [f"{name}: {value}" for name, value in record.items()]
    elif (path / "model_index.json").is_file():
        index = json.loads((path / "model_index.json").read_text(encoding="utf-8"))
        found.append(f"a pipeline: {index.get('_class_name')}")
    if not found:
        raise ValueError(f"{path}: holds no scores and no model that unsee knows")
    return found


def _describe_scores(path: Path) -> list[str]:
    scores = Scores.load(path)
    settings = scores.settings
    lines = [f"{path}: {scores.method}, {len(scores)} scores from {scores.values.min():.3g} to "
             f"{scores.values.max():.3g}"]  # fmt: skip
    shown = {name: value for name, value in settings.items() if name != "parameters"}
    return lines + [f"  {name}: {value}" for name, value in shown.items()]


def _versions() -> list[str]:
    from importlib import metadata

    packages = ("torch", "diffusers", "transformers", "datasets", "peft", "numpy")
    lines = [f"unsee {__version__}, Python {platform.python_version()} on {platform.platform()}"]
    for name in packages:
        try:
            lines.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            lines.append(f"{name} is not installed")
    cuda = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none"
    lines.append(f"CUDA: {cuda}; MPS: {'yes' if torch.mps.is_available() else 'none'}; "
                 f"{torch.get_num_threads()} threads of {os.cpu_count()} processors")  # fmt: skip
    return lines


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
