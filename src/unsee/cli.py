"""The command line: one verb per question, exit code 2 and one clear line for bad input."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from . import __version__
from .cli_arguments import DATA_HELP, MODEL_HELP, open_model_and_data, positive, quiet_loading
from .cli_attribute import add_attribute, add_method_options
from .cli_evaluate import add_evaluate
from .cli_index import add_index
from .cli_train import add_train


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
    add_index(commands)
    add_attribute(commands)
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
    from .runs import Source, write_source

    quiet_loading()
    if args.model_only:
        print(write_demo_model(args.model_only))
    else:
        run_demo(args.out)
        write_source(args.out / "index", Source("demo", "twemoji"))  # for `unsee attribute`


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
    add_method_options(command)
    command.set_defaults(run=_doctor)


def _doctor(args: argparse.Namespace) -> int:
    from .doctor import examine

    model, data = open_model_and_data(args)
    findings = examine(
        model, data, args.out, draws=args.draws, query_draws=args.query_draws, flips=args.flips,
        batch_size=args.batch_size, seed=args.method_seed, finished=args.weights is None,
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
    from .runs import is_run, read_source

    for line in describe(args.path):
        print(line)
    if args.path is not None and is_run(args.path):
        with contextlib.suppress(ValueError):  # made in Python: nobody knows
            source = read_source(args.path)
            print(f"made of {source.whole_model} and {source.data!r}")


if __name__ == "__main__":
    sys.exit(main())
