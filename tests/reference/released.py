"""A random experiment in the layout of the files that the AbU paper released."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel

from .abu import denoising_loss

UNET: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 1,
    "block_out_channels": [8, 16],
    "cross_attention_dim": 12,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}
CONFIG: dict[str, Any] = {
    "weight_selection": "cross-attn-kv",
    "lr": 0.01,
    "steps": 1,
    "unlearn_batch": 3,
    "grad_accum": 2,
    "num_captions": 1,
    "time_samples": 2,
}


def write_experiment(
    folder: Path,
    *,
    unet: dict[str, Any] | None = None,
    n: int = 3,
    queries: int = 2,
    captions: int = 2,
    tokens: int = 5,
    shape: tuple[int, ...] = (4, 8, 8),
    seed: int = 0,
    **config: Any,
) -> Path:
    """Writes arrays, weights, Fisher, draws and configuration; returns the folder.

    Args:
        folder: is made.
        unet: arguments of the UNet that differ from `UNET`.
        n: training pictures.
        queries: synthesized pictures.
        captions: of each training picture, in the file.
        tokens: of a caption; a query's prompt has one more.
        shape: of a latent.
        seed: of everything random.
        config: what differs from `CONFIG`.
    """
    folder.mkdir(parents=True)
    settings = {"unet": {**UNET, **(unet or {})}, **CONFIG, "dataset_size": n, **config}
    (folder / "config.json").write_text(json.dumps(settings))
    rng = np.random.default_rng(seed)

    def normal(*size):
        return rng.standard_normal(size, dtype=np.float32)

    width = settings["unet"]["cross_attention_dim"]
    arrays = {
        "train_latents": normal(2 * n, *shape),
        "train_text_embeddings": normal(n, captions, tokens, width),
        "sample_latents": normal(queries, *shape),
        "sample_text_embeddings": normal(queries, 1, tokens + 1, width),
    }
    for name, array in arrays.items():
        np.save(folder / f"coco17_{name}.npy", array)
    torch.manual_seed(seed)
    model = UNet2DConditionModel(**settings["unet"]).eval()
    torch.save(model.state_dict(), folder / "model.bin")
    torch.save(_fisher(model, arrays, rng), folder / "fisher_info.pt")
    draws = {
        "loss_timesteps": np.sort(rng.permutation(1000)[: settings["time_samples"]]),
        "loss_noise": normal(2 * n, settings["num_captions"], settings["time_samples"], *shape),
    }
    for q in range(queries):
        size = (settings["steps"], settings["grad_accum"], settings["unlearn_batch"])
        draws[f"unlearn_timesteps_{q}"] = rng.integers(0, 1000, size)
        draws[f"unlearn_noise_{q}"] = normal(*size, *shape)
    np.savez(folder / "draws.npz", **draws)
    return folder


def _fisher(model, arrays, rng):
    """Mean square of the gradients of a few draws, with a floor, for every parameter."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    total = [torch.zeros(p.shape, dtype=torch.float64) for p in parameters]
    for draw in range(8):
        row = draw % len(arrays["train_text_embeddings"])
        latent = torch.from_numpy(arrays["train_latents"][row])
        text = torch.from_numpy(arrays["train_text_embeddings"][row, 0])
        noise = torch.from_numpy(rng.standard_normal(latent.shape, dtype=np.float32))
        loss = denoising_loss(model, latent, text, int(rng.integers(1000)), noise)
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        for sums, g in zip(total, gradients, strict=True):
            sums += 0 if g is None else g.double() ** 2 / 8
    # A few draws leave weights that hardly mattered in them; the floor keeps their steps small.
    floors = [max(1e-12, 0.1 * float(s.mean())) for s in total]
    return {k: s.clamp_min(f) for k, s, f in zip(names, total, floors, strict=True)}
