from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import unsee.index.columns as column_module
import unsee.index.index as module
import unsee.index.table as table_module
from tests.methods.conftest import examples
from unsee.curvature.kfac import EKFAC
from unsee.data.dataset import ImageDataset, load_dataset
from unsee.data.latents import EncodedDataset
from unsee.draws import Draws
from unsee.index import layout
from unsee.index.describe import describe_index
from unsee.index.index import Index
from unsee.index.layout import read_manifest, shard_path
from unsee.index.sketch import Sketch
from unsee.methods.base import Scores
from unsee.methods.indexed import AbU
from unsee.methods.self_influence import self_influence
from unsee.methods.similarity import Similarity
from unsee.methods.trak import TRAK
from unsee.query import Query
from unsee.tensor_files import read_tensors

from .conftest import DRAWS, build_index, contents
from .test_build import Stopped, assert_same, columns, stop_after

IDS = [f"picture-{i}" for i in range(10)]


@pytest.fixture
def index(built: Index, model, tmp_path: Path) -> Index:
    """A copy of the index of ten examples, to be changed."""
    shutil.copytree(built.path, tmp_path / "index")
    return Index.open(tmp_path / "index", model)


@pytest.fixture
def query(data) -> Query:
    return Query("query", data.latents([4])[0] * 0.9, data.text([4], 0)[0], "p", None)  # type: ignore[arg-type]


def scores(index: Index, query: Query, curvature: str = "identity") -> Scores:
    options = {"columns": ["factors"], "query_draws": Draws(seed=1, n=4), "tolerance": 0.0}
    return AbU(index, curvature=curvature, **options).attribute(query)  # type: ignore[arg-type]


def assert_same_scores(some: Scores, other: Scores, tolerance: float = 1e-4) -> None:
    """Of the examples of `some`, relative to the largest; float32 rounding unless said."""
    at = dict(zip(other.ids, other.values, strict=True))
    error = np.abs(some.values - [at[i] for i in some.ids]).max()
    assert error <= tolerance * np.abs(other.values).max()


# -- adding ------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [4, 6])
def test_an_appended_index_answers_as_one_of_all(built, model, data, query, tmp_path, first):
    begun = build_index(tmp_path, model, data.select(IDS[:first]), storage="float32")
    begun.curvature("ekfac")  # of some of the examples: not to be used any more
    grown = begun.append(data.select(IDS[first:]))
    assert grown.ids == built.ids
    assert_same(grown, built)
    for curvature in ("identity", "ekfac", "diagonal_per_draw"):
        assert_same_scores(scores(grown, query, curvature), scores(built, query, curvature))
    opened = Index.open(tmp_path, model)
    assert opened.ids == built.ids and opened.manifest == grown.manifest


def test_the_same_examples_cannot_be_added_twice(index: Index, data) -> None:
    more = examples(14).select(["picture-12", "picture-13"])
    grown = index.append(more)
    before = contents(index.path)
    for again in (index, grown):
        with pytest.raises(ValueError, match="example 'picture-12' is there already, or was del"):
            again.append(more)
        with pytest.raises(
            ValueError, match="example 'picture-7' is there already, or was deleted"
        ):
            again.append(data.select(["picture-7"]))
    assert contents(index.path) == before


@pytest.mark.parametrize("files", [0, 3, 4, None])
def test_a_stopped_addition_goes_on(index, model, query, monkeypatch, caplog, files) -> None:
    """At some file of the columns, or, with None, before the table is written."""
    more = examples(16).select([f"picture-{i}" for i in range(10, 16)])
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        if files is None:
            patch.setattr(module, "write_table", lambda *_: (_ for _ in ()).throw(Stopped()))
        else:
            stop_after(files, patch, Stopped())
        index.append(more)
    # The index of before still answers, and is what is opened.
    assert scores(index, query).ids == IDS
    assert scores(Index.open(index.path, model), query).ids == IDS
    assert "(6 examples) was not finished, and the index is as it was before" in caplog.text
    other = examples(20).select(["picture-17"])
    grown = Index.open(index.path, model).append(more)
    assert grown.ids == [*IDS, *more.ids]
    assert scores(Index.open(index.path, model), query).ids == grown.ids
    assert index.append(other).ids == [*grown.ids, "picture-17"]


def stopped_addition(index: Index, monkeypatch, files: int | None = 3) -> None:
    """Begins to add six examples; with None, stops before the table is written."""
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        if files is None:
            patch.setattr(module, "write_table", lambda *_: (_ for _ in ()).throw(Stopped()))
        else:
            stop_after(files, patch, Stopped())
        index.append(examples(16).select([f"picture-{i}" for i in range(10, 16)]))


@pytest.mark.parametrize("files", [0, 3, None])
@pytest.mark.parametrize("again", [[], ["picture-10"], ["picture-17"]], ids=str)
def test_an_addition_that_was_not_finished_is_given_up_for_another(
    index, model, data, query, monkeypatch, files, again: list[str]
) -> None:
    """One without an example that made it fail, for instance; or for a deletion."""
    stopped_addition(index, monkeypatch, files)
    more = examples(20).select(again)
    later = index.append(more) if again else index.delete(["picture-1"])
    assert later.ids == [i for i in [*IDS, *again] if again or i != "picture-1"]
    assert Index.open(index.path, model).ids == later.ids
    kept = {shard_path(index.path, c, s) for c in later.columns for s in later.shards()}
    assert set(index.path.glob("columns/*/*")) == kept
    # As if it had never been begun.
    rest = data.select([i for i in later.ids if i in IDS])
    fresh = build_index(index.path.parent / "fresh", model, rest, storage="float32")
    fresh = fresh.append(more) if again else fresh
    last = examples(16).select(["picture-12", "picture-15"])
    later, fresh = later.append(last), fresh.append(last)
    assert later.ids == fresh.ids
    assert_same(later, fresh)
    assert_same_scores(scores(later, query), scores(fresh, query))


def test_a_lost_shard_is_made_again_beside_an_addition_that_was_not_finished(
    index, model, data, monkeypatch
) -> None:
    stopped_addition(index, monkeypatch, None)
    whole = contents(index.path)
    shard_path(index.path, "examples", next(index.shards())).unlink()
    with pytest.raises(ValueError, match="1 of its shards are missing; run the same"):
        Index.open(index.path, model)
    assert build_index(index.path, model, data, storage="float32").ids == IDS
    assert contents(index.path) == whole
    more = examples(16).select([f"picture-{i}" for i in range(10, 16)])
    assert Index.open(index.path, model).append(more).ids == [*IDS, *more.ids]


def test_a_lost_table_does_not_make_an_addition_unfinished(index, model, data) -> None:
    more = examples(12).select(["picture-11"])
    grown = index.append(more)
    (index.path / "examples.parquet").unlink()
    for change in (lambda: index.delete(["picture-1"]), lambda: index.append(examples(13))):
        with pytest.raises(ValueError, match="table of examples is not complete; run the same"):
            change()
    assert build_index(index.path, model, data, storage="float32").ids == grown.ids


def encoded(ids: list[str], size: int = 8, width: int = 12, flips: bool = True) -> EncodedDataset:
    latents = torch.ones(len(ids), 4, size, size)
    rows = [[0]] * len(ids)
    return EncodedDataset(ids, latents, torch.ones(1, 5, width), rows, latents if flips else None)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (encoded(["a"], size=4), r"latents \[4, 8, 8\], .* latents \[4, 4, 4\], text of width 12"),
        (encoded(["a"], width=7), r"text of width 12 .* to append latents .* text of width 7"),
        (encoded(["a"], flips=False), "text of width 12 and mirrored views, those .* width 12; en"),
    ],
)
def test_examples_of_another_shape_are_refused_at_once(model, data, tmp_path, more, said) -> None:
    index = build_index(tmp_path, model, data, flips=True)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=said):
        index.append(more)
    assert contents(tmp_path) == before
    assert index.append(encoded(["b"])).ids == [*IDS, "b"]


def test_the_first_data_set_can_be_built_again_after_an_addition(index, model, data) -> None:
    grown = index.append(examples(12).select(["picture-11"]))
    before = contents(index.path)
    again = build_index(index.path, model, data, storage="float32")
    assert again.ids == grown.ids and contents(index.path) == before


# -- reading -----------------------------------------------------------------------------------


def test_what_was_read_before_is_not_read_again(index: Index, query, monkeypatch) -> None:
    expected = scores(index, query).values
    fresh = Index.open(index.path, index.model)
    fresh.warm(["factors"])
    for file in (index.path / "columns" / "factors").iterdir():
        file.unlink()
    np.testing.assert_array_equal(scores(fresh, query).values, expected)
    with pytest.raises(ValueError, match="it has no column 'features'"):
        fresh.warm(["features"])


def test_only_what_has_room_is_read_before(index: Index, monkeypatch) -> None:
    first, second, _ = (shard_path(index.path, "factors", s) for s in index.shards())
    monkeypatch.setattr(column_module, "MEMORY_BYTES", first.stat().st_size + 10)
    second.write_bytes(bytes(second.stat().st_size))  # it would be refused
    index.warm(["factors"])
    with pytest.raises(ValueError, match="is damaged"):
        index.components("factors", list(index.shards())[1])


def test_a_part_of_the_schedule_is_kept_and_asked_for(model, data, query, tmp_path) -> None:
    draws = Draws(seed=3, n=4, timesteps=(0.5, 1.0))
    build_index(tmp_path, model, data, draws=draws, columns=("loss", "factors"))
    index = Index.open(tmp_path, model)
    assert index.draws == draws
    assert AbU(index).used_query_draws == Draws(seed=1, n=64, timesteps=(0.5, 1.0))
    assert AbU(index, query_draws=Draws(1, 4)).used_query_draws == Draws(1, 4)
    late = AbU(index, curvature="identity").attribute(query)
    assert "timesteps=(0.5, 1.0)" in late.settings["query_draws"]
    forward = AbU(index, forward=True, rise=1e-3).attribute(query, candidates=IDS[:3])
    assert forward.settings["draws"]["timesteps"] == (0.5, 1.0)
    with pytest.raises(ValueError, match=r"draws.timesteps(\[0\])? is "):
        build_index(tmp_path, model, data, draws=DRAWS, columns=("loss", "factors"))
    assert build_index(tmp_path, model, data, draws=draws, columns=("loss", "factors")).ids == IDS


# -- erasing -----------------------------------------------------------------------------------


def traces(index: Index, data, row: int) -> list[str]:
    """Returns the files that hold an example's id, latents, texts, losses or factors."""
    path, identifier = index.path, data.ids[row]
    mine = data.latents([row]), data.latents([row], flipped=True), data.text([row], 0)
    needles = [t.numpy().tobytes() for t in mine] + [f'\\"{identifier}\\"'.encode()]
    found = [
        name for name, text in contents(path).items() if any(needle in text for needle in needles)
    ]
    table = pq.read_table(path / "examples.parquet")
    if any(identifier in map(str, c.to_pylist()) for c in table.columns):
        found.append("examples.parquet")
    return sorted(found)


@pytest.mark.parametrize("gone", [["picture-5"], ["picture-9", "picture-0"], IDS[4:8]], ids=str)
def test_deleted_rows_leave_every_file(model, data, query, tmp_path, gone: list[str]) -> None:
    index = build_index(tmp_path, model, data, flips=True, storage="float32")
    rows = [IDS.index(i) for i in gone]
    assert all(len(traces(index, data, row)) == 2 for row in rows)  # a shard and the table
    own = [columns(index)[i][c].numpy().tobytes() for i in gone for c in ("loss", "factors")]
    before, old_curvature = scores(index, query), index.curvature("ekfac")
    left = tmp_path / "columns" / "examples" / ".00000.safetensors.77.part"
    left.write_bytes(data.latents(rows).numpy().tobytes())  # of a writer that was killed
    smaller = index.delete(gone)
    assert [traces(smaller, data, row) for row in rows] == [[]] * len(rows)
    files = contents(tmp_path)
    assert not any(number in text for number in own for text in files.values())
    assert not list(tmp_path.glob("curvature/*")) and not left.exists()
    assert smaller.ids == [i for i in IDS if i not in gone]
    assert sorted(smaller.manifest.deleted) == sorted(gone)
    assert read_manifest(tmp_path) == smaller.manifest
    assert_same_scores(scores(smaller, query), before)
    assert smaller.curvature("ekfac").count == 10 - len(gone) == old_curvature.count - len(gone)
    # As if they had never been there.
    fresh = build_index(tmp_path / "fresh", model, data.select(smaller.ids), flips=True,
                        storage="float32")  # fmt: skip
    assert_same(smaller, fresh)
    assert_same_scores(scores(smaller, query, "ekfac"), scores(fresh, query, "ekfac"))


def test_deleted_rows_do_not_come_back(index: Index, model, data) -> None:
    smaller = index.delete(["picture-5", "picture-6"]).delete(["picture-4"])
    before = contents(index.path)
    again = build_index(index.path, model, data, storage="float32")
    assert again.ids == smaller.ids and contents(index.path) == before
    with pytest.raises(ValueError, match="example 'picture-5' is there already, or was deleted"):
        smaller.append(data.select(["picture-5"]))
    # A lost shard is computed again without them.
    shard = next(s for s in smaller.shards() if s.edition)
    for column in smaller.columns:
        shard_path(index.path, column, shard).unlink()
    assert build_index(index.path, model, data, storage="float32").ids == smaller.ids
    assert contents(index.path).keys() == before.keys()
    assert traces(smaller, data, 5) == []
    assert_same(Index.open(index.path, model), index.append(examples(11).select(["picture-10"])),
                smaller.ids)  # fmt: skip


def test_an_unknown_example_cannot_be_deleted(index: Index) -> None:
    before = contents(index.path)
    with pytest.raises(ValueError, match="there is no example 'nobody'"):
        index.delete(["picture-1", "nobody"])
    assert contents(index.path) == before


@pytest.mark.parametrize(
    "moment", [0, 1, 3, 4, 7, "write_manifest", "remove_files", "write_table"], ids=str
)
def test_a_stopped_deletion_leaves_a_valid_index(index, model, data, query, monkeypatch, moment):
    """At some file of the two shards that change, or before one of the steps after."""
    gone = ["picture-1", "picture-6"]
    index.curvature("ekfac")
    before = scores(index, query)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        if isinstance(moment, int):
            stop_after(moment, patch, Stopped())
        else:
            patch.setattr(module, moment, lambda *_: (_ for _ in ()).throw(Stopped()))
        index.delete(gone)
    opened = Index.open(index.path, model)
    done = moment in ("remove_files", "write_table")
    assert opened.ids == [i for i in IDS if not (done and i in gone)]
    assert_same_scores(scores(opened, query), before)
    assert opened.curvature("ekfac").count == len(opened.ids)
    assert [about for about in columns(opened)] == opened.ids
    finished = index.delete(gone)  # said again, to the object of before
    assert finished.ids == [i for i in IDS if i not in gone]
    assert traces(finished, data, 1) == traces(finished, data, 6) == []
    assert_same_scores(scores(Index.open(index.path, model), query), before)
    kept = {shard_path(index.path, c, s) for c in finished.columns for s in finished.shards()}
    assert set(index.path.glob("columns/*/*")) == kept


@pytest.mark.parametrize("storage", ["int8", "float32"])
def test_a_shard_without_examples_is_passed_over(model, data, query, tmp_path, storage) -> None:
    """As it is left by a deletion, and as it is made again after that, without any width."""
    columns = ["loss", "factors", "outputs", "probes", "sketch", "features"]
    options = {"columns": columns, "sketch": Sketch(length=64), "storage": storage, "flips": True}
    index = build_index(tmp_path, model, data, **options).delete(IDS[4:8])

    def answers(index: Index) -> list[Scores]:
        draws = Draws(seed=1, n=4)
        return [
            AbU(index, query_draws=draws).attribute(query),
            AbU(index, query_draws=draws, curvature="identity").attribute(query),
            AbU(index, query_draws=draws, forward=True, rise=1e-3).attribute(query),
            TRAK(index, query_draws=draws).attribute(query),
            Similarity(index, "latent").attribute(query),
            self_influence(index),
        ]

    before = answers(index)
    for column in index.columns:
        shard_path(tmp_path, column, index.manifest.shards[1]).unlink()
    for file in (tmp_path / "curvature").iterdir():
        file.unlink()
    again = build_index(tmp_path, model, data, **options)
    for some, other in zip(answers(again), before, strict=True):
        assert sorted(some.ids) == sorted(i for i in IDS if i not in IDS[4:8])
        np.testing.assert_array_equal(some.values, other.values)
    assert again.append(examples(12).select(["picture-11"])).delete(["picture-0"]).ids == [
        *IDS[1:4], *IDS[8:], "picture-11"
    ]  # fmt: skip


def test_an_index_of_nothing_is_refused(index: Index, model, data, tmp_path: Path) -> None:
    for some in (lambda: build_index(tmp_path / "new", model, data.select([])),
                 lambda: index.append(data.select([]))):  # fmt: skip
        with pytest.raises(ValueError, match="'encoded' is empty: it has no example to index"):
            some()
    assert not (tmp_path / "new").exists()


def test_everything_can_be_deleted(index: Index, query: Query) -> None:
    empty = index.delete(IDS)
    assert empty.ids == [] and columns(empty) == {}
    with pytest.raises(ValueError, match="there is no example to fit curvature on"):
        scores(empty, query, "ekfac")
    with pytest.raises(ValueError, match="there is no example to score"):
        scores(empty, query)
    assert empty.append(examples(12).select(["picture-11"])).ids == ["picture-11"]


def test_changes_start_from_what_is_on_disk(index: Index) -> None:
    """An object that others have overtaken does not undo what they did."""
    index.append(examples(12).select(["picture-11"]))
    assert index.ids == IDS
    smaller = index.delete(["picture-2"])
    assert smaller.ids == [*IDS[:2], *IDS[3:], "picture-11"]
    assert index.delete(["picture-11"]).ids == [*IDS[:2], *IDS[3:]]


# -- two writers -------------------------------------------------------------------------------


def meanwhile(monkeypatch, name: str, work: Callable[[], object]) -> None:
    """Lets another process do its work, from start to end, just before the next call of a step."""
    step, done = getattr(module, name), []

    def first(*args):
        if not done:
            done.append(True)
            work()
        return step(*args)

    monkeypatch.setattr(module, name, first)


CHANGED = "another process has changed it meanwhile"


@pytest.mark.parametrize("step", ["write_shard", "list_others", "write_manifest"])
@pytest.mark.parametrize("other", ["picture-1", "picture-6"])
def test_two_deletions_at_once(index, model, data, query, monkeypatch, step, other) -> None:
    before = scores(index, query)
    meanwhile(monkeypatch, step, lambda: Index.open(index.path, model).delete([other]))
    with pytest.raises(ValueError, match=rf"{CHANGED}|no such shard"):
        index.delete(["picture-0"])
    opened = Index.open(index.path, model)
    assert opened.ids == [i for i in IDS if i != other] and opened.manifest.deleted == [other]
    assert traces(opened, data, int(other[-1])) == []
    assert_same_scores(scores(opened, query), before)
    assert opened.delete(["picture-0"]).ids == [i for i in IDS if i not in ("picture-0", other)]
    assert traces(opened, data, 0) == traces(opened, data, int(other[-1])) == []


def test_two_additions_at_once(index, model, query, monkeypatch) -> None:
    some, others = (examples(20).select(ids) for ids in (["picture-12"], ["picture-17"]))
    meanwhile(monkeypatch, "write_manifest", lambda: Index.open(index.path, model).append(others))
    with pytest.raises(ValueError, match=CHANGED):
        index.append(some)
    assert Index.open(index.path, model).ids == [*IDS, "picture-17"]
    grown = index.append(some)
    assert grown.ids == [*IDS, "picture-17", "picture-12"]
    assert scores(grown, query).ids == grown.ids


def test_a_deletion_during_an_addition_is_not_undone(index, model, data, monkeypatch) -> None:
    more = examples(12).select(["picture-11"])
    with monkeypatch.context() as patch:
        meanwhile(patch, "check_unchanged", lambda: Index.open(index.path, model).delete(IDS[:2]))
        with pytest.raises(ValueError, match=CHANGED):
            index.append(more)
    opened = Index.open(index.path, model)
    assert opened.ids == IDS[2:] and traces(opened, data, 0) == []
    assert index.append(more).ids == [*IDS[2:], "picture-11"]


def test_two_builds_with_other_settings_at_once(model, data, tmp_path, monkeypatch) -> None:
    meanwhile(monkeypatch, "create_manifest",
              lambda: build_index(tmp_path, model, data, draws=Draws(9, 4)))  # fmt: skip
    with pytest.raises(ValueError, match=r"draws\.seed is 9 there, but 3 is asked for"):
        build_index(tmp_path, model, data)
    assert Index.open(tmp_path, model).draws == Draws(9, 4)


# -- what it says of itself --------------------------------------------------------------------


def test_curvature_is_fitted_once(index: Index, monkeypatch) -> None:
    first = index.curvature("ekfac")
    assert isinstance(first, EKFAC)
    monkeypatch.setattr(module, "fit_curvature", lambda *_: pytest.fail("fitted again"))
    again = index.curvature("ekfac")
    assert all(bool((again.values[n] == v).all()) for n, v in first.values.items())
    with pytest.raises(pytest.fail.Exception):
        index.curvature("ekfac", "outputs")


def test_an_index_describes_itself(index: Index, tmp_path: Path) -> None:
    smaller = index.delete(["picture-3"])
    lines = "\n".join(describe_index(index.path))
    assert "9 examples, 1 deleted" in lines
    assert "2 layers, 4 draws, 1 views, stored as float32" in lines
    for column, size in smaller.nbytes.items():
        files = (index.path / "columns" / column).iterdir()
        assert size == sum(f.stat().st_size for f in files)
        assert f"{column}: 3 of 3 shards" in lines
    with pytest.raises(ValueError, match=r"no manifest\.json there"):
        describe_index(tmp_path / "nowhere")


def test_metadata_of_pictures_follow_their_rows(tiny_model, image_folder, tmp_path: Path) -> None:
    pictures = load_dataset("imagefolder", data_dir=image_folder)
    options = {"draws": Draws(n=2), "columns": ["loss"], "shard_size": 4}
    first = build_index(tmp_path / "ix", tiny_model, pictures.select(pictures.ids[:7]), **options)
    grown = first.append(pictures.select(pictures.ids[7:])).delete(pictures.ids[2:9])
    rows = pq.read_table(grown.path / "examples.parquet").to_pylist()
    kept = [*range(2), *range(9, 12)]
    assert [r["id"] for r in rows] == grown.ids == [pictures.ids[k] for k in kept]
    assert [r["captions"] for r in rows] == [list(pictures.captions[k]) for k in kept]
    assert [r["colour"] for r in rows] == [pictures.metadata(k)["colour"] for k in kept]


def with_metadata(pictures: ImageDataset, ids: list[str], **columns: list) -> ImageDataset:
    """Returns some pictures with other columns of metadata."""
    table = pictures.select(ids).table
    table = table.remove_columns([n for n in ("colour", "licence") if n in table.column_names])
    for name, values in columns.items():
        table = table.add_column(name, values)
    return ImageDataset(table, "pictures")


@pytest.mark.parametrize(
    ("first", "then", "found"),
    [
        (["1999", "2000"], [2001, None], ["1999", "2000", "2001", None]),
        ([1999, None], ["today", "2"], ["1999", None, "today", "2"]),
        ([1, 2], [0.5, 2], [1.0, 2.0, 0.5, 2.0]),
        ([None, None], [7, 8], [None, None, 7, 8]),
        (["a", "b"], [["c", "d"], []], ["a", "b", '["c", "d"]', "[]"]),
        ([{"a": 1}, None], [{"b": "c"}, None], ['{"a": 1}', None, '{"b": "c"}', None]),
        ([True, False], [1, 2], ["true", "false", "1", "2"]),
    ],
    ids=str,
)
def test_metadata_of_several_types_go_together(
    tiny_model, image_folder, tmp_path, first, then, found
) -> None:
    every = load_dataset("imagefolder", data_dir=image_folder)
    ids = every.ids[:4]
    old, new = (with_metadata(every, some, year=values)
                for some, values in ((ids[:2], first), (ids[2:], then)))  # fmt: skip
    options = {"draws": Draws(n=2), "columns": ["loss"]}
    grown = build_index(tmp_path, tiny_model, old, **options).append(new)
    assert pq.read_table(tmp_path / "examples.parquet")["year"].to_pylist() == found
    together = old.with_further([new])
    assert [together.metadata(i)["year"] for i in range(4)] == found
    # Whichever is said again, and whatever is taken out: it stays.
    before = contents(tmp_path)
    for again in (old, new):
        assert build_index(tmp_path, tiny_model, again, **options).ids == ids
        assert contents(tmp_path) == before
    grown.delete([ids[1]])
    left = pq.read_table(tmp_path / "examples.parquet")["year"].to_pylist()
    assert left == [found[0], *found[2:]]


def test_a_metadata_column_called_shard_is_kept(tiny_model, image_folder, tmp_path) -> None:
    every = load_dataset("imagefolder", data_dir=image_folder)
    data = with_metadata(every, every.ids[:3], shard=["of glass", "of clay", None])
    options = {"draws": Draws(n=2), "columns": ["loss"], "shard_size": 2}
    index = build_index(tmp_path, tiny_model, data, **options).delete([data.ids[1]])
    rows = pq.read_table(index.path / "examples.parquet").to_pylist()
    assert [r["shard"] for r in rows] == ["of glass", None]
    assert [r["unsee_shard"] for r in rows] == [0, 1]


def test_a_table_of_an_earlier_version_is_read_and_brought_up_to_date(index, model, query) -> None:
    """There, the column that says in which shard an example is was called `shard`."""
    file = index.path / "examples.parquet"
    now = file.read_bytes()
    table = pq.read_table(file)
    names = ["shard" if name == "unsee_shard" else name for name in table.column_names]
    table = table.rename_columns(names)
    table = table.replace_schema_metadata({"unsee": pq.read_metadata(file).metadata[b"unsee"]})
    pq.write_table(table, file, write_page_checksum=True)
    opened = Index.open(index.path, model)
    assert opened.ids == IDS
    assert_same_scores(scores(opened, query), scores(index, query))
    build_index(index.path, model, examples(10), storage="float32")
    assert file.read_bytes() == now


def test_a_table_that_says_it_all_is_not_written_again(index, model, data, monkeypatch) -> None:
    monkeypatch.setattr(table_module, "write_atomically", lambda *_: pytest.fail("written"))
    assert build_index(index.path, model, data, storage="float32").ids == IDS


def test_a_deletion_reads_only_the_shards_that_it_changes(index, monkeypatch) -> None:
    """Latents of a large data set are many gigabytes, and a deletion may be of one example."""
    read = set()

    def noting(path: Path):
        read.add(path.name)
        return read_tensors(path)

    monkeypatch.setattr(layout, "read_tensors", noting)
    index.delete(["picture-5"])
    assert read == {"00001.safetensors"}
