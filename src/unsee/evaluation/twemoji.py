"""The twemoji benchmark as it ships: its model, its queries and where its outcomes are."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file

from ..data.dataset import ImageDataset, load_dataset
from ..data.latents import EncodedDataset, encode_dataset
from ..models.unet import UNetDenoiser
from ..query import Query
from ..training.pipeline import assemble_pipeline, load_text_encoder
from .benchmark import Outcomes, members_and_decoys, read_outcomes

MAX_TOKENS = 20


@dataclass(frozen=True)
class Benchmark:
    """Everything that a method needs to be judged.

    Attributes:
        model: trained on the members.
        images: pictures and captions.
        data: all examples, encoded: members and decoys.
        members: [N] bool, examples that the model was trained on.
        queries: what it generated; the first half from training captions.
        directory: where the outcomes are.
    """

    model: UNetDenoiser
    images: ImageDataset
    data: EncodedDataset
    members: np.ndarray
    queries: list[Query]
    directory: Path

    def outcomes(self) -> Outcomes:
        """Returns the losses of the queries under the retrained models.

        Raises:
            ValueError: see `read_outcomes`.
        """
        path = self.directory / "outcomes.parquet"
        return read_outcomes(path, self.data.ids, [q.id for q in self.queries])

    @property
    def tuning(self) -> np.ndarray:
        """[Q] bool: the queries that methods are tuned on, every other one of each kind."""
        return np.arange(len(self.queries)) % 2 == 0


def shipped() -> Path:
    """Returns the folder of the benchmark in this installation."""
    return Path(str(resources.files("unsee") / "assets" / "benchmark"))


def build_model(
    unet: UNet2DConditionModel, scheduler: DDIMScheduler, parameters: str | Sequence[str]
) -> UNetDenoiser:
    """Returns a UNet of the benchmark with the encoders that ship with the demo model."""
    vae = AutoencoderKL.from_pretrained(shipped().parent / "twemoji" / "vae").float().eval()
    encoder, tokenizer = load_text_encoder("minilm", MAX_TOKENS)
    pipeline = assemble_pipeline(vae, unet, scheduler, encoder, tokenizer)
    pipeline.set_progress_bar_config(disable=True)
    return UNetDenoiser.from_pipeline(pipeline, parameters)


def load_benchmark(
    cache: Path,
    parameters: str | Sequence[str] = "cross-attn-kv",
    directory: Path | None = None,
) -> Benchmark:
    """Loads the benchmark; encodes its pictures if `cache` does not hold them.

    Args:
        cache: folder for what is computed on the way.
        parameters: which parameters methods look at.
        directory: of the benchmark; the one that ships by default.

    Raises:
        ValueError: the folder lacks a part, or the data set does not install.
    """
    where = directory or shipped()
    for part in ("unet/config.json", "scheduler", "queries.json", "queries.safetensors"):
        if not (where / part).exists():
            raise ValueError(f"benchmark {str(where)!r}: no {part} there")
    unet = UNet2DConditionModel.from_pretrained(where / "unet", torch_dtype=torch.float32).eval()
    model = build_model(unet, DDIMScheduler.from_pretrained(where / "scheduler"), parameters)
    images = load_dataset("twemoji")
    data = encode_dataset(model, images, cache=cache)
    rows, _ = members_and_decoys(data.ids)
    members = np.zeros(len(data.ids), dtype=bool)
    members[rows] = True
    return Benchmark(model, images, data, members, _queries(where, model), where)


def _queries(where: Path, model: UNetDenoiser) -> list[Query]:
    about = json.loads((where / "queries.json").read_text(encoding="utf-8"))
    latents = load_file(where / "queries.safetensors")["latents"]
    text = model.encode_prompts([q["prompt"] for q in about])
    pictures: list[Image.Image] = model.decode(latents)
    return [
        Query(q["id"], latents[i], text[i], q["prompt"], pictures[i], provenance=q)
        for i, q in enumerate(about)
    ]
