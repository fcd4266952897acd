"""The command line, as somebody types it, on tiny models."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.reference.released import write_experiment
from unsee.cli import build_parser, main

SHORT = ["--steps", "2", "--batch-size", "2", "--device", "cpu"]


def test_reproduce_takes_a_work_folder_a_seed_and_a_batch_size(tmp_path: Path) -> None:
    data = write_experiment(tmp_path / "data", n=2, num_captions=1, lr=1e-4)
    out, work = tmp_path / "new" / "out.npz", tmp_path / "work"
    options = ["--work", str(work), "--seed", "3", "--batch-size", "7", "--device", "cpu"]
    assert (
        main(["reproduce", "--data", str(data), "--query", "0", "--out", str(out), *options]) == 0
    )
    settings = json.loads(str(np.load(out)["settings"]))
    assert settings["draws"] == "seed 3" and settings["batch_size"] == 7
    assert (work / "settings.json").is_file()  # a folder that was named is kept


def test_a_picture_that_does_not_decode_does_not_stop_a_training(
    image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    bad = image_folder / "blue-square.png"
    bad.write_bytes(bad.read_bytes()[:40])
    command = ["train", "autoencoder", str(image_folder), str(tmp_path / "vae"), *SHORT]
    command += ["--resolution", "16", "--channels", "8,8", "--latent-channels", "2"]
    assert main(command) == 2
    assert bad.name in capsys.readouterr().err
    assert main([*command, "--skip-bad"]) == 0
    assert (tmp_path / "vae" / "config.json").is_file()


def test_a_decoder_is_trained_and_the_encoder_is_written_unchanged(
    image_folder: Path, tiny_pipeline_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    vae, out = tiny_pipeline_dir / "vae", tmp_path / "out"
    command = ["train", "decoder", str(image_folder), str(out), "--autoencoder", str(vae), *SHORT]
    assert main(command) == 0
    weights = "diffusion_pytorch_model.safetensors"
    before, after = load_file(vae / weights), load_file(out / weights)
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"decoder", "post_quant_conv"}
    record = json.loads((out / "training.json").read_text())
    assert record["part"] == "decoder" and record["psnr_db"] != record["psnr_db_before"]
    command[3] = str(vae)
    assert main(command) == 2
    assert "name another folder" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["autoencoder", "decoder", "text-to-image", "lora"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a device that is not there")
def test_every_training_takes_a_device(
    what: str, image_folder: Path, tiny_pipeline_dir: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    model = [str(tiny_pipeline_dir)] if what == "lora" else []
    takes_one = what in ("decoder", "text-to-image")
    vae = ["--autoencoder", str(tiny_pipeline_dir / "vae")] if takes_one else []
    command = ["train", what, *model, str(image_folder), str(tmp_path / "out"), *vae]
    assert main([*command, "--device", "cuda"]) == 2
    assert "device 'cuda' is not available here" in capsys.readouterr().err


def test_help_names_every_data_set_and_what_guidance_is(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        build_parser().parse_args(["attribute", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "'twemoji-skin-tones'" in text
    assert "classifier-free guidance (default: 7.5" in text


def test_no_bar_is_shown_while_a_model_loads(
    tiny_pipeline_dir: Path, image_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    command = ["doctor", str(tiny_pipeline_dir), str(image_folder), "--out", str(tmp_path)]
    main([*command, "--draws", "1", "--query-draws", "2", "--device", "cpu"])
    shown = capfd.readouterr()
    assert "Loading" not in shown.out + shown.err
