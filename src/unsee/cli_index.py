"""Commands of the index: build it, ask it about a picture, ask it about the training set."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from .cli_arguments import (
    DATA_HELP,
    MODEL_HELP,
    add_model_options,
    open_data,
    open_model_and_data,
    positive,
    quiet_loading,
    source_of,
)

if TYPE_CHECKING:
    from .data.dataset import ImageDataset
    from .index.index import Index
    from .index.sketch import Sketch
    from .methods.base import Scores
    from .runs import Source

OF_BUILD = (
    "columns", "draws", "timesteps", "storage", "tolerance", "sketch_parameters", "sketch_length",
    "sketch_measures", "flips", "shard_size", "method_seed",
)  # fmt: skip
"""What a build settles for all that is added later."""

CURVATURES = ("ekfac", "kfac", "diagonal", "diagonal_per_draw", "identity")


def add_index(commands: argparse._SubParsersAction) -> None:
    """Adds `unsee index` and `unsee influence`."""
    command = commands.add_parser(
        "index", help="one pass over the training data, then answers without another"
    )
    command.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    command.add_argument("data", metavar="DATA", help=DATA_HELP)
    command.add_argument("--out", type=Path, required=True, metavar="RUN", help="its folder")
    command.add_argument("--columns", nargs="+", default=["loss", "factors", "outputs"],
                         help="what to keep: loss, factors, outputs, probes, sketch, "
                         "features")  # fmt: skip
    command.add_argument("--encoders", nargs="+", default=[], metavar="ENCODER",
                         help="of the features: latent, text, pixel, or the folder of a vision "
                         "model of transformers (default: latent text)")  # fmt: skip
    command.add_argument("--draws", type=positive, default=16, help="per example; an even number")
    command.add_argument("--timesteps", type=float, nargs=2, metavar=("FIRST", "LAST"),
                         help="the part of the noise schedule that they are drawn from, in shares; "
                         "0 is no noise (default: 0 1)")  # fmt: skip
    command.add_argument("--storage", default="int8", choices=("int8", "float16", "float32"))
    command.add_argument("--tolerance", type=float, default=3e-4, metavar="SHARE",
                         help="of a squared gradient that may be left out to keep it small; 0 for "
                         "none (default: 0.0003)")  # fmt: skip
    command.add_argument("--sketch-parameters", metavar="PARAMETERS",
                         help="of the sketch: a preset or a pattern (default: all)")  # fmt: skip
    command.add_argument("--sketch-length", type=positive, metavar="N",
                         help="numbers in a row of the sketch (default: 16384)")  # fmt: skip
    command.add_argument("--sketch-measures", nargs="+", choices=("loss", "output_norm"),
                         help="what the sketch differentiates: loss is TRAK's, output_norm "
                         "D-TRAK's (default: output_norm)")  # fmt: skip
    command.add_argument("--flips", action="store_true", help="also index mirrored pictures")
    command.add_argument("--shard-size", type=positive, default=64, help="examples in a file")
    command.add_argument("--method-seed", type=int, default=0, help="of timesteps and noise")
    command.add_argument("--batch-size", type=positive, default=64, help="passes at once")
    command.add_argument("--append", action="store_true",
                         help="add DATA to the run; the other options as they were")  # fmt: skip
    command.add_argument("--delete", nargs="+", metavar="ID",
                         help="erase these examples; the other options as they were")  # fmt: skip
    add_model_options(command)
    # None says that an option was not given: what a run was built with cannot be changed later.
    ordinary = {name: command.get_default(name) for name in OF_BUILD}
    command.set_defaults(run=_index, ordinary=ordinary, **dict.fromkeys(OF_BUILD))

    command = commands.add_parser(
        "influence", help="which training examples a run's model has learnt by heart"
    )
    command.add_argument("path", type=Path, metavar="RUN", help="what `unsee index` made")
    command.add_argument("--top", type=positive, default=10, help="how many to show")
    command.add_argument("--out", type=Path, help="result folder (default: RUN/influence)")
    command.add_argument("--device", help="cpu, cuda or mps (default: the best there is)")
    command.add_argument("--curvature", default="ekfac", choices=CURVATURES)
    command.add_argument("--column", default="factors", choices=("factors", "outputs"))
    command.set_defaults(run=_influence)


def add_run_options(command: argparse.ArgumentParser) -> None:
    """Adds the options of attribution from an index."""
    group = command.add_argument_group("with a RUN")
    group.add_argument("--method", default="abu", choices=("abu", "trak", "d-trak", "similarity"),
                       help="abu needs the columns factors or outputs, trak and d-trak a sketch of "
                       "the loss or the output, similarity features (default: abu)")  # fmt: skip
    group.add_argument("--also", nargs="+", action="extend", type=Path, metavar="RUN",
                       help="further runs of the same data, for instance of snapshots of the "
                       "training: the mean of all runs' scores, each divided by its standard "
                       "deviation")  # fmt: skip
    group.add_argument("--curvature", default="ekfac", choices=CURVATURES)
    group.add_argument("--use-columns", nargs="+", metavar="COLUMN",
                       help="factors, outputs, probes (default: what the run has)")  # fmt: skip
    group.add_argument("--forward", action="store_true", help="really unlearn the picture, and "
                       "score the best of the index by it")  # fmt: skip
    group.add_argument("--shortlist", type=positive, default=200, help="how many of them")
    group.add_argument("--ridge", type=float, default=0.1, help="of trak and d-trak, relative to "
                       "the mean squared gradient (default: 0.1)")  # fmt: skip
    group.add_argument("--encoder", default="latent", help="of similarity: latent, text, pixel, "
                       "or the folder of a vision model of the run (default: latent)")  # fmt: skip


def _index(args: argparse.Namespace) -> None:
    from .index.describe import describe_index
    from .index.index import Index
    from .runs import append, open_model

    if args.append and args.delete:
        raise ValueError("index: --append adds pictures and --delete erases some: one at a time")
    if args.append or args.delete:
        _check_as_built(args)
    if args.append:
        data = open_data(args.data, args.skip_bad)
        quiet_loading()
        index = append(args.out, source_of(args), data, args.device, args.batch_size, args.encoders)
        _fit(index)
    elif args.delete:  # DATA may be without them already
        quiet_loading()
        Index.open(args.out, open_model(source_of(args), args.device)).delete(args.delete)
        print("erased; scores and pages that were made before still have them: remove those too")
    else:
        given = {n: args.ordinary.get(n) if v is None else v for n, v in vars(args).items()}
        _fit(_build(argparse.Namespace(**given)))
    for line in describe_index(args.out):
        print(line)


def _build(args: argparse.Namespace) -> Index:
    from .draws import Draws
    from .index.index import Index
    from .runs import is_run, recorded, write_source

    model, data = open_model_and_data(args)
    length = model.num_train_timesteps
    source = _source_of_build(args)
    # From its beginning, so that a build that is stopped can be asked what it is of.
    begun = contextlib.nullcontext() if is_run(args.out) else recorded(
        args.out, source, lambda: is_run(args.out)
    )  # fmt: skip
    with begun:
        index = Index.build(
            args.out, model, data, args.columns, encoders=args.encoders,
            draws=Draws(args.method_seed, args.draws, args.timesteps or "stratified", length),
            storage=args.storage, tolerance=args.tolerance, sketch=_sketch(args), flips=args.flips,
            shard_size=args.shard_size, batch_size=args.batch_size,
            on_error="skip" if args.skip_bad else "raise",
        )  # fmt: skip
    write_source(args.out, source)
    return index


def _check_as_built(args: argparse.Namespace) -> None:
    """Refuses options that say otherwise than the run was built.

    The same may be said again: to erase, `--delete` is added to the command that built the run.
    """
    from .index.layout import read_manifest
    from .runs import is_run

    if not is_run(args.out):
        return  # refused by what comes next
    _check_source(args)
    settings = read_manifest(args.out).settings
    draws, sketch = settings["draws"], settings.get("sketch", {})
    built = {
        "columns": [c for c in settings["columns"] if c != "examples"],
        "draws": draws["n"], "timesteps": draws["timesteps"], "method_seed": draws["seed"],
        "storage": settings["storage"], "tolerance": settings["tolerance"],
        "flips": settings["views"] == 2, "shard_size": settings["shard_size"],
        **{f"sketch_{n}": sketch.get(n) for n in ("parameters", "length", "measures")},
    }  # fmt: skip
    said = {name: getattr(args, name) for name in OF_BUILD}
    if said["columns"] is not None:
        said["columns"] = [c for c in built["columns"] if c in said["columns"]] + [
            c for c in said["columns"] if c not in ("examples", *built["columns"])
        ]
    if args.delete:  # nothing is computed
        built |= {"encoders": list(settings.get("encoders", ()))}
        said |= {"encoders": [Path(e).name for e in args.encoders] or None}
        built |= {"skip_bad": settings["on_error"] == "skip"}
        said |= {"skip_bad": args.skip_bad or None}
    for name, value in said.items():
        if value is not None and value != built[name]:
            raise ValueError(
                f"--{name.replace('_', '-')}: {value} is asked for, but run {str(args.out)!r} was "
                f"built with {built[name]}, and --{'delete' if args.delete else 'append'} does not "
                "change that: leave it out"
            )


def _check_source(args: argparse.Namespace) -> None:
    """Refuses weights on the model that are not those of the run; others are told by its hash."""
    from .runs import read_source

    try:
        built = read_source(args.out)
    except ValueError:  # made in Python, or damaged: refused by what comes next
        return
    asked = source_of(args).absolute()
    for name in ("lora", "weights"):
        said, was = getattr(asked, name), getattr(built, name)
        if said != was:
            raise ValueError(
                f"run {str(args.out)!r} was built with "
                + (f"--{name} {was}" if was else f"no --{name}")
                + (f", not with {said}" if said else "")
                + ": give the options that built it"
            )


def _sketch(args: argparse.Namespace) -> Sketch | None:
    """Returns what the options say of a sketch; None where they say nothing."""
    from .index.sketch import Sketch

    said = {"length": args.sketch_length, "parameters": args.sketch_parameters,
            "measures": tuple(args.sketch_measures) if args.sketch_measures else None}  # fmt: skip
    given = {name: value for name, value in said.items() if value is not None}
    return Sketch(**given) if given else None


def _source_of_build(args: argparse.Namespace) -> Source:
    """Returns MODEL and DATA, with what was appended to the run before."""
    from .runs import read_source

    source = source_of(args)
    try:
        known = read_source(args.out)
    except ValueError:  # none yet, made in Python, or damaged: this build writes it
        return source
    if source.absolute().data in known.further:
        return known
    return dataclasses.replace(source, further=known.further)


def _fit(index: Index) -> None:
    """Fits the curvature, and the kernel of a sketch, that answers use by default."""
    for column in ("factors", "outputs"):
        if column in index.columns:
            index.curvature("ekfac", column)
    for measure in index.manifest.settings.get("sketch", {}).get("measures", ()):
        index.kernel(measure)


def _influence(args: argparse.Namespace) -> None:
    from .methods.self_influence import self_influence
    from .report import write_report
    from .runs import open_run

    quiet_loading()
    index, data = open_run(args.path, args.device)
    scores = self_influence(index, args.curvature, column=args.column)
    paths = write_report(scores, data, args.out or args.path / "influence", top=args.top)
    print_top(scores, data, args.top)
    for name, path in paths.items():
        print(f"{name}: {path}")


def print_top(scores: Scores, data: ImageDataset, top: int) -> None:
    """Prints the most influential examples, and which of them stand clear of their noise."""
    from .report.section import CLEAR, stands_clear

    captions = dict(zip(data.ids, data.captions, strict=True))
    best = scores.top(top)
    floor = scores.settings.get("noise_floor")
    clear = stands_clear(best, floor)
    known = best.errors is not None
    print(f"{'rank':>4}  {'score':>10}{' ± error   ' if known else ''}  id / caption")
    for place, (identifier, value) in enumerate(zip(best.ids, best.values, strict=True)):
        number = f"{'' if clear[place] else '~'}{value:.3g}"
        error = "" if best.errors is None else f" ± {best.errors[place]:<8.2g}"
        print(f"{place + 1:>4}  {number:>10}{error}  {identifier} / "
              f"{' | '.join(captions[identifier])}")  # fmt: skip
    if not all(clear):
        print(f"~ is within {CLEAR} standard errors of zero: it may be chance" if known
              else f"~ is within {floor:.2g} of zero: it may be rounding")  # fmt: skip
