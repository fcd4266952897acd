"""The command line: one verb per question, exit code 2 and one clear line for bad input."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from . import __version__
from .cli_arguments import DATA_HELP, MODEL_HELP, box, open_data, positive, quiet_loading
from .cli_evaluate import add_evaluate
from .cli_train import add_train

if TYPE_CHECKING:
    from .data.dataset import ImageDataset
    from .models.base import Denoiser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code.

    0 where all went well, 1 where `doctor` finds a fault, 2 for bad input.
    """
    parser = build_parser()
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr, force=True)
    # Read when these libraries are first imported, which the commands do.
    for library in ("TRANSFORMERS", "DIFFUSERS", "DATASETS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("httpx").setLevel(logging.ERROR)
    try:
        return args.run(args) or 0
    except ValueError as error:
        print(f"unsee: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("unsee: stopped; run the same command again to continue", file=sys.stderr)
        return 130


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="unsee", description="Which training images made this picture possible?"
    )
    parser.add_argument("--version", action="version", version=f"unsee {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_demo(commands)
    _add_attribute(commands)
    add_train(commands)
    add_evaluate(commands)
    _add_reproduce(commands)
    _add_doctor(commands)
    _add_info(commands)
    return parser


# -- demo ---------------------------------------------------------------------------------------


def _add_demo(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser("demo", help="attribute three pictures of the model that ships")
    command.add_argument("--out", type=Path, default=Path("runs/demo"), help="result folder")
    command.add_argument("--model-only", type=Path, metavar="DIR",
                         help="only write the model as a complete pipeline folder")  # fmt: skip
    command.set_defaults(run=_demo)


def _demo(args: argparse.Namespace) -> None:
    from .demo import run_demo, write_demo_model

    quiet_loading()
    if args.model_only:
        print(write_demo_model(args.model_only))
    else:
        run_demo(args.out)


# -- attribute ----------------------------------------------------------------------------------


def _add_attribute(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "attribute", help="name the training images that made a picture possible"
    )
    command.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    command.add_argument("data", metavar="DATA", help=DATA_HELP)
    command.add_argument("--prompt", required=True, help="what the picture was made for")
    picture = command.add_mutually_exclusive_group(required=True)
    picture.add_argument("--seed", type=int, help="generate the picture with this seed")
    picture.add_argument("--image", type=Path, help="take this picture")
    command.add_argument("--box", type=box, metavar="X0,Y0,X1,Y1",
                         help="only this part of the picture, in its pixels")  # fmt: skip
    command.add_argument("--top", type=positive, default=10, help="how many to show")
    command.add_argument("--out", type=Path, default=Path("runs/attribute"))
    command.add_argument("--work", type=Path, help="intermediate results (default: OUT/work)")
    command.add_argument("--sampler-steps", type=positive, default=50)
    command.add_argument(
        "--guidance", type=float, help="classifier-free guidance (default: 7.5; the demo uses 3)"
    )
    _add_method_options(command)
    command.set_defaults(run=_attribute)


def _add_method_options(command: argparse.ArgumentParser) -> None:
    method = command.add_argument_group("method")
    method.add_argument("--draws", type=positive, default=10, help="draws per training example")
    method.add_argument("--query-draws", type=positive, default=200)
    method.add_argument("--rise", type=float, default=0.05,
                        help="unlearn until the picture's own loss rose by this share")  # fmt: skip
    method.add_argument("--step-size", type=float, help="fixed step instead; the paper's is 0.01/N")
    method.add_argument("--steps", type=positive, default=1, help="unlearning steps")
    method.add_argument("--damping", type=float, default=0.1, help="0 is the published update")
    method.add_argument("--flips", action="store_true", help="also score mirrored pictures")
    method.add_argument("--method-seed", type=int, default=0, help="of timesteps and noise")
    method.add_argument("--batch-size", type=positive, default=80, help="forward passes at once")
    _add_model_options(command)


def _add_model_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--parameters",
        default="cross-attn-kv",
        help="cross-attn-kv, cross-attn, attn, lora, all, or a pattern",
    )
    command.add_argument("--lora", help="LoRA weights to load on the model: a folder or a hub id")
    command.add_argument("--dtype", default="float32",
                         choices=("float32", "float16", "bfloat16", "float64"))  # fmt: skip
    command.add_argument("--device", help="cpu, cuda or mps (default: the best there is)")
    command.add_argument("--skip-bad", action="store_true",
                         help="leave out pictures that cannot be read, with a warning")  # fmt: skip


def _attribute(args: argparse.Namespace) -> None:
    from .attribution import attribute_to_files
    from .data.dataset import open_image
    from .models.base import with_box

    image = open_image(args.image) if args.image else None
    model, data = _open(args)
    if image is not None:
        query = model.query(image, args.prompt, args.box)
    else:
        options = {"steps": args.sampler_steps}
        if args.guidance is not None:
            options["guidance_scale"] = args.guidance
        query = model.generate(args.prompt, args.seed, **options)
    if args.box is not None and image is None:
        query = with_box(query, args.box)
    scores, paths = attribute_to_files(
        model, data, query, args.out, work=args.work, top=args.top,
        on_error="skip" if args.skip_bad else "raise", draws=args.draws,
        query_draws=args.query_draws, rise=args.rise, step_size=args.step_size, steps=args.steps,
        damping=args.damping, flips=args.flips, seed=args.method_seed, batch_size=args.batch_size,
    )  # fmt: skip
    captions = dict(zip(data.ids, data.captions, strict=True))
    best = scores.top(args.top)
    print(f"{'rank':>4}  {'score':>10}  id / caption")
    for rank, (identifier, value) in enumerate(zip(best.ids, best.values, strict=True), start=1):
        print(f"{rank:>4}  {value:>10.3g}  {identifier} / {' | '.join(captions[identifier])}")
    for name, path in paths.items():
        print(f"{name}: {path}")


def _open(args: argparse.Namespace) -> tuple[Denoiser, ImageDataset]:
    """Opens MODEL and DATA; the cheap one first, so that a typo there costs nothing."""
    from .demo import write_demo_model
    from .models.base import Denoiser
    from .models.loading import load_lora, load_pipeline

    data = open_data(args.data, args.skip_bad)
    quiet_loading()
    source = write_demo_model() if args.model == "demo" else args.model
    pipeline = load_pipeline(source, args.dtype, args.device)
    if args.lora:
        load_lora(pipeline, args.lora)
    return Denoiser.from_pipeline(pipeline, args.parameters), data


# -- reproduce, doctor, info --------------------------------------------------------------------


def _add_reproduce(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "reproduce", help="the AbU paper's MSCOCO experiment on its files"
    )
    command.add_argument("--data", type=Path, required=True, help="folder of the released files")
    command.add_argument("--query", type=int, required=True, help="which query, from 0")
    command.add_argument("--draws", type=Path, help="recorded noise and timesteps (.npz)")
    command.add_argument("--out", type=Path, required=True, help=".npz with influence and rank")
    command.add_argument("--work", type=Path, help="finished parts, one folder for all queries")
    command.add_argument("--seed", type=int, default=0, help="of our own draws")
    command.add_argument("--batch-size", type=positive, default=80, help="passes at once")
    command.add_argument("--device", help="cpu, cuda or mps (default: the best there is)")
    command.set_defaults(run=_reproduce)


def _reproduce(args: argparse.Namespace) -> None:
    from .models.loading import choose_device
    from .reproduce import reproduce

    reproduce(
        args.data, args.query, args.out, draws=args.draws, seed=args.seed, work=args.work,
        batch_size=args.batch_size, device=choose_device(args.device),
    )  # fmt: skip
    print(args.out)


def _add_doctor(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser("doctor", help="check a model and its data before a long run")
    command.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    command.add_argument("data", metavar="DATA", help=DATA_HELP)
    command.add_argument("--out", type=Path, default=Path("runs"), help="where a run would write")
    _add_method_options(command)
    command.set_defaults(run=_doctor)


def _doctor(args: argparse.Namespace) -> int:
    from .doctor import examine

    model, data = _open(args)
    findings = examine(
        model, data, args.out, draws=args.draws, query_draws=args.query_draws, flips=args.flips,
        batch_size=args.batch_size, seed=args.method_seed,
    )  # fmt: skip
    for finding in findings:
        print(finding)
    return 0 if all(finding.ok for finding in findings) else 1


def _add_info(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser("info", help="versions, devices; or what a file or folder holds")
    command.add_argument("path", nargs="?", type=Path, help="scores, a results folder or a model")
    command.set_defaults(run=_info)


def _info(args: argparse.Namespace) -> None:
    from .doctor import describe

    for line in describe(args.path):
        print(line)


if __name__ == "__main__":
    sys.exit(main())
