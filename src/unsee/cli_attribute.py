"""`unsee attribute`: one picture, from a model and its data or from a run that is indexed."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .cli_arguments import (
    DATA_HELP,
    MODEL_HELP,
    add_model_options,
    box,
    open_model_and_data,
    positive,
    quiet_loading,
)
from .cli_index import add_run_options, print_top

if TYPE_CHECKING:
    from .data.dataset import ImageDataset
    from .index.index import Index
    from .methods.base import Attributor, Scores
    from .models.base import Denoiser
    from .query import Query

OF_GENERATION = ("guidance", "sampler_steps")
OF_MODEL_AND_DATA = (
    "work", "draws", "step_size", "steps", "flips", "batch_size", "parameters", "lora",
    "weights", "dtype", "skip_bad",
)  # fmt: skip
OF_RUN = ("also", "method", "curvature", "use_columns", "forward", "shortlist", "ridge", "encoder")
OF_FORWARD = ("rise", "shortlist")
"""Of a run, only where it really unlearns; the rise also where it has probes."""
OF_METHOD = {
    "abu": ("also", "curvature", "use_columns", "forward", "shortlist", "rise", "damping"),
    "trak": ("also", "ridge"),
    "d-trak": ("also", "ridge"),
    "similarity": ("encoder",),
}
"""Of a run, by method; the options of others do nothing. Similarity does not see the weights of the
UNet: further runs would say the same."""
OF_DRAWS = ("query_draws", "method_seed")
"""What similarity has no use for."""


def add_attribute(commands: argparse._SubParsersAction) -> None:
    """Adds `unsee attribute`."""
    command = commands.add_parser(
        "attribute", help="name the training images that made a picture possible"
    )
    command.add_argument(
        "model", metavar="MODEL|RUN",
        help=f"{MODEL_HELP}; or what `unsee index` made, without DATA",
    )  # fmt: skip
    command.add_argument("data", metavar="DATA", nargs="?", help=DATA_HELP)
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
    add_method_options(command)
    add_run_options(command)
    # None says that an option was not given: one that would do nothing is refused.
    ordinary = {
        name: command.get_default(name)
        for name in (*OF_GENERATION, *OF_MODEL_AND_DATA, *OF_RUN, *OF_FORWARD, "damping", *OF_DRAWS)
    }
    command.set_defaults(run=_attribute, ordinary=ordinary, **dict.fromkeys(ordinary))


def add_method_options(command: argparse.ArgumentParser) -> None:
    """Adds the settings of AbU and of the model."""
    method = command.add_argument_group("method")
    method.add_argument("--draws", type=positive, default=10, help="draws per training example")
    method.add_argument("--query-draws", type=positive, default=200)
    method.add_argument(
        "--rise", type=float, help="unlearn until the picture's own loss rose by this share "
        "(default: 0.25; 0.05 for the second order that a run has without --forward)",
    )  # fmt: skip
    method.add_argument("--step-size", type=float, help="fixed step instead; the paper's is 0.01/N")
    method.add_argument("--steps", type=positive, default=1, help="unlearning steps")
    method.add_argument("--damping", type=float, default=0.1, help="0 is the published update")
    method.add_argument("--flips", action="store_true", help="also score mirrored pictures")
    method.add_argument("--method-seed", type=int, default=0, help="of timesteps and noise")
    method.add_argument("--batch-size", type=positive, default=80, help="forward passes at once")
    add_model_options(command)


def _attribute(args: argparse.Namespace) -> None:
    _check(args)
    given = {n: args.ordinary.get(n) if v is None else v for n, v in vars(args).items()}
    settled = argparse.Namespace(**given)
    scores, paths, captions = _from_run(settled) if args.data is None else _from_model(settled)
    print_top(scores, captions, args.top)
    for name, path in paths.items():
        print(f"{name}: {path}")


def _check(args: argparse.Namespace) -> None:
    """Refuses what does not go together, before anything is opened."""
    from .runs import check_together, is_run

    def refuse(names: Sequence[str], why: str) -> None:
        for name in names:
            if getattr(args, name) is not None:
                raise ValueError(f"--{name.replace('_', '-')} {why}")

    if args.image:
        refuse(OF_GENERATION, "says how to generate a picture, but --image gives one")
    if is_run(args.model):
        if args.data is not None:
            raise ValueError(
                f"{args.model!r} is a run, which knows its training data: leave {args.data!r} out"
            )
        refuse(OF_MODEL_AND_DATA, "does nothing with a run, which `unsee index` has settled: "
               "leave it out, or give MODEL and DATA")  # fmt: skip
        if args.also:
            check_together([Path(args.model), *args.also], args.use_columns)
        method = args.method or "abu"
        others = [n for names in OF_METHOD.values() for n in names if n not in OF_METHOD[method]]
        refuse(others, f"does nothing with --method {method}: leave it out")
        if args.curvature == "identity":
            refuse(["damping"], "does nothing with --curvature identity: leave it out")
        if method == "similarity":
            refuse(OF_DRAWS, f"does nothing with --method {method}: leave it out")
        if not args.forward:
            refuse(["shortlist"], "needs --forward: all examples are scored without it")
            if not _asks_probes(args):
                refuse(["rise"], "needs --forward or the column `probes`: the order that the "
                       "first order gives does not depend on the step")  # fmt: skip
        elif args.also:
            raise ValueError("--forward re-evaluates the best images of one run, which are others "
                             "than those of the next: leave --also out")  # fmt: skip
        elif args.curvature == "identity":
            raise ValueError("--curvature identity does not go with --forward: unlearning needs a "
                             "curvature, use ekfac or diagonal_per_draw")  # fmt: skip
    elif args.data is None:
        raise ValueError(
            f"{args.model!r} is no run that `unsee index` made: give DATA, the model's training "
            "data, or a run's folder"
        )
    else:
        refuse(OF_RUN, "is for a run: `unsee index` makes one, and `unsee attribute RUN` asks it")


def _asks_probes(args: argparse.Namespace) -> bool:
    """Whether a run is asked for the second order, which depends on the size of the step."""
    from .index.layout import read_manifest

    has = read_manifest(Path(args.model)).settings["columns"]
    return "probes" in has and (args.use_columns is None or "probes" in args.use_columns)


def _from_model(args: argparse.Namespace) -> tuple:
    from .attribution import attribute_to_files
    from .methods.unlearning import RISE

    opened = _picture(args)
    model, data = open_model_and_data(args)
    scores, paths = attribute_to_files(
        model, data, _query(args, model, opened), args.out, work=args.work, top=args.top,
        on_error="skip" if args.skip_bad else "raise", draws=args.draws,
        query_draws=args.query_draws, rise=RISE if args.rise is None else args.rise,
        step_size=args.step_size, steps=args.steps,
        damping=args.damping, flips=args.flips, seed=args.method_seed, batch_size=args.batch_size,
    )  # fmt: skip
    return scores, paths, data


def _from_run(args: argparse.Namespace) -> tuple:
    from .methods.combine import combine
    from .report import write_report
    from .runs import open_run

    opened = _picture(args)
    quiet_loading()

    def ask(path: Path, query: Query | None = None) -> tuple[Scores, ImageDataset]:
        index, data = open_run(path, args.device)
        method = _method(args, index)  # before the picture: what does not fit costs no generation
        return method.attribute(query or _query(args, index.model, opened)), data

    scores, data = ask(Path(args.model))
    if args.also:  # one after another: a device may have no room for two models
        scores = combine([scores, *(ask(path, scores.query)[0] for path in args.also)], "scaled")
    return scores, write_report(scores, data, args.out, top=args.top), data


def _method(args: argparse.Namespace, index: Index) -> Attributor:
    """Returns the method that is asked for, on an index."""
    from .methods.indexed import AbU, query_draws_for
    from .methods.similarity import Similarity
    from .methods.trak import TRAK

    if args.method == "similarity":
        return Similarity(index, args.encoder)
    draws = query_draws_for(index, args.method_seed + 1, args.query_draws)
    if args.method == "abu":
        return AbU(
            index, args.curvature, args.damping, args.use_columns, args.rise, draws,
            forward=args.forward, shortlist=args.shortlist,
        )  # fmt: skip
    return TRAK(index, "loss" if args.method == "trak" else "output_norm", args.ridge, draws)


def _picture(args: argparse.Namespace):  # noqa: ANN202 - PIL is not imported for the parser
    """Opens the picture before the model, so that a typo there costs nothing."""
    from .data.dataset import open_image

    return open_image(args.image) if args.image else None


def _query(args: argparse.Namespace, model: Denoiser, image) -> Query:  # noqa: ANN001
    from .models.base import with_box

    if image is not None:
        return model.query(image, args.prompt, args.box)
    options = {"steps": args.sampler_steps}
    if args.guidance is not None:
        options["guidance_scale"] = args.guidance
    query = model.generate(args.prompt, args.seed, **options)
    return query if args.box is None else with_box(query, args.box)
