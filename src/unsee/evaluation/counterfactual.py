"""Leave-K-out with one's own training script: is the picture lost without what was named?"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..data.dataset import ImageDataset
from ..draws import Draws
from ..files import write_atomically
from ..methods.base import Scores
from ..models.base import Denoiser
from ..query import Query
from .deviation import Outcome, measure_outcome
from .intervals import check_level
from .leave_out import FULL, RANDOM, Effect, Removal, leave_out_effects, plan_removals
from .retrain import Retrained, retrain, without

LOG = logging.getLogger(__name__)

MEASURED = "outcomes.json"
"""In the folder of a run: what its model says about the queries."""


@dataclass(frozen=True)
class Prompted:
    """How the model makes a picture that is asked about.

    Attributes:
        id: names the query and its score files.
        prompt: the prompt.
        seed: of the initial noise.
        steps: of the sampler.
        guidance_scale: classifier-free guidance.
    """

    id: str
    prompt: str
    seed: int
    steps: int = 50
    guidance_scale: float = 7.5

    def made_by(self, model: Denoiser) -> Query:
        """Returns the query."""
        query = model.generate(self.prompt, self.seed, self.steps, self.guidance_scale)
        return dataclasses.replace(query, id=self.id)


@dataclass(frozen=True)
class LeftOut:
    """What became of a leave-K-out experiment.

    Attributes:
        rows: an outcome for each run and query, see `leave_out.leave_out_effects`.
        effects: of the methods, against random removal.
        failed: runs that left no model; they are in no row.
    """

    rows: list[dict[str, Any]]
    effects: list[Effect]
    failed: list[Retrained]


def read_queries(path: Path) -> list[Prompted]:
    """Reads queries from JSON lines, each with `id`, `prompt` and `seed`, see `Prompted`.

    Raises:
        ValueError: no such file, a line that is no query, or an id that appears twice.
    """
    if not path.is_file():
        raise ValueError(f"queries {str(path)!r}: no such file")
    found: list[Prompted] = []
    lines = path.read_text(encoding="utf-8-sig").split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"queries {str(path)!r}, line {number}"
        try:
            query = Prompted(**json.loads(line))
        except (TypeError, ValueError):
            raise ValueError(
                f'{where}: not like {{"id": "cat", "prompt": "a cat", "seed": 3}}, which may also '
                "have steps and guidance_scale"
            ) from None
        for name, kind in (("id", str), ("prompt", str), ("seed", int), ("steps", int),
                           ("guidance_scale", (int, float))):  # fmt: skip
            value = getattr(query, name)
            if not isinstance(value, kind) or isinstance(value, bool):
                raise ValueError(f"{where}: {name} is {value!r}")
        if query.steps < 1 or not math.isfinite(query.guidance_scale):
            raise ValueError(
                f"{where}: steps = {query.steps} must be at least 1, and guidance_scale = "
                f"{query.guidance_scale} a number"
            )
        if query.id in (q.id for q in found):
            raise ValueError(f"{where}: id {query.id!r} appears twice")
        found.append(query)
    if not found:
        raise ValueError(f"queries {str(path)!r}: there is none")
    return found


def read_rankings(
    directories: Sequence[Path], queries: Sequence[str]
) -> dict[str, dict[str, list[str]]]:
    """Returns method -> query -> ids, most influential first.

    Args:
        directories: one for each method, which is called after it; in it `QUERY.parquet` as
            `Scores.save` writes, or `QUERY/scores.parquet` as `unsee attribute --out` does.
        queries: ids.

    Raises:
        ValueError: two methods of one name, a file that is missing or no score file, or scores
            that are all equal.
    """
    rankings: dict[str, dict[str, list[str]]] = {}
    for directory in directories:
        name = directory.resolve().name
        if name in rankings or name in (FULL, RANDOM):
            raise ValueError(f"scores {str(directory)!r}: a second {name!r}; rename the folder")
        rankings[name] = {}
        for query in queries:
            path = directory / f"{query}.parquet"
            if not path.is_file():
                path = directory / query / "scores.parquet"
            if not path.is_file():
                raise ValueError(
                    f"scores {str(directory)!r}: neither {query}.parquet nor "
                    f"{query}/scores.parquet is there"
                )
            scores = Scores.load(path)
            if len(scores) > 1 and scores.values.min() == scores.values.max():
                raise ValueError(f"scores {str(path)!r}: all are equal, so there is no top K")
            rankings[name][query] = [scores.ids[i] for i in scores.order]
    return rankings


def evaluate_removals(
    model: Denoiser,
    data: ImageDataset,
    queries: Sequence[Prompted],
    rankings: Mapping[str, Mapping[str, Sequence[str]]],
    k: int,
    command: Sequence[str],
    out: Path,
    *,
    open_model: Callable[[Path], Denoiser],
    random: int = 4,
    seed: int = 0,
    draws: int = 100,
    level: float = 0.95,
) -> LeftOut:
    """Trains without the top K of each query and method, and without random K; compares.

    What is finished is not repeated: a second call with the same `out` goes on.

    Args:
        model: trained on all of `data`; makes the queries.
        data: the training examples.
        queries: what is asked about.
        rankings: method -> query -> ids, see `read_rankings`.
        k: how many examples are removed.
        command: trains a model, see `retrain`.
        out: folder of the runs, of this K in `out/kK`.
        open_model: opens the folder that the command wrote; raises an exception if it cannot.
        random: how many random sets are removed; all queries share them.
        seed: of the random sets.
        draws: timesteps and noises of a query's loss.
        level: of the intervals.

    Raises:
        ValueError: see `plan_removals`, `retrain`, `measure_outcome`.
    """
    check_level(level)  # before anything is trained
    plan = plan_removals(rankings, data.ids, k, random=random, seed=seed)
    runs = {removal.name: without(data.ids, removal.ids) for removal in plan}
    folder = out / f"k{k}"
    asked = [query.made_by(model) for query in queries]
    # A seed that methods do not use, so that no luck is shared.
    fixed = Draws(seed=-100, n=draws, num_train_timesteps=model.num_train_timesteps)
    rows = [_row(q, measure_outcome(model, q, fixed), FULL, FULL, 0, "") for q in asked]
    own = {r.name: [q for q in asked if r.query in ("", q.id)] for r in plan}

    def measured(trained: Path) -> list[Outcome]:
        return _measured(trained, own[trained.parent.name], fixed, open_model)

    # A model that cannot be measured is none: such a run has failed, and is not finished.
    results = retrain(command, runs, data.ids, folder, data=data, check=measured)
    failed = []
    for removal, result in zip(plan, results, strict=True):
        if result.error is not None:
            failed.append(result)
            continue
        try:
            outcomes = measured(result.model)
        except Exception as error:  # see retrain: of a run that was finished before
            failed.append(dataclasses.replace(result, error=f"run {result.name!r}: {error}"))
            continue
        rows += _rows(removal, own[removal.name], outcomes, k)
    table = pa.Table.from_pylist(rows)
    write_atomically(folder / "outcomes.parquet", lambda path: pq.write_table(table, path))
    return LeftOut(rows, leave_out_effects(rows, level=level), failed)


def _rows(
    removal: Removal, queries: Sequence[Query], outcomes: Sequence[Outcome], k: int
) -> list[dict[str, Any]]:
    return [_row(query, outcome, removal.name, removal.method, k, removal.query)
            for query, outcome in zip(queries, outcomes, strict=True)]  # fmt: skip


def _row(
    query: Query, outcome: Outcome, run: str, method: str, k: int, removed_for: str
) -> dict[str, Any]:
    about = {"run": run, "method": method, "k": k, "removed_for": removed_for, "query": query.id}
    return {**about, **dataclasses.asdict(outcome)}


def _measured(
    model: Path, queries: Sequence[Query], draws: Draws, open_model: Callable[[Path], Denoiser]
) -> list[Outcome]:
    """Returns the outcomes of queries, read from the run's folder where they are there."""
    digest = hashlib.sha256(repr(draws).encode())
    for query in queries:
        digest.update(f"{query.id} {query.prompt} {query.provenance}".encode())
        digest.update(query.latents.numpy().tobytes())
    key, path = digest.hexdigest()[:16], model.parent / MEASURED
    if path.is_file():
        about = json.loads(path.read_text(encoding="utf-8"))
        if about["of"] == key:
            return [Outcome(**values) for values in about["outcomes"]]
    opened = open_model(model)
    outcomes = [measure_outcome(opened, query, draws) for query in queries]
    text = json.dumps({"of": key, "outcomes": [dataclasses.asdict(o) for o in outcomes]}, indent=1)
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return outcomes
