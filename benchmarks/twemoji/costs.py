"""What each method costs on the twemoji benchmark, in seconds of one run: python
benchmarks/twemoji/costs.py WORK

Once for the data set, and for each query, with the settings that the benchmark judges. It is done
for a part of the examples, and what grows with their number is multiplied (--examples 1898: for
all). Nothing is taken from WORK but the encoded pictures. Writes costs.json and prints a table.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gradients import EXAMPLE_DRAWS, QUERY_DRAWS
from mucs import LEAST_NOISE, SELECTION
from recipe import BATCH, optimization

from unsee.curvature.diagonal import DiagonalFisher
from unsee.curvature.kfac import EKFAC, kronecker_covariances
from unsee.data.batches import gather
from unsee.data.latents import EncodedDataset
from unsee.draws import Draws
from unsee.evaluation.twemoji import Benchmark, load_benchmark
from unsee.index.fisher import fit_diagonal_fisher
from unsee.index.index import Index
from unsee.methods.example_gradients import QueryExamples, example_gradients
from unsee.methods.indexed import AbU
from unsee.methods.influence import influence_scores
from unsee.methods.mucs import MUCS, SharedDraws
from unsee.methods.similarity import Similarity
from unsee.methods.trak import TRAK, trak_kernel, trak_scores
from unsee.methods.unlearning import ForwardAbU
from unsee.query import Query

FORWARD_DRAWS, MUCS_DRAWS = 8, 12


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    result = call()
    return time.perf_counter() - started, result


class Costs:
    """Times methods, one after another.

    Args:
        benchmark: its model and queries.
        data: the part of its examples that is used.
        query: what is asked about.
    """

    def __init__(self, benchmark: Benchmark, data: EncodedDataset, query: Query) -> None:
        self.benchmark, self.data, self.query = benchmark, data, query
        self.model = benchmark.model
        self.rows: list[dict[str, Any]] = []

        self.share = len(benchmark.data.ids) / len(data.ids)

    def add(self, method: str, once: float, each: float) -> None:
        """Keeps the seconds of all examples, and of a query."""
        self.rows.append({"method": method, "once": once, "query": each})
        print(self.rows[-1], flush=True)

    def index(self, folder: Path) -> None:
        """What an index answers, column by column."""
        for name, columns in (
            ("AbU(index), both columns", ("loss", "factors", "outputs")),
            ("AbU(index), loss only", ("loss", "factors")),
            ("AbU(index), both columns and probes", ("loss", "factors", "outputs", "probes")),
        ):
            once, index = timed(partial(self._built, folder / name, columns))
            self._ask(name, once, AbU(index))
        once, index = timed(partial(self._built, folder / "sketch", ("sketch",)))
        self._ask("TRAK(index), a sketch of all parameters", once, TRAK(index))
        once, index = timed(partial(self._built, folder / "features", ("features",)))
        self._ask("similarity, latent", once, Similarity(index))

    def _ask(self, name: str, once: float, method: AbU | TRAK | Similarity) -> None:
        """The second question is timed: the first reads the index."""
        method.attribute(self.query)
        spent = dict(method.attribute(self.query).settings["seconds"])
        grows = sum(spent.pop(part, 0.0) for part in ("scan", "kernel"))
        self.add(name, once * self.share, sum(spent.values()) + grows * self.share)

    def _built(self, path: Path, columns: tuple[str, ...]) -> Index:
        index = Index.build(path, self.model, self.data, columns)
        for column in ("factors", "outputs"):
            if column in columns:
                index.curvature("ekfac", column)
        if "sketch" in columns:
            index.kernel("output_norm")
        return index

    def gradients(self) -> None:
        """Methods on gradients in memory."""
        asked = QueryExamples([self.query])
        differentiated, examples = timed(
            lambda: example_gradients(self.model, self.data, EXAMPLE_DRAWS)
        )
        fit, curvature = timed(self._ekfac)
        each, found = timed(lambda: example_gradients(self.model, asked, QUERY_DRAWS))
        scan = timed(lambda: influence_scores(examples, found, curvature))[0]
        once, scan = (differentiated + fit) * self.share, scan * self.share
        self.add("influence, EK-FAC, in memory", once, each + scan)
        fit, fisher = timed(lambda: fit_diagonal_fisher(self.model, self.data, Draws(21, 2)))
        scan = timed(lambda: influence_scores(examples, found, fisher))[0] * self.share
        once = (differentiated + fit) * self.share
        self.add("AbU as published, to first order, in memory", once, each + scan)
        whole = self.model.selecting("all")
        options = {"measure": "output_norm"}
        once, examples = timed(
            lambda: example_gradients(whole, self.data, EXAMPLE_DRAWS, **options)
        )
        each, found = timed(lambda: example_gradients(whole, asked, QUERY_DRAWS, **options))
        fit, kernel = timed(lambda: trak_kernel(examples))
        scan = timed(lambda: trak_scores(kernel, examples.products(found), 0.1))[0]
        # The kernel has as many rows as columns; solving it with few is nothing beside it.
        once = once * self.share + fit * self.share**2
        self.add("D-TRAK, all parameters, exact kernel", once, each + scan * self.share)

    def _ekfac(self) -> EKFAC:
        """Fits on 512 examples and 8 draws in the benchmark; here on that share of them."""
        count = max(8, 512 * len(self.data.ids) // len(self.benchmark.data.ids))
        draws, model = Draws(seed=20, n=8), self.model
        jobs = [(0, row, 0) for row in range(count)]

        def losses() -> torch.Tensor:
            latents, text, t, e = gather(self.data, draws, jobs)
            latents, text = (x.repeat_interleave(draws.n, 0) for x in (latents, text))
            return model.loss(latents, text, t.flatten()[:, None], e.flatten(0, 1)[:, None])[
                :, 0
            ].reshape(count, draws.n)

        keys = [n for n in model.parameters if "to_k" in n]
        with model.gradients_on():
            covariances = kronecker_covariances(
                model.network, model.parameters, [losses], "averaged", centre_inputs=keys
            )
            gradients = example_gradients(model, self.data.select(self.data.ids[:count]), draws)
        return EKFAC.fit(covariances, [{n: gradients.of(n) for n in gradients.names}])

    def unlearning(self) -> None:
        """Real unlearning, as published and as we would; every example is evaluated again."""
        self._unlearn(
            "AbU as published, real unlearning by 5%", 0.05,
            partial(fit_diagonal_fisher, self.model, self.data, Draws(21, 2)),
        )  # fmt: skip
        self._unlearn("AbU, real unlearning by 25%, EK-FAC", 0.25, self._ekfac)

    def _unlearn(self, name: str, rise: float, fit: Callable[[], DiagonalFisher | EKFAC]) -> None:
        fitted, curvature = timed(fit)
        method = ForwardAbU(
            self.model, self.data, curvature, rise=rise, draws=Draws(0, FORWARD_DRAWS),
            query_draws=Draws(1, 128),
        )  # fmt: skip
        evaluated, before = timed(lambda: method.losses(range(len(self.data.ids))))
        unlearn, unlearned = timed(lambda: method.unlearn(self.query))
        each = timed(
            lambda: method.attribute(self.query, unlearned=unlearned, before=before)
        )[0]  # fmt: skip
        once = (fitted + evaluated) * self.share
        self.add(name, once, each * self.share + unlearn)

    def mucs(self) -> None:
        """MUCS with its own selection of weights."""
        model = self.model.selecting(SELECTION)
        levels = (1 / self.benchmark.model.schedule.alphas_cumprod - 1).sqrt()
        rate = optimization(len(self.benchmark.data.ids), 0).learning_rate / 10
        method = MUCS(
            model, self.data, rate, retain=self.data, batch_size=BATCH,
            draws=SharedDraws(n=MUCS_DRAWS, first=int((levels < LEAST_NOISE).sum())),
        )  # fmt: skip
        seconds, scores = timed(lambda: method.attribute(self.query))
        spent = scores.settings.get("seconds", {})
        before = spent.get("losses before", 0.0)
        train = spent.get("unlearning", 0.0)
        self.add("MUCS", before * self.share, (seconds - before - train) * self.share + train)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--examples", type=int, default=237, help="an eighth of the 1,898")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "costs.json")
    arguments = parser.parse_args()
    benchmark = load_benchmark(arguments.work / "encoded")
    ids = benchmark.data.ids[:: max(1, len(benchmark.data.ids) // arguments.examples)]
    data = benchmark.data.select(ids[: arguments.examples])
    costs = Costs(benchmark, data, benchmark.queries[1])
    with tempfile.TemporaryDirectory() as folder:
        costs.index(Path(folder))
    costs.gradients()
    costs.unlearning()
    costs.mucs()
    about = {"torch": torch.__version__, "threads": torch.get_num_threads(),
             "examples": len(data.ids), "rows": costs.rows}  # fmt: skip
    arguments.out.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    print("| method | once, s | each query, s |\n|---|--:|--:|")
    for row in costs.rows:
        print(f"| {row['method']} | {row['once']:.0f} | {row['query']:.2f} |")


if __name__ == "__main__":
    main()
