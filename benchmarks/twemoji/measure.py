"""Measures the models of the twemoji benchmark: python benchmarks/twemoji/measure.py WORK

Makes the queries once, from the model on all members (rounded to float16, as it ships), and then
for each finished training the loss of every query and the picture regenerated from the same noise.
Writes what ships (model, queries, outcomes) to OUT; measured runs are not measured again.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from recipe import RECIPE
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

import unsee
from unsee import load_dataset
from unsee.draws import Draws
from unsee.evaluation.benchmark import Run, fingerprint_of, members_and_decoys, plan
from unsee.evaluation.deviation import ssim
from unsee.evaluation.twemoji import Benchmark, build_model, load_benchmark, shipped
from unsee.files import write_atomically
from unsee.models.unet import UNetDenoiser
from unsee.training.text_to_image import build_scheduler, build_unet

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes" / "twemoji"))
from captions import NOVEL, check_novel, stratified_rows

DRAWS = Draws(seed=-100, n=100)
"""Of the outcomes: seeds that methods do not use, so that no luck is shared."""

BINS = 10
GUIDANCE, STEPS = 3.0, 50


def network(weights: Path) -> torch.nn.Module:
    unet = build_unet(RECIPE, 8, 8, 384)
    unet.load_state_dict({k: v.float() for k, v in load_file(weights).items()})
    return unet.eval()


@torch.no_grad()
def pictures(model: UNetDenoiser, prompts: list[str], seeds: list[int]) -> torch.Tensor:
    """Returns final latents [Q, C, h, w]; each query has its own generator of initial noise."""
    return model.pipeline(
        prompts, num_inference_steps=STEPS, guidance_scale=GUIDANCE, output_type="latent",
        generator=[torch.Generator("cpu").manual_seed(s) for s in seeds],
    ).images.float()  # fmt: skip


def make_queries(work: Path, out: Path) -> None:
    """Writes the model that ships and its queries: 20 training captions, 20 new ones."""
    unet = network(work / "full-0" / "unet.safetensors").half()
    unet.save_pretrained(out / "unet")
    build_scheduler(RECIPE).save_pretrained(out / "scheduler")
    data = load_dataset("twemoji")
    captions = [c[0] for c in data.captions]
    check_novel(NOVEL, captions)
    rows, _ = members_and_decoys(data.ids)
    chosen = stratified_rows(
        [data.ids[r] for r in rows], [captions[r] for r in rows],
        [data.metadata(r)["category"] for r in rows], 20,
    )  # fmt: skip
    own = [data.ids[rows[c]] for c in chosen]
    prompts = [captions[rows[c]] for c in chosen] + list(NOVEL)
    model = build_model(unet.float(), build_scheduler(RECIPE), "all")
    seeds = list(range(1000, 1000 + len(prompts)))
    latents = pictures(model, prompts, seeds)
    about = [
        {"id": f"{'new' if i >= 20 else 'member'}-{i % 20:02d}", "prompt": p, "seed": seeds[i],
         "own": own[i] if i < 20 else None, "guidance_scale": GUIDANCE, "steps": STEPS}
        for i, p in enumerate(prompts)
    ]  # fmt: skip
    save_file({"latents": latents.contiguous()}, out / "queries.safetensors")
    (out / "queries.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    sheet(model.decode(latents)).save(out / "queries.png", optimize=True)  # for docs/images


def sheet(images: list[Image.Image], columns: int = 10) -> Image.Image:
    """Returns the pictures of all queries side by side."""
    w, h = images[0].size
    rows = -(-len(images) // columns)
    page = Image.new("RGB", (w * columns, h * rows), "white")
    for i, image in enumerate(images):
        page.paste(image, ((i % columns) * w, i // columns * h))
    return page


def measure(run: Run, work: Path, out: Path, benchmark: Benchmark) -> tuple[list[dict], list[dict]]:
    """Returns the outcomes and deviations of one run, and writes its sheet of pictures."""
    model, queries = benchmark.model, benchmark.queries
    model.network.load_state_dict(network(work / run.name / "unet.safetensors").state_dict())
    losses, deviations = [], []
    with torch.no_grad():
        for q in queries:
            timesteps, noise = DRAWS.of(q.id, tuple(q.latents.shape))
            values = model.loss(q.latents[None], q.text[None], timesteps[None], noise[None])[0]
            for b, part in enumerate(values.double().reshape(BINS, -1).mean(1).tolist()):
                losses.append({"run": run.name, "subset": run.subset, "seed": run.seed,
                               "query": q.id, "timestep_bin": b, "loss": part})  # fmt: skip
    about = [q.provenance for q in queries]
    latents = pictures(model, [q.prompt for q in queries], [a["seed"] for a in about])
    made = model.decode(latents)
    for i, q in enumerate(queries):
        a, b = (np.asarray(p, dtype=np.float64) / 255 for p in (q.image, made[i]))
        cosine = torch.cosine_similarity(latents[i].flatten(), q.latents.flatten(), dim=0)
        deviations.append({"run": run.name, "query": q.id, "mse": float(((a - b) ** 2).mean()),
                           "ssim": ssim(a, b), "latent_cosine": float(cosine)})  # fmt: skip
    folder = Path(__file__).parent / "sheets" if out == shipped() else out / "sheets"
    folder.mkdir(parents=True, exist_ok=True)
    sheet(made).save(folder / f"{run.name}.webp", quality=60, method=6)
    return losses, deviations


def origin(benchmark: Benchmark, *commands: str) -> dict[str, str]:
    """Returns what made a table of outcomes, for its metadata. Versions are those of whoever added
    the last row."""
    return {
        "examples": fingerprint_of(benchmark.data.ids), "draws": repr(DRAWS),
        "commands": "\n".join(dict.fromkeys(commands)), "unsee": unsee.__version__,
        "torch": torch.__version__,
        "seeds": "trainings 0, or the number at the end of the run's name; random sets 0",
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path, help="the folder that train.py filled")
    parser.add_argument("--out", type=Path, default=shipped())
    arguments = parser.parse_args()
    work, out = arguments.work, arguments.out
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "queries.json").is_file():
        make_queries(work, out)
    benchmark = load_benchmark(work / "encoded", "all", out)
    metadata = origin(benchmark, "python benchmarks/twemoji/measure.py WORK")
    names = "outcomes", "deviations"
    rows = {n: pq.read_table(out / f"{n}.parquet").to_pylist()
            if (out / f"{n}.parquet").is_file() else [] for n in names}  # fmt: skip
    done = {r["run"] for r in rows["deviations"]}
    for run in tqdm(plan(benchmark.data.ids), unit="model"):
        if run.name in done or not (work / run.name / "unet.safetensors").is_file():
            continue
        for name, new in zip(names, measure(run, work, out, benchmark), strict=True):
            rows[name] += new
            table = pa.Table.from_pylist(rows[name]).replace_schema_metadata(metadata)
            write_atomically(out / f"{name}.parquet",
                             lambda path, table=table: pq.write_table(table, path))  # fmt: skip


if __name__ == "__main__":
    main()
