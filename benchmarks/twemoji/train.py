"""Trains the models of the twemoji benchmark: python benchmarks/twemoji/train.py WORK

One model on all members, with two seeds; one on each of 64 random halves, 16 of them twice.
Two run side by side with one thread each. A run that was killed goes on where its last checkpoint
was; a finished run is not repeated.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import pyarrow.parquet as pq
import torch
from recipe import EPOCHS, RECIPE, optimization
from safetensors.torch import save_file
from tqdm.auto import tqdm

from unsee import Denoiser, load_dataset
from unsee.data.latents import EncodedDataset, encode_dataset
from unsee.demo import write_demo_model
from unsee.evaluation.benchmark import Run, plan
from unsee.evaluation.twemoji import shipped
from unsee.files import write_atomically
from unsee.models.loading import load_pipeline
from unsee.training.text_to_image import train_text_to_image


def encoded(work: Path) -> tuple[EncodedDataset, torch.Tensor]:
    """Returns the data set as the demo model's autoencoder and text encoder see it, and the
    empty prompt."""
    model = Denoiser.from_pipeline(load_pipeline(write_demo_model()))
    data = encode_dataset(model, load_dataset("twemoji"), cache=work / "encoded")
    return data, model.encode_prompts([""])[0]


def train_one(run: Run, work: Path) -> tuple[str, float]:
    """Trains one model; returns its name and the seconds it took."""
    torch.set_num_threads(1)
    weights = work / run.name / "unet.safetensors"
    if weights.is_file():
        return run.name, 0.0
    started = time.monotonic()
    data, null_text = encoded(work)
    kept = set(run.keep)
    out = [i for row, i in enumerate(data.ids) if row not in kept]
    model = train_text_to_image(
        RECIPE, data, null_text, optimization(len(run.keep), run.seed), work / run.name,
        leave_out=out,
    )  # fmt: skip
    state = {k: v.contiguous() for k, v in model.network.state_dict().items()}
    about = {"torch": torch.__version__, "epochs": str(EPOCHS), "seed": str(run.seed)}
    write_atomically(weights, lambda path: save_file(state, path, about))
    (work / run.name / "checkpoint.pt").unlink()
    return run.name, time.monotonic() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path, help="folder of the encoded data and the models")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument(
        "--only", nargs="*", help="names of runs; by default all that are not measured"
    )
    arguments = parser.parse_args()
    data, _ = encoded(arguments.work)
    runs = [r for r in plan(data.ids) if not arguments.only or r.name in arguments.only]
    todo = [r for r in runs if not (arguments.work / r.name / "unet.safetensors").is_file()]
    if not arguments.only and (path := shipped() / "outcomes.parquet").is_file():
        # What has been measured need not be trained again: its outcomes ship.
        measured = set(pq.read_table(path, columns=["run"])["run"].to_pylist())
        todo = [r for r in todo if r.name not in measured]
    print(f"{len(runs)} models, {len(todo)} of them to train")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.processes, mp_context=context) as pool:
        futures = [pool.submit(train_one, run, arguments.work) for run in todo]
        for future in tqdm(as_completed(futures), total=len(todo), unit="model"):
            name, seconds = future.result()
            print(f"{name}: {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
