"""The AbU paper's MSCOCO experiment the slow way: one picture, one caption, one draw at a time."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DConditionModel

BETAS = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
ALPHAS = torch.cumprod(1 - BETAS, 0)


def denoising_loss(unet, latent, text, timestep, noise):
    """Mean over latent elements of (predicted noise - noise) squared, for one latent."""
    alpha = ALPHAS[timestep].to(latent.dtype)
    noisy = alpha.sqrt() * latent + (1 - alpha).sqrt() * noise
    predicted = unet(noisy[None], int(timestep), encoder_hidden_states=text[None]).sample[0]
    return ((predicted - noise) ** 2).sum() / noise.numel()


def selected(name: str, selection: str) -> bool:
    if selection == "cross-attn-kv":
        return "attn2" in name and ("to_k" in name or "to_v" in name)
    if selection == "cross-attn":
        return "attn2" in name
    if selection == "attn":
        return "attn" in name
    assert selection == "all"
    return True


def attribute(
    folder: Path,
    query: int,
    rows: Sequence[int] | None = None,
    draws: Path | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns losses [rows, 2 views] before and after unlearning the query."""
    config = json.loads((folder / "config.json").read_text())
    recorded = np.load(draws or folder / "draws.npz")

    def array(name):
        return torch.from_numpy(np.load(folder / f"coco17_{name}.npy")).to(dtype)

    unet = UNet2DConditionModel(**config["unet"])
    unet.load_state_dict(torch.load(folder / "model.bin", weights_only=True))
    unet.to(dtype).eval()
    fisher = torch.load(folder / "fisher_info.pt", weights_only=True)
    latents, texts = array("train_latents"), array("train_text_embeddings")
    n = len(texts)
    rows = range(n) if rows is None else rows

    @torch.no_grad()
    def losses():
        noise = recorded["loss_noise"]
        result = np.zeros((len(rows), 2))
        for place, row in enumerate(rows):
            for view in (0, 1):
                values = []
                for caption in range(config["num_captions"]):
                    for d, t in enumerate(recorded["loss_timesteps"]):
                        e = torch.from_numpy(noise[row + view * n, caption, d]).to(dtype)
                        text = texts[row, caption]
                        loss = denoising_loss(unet, latents[row + view * n], text, t, e)
                        values.append(float(loss))
                result[place, view] = sum(values) / len(values)
        return result

    before = losses()
    latent = array("sample_latents")[query]
    text = array("sample_text_embeddings")[query, 0]
    which = config["weight_selection"]
    parameters = [(k, p) for k, p in unet.named_parameters() if selected(k, which)]
    for step in range(config["steps"]):
        gradient = {name: torch.zeros(p.shape, dtype=torch.float64) for name, p in parameters}
        for a in range(config["grad_accum"]):
            for b in range(config["unlearn_batch"]):
                t = recorded[f"unlearn_timesteps_{query}"][step, a, b]
                e = torch.from_numpy(recorded[f"unlearn_noise_{query}"][step, a, b]).to(dtype)
                loss = denoising_loss(unet, latent, text, t, e)
                values = torch.autograd.grad(loss, [p for _, p in parameters], allow_unused=True)
                for (name, _), value in zip(parameters, values, strict=True):
                    if value is not None:
                        gradient[name] += value / config["unlearn_batch"] / config["grad_accum"]
        with torch.no_grad():
            for name, p in parameters:
                size = config["lr"] / config["dataset_size"]
                moved = p.double() + size * gradient[name] / fisher[name]
                # The weights are float32, whatever the passes are computed in.
                p.copy_(moved.float())
    return before, losses()
