"""`unsee train`: autoencoder, decoder, text-to-image, LoRA."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from .cli_arguments import DATA_HELP, MODEL_HELP, integers, open_data, positive, quiet_loading

if TYPE_CHECKING:
    from .training.loop import Optimization


# -- train --------------------------------------------------------------------------------------


def add_train(commands: argparse._SubParsersAction) -> None:
    """Adds the command and its kinds."""
    train = commands.add_parser("train", help="train a small model, or fine-tune one with LoRA")
    kinds = train.add_subparsers(required=True, metavar="WHAT")

    command = kinds.add_parser("autoencoder", help="pictures to latents and back, from scratch")
    command.add_argument("data", metavar="DATA", help=DATA_HELP)
    command.add_argument("out", metavar="OUT", type=Path)
    command.add_argument("--resolution", type=positive, default=64)
    command.add_argument("--channels", type=integers, default=(16, 24, 64, 128))
    command.add_argument("--latent-channels", type=positive, default=8)
    command.add_argument("--kl-weight", type=float, default=1e-4)
    _add_optimization(command, steps=7000, batch_size=8, learning_rate=1e-3)
    command.set_defaults(run=_train_autoencoder)

    command = kinds.add_parser("decoder", help="an autoencoder's decoder further; latents stay")
    command.add_argument("data", metavar="DATA", help=DATA_HELP)
    command.add_argument("out", metavar="OUT", type=Path)
    command.add_argument("--autoencoder", type=Path, required=True, help="an AutoencoderKL folder")
    _add_optimization(command, steps=3000, batch_size=8, learning_rate=5e-4)
    command.set_defaults(run=_train_decoder)

    command = kinds.add_parser("text-to-image", help="a latent diffusion pipeline, from scratch")
    command.add_argument("data", metavar="DATA", help=DATA_HELP)
    command.add_argument("out", metavar="OUT", type=Path)
    command.add_argument("--autoencoder", type=Path, required=True, help="an AutoencoderKL folder")
    command.add_argument("--text-encoder", default="minilm",
                         help="'minilm' (from its pip package), a folder or a hub id")  # fmt: skip
    command.add_argument("--max-tokens", type=positive, default=20)
    command.add_argument("--channels", type=integers, default=(64, 128))
    command.add_argument("--layers-per-block", type=positive, default=1)
    command.add_argument("--heads", type=positive, default=4)
    command.add_argument("--prediction-type", default="v_prediction",
                         choices=("epsilon", "v_prediction", "sample"))  # fmt: skip
    command.add_argument("--beta-schedule", default="squaredcos_cap_v2")
    command.add_argument("--snr-gamma", type=float, help="Min-SNR weighting of timesteps")
    _add_finetuning(command, caption_dropout=0.1)
    _add_optimization(command, steps=20000, batch_size=32, learning_rate=1e-3)
    command.set_defaults(run=_train_text_to_image)

    command = kinds.add_parser("lora", help="fine-tune a pipeline with low-rank adapters")
    command.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    command.add_argument("data", metavar="DATA", help=DATA_HELP)
    command.add_argument("out", metavar="OUT", type=Path)
    command.add_argument("--rank", type=positive, default=8)
    _add_finetuning(command, caption_dropout=0.0)
    _add_optimization(command, steps=1000, batch_size=8, learning_rate=1e-3)
    command.set_defaults(run=_train_lora)


def _add_finetuning(command: argparse.ArgumentParser, caption_dropout: float) -> None:
    command.add_argument("--caption-dropout", type=float, default=caption_dropout)
    command.add_argument("--leave-out", type=Path, metavar="FILE",
                         help="ids that are not trained on, one a line")  # fmt: skip


def _add_optimization(command: argparse.ArgumentParser, **defaults: float) -> None:
    command.add_argument("--steps", type=positive, default=defaults["steps"])
    command.add_argument("--batch-size", type=positive, default=defaults["batch_size"])
    command.add_argument("--learning-rate", type=float, default=defaults["learning_rate"])
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--snapshots", type=integers, default=(), metavar="STEP,STEP",
                         help="steps after which the averaged weights are kept too")  # fmt: skip
    command.add_argument("--device", help="cpu, cuda or mps (default: the best there is)")
    command.add_argument("--threads", type=positive, help="processor threads of PyTorch")
    command.add_argument("--skip-bad", action="store_true",
                         help="leave out pictures that cannot be read, with a warning")  # fmt: skip


def _train_autoencoder(args: argparse.Namespace) -> None:
    from .models.loading import choose_device
    from .training import commands
    from .training.autoencoder import AutoencoderRecipe

    recipe = AutoencoderRecipe(
        resolution=args.resolution, channels=args.channels,
        latent_channels=args.latent_channels, kl_weight=args.kl_weight,
    )  # fmt: skip
    data = open_data(args.data, args.skip_bad)
    print(
        commands.autoencoder(
            data, args.out, recipe, _optimization(args),
            on_error="skip" if args.skip_bad else "raise", device=choose_device(args.device),
        )
    )  # fmt: skip


def _train_decoder(args: argparse.Namespace) -> None:
    from .models.loading import choose_device
    from .training import commands

    data = open_data(args.data, args.skip_bad)
    print(
        commands.decoder(
            data, args.out, _optimization(args), autoencoder=args.autoencoder,
            on_error="skip" if args.skip_bad else "raise", device=choose_device(args.device),
        )
    )  # fmt: skip


def _train_text_to_image(args: argparse.Namespace) -> None:
    from .models.loading import choose_device
    from .training import commands
    from .training.text_to_image import UNetRecipe

    recipe = UNetRecipe(
        channels=args.channels, layers_per_block=args.layers_per_block, heads=args.heads,
        prediction_type=args.prediction_type, beta_schedule=args.beta_schedule,
        snr_gamma=args.snr_gamma,
    )  # fmt: skip
    data = open_data(args.data, args.skip_bad)
    quiet_loading()
    print(
        commands.text_to_image(
            data, args.out, recipe, _optimization(args), autoencoder=args.autoencoder,
            text_encoder=args.text_encoder, max_tokens=args.max_tokens,
            caption_dropout=args.caption_dropout, leave_out=_ids(args.leave_out),
            on_error="skip" if args.skip_bad else "raise", device=choose_device(args.device),
        )
    )  # fmt: skip


def _train_lora(args: argparse.Namespace) -> None:
    from .demo import write_demo_model
    from .models.loading import load_pipeline
    from .training import commands

    data = open_data(args.data, args.skip_bad)
    quiet_loading()
    source = write_demo_model() if args.model == "demo" else args.model
    pipeline = load_pipeline(source, device=args.device)
    print(
        commands.lora(
            pipeline, data, args.out, _optimization(args), rank=args.rank,
            caption_dropout=args.caption_dropout, leave_out=_ids(args.leave_out),
            on_error="skip" if args.skip_bad else "raise",
        )
    )  # fmt: skip


def _optimization(args: argparse.Namespace) -> Optimization:
    import torch

    from .training.loop import Optimization

    if args.threads:
        torch.set_num_threads(args.threads)
    return Optimization(args.steps, args.batch_size, args.learning_rate, seed=args.seed,
                        snapshots=args.snapshots)  # fmt: skip


def _ids(path: Path | None) -> list[str]:
    if path is None:
        return []
    if not path.is_file():
        raise ValueError(f"--leave-out {path}: no such file")
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
