"""The verb `unsee evaluate`: scores against the outcomes of retrained models."""

from __future__ import annotations

import argparse
from pathlib import Path

from .cli_arguments import DATA_HELP, open_data


def add_evaluate(commands: argparse._SubParsersAction) -> None:
    """Adds the verb to a parser's commands."""
    evaluate = commands.add_parser("evaluate", help="how good scores are: retrained models tell")
    kinds = evaluate.add_subparsers(required=True, metavar="WHAT")

    command = kinds.add_parser("lds", help="do scores predict the losses of retrained models?")
    command.add_argument("scores", metavar="SCORES", nargs=1, type=Path,
                         help="folder of QUERY.parquet")  # fmt: skip
    _add_outcomes(command)

    command = kinds.add_parser("compare", help="which of two methods predicts them better?")
    command.add_argument("scores", metavar="SCORES", nargs=2, type=Path,
                         help="folder of QUERY.parquet")  # fmt: skip
    _add_outcomes(command)


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
