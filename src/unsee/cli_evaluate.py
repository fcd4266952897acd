"""The verb `unsee evaluate`: scores against the outcomes of retrained models."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__
from .cli_arguments import DATA_HELP, MODEL_HELP, open_data, positive, quiet_loading

if TYPE_CHECKING:
    from .models.base import Denoiser


def add_evaluate(commands: argparse._SubParsersAction) -> None:
    """Adds the verb to a parser's commands."""
    evaluate = commands.add_parser("evaluate", help="how good scores are: retrained models tell")
    kinds = evaluate.add_subparsers(required=True, metavar="WHAT")

    command = kinds.add_parser("lds", help="do scores predict the losses of retrained models?")
    command.add_argument("scores", metavar="SCORES", nargs="?", type=Path,
                         help="folder of QUERY.parquet; or give --method")  # fmt: skip
    _add_outcomes(command)
    method = command.add_argument_group("instead of SCORES, with --benchmark")
    method.add_argument("--method", metavar="NAME",
                        help="score the benchmark's queries: latent, pixel, text, random, abu, "
                        "abu-unlearned, tracin, tracin-cosine, diagonal, kfac, ekfac, "
                        "ekfac-output, trak, d-trak, index, "
                        "index-loss, index-output")  # fmt: skip
    method.add_argument(
        "--damping",
        type=float,
        metavar="X",
        help="of the curvature, or ridge of the kernel (default: the method's)",
    )
    method.add_argument("--draws", type=positive, default=32, help="per training image")
    method.add_argument(
        "--work",
        type=Path,
        metavar="DIR",
        help="gradients and scores (default: in the user's cache folder)",
    )
    command.set_defaults(run=_lds)

    command = kinds.add_parser("compare", help="which of two methods predicts them better?")
    command.add_argument("scores", metavar="SCORES", nargs=2, type=Path,
                         help="folder of QUERY.parquet")  # fmt: skip
    _add_outcomes(command)

    _add_counterfactual(kinds)


def _add_outcomes(command: argparse.ArgumentParser) -> None:
    truth = command.add_mutually_exclusive_group(required=True)
    truth.add_argument("--outcomes", type=Path, metavar="FILE",
                       help="Parquet: run, subset, seed, query, timestep_bin, loss")  # fmt: skip
    truth.add_argument("--benchmark", choices=("twemoji",), help="the outcomes that ship")
    command.add_argument("--data", default="twemoji",
                         help=f"{DATA_HELP} (default: twemoji)")  # fmt: skip
    command.add_argument("--half", choices=("report", "tune", "all"), default="report",
                         help="'tune' to choose settings, 'report' (the other queries and "
                         "subsets) to judge them")  # fmt: skip
    command.add_argument("--level", type=float, default=0.95, help="of the intervals")
    command.set_defaults(run=_evaluate)


def _lds(args: argparse.Namespace) -> None:
    from .evaluation.intervals import check_level

    check_level(args.level)  # before anything is scored
    if (args.scores is None) == (args.method is None):
        raise ValueError("lds: give either a folder of scores or --method")
    if args.method is not None:
        if args.benchmark is None or args.data != args.benchmark:
            raise ValueError("lds: --method scores the queries of --benchmark twemoji")
        args.scores = _scored(args)
    args.scores = [args.scores]
    _evaluate(args)


def _scored(args: argparse.Namespace) -> Path:
    """Returns the folder of the scores of a method of ours."""
    from .evaluation.scoring import check_method, score_files
    from .evaluation.twemoji import load_benchmark

    check_method(args.method, args.damping)
    work = args.work
    if work is None:
        cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
        work = cache / "unsee" / f"benchmark-{__version__}"
    quiet_loading()
    benchmark = load_benchmark(work / "encoded")
    return score_files(benchmark, args.method, work, damping=args.damping, draws=args.draws)


def _evaluate(args: argparse.Namespace) -> None:
    from .evaluation.compare import compare
    from .evaluation.twemoji import shipped

    data = open_data(args.data)
    outcomes = args.outcomes or shipped() / "outcomes.parquet"
    result = compare(args.scores, outcomes, data.ids, half=args.half, level=args.level)
    for estimate, folder in zip(result.lds, args.scores, strict=True):
        print(f"{estimate}  {folder}")
    if (difference := result.difference) is not None:
        clear = difference.low > 0 or difference.high < 0
        print(f"{difference}  first - second, {'clear' if clear else 'not clear'} of zero")
    text = (
        f"mean LDS of {len(result.queries)} queries over {result.subsets} subsets "
        f"({args.half}), with {args.level:.0%} intervals"
    )
    if result.agreement is not None:
        text += f"; two seeds on the same subset agree by {result.agreement:.3f}"
    print(text)


# -- counterfactual -----------------------------------------------------------------------------


def _add_counterfactual(kinds: argparse._SubParsersAction) -> None:
    command = kinds.add_parser(
        "counterfactual", help="is a picture lost by training without its top K?"
    )
    command.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    command.add_argument("data", metavar="DATA", help=DATA_HELP)
    command.add_argument(
        "scores",
        metavar="SCORES",
        nargs="+",
        type=Path,
        help="a method's folder: QUERY.parquet or QUERY/scores.parquet",
    )
    command.add_argument(
        "--queries",
        type=Path,
        required=True,
        metavar="FILE",
        help="JSON lines: id, prompt, seed; also steps, guidance_scale",
    )
    command.add_argument("--k", required=True, help="how many are removed: 34, or 2%%")
    command.add_argument("--train-command", metavar="COMMAND",
                         help="'python train.py {data} {out}': {data} is an image folder, {ids} a "
                         "file of the ids in it, {out} where the pipeline is saved; no shell sees "
                         "it (default: as `unsee train text-to-image` made MODEL)")  # fmt: skip
    command.add_argument("--out", type=Path, default=Path("runs/counterfactual"))
    command.add_argument("--random", type=positive, default=4, help="random sets to compare with")
    command.add_argument("--seed", type=int, default=0, help="of the random sets")
    command.add_argument("--draws", type=positive, default=100, help="of a query's loss")
    command.add_argument("--lora", help="LoRA weights on MODEL; then {out} gets such weights")
    command.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"))
    command.add_argument("--device", help="cpu, cuda or mps (default: the best there is)")
    command.add_argument("--level", type=float, default=0.95, help="of the intervals")
    command.set_defaults(run=_counterfactual)


def _counterfactual(args: argparse.Namespace) -> int:
    from .demo import write_demo_model
    from .evaluation.counterfactual import evaluate_removals, read_queries, read_rankings
    from .evaluation.leave_out import (
        count_of,
        leave_out_differences,
        table_of,
        table_of_differences,
    )
    from .evaluation.retrain import check_command

    if args.lora and args.train_command is None:
        raise ValueError("counterfactual: how LoRA weights were trained is not recorded in MODEL: "
                         "give --train-command")  # fmt: skip
    queries = read_queries(args.queries)
    rankings = read_rankings(args.scores, [query.id for query in queries])
    data = open_data(args.data)
    k = count_of(args.k, len(data))
    quiet_loading()
    source = str(write_demo_model()) if args.model == "demo" else args.model
    if args.train_command is not None:
        command = _split(args.train_command)
    else:
        command = recorded_command(Path(source), data.fingerprint)
    check_command(command)

    def opened(folder: str | Path, lora: str | Path | None) -> Denoiser:
        from .models.base import Denoiser
        from .models.loading import load_lora, load_pipeline

        pipeline = load_pipeline(folder, args.dtype, args.device)
        if lora is not None:
            load_lora(pipeline, lora)
        return Denoiser.from_pipeline(pipeline, "all")

    result = evaluate_removals(
        opened(source, args.lora), data, queries, rankings, k, command, args.out,
        open_model=lambda path: opened(source, path) if args.lora else opened(path, None),
        random=args.random, seed=args.seed, draws=args.draws, level=args.level,
    )  # fmt: skip
    print("\n".join(table_of(result.effects)))
    if apart := leave_out_differences(result.rows, level=args.level):
        print("\n".join(table_of_differences(apart)))
    print(f"change of the mean over queries, with {args.level:.0%} intervals; every outcome is in "
          f"{args.out / f'k{k}' / 'outcomes.parquet'}")  # fmt: skip
    for run in result.failed:
        print(f"unsee: {run.error}", file=sys.stderr)
    return 1 if result.failed else 0


def _split(command: str) -> list[str]:
    try:
        return shlex.split(command)
    except ValueError as error:
        raise ValueError(f"--train-command {command!r}: {error}") from None


def recorded_command(model: Path, fingerprint: str) -> list[str]:
    """Returns the command that trains a model again as its `training.json` says.

    Args:
        model: folder that `unsee train text-to-image` wrote.
        fingerprint: of the data set; the record's must be the same.

    Raises:
        ValueError: no such record, of other data, or of settings that the command line lacks.
    """
    from .training.commands import RECORD

    path = model / RECORD
    if not path.is_file():
        raise ValueError(f"{str(model)!r} has no {RECORD}, which says how to train it again: give "
                         "--train-command")  # fmt: skip
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        return _command_of(about, path, fingerprint)
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged, or no record of `unsee train` ({error!r}): give "
                         "--train-command") from None  # fmt: skip


def _command_of(about: dict[str, Any], path: Path, fingerprint: str) -> list[str]:
    from .training.loop import Optimization

    recipe, how = about["recipe"], about["optimization"]
    if recipe is None or "text_encoder" not in about or about["left_out"]:
        raise ValueError(f"{path} is not of a text-to-image training on all data: give "
                         "--train-command")  # fmt: skip
    if about["data"]["fingerprint"] != fingerprint:
        raise ValueError(f"{path} is of other data (fingerprint {about['data']['fingerprint']}, "
                         f"here {fingerprint})")  # fmt: skip
    told = {name: how[name] for name in ("steps", "batch_size", "learning_rate", "seed")}
    # Snapshots change nothing, and records of before have none.
    if {**vars(Optimization(**told)), "snapshots": None} != {**how, "snapshots": None}:
        raise ValueError(f"{path}: settings that `unsee train` has no options for: give "
                         "--train-command")  # fmt: skip
    options = {
        **recipe,
        **told,
        "channels": ",".join(map(str, recipe["channels"])),
        "autoencoder": (path.parent / "vae").resolve(),
        "threads": about["threads"],
        **{n: about[n] for n in ("text_encoder", "max_tokens", "caption_dropout")},
    }
    command = [sys.executable, "-m", "unsee.cli", "train", "text-to-image", "{data}", "{out}"]
    for name, value in options.items():
        if value is not None:
            command += [f"--{name.replace('_', '-')}", str(value)]
    return command
