"""Sketches: rows against whole gradients, one at a time; what they must not depend on."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig

import unsee.index.build as build_module
from tests.methods.conftest import examples
from tests.models.test_unet import build
from unsee.data.batches import gather
from unsee.draws import Draws
from unsee.gradients import mean_gradient
from unsee.index.describe import describe_index
from unsee.index.index import Index
from unsee.index.layout import read_manifest, shard_path
from unsee.index.sketch import Sketch, Sketcher, dequantise_rows, quantise_rows
from unsee.query import Query

from .conftest import DRAWS, build_index, contents

BOTH = Sketch(64, measures=("loss", "output_norm"))
EXACT = {"columns": ("sketch",), "storage": "float32"}


def rows(index: Index, measure: str = "output_norm") -> torch.Tensor:
    """Returns all rows [N, 2, length]."""
    return torch.cat([dequantise_rows(index.sketches(measure, s)) for s in index.shards()])  # type: ignore[arg-type]


def table(sketcher: Sketcher) -> dict[str, torch.Tensor]:
    """Returns the projection as dense matrices, parameter -> [weights, length] float64."""
    found = {}
    for name, places, signs in zip(
        sketcher.model.parameters, sketcher._places, sketcher._signs, strict=True
    ):
        found[name] = torch.zeros(len(places), sketcher.sketch.length, dtype=torch.float64)
        found[name][torch.arange(len(places)), places.long()] = signs.double()
    return found


@pytest.mark.parametrize("measure", ["loss", "output_norm"])
@pytest.mark.parametrize("parameters", ["all", ("*attn1*", "conv_out*")])
def test_rows_are_projections_of_whole_gradients(model, data, tmp_path, measure, parameters):
    """Of every example and half, by one backward pass each and a dense matrix."""
    sketch = Sketch(64, parameters, (measure,))
    index = build_index(tmp_path, model, data.select(data.ids[:3]), flips=True, sketch=sketch,
                        **EXACT)  # fmt: skip
    sketcher = Sketcher(model, sketch)
    matrix = table(sketcher)
    whole = sketcher.model
    for row, half in np.ndindex(3, 2):
        total = torch.zeros(64, dtype=torch.float64)
        for caption in range(data.caption_counts[row]):
            latents, text, t, e = gather(data, DRAWS, [(0, row, caption)])
            with whole.gradients_on():
                outputs, targets = whole.predict(latents, text, t[:, half::2], e[:, half::2])
                values = outputs if measure == "output_norm" else outputs - targets
                gradient = mean_gradient(values.square().mean((2, 3, 4)), whole.parameters)
            total += sum(g.flatten() @ matrix[n] for n, g in gradient.items())
        expected = total / data.caption_counts[row]
        found = rows(index, measure)[row, half].double()
        # float32 gradients of other batches, added up in another order.
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * expected.abs().max())


def test_inner_products_are_those_of_the_gradients_on_average() -> None:
    generator = torch.Generator().manual_seed(0)
    model = build(prediction="v_prediction")
    a, b = ([torch.randn(p.shape, generator=generator) for p in model.parameters.values()]
            for _ in range(2))  # fmt: skip
    b = [x + 0.3 * y for x, y in zip(b, a, strict=True)]
    truth = sum(float((x * y).sum()) for x, y in zip(a, b, strict=True))
    found = []
    for seed in range(200):
        sketcher = Sketcher(model, Sketch(32, "cross-attn-kv", seed=seed))
        found.append(float(sketcher._project(a) @ sketcher._project(b)))
    error = np.std(found, ddof=1) / len(found) ** 0.5
    assert abs(np.mean(found) - truth) < 4 * error  # four standard errors: 1 in 16,000 by chance
    lengths = sum(float(x.square().sum()) for x in a) * sum(float(x.square().sum()) for x in b)
    # The variance of a count sketch is at most (|a|²|b|² + (ab)²) / length.
    assert np.var(found, ddof=1) < 1.3 * (lengths + truth**2) / 32


def test_rows_do_not_depend_on_batch_shard_order_or_selection(model, data, tmp_path) -> None:
    built = build_index(tmp_path / "a", model, data, sketch=BOTH, **EXACT)
    kept = list(reversed(data.ids[2:9]))
    other = build_index(
        tmp_path / "b", model.selecting("attn"), data.select(kept), sketch=BOTH, batch_size=1,
        shard_size=3, **EXACT,
    )  # fmt: skip
    for measure in BOTH.measures:
        expected = rows(built, measure)[[data.ids.index(i) for i in kept]]
        # Rounding of float32 passes of another size.
        torch.testing.assert_close(rows(other, measure), expected, rtol=1e-4,
                                   atol=1e-5 * float(expected.abs().max()))  # fmt: skip


def test_the_same_build_gives_the_same_bytes(model, data, tmp_path: Path) -> None:
    for name in ("a", "b"):
        build_index(tmp_path / name, model, data, columns=("sketch", "loss"), sketch=BOTH)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_a_build_goes_on_where_a_shard_is_missing(model, data, tmp_path: Path) -> None:
    index = build_index(tmp_path, model, data, sketch=BOTH, **EXACT)
    before = contents(tmp_path)
    shard_path(tmp_path, "sketch", list(index.shards())[1]).unlink()
    build_index(tmp_path, model, data, sketch=BOTH, **EXACT)
    assert contents(tmp_path) == before


def test_examples_come_and_go(model, data, tmp_path: Path) -> None:
    index = build_index(tmp_path / "a", model, data.select(data.ids[:6]), sketch=BOTH, **EXACT)
    index.kernel("loss")
    index = index.append(data.select(data.ids[6:])).delete([data.ids[1], data.ids[7]])
    assert not list((tmp_path / "a" / "curvature").glob("*"))  # it was of other rows
    left = [i for i in data.ids if i not in (data.ids[1], data.ids[7])]
    whole = build_index(tmp_path / "b", model, data, sketch=BOTH, **EXACT)
    assert index.ids == left
    expected = rows(whole)[[data.ids.index(i) for i in left]]
    torch.testing.assert_close(rows(index), expected)
    assert index.kernel("loss").share == 1.0


def test_no_selection_is_too_strange_for_a_sketch(model, data, tmp_path: Path) -> None:
    """Factors need layers that read the text; a sketch does not, and is opened with any model."""
    convolutions = build(prediction="v_prediction", parameters=["conv_in*"])
    with pytest.raises(ValueError, match="is not the weight of a linear layer whose input"):
        build_index(tmp_path / "a", convolutions, data)
    build_index(tmp_path / "b", convolutions, data, columns=("sketch", "loss"))
    assert Index.open(tmp_path / "b", convolutions.selecting("all")).layers == []


@pytest.mark.parametrize(("storage", "error"), [("int8", 1 / 250), ("float16", 1e-3)])
def test_stored_rows_are_near(storage, error) -> None:
    made = torch.randn(5, 2, 2, 300, generator=torch.Generator().manual_seed(0)) * 1e-9
    made[1] = 0
    back = dequantise_rows(quantise_rows(made, storage))
    # Half a step of the largest number for int8; eleven bits of each number for float16.
    assert (back - made).abs().max() <= error * made.abs().max()
    assert (back[1] == 0).all()


def test_the_mask_of_a_query_counts(model, data) -> None:
    sketcher = Sketcher(model, BOTH)
    query = Query("query", data.latents([4])[0], data.text([4], 0)[0], "p", None)  # type: ignore[arg-type]
    whole = sketcher.query(query, Draws(1, 4), 3)
    all_cells = dataclasses.replace(query, mask=torch.ones(8, 8))
    part = dataclasses.replace(query, mask=torch.eye(8))
    same, other = (sketcher.query(q, Draws(1, 4), 3) for q in (all_cells, part))
    for measure in BOTH.measures:
        torch.testing.assert_close(same[1][measure], whole[1][measure], rtol=1e-4, atol=1e-7)
        assert not torch.allclose(other[1][measure], whole[1][measure], rtol=0.1)
    assert same[0] == pytest.approx(whole[0], rel=1e-5) and other[0] != pytest.approx(whole[0])


def test_a_gradient_that_is_not_finite_names_the_example(data, tmp_path: Path) -> None:
    model = build(prediction="v_prediction")
    with torch.no_grad():
        model.network.conv_out.bias[0] = float("nan")  # type: ignore[index]
    with pytest.raises(ValueError, match=r"gradient of example 'picture-0' is not finite"):
        build_index(tmp_path, model, data, sketch=BOTH, **EXACT)
    query = Query("mine", data.latents([4])[0], data.text([4], 0)[0], "p", None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="gradient of the query 'mine' is not finite"):
        Sketcher(model, BOTH).query(query, Draws(1, 4), 4)


def test_what_does_not_fit_is_refused(model, data, built: Index, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="length = 0 must be at least 1"):
        Sketch(0)
    for measures in ((), ("noise",)):
        with pytest.raises(ValueError, match="use a tuple of loss, output_norm or both"):
            Sketch(measures=measures)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"measures = 'loss'; use a tuple of"):
        Sketch(measures="loss")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="name one twice"):
        Sketch(measures=("loss", "loss"))
    with pytest.raises(ValueError, match="add it to the columns"):
        build_index(tmp_path / "a", model, data, columns=("loss",), sketch=BOTH)
    with pytest.raises(ValueError, match="'nothing' matches none of the model's"):
        build_index(tmp_path / "a", model, data, sketch=Sketch(parameters="nothing"), **EXACT)
    assert not (tmp_path / "a").exists()
    index = build_index(tmp_path / "b", model, data, sketch=Sketch(64), **EXACT)
    before = contents(tmp_path / "b")
    for sketch, message in (
        (Sketch(32), "sketch.length is 64 there, but 32 is asked for"),
        (Sketch(64, "attn"), 'sketch.parameters is "all" there, but "attn" is asked for'),
        (Sketch(64, seed=1), "sketch.seed is 0 there, but 1 is asked for"),
    ):
        with pytest.raises(ValueError, match=message):
            build_index(tmp_path / "b", model, data, sketch=sketch, **EXACT)
    assert contents(tmp_path / "b") == before
    with pytest.raises(ValueError, match="not of the measure 'loss', only of output_norm"):
        index.kernel("loss")
    with pytest.raises(ValueError, match="no column 'sketch', only examples, loss, factors"):
        built.kernel("loss")


def test_parameters_that_nothing_depends_on_are_refused(data, tmp_path: Path) -> None:
    """An adapter that is not active has no gradient; a fresh one's lower half has one of zeros."""
    model = build(prediction="v_prediction")
    config = LoraConfig(r=2, target_modules=["to_k"])
    model.network.add_adapter(config, adapter_name="one")
    model.network.add_adapter(config, adapter_name="two")  # the active one
    with pytest.raises(ValueError, match=r"does not depend on the parameters '\*\.one\.\*'"):
        build_index(tmp_path / "a", model, data, sketch=Sketch(64, "*.one.*"), **EXACT)
    zeros = build_index(tmp_path / "b", model, data, sketch=Sketch(64, "*lora_A.two*"), **EXACT)
    with pytest.raises(ValueError, match="all gradients of 'output_norm' are zero in the param"):
        zeros.kernel("output_norm")


def test_nothing_is_made_where_nothing_is_missing(model, data, tmp_path, monkeypatch) -> None:
    build_index(tmp_path, model, data, sketch=Sketch(64), **EXACT)
    monkeypatch.setattr(build_module, "Sketcher", None)
    build_index(tmp_path, model, data, sketch=Sketch(64), **EXACT)


def test_one_network_has_one_dtype_whatever_is_selected(data, tmp_path: Path) -> None:
    """LoRA weights are float32 where those below are not."""
    model = build(prediction="v_prediction")
    model.network.to(torch.bfloat16)
    model.network.add_adapter(LoraConfig(r=2, target_modules=["to_k"]))
    for name, parameter in model.network.named_parameters():
        if "lora" in name:
            parameter.data = parameter.data.float()
    about = {"columns": ("sketch",), "sketch": Sketch(64, "conv_out*")}
    build_index(tmp_path, model.selecting("lora"), data, **about)
    assert Index.open(tmp_path, model.selecting("all")).ids == data.ids


def test_a_person_is_told(model, data, tmp_path: Path) -> None:
    build_index(tmp_path, model, data, sketch=BOTH, **EXACT)
    lines = describe_index(tmp_path)
    assert any("sketch: 3 of 3 shards" in line and "TRAK and D-TRAK" in line for line in lines)
    assert any("sketch of 64 numbers of loss, output_norm in all" in line for line in lines)
    assert read_manifest(tmp_path).settings["sketch"]["weights"] == sum(
        p.numel() for p in model.network.parameters()
    )


def test_a_damaged_kernel_is_refused(model, data, tmp_path: Path) -> None:
    index = build_index(tmp_path, model, examples(4), sketch=Sketch(64), **EXACT)
    index.kernel("output_norm")
    (file,) = (tmp_path / "curvature").glob("*")
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(ValueError, match=r"is damaged .* delete it, it is fitted again"):
        Index.open(tmp_path, model).kernel("output_norm")
