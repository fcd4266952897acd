from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from unsee.data.dataset import load_dataset
from unsee.data.latents import EncodedDataset, encode_dataset
from unsee.draws import Draws
from unsee.index.fisher import fit_diagonal_fisher
from unsee.methods.unlearning import ForwardAbU
from unsee.models.base import Denoiser
from unsee.models.loading import load_lora, load_snapshot
from unsee.training.commands import lora, training_loss
from unsee.training.loop import Optimization, snapshot_path
from unsee.training.lora import train_lora

from .conftest import make_data

pytest.importorskip("peft")

OPTIMIZATION = Optimization(
    steps=12, batch_size=4, learning_rate=2e-2, warmup=2, ema_decay=0.5, checkpoint_seconds=0
)


class Stopped(Exception):
    """Ends a run from inside, as a crash would."""


class StoppingDataset(EncodedDataset):
    """Data that cannot be read any more after some batches."""

    left = 10**9

    def latents(self, rows: Sequence[int], flipped: bool = False) -> Tensor:
        if self.left == 0:
            raise Stopped
        self.left -= 1
        return super().latents(rows, flipped)


def content_of(path: Path) -> tuple[dict, dict]:
    """Returns weights as bytes, and metadata; safetensors orders the latter as it likes."""
    with safe_open(str(path), framework="pt") as file:
        weights = {name: file.get_tensor(name).numpy().tobytes() for name in file.keys()}  # noqa: SIM118
        return weights, file.metadata()


def loss_of(pipeline: StableDiffusionPipeline, data: EncodedDataset) -> Tensor:
    """Returns losses [N, 3] on fixed draws."""
    noise = torch.randn((len(data.ids), 3, 4, 8, 8), generator=torch.Generator().manual_seed(7))
    timesteps = torch.tensor([200, 500, 800]).expand(len(data.ids), 3)
    rows = range(len(data.ids))
    with torch.no_grad():
        model = Denoiser.from_pipeline(pipeline, "all")
        return model.loss(data.latents(rows), data.text(rows, 0), timesteps, noise)


def test_the_saved_weights_load_and_the_pipeline_stays_as_it_was(
    tiny_pipeline: StableDiffusionPipeline,
    tiny_pipeline_dir: Path,
    data: EncodedDataset,
    null_text: Tensor,
    tmp_path: Path,
) -> None:
    unet = tiny_pipeline.unet
    unet.conv_in.weight.requires_grad_(False)
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    base_loss = loss_of(tiny_pipeline, data)
    optimization = dataclasses.replace(OPTIMIZATION, steps=40)
    path = train_lora(tiny_pipeline, data, null_text, optimization, tmp_path, rank=2, alpha=6.0)

    after = unet.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert [n for n, p in unet.named_parameters() if not p.requires_grad] == ["conv_in.weight"]

    tiny_pipeline.load_lora_weights(tmp_path)
    losses = loss_of(tiny_pipeline, data)
    assert float(losses.mean()) < float(base_loss.mean()) - 0.01  # it learnt, and it is used

    # The adapters' own definition, W + alpha / rank * up @ down, added to fresh weights by hand.
    by_hand = StableDiffusionPipeline.from_pretrained(tiny_pipeline_dir)
    weights = load_file(path)
    downs = [name for name in weights if ".lora_A." in name or ".lora.down." in name]
    assert len(weights) == 2 * len(downs)
    for name in downs:
        up = weights[name.replace("lora_A", "lora_B").replace("lora.down", "lora.up")]
        assert weights[name].dtype == torch.float32
        module = name.removeprefix("unet.").split(".lora")[0]
        linear = by_hand.unet.get_submodule(module)
        linear.weight.data += 6.0 / 2 * up @ weights[name]
    # float32, the product added before instead of after the input is multiplied
    torch.testing.assert_close(losses, loss_of(by_hand, data), rtol=1e-4, atol=1e-5)


def test_equal_seeds_give_equal_files_and_resuming_changes_nothing(
    tiny_pipeline: StableDiffusionPipeline, data: EncodedDataset, null_text: Tensor, tmp_path: Path
) -> None:
    def train(name: str, with_data: EncodedDataset = data) -> tuple[dict, dict]:
        return content_of(
            train_lora(tiny_pipeline, with_data, null_text, OPTIMIZATION, tmp_path / name, rank=2)
        )

    whole = train("a")
    assert whole == train("b")
    stopping = StoppingDataset(data.ids, data._latents, data._states, data._caption_rows)
    stopping.left = 5
    with pytest.raises(Stopped):
        train("c", stopping)
    assert not hasattr(tiny_pipeline.unet, "peft_config")
    assert train("c") == whole
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == [
        "checkpoint.pt", "pytorch_lora_weights.safetensors",
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"made with alpha = 2\.0, rank = 2; .* rank = 3"):
        train_lora(tiny_pipeline, data, null_text, OPTIMIZATION, tmp_path / "a", rank=3)
    tiny_pipeline.unet.conv_in.weight.data += 1
    with pytest.raises(ValueError, match="made with base = "):
        train("a")


def test_what_is_left_out_is_never_looked_at(
    tiny_pipeline: StableDiffusionPipeline, null_text: Tensor, tmp_path: Path
) -> None:
    short = dataclasses.replace(OPTIMIZATION, steps=4)
    files = []
    for number, value in enumerate((0.0, float("nan"))):
        data = make_data()
        data._latents[3], data._states[3] = value, value
        path = train_lora(
            tiny_pipeline, data, null_text, short, tmp_path / f"{number}", rank=2,
            leave_out=["example3"],
        )  # fmt: skip
        files.append(content_of(path))
    assert files[0] == files[1]
    with pytest.raises(ValueError, match="training loss is nan"):
        train_lora(tiny_pipeline, data, null_text, short, tmp_path / "all", rank=2)
    assert not tiny_pipeline.unet.training
    assert not any("lora" in name for name, _ in tiny_pipeline.unet.named_modules())


def test_an_attribution_over_the_adapters(
    tiny_pipeline: StableDiffusionPipeline, data: EncodedDataset, null_text: Tensor, tmp_path: Path
) -> None:
    train_lora(tiny_pipeline, data, null_text, OPTIMIZATION, tmp_path, rank=2)
    tiny_pipeline.load_lora_weights(tmp_path)
    model = Denoiser.from_pipeline(tiny_pipeline, "lora")
    saved = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    assert len(model.parameters) == len(saved)
    assert all("lora_" in name for name in model.parameters)
    assert sum(p.numel() for p in model.parameters.values()) == sum(
        v.numel() for v in saved.values()
    )

    # An adapter on the text's projections takes part in sharing them between draws.
    noise = torch.randn((2, 3, 4, 8, 8), generator=torch.Generator().manual_seed(3))
    timesteps = torch.tensor([[100, 500, 900], [300, 600, 999]])
    with torch.no_grad():
        inputs = data.latents([0, 1]), data.text([0, 1], 0)
        shared = model.loss(*inputs, timesteps, noise)
        single = [model.loss(*inputs, timesteps[:, [d]], noise[:, [d]]) for d in range(3)]
    # float32, batches of another size
    torch.testing.assert_close(shared, torch.cat(single, 1), rtol=1e-5, atol=1e-6)

    before = {name: p.detach().clone() for name, p in model.parameters.items()}
    fisher = fit_diagonal_fisher(model, data, Draws(seed=5, n=2))
    query = model.generate("a red square", seed=0, steps=2)
    method = ForwardAbU(
        model, data, fisher, rise=0.05, draws=Draws(n=2), query_draws=Draws(seed=1, n=4)
    )
    scores = method.attribute(query)
    assert scores.ids == data.ids
    assert np.ptp(scores.values) > 0
    assert scores.settings["rise"] == pytest.approx(0.05, rel=0.02)  # found to 1% of the way
    assert all(torch.equal(p, before[name]) for name, p in model.parameters.items())


def test_bad_settings_are_named(
    tiny_pipeline: StableDiffusionPipeline, data: EncodedDataset, null_text: Tensor, tmp_path: Path
) -> None:
    def train(**options: object) -> Path:
        return train_lora(tiny_pipeline, data, null_text, OPTIMIZATION, tmp_path, **options)

    with pytest.raises(ValueError, match="no module of the UNet is called 'to_z'"):
        train(targets=("to_q", "to_z"))
    with pytest.raises(ValueError, match="targets is empty"):
        train(targets=())
    with pytest.raises(ValueError, match="rank = 0"):
        train(rank=0)
    with pytest.raises(ValueError, match="'example77' is not in the data set"):
        train(leave_out=["example77"])
    assert list(tmp_path.iterdir()) == []
    tiny_pipeline.unet.half()
    with pytest.raises(ValueError, match=r"float16.*bfloat16 or torch.float32"):
        train()
    tiny_pipeline.unet.float()
    train(rank=2)
    tiny_pipeline.load_lora_weights(tmp_path)
    with pytest.raises(ValueError, match=r"has adapters already; call .*unload_lora_weights"):
        train(rank=2)
    tiny_pipeline.unload_lora_weights()
    train(rank=2)


def test_without_peft_the_remedy_is_named(
    tiny_pipeline: StableDiffusionPipeline,
    data: EncodedDataset,
    null_text: Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)  # as if it were not installed
    with pytest.raises(ValueError, match=r"pip install 'unsee\[lora\]'"):
        train_lora(tiny_pipeline, data, null_text, OPTIMIZATION, tmp_path)


def test_the_record_holds_the_loss_with_the_adapter(
    tiny_pipeline: StableDiffusionPipeline, image_folder: Path, tmp_path: Path
) -> None:
    data = load_dataset("imagefolder", data_dir=image_folder)
    lora(tiny_pipeline, data, tmp_path / "lora", OPTIMIZATION, rank=2)
    recorded = json.loads((tmp_path / "lora" / "training.json").read_text())["loss"]
    model = Denoiser.from_pipeline(tiny_pipeline)  # without adapter: the pipeline is as it was
    assert not any("lora" in name for name, _ in model.network.named_parameters())
    encoded = encode_dataset(model, data, cache=tmp_path / "work")
    base = training_loss(model, encoded)
    load_lora(tiny_pipeline, tmp_path / "lora")
    adapted = Denoiser.from_pipeline(tiny_pipeline)  # K and V below the adapters
    assert all(name.endswith("base_layer.weight") for name in adapted.parameters)
    assert recorded == pytest.approx(training_loss(adapted, encoded), rel=1e-6)
    assert recorded < base


def test_a_snapshot_takes_the_place_of_the_adapter(
    tiny_pipeline: StableDiffusionPipeline, image_folder: Path, tmp_path: Path
) -> None:
    data = load_dataset("imagefolder", data_dir=image_folder)
    steps = OPTIMIZATION.steps
    asked = dataclasses.replace(OPTIMIZATION, snapshots=(1, steps))
    lora(tiny_pipeline, data, tmp_path / "run", asked, rank=2)
    load_lora(tiny_pipeline, tmp_path / "run")
    final = {n: p.clone() for n, p in tiny_pipeline.unet.named_parameters() if "lora_" in n}
    load_snapshot(tiny_pipeline.unet, snapshot_path(tmp_path / "run", 1))
    first = {n: p.clone() for n, p in tiny_pipeline.unet.named_parameters() if "lora_" in n}
    assert not all(torch.equal(first[n], final[n]) for n in final)
    load_snapshot(tiny_pipeline.unet, snapshot_path(tmp_path / "run", steps))
    for name, parameter in tiny_pipeline.unet.named_parameters():
        assert "lora_" not in name or torch.equal(parameter, final[name])
