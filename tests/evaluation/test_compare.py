import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from unsee.evaluation.benchmark import fingerprint_of, members_and_decoys, plan
from unsee.evaluation.compare import compare
from unsee.evaluation.intervals import lds_interval, paired_difference
from unsee.evaluation.metrics import noise_ceiling
from unsee.methods.base import Scores

IDS = [f"example-{i}" for i in range(30)]
QUERIES = [f"query-{i}" for i in range(8)]


@pytest.fixture
def truth():
    return np.random.default_rng(0).normal(size=(len(QUERIES), len(IDS)))


@pytest.fixture
def outcomes(tmp_path, truth):
    """Losses that fall by the true influences, in two parts of the schedule, with noise."""
    rng = np.random.default_rng(1)
    rows = []
    for run in plan(IDS):
        losses = 3 - truth[:, list(run.keep)].sum(1) + rng.normal(size=len(QUERIES))
        for query, loss in zip(QUERIES, losses, strict=True):
            for part, offset in ((0, -1.0), (1, 1.0)):
                about = {"run": run.name, "subset": run.subset, "seed": run.seed}
                rows.append({**about, "query": query, "timestep_bin": part, "loss": loss + offset})
    table = pa.Table.from_pylist(rows)
    path = tmp_path / "outcomes.parquet"
    pq.write_table(table.replace_schema_metadata({"examples": fingerprint_of(IDS)}), path)
    return path


def save(folder, values, queries=QUERIES, ids=IDS):
    for query, row in zip(queries, values, strict=True):
        Scores(list(ids), row, "method").save(folder / f"{query}.parquet")
    return folder


def losses_of(outcomes):
    """(run name -> [Q]) by reading the rows one at a time."""
    losses = {}
    for row in pq.read_table(outcomes).to_pylist():
        of = losses.setdefault(row["run"], [0.0] * len(QUERIES))
        of[QUERIES.index(row["query"])] += row["loss"] / 2
    return {name: np.array(of) for name, of in losses.items()}


@pytest.mark.parametrize("half", ["report", "tune", "all"])
def test_holds_methods_against_their_half(half, tmp_path, outcomes, truth):
    rng = np.random.default_rng(2)
    a, b = truth + 0.3 * rng.normal(size=truth.shape), rng.normal(size=truth.shape)
    got = compare([save(tmp_path / "a", a), save(tmp_path / "b", b)], outcomes, IDS, half=half)

    losses, runs = losses_of(outcomes), {r.name: r for r in plan(IDS)}
    numbers = {"tune": range(1, 33), "report": range(33, 65), "all": range(1, 65)}[half]
    chosen = {"tune": [0, 2, 4, 6], "report": [1, 3, 5, 7], "all": list(range(8))}[half]
    masks, means = np.zeros((len(numbers), len(IDS)), dtype=bool), []
    for m, number in enumerate(numbers):
        masks[m, list(runs[f"half-{number:02d}-0"].keep)] = True
        means.append(losses[f"half-{number:02d}-0"])
    want = np.array(means)[:, chosen]
    twice = sorted({r.subset for r in runs.values() if r.subset and r.seed == 1})
    first, second = (
        np.array([losses[f"half-{n:02d}-{s}"] for n in twice])[:, chosen] for s in (0, 1)
    )

    assert got.queries == [QUERIES[i] for i in chosen]
    assert got.subsets == len(numbers)
    pairs = zip(got.lds, (a, b), strict=True)
    for estimate, expected in [(e, lds_interval(s[chosen], masks, want)) for e, s in pairs]:
        # losses are averaged in another order
        assert vars(estimate) == pytest.approx(vars(expected), rel=1e-9)
    expected = paired_difference(a[chosen], b[chosen], masks, want)
    assert vars(got.difference) == pytest.approx(vars(expected), rel=1e-9)
    assert got.agreement == pytest.approx(noise_ceiling(first, second).mean(), rel=1e-9)
    assert got.lds[0].low > got.lds[1].high


def test_one_method(tmp_path, outcomes, truth):
    got = compare([save(tmp_path / "a", truth)], outcomes, IDS)
    assert got.difference is None
    assert got.lds[0].value > 0.8


def test_queries_that_only_one_method_scored_are_left_out(tmp_path, outcomes, truth):
    a = save(tmp_path / "a", truth)
    b = save(tmp_path / "b", truth[2:6], QUERIES[2:6])
    assert compare([a, b], outcomes, IDS, half="all").queries == QUERIES[2:6]
    assert compare([a, b], outcomes, IDS).queries == ["query-3", "query-5"]


def test_decoys_need_no_score(tmp_path, outcomes, truth):
    members, _ = members_and_decoys(IDS)
    some = save(tmp_path / "some", truth[:, members], ids=[IDS[m] for m in members])
    every = save(tmp_path / "every", truth)
    assert compare([some], outcomes, IDS).lds == compare([every], outcomes, IDS).lds


def test_refuses(tmp_path, outcomes, truth):
    a = save(tmp_path / "a", truth)
    with pytest.raises(ValueError, match=r"no folder with QUERY\.parquet"):
        compare([tmp_path / "none"], outcomes, IDS)
    with pytest.raises(ValueError, match="no such file"):
        compare([a], tmp_path / "none.parquet", IDS)
    with pytest.raises(ValueError, match="are of another data set"):
        compare([a], outcomes, IDS[::-1])
    with pytest.raises(ValueError, match="the outcomes have no query 'other'"):
        compare([save(tmp_path / "b", truth[:1], ["other"])], outcomes, IDS)
    with pytest.raises(ValueError, match="no query of the 'report' part is scored in"):
        compare([save(tmp_path / "c", truth[:1], QUERIES[:1])], outcomes, IDS)
    with pytest.raises(ValueError, match="'x' is not among the 30 examples"):
        compare([save(tmp_path / "d", truth, ids=[*IDS[:-1], "x"])], outcomes, IDS)
    member = members_and_decoys(IDS)[0][0]
    fewer = [i for i in range(len(IDS)) if i != member]
    scores = save(tmp_path / "e", truth[:, fewer], ids=[IDS[i] for i in fewer])
    with pytest.raises(ValueError, match=f"no score of '{IDS[member]}', which models"):
        compare([scores], outcomes, IDS)
    (tmp_path / "text.parquet").write_text("no table")
    with pytest.raises(ValueError, match="cannot be read"):
        compare([a], tmp_path / "text.parquet", IDS)
    pq.write_table(pa.table({"id": ["a"]}), tmp_path / "other.parquet")
    with pytest.raises(ValueError, match="cannot be read"):
        compare([a], tmp_path / "other.parquet", IDS)
