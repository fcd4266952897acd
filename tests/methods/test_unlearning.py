from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from tests.methods.conftest import examples
from tests.models.test_unet import build
from tests.reference import unlearning as reference
from tests.reference.denoising import denoising_losses
from tests.reference.gradients import row_gradients
from unsee.data.dataset import load_dataset
from unsee.data.latents import EncodedDataset, encode_dataset
from unsee.draws import Draws
from unsee.index.fisher import fit_diagonal_fisher
from unsee.methods.unlearning import ForwardAbU, query_gradient, query_loss
from unsee.models.base import Denoiser, with_box
from unsee.models.unet import UNetDenoiser

FEW = ["picture-0", "picture-1", "picture-2"]  # with 1, 2 and 1 captions


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    ranks = [np.argsort(np.argsort(x)).astype(float) for x in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


def boxed(query):
    return with_box(query, (0, 0, 32, 24))


# -- gradients and curvature of the real network ------------------------------------------------


def slow_fisher(model, data, draws):
    """Mean over examples, captions and draws of squared gradients, one at a time."""
    squares = {name: torch.zeros_like(p) for name, p in model.parameters.items()}
    count = 0
    for row in range(len(data.ids)):
        for caption in range(data.caption_counts[row]):
            latents, text = data.latents([row]).double(), data.text([row], caption).double()
            t, e = draws.of(data.ids[row], (4, 8, 8), caption)

            def losses(x=latents, c=text, t=t, e=e):
                inputs = (x, c, t[None], e[None].double())
                return denoising_losses(model.network, model.schedule, *inputs)[0]

            for name, gradient in row_gradients(losses, model.parameters).items():
                squares[name] += gradient.square().sum(0)
            count += draws.n
    return {name: total / count for name, total in squares.items()}


def assert_same_fisher(fisher, expected):
    assert list(fisher.values) == list(expected)
    for name, value in fisher.values.items():
        # float64; a Fisher of exactly zero in theory (a key's bias) is 1e-30 in practice
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-25, msg=name)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_the_fisher_is_the_mean_over_examples_captions_and_draws(double, batch_size):
    few, draws = double.data.select(FEW[:2]), Draws(seed=9, n=2)
    fisher = fit_diagonal_fisher(double.model, few, draws, batch_size)
    assert fisher.count == 3 * 2  # one caption and two, two draws
    assert_same_fisher(fisher, slow_fisher(double.model, few, draws))


@pytest.mark.parametrize("parameters", ["attn", "all"])
def test_the_fisher_of_other_selections(double, parameters):
    """Convolutions and norms take one backward pass for each row."""
    model = UNetDenoiser(double.model.network, double.model.schedule, parameters)
    few, draws = double.data.select(FEW[:2]), Draws(seed=9, n=1)
    fisher = fit_diagonal_fisher(model, few, draws)
    assert_same_fisher(fisher, slow_fisher(model, few, draws))


def test_the_fisher_of_a_lora(data):
    peft = pytest.importorskip("peft")
    network = build(prediction="v_prediction").network
    network.add_adapter(
        peft.LoraConfig(r=2, target_modules=["to_k", "to_v"], init_lora_weights=False)
    )
    model = UNetDenoiser(network.double(), DDPMScheduler(), parameters="lora")
    few, draws = data.select(FEW[:2]), Draws(seed=9, n=1)
    fisher = fit_diagonal_fisher(model, few, draws)
    assert len(fisher.values) == 2 * 2 * 2 * 7  # A and B, K and V, self and cross, 7 transformers
    assert all(v.any() for n, v in fisher.values.items() if "attn2" in n)
    assert_same_fisher(fisher, slow_fisher(model, few, draws))


@pytest.mark.parametrize("batch_size", [1, 3, 64])
@pytest.mark.parametrize("look", [lambda q: q, boxed], ids=["whole", "box"])
def test_the_gradient_and_loss_of_the_query(double, query, look, batch_size):
    model, query, draws = double.model, look(query), Draws(seed=1, n=5)
    expected = reference.query_loss(model.network, model.schedule, query, draws)
    gradients = torch.autograd.grad(expected, list(model.parameters.values()))
    found = query_gradient(model, query, draws, batch_size)
    assert list(found) == list(model.parameters)
    for ours, theirs in zip(found.values(), gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-14)  # float64
    loss = query_loss(model, query, draws, batch_size)
    assert loss == pytest.approx(expected.item(), rel=1e-12)


# -- the step -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("rise", "steps"), [(0.001, 1), (0.05, 1), (0.05, 3), (0.08, 1)])
def test_the_wanted_rise_is_achieved_and_reported(single, query, rise, steps):
    abu = single.abu(rise=rise, steps=steps)
    result = abu.unlearn(query)
    assert len(result.step_sizes) == steps and all(s > 0 for s in result.step_sizes)
    # within 1% of the last step's way, which is at most the whole way
    assert result.rise == pytest.approx(rise, rel=0.01)
    with single.model.replaced(result.weights):
        assert query_loss(single.model, query, abu.query_draws) == result.loss_after
    assert query_loss(single.model, query, abu.query_draws) == result.loss_before


def test_a_fixed_step_is_the_papers_update(double, query):
    """weights + size * gradient / Fisher; later steps take fresh draws."""
    abu = double.abu(step_size=1e-4, damping=0.0, steps=2)
    result = abu.unlearn(query)
    assert result.step_sizes == [1e-4, 1e-4]
    first = double.abu(step_size=1e-4, damping=0.0).unlearn(query)
    gradient = query_gradient(double.model, query, abu.query_draws)
    moved = 0
    for name, parameter in double.model.parameters.items():
        fisher = double.fisher.values[name]
        step = torch.where(fisher > 0, 1e-4 * gradient[name] / fisher, 0.0)
        torch.testing.assert_close(first.weights[name], parameter + step, rtol=1e-9, atol=1e-12)
        moved += int((result.weights[name] != first.weights[name]).sum())
    assert moved > 0
    assert result.loss_after > result.loss_before


def test_the_paper_step_scales_with_the_number_of_examples(double, query):
    """Its size is 0.01 / N: half as large a size is half the way, to first order."""
    whole = double.abu(step_size=1e-7).unlearn(query)
    half = double.abu(step_size=0.5e-7).unlearn(query)
    for name, parameter in double.model.parameters.items():
        torch.testing.assert_close(
            (whole.weights[name] - parameter), 2 * (half.weights[name] - parameter),
            rtol=1e-6, atol=1e-14,  # differences of numbers of size 1 in float64
        )  # fmt: skip


# -- scores against the slow reference ----------------------------------------------------------

CASES = {
    "default": {},
    "three steps": {"steps": 3},
    "published": {"step_size": 3e-6, "steps": 2, "damping": 0.0},
    "mirrored": {"flips": True},
    "grid": {"draws": Draws(seed=3, n=3, timesteps="grid")},
    "large rise": {"rise": 0.08, "damping": 1.0},
}


@pytest.mark.parametrize("look", [lambda q: q, boxed], ids=["whole", "box"])
@pytest.mark.parametrize("case", CASES)
def test_scores_equal_the_slow_reference(double, query, case, look):
    query, data = look(query), double.data.select(FEW)
    abu = double.abu(data=data, **CASES[case])
    result = abu.attribute(query)
    plans = [
        dataclasses.replace(abu.query_draws, seed=abu.query_draws.seed + 7919 * step)
        for step in range(abu.steps)
    ]
    network, schedule = double.model.network, double.model.schedule
    after = reference.unlearned(
        network, schedule, list(double.model.parameters), query, plans,
        result.settings["step_sizes"], double.fisher.values, abu.damping,
    )  # fmt: skip
    expected = reference.scores(network, after, schedule, data, abu.draws, abu.flips)
    assert result.ids == FEW
    np.testing.assert_allclose(result.values, expected, rtol=0, atol=1e-9)  # the requirement
    assert np.abs(result.values).max() > 1e-5  # ... of which the scores are a large multiple


def test_a_box_changes_what_is_forgotten_not_how_it_is_measured(double, query):
    abu, data = double.abu(), double.data
    rows = range(len(data.ids))
    before = abu.losses(rows)
    whole, part = abu.attribute(query), abu.attribute(boxed(query))
    np.testing.assert_array_equal(before, abu.losses(rows))
    assert whole.settings["box"] is None and part.settings["box"] == (0, 0, 32, 24)
    assert np.abs(whole.values - part.values).max() > 1e-6
    # a box around everything is no box, but for the name that the draws are keyed by
    everything = dataclasses.replace(with_box(query, (0, 0, 64, 64)), id=query.id)
    np.testing.assert_allclose(abu.attribute(everything).values, whole.values, atol=1e-9)


def test_captions_are_averaged(double):
    """Each with its own draws."""
    abu, few = double.abu(), double.data.select(["picture-1"])
    both = double.abu(data=few).losses([0])[0, 0]
    assert few.caption_counts == [2]
    parts = []
    for caption in (0, 1):
        t, e = abu.draws.of("picture-1", (4, 8, 8), caption)
        loss = double.model.loss(few.latents([0]), few.text([0], caption), t[None], e[None])
        parts.append(loss.detach().numpy()[0])
    assert np.abs(parts[0] - parts[1]).min() > 1e-6
    np.testing.assert_allclose(both, (parts[0] + parts[1]) / 2, rtol=1e-12)


def test_of_two_mirror_images_the_larger_rise_counts(double, query):
    plain, both = double.abu().attribute(query), double.abu(flips=True).attribute(query)
    before = double.abu(flips=True).losses(range(len(double.data.ids)))
    assert before.shape == (16, 2, 4)
    assert (both.values >= plain.values - 1e-12).all()
    assert (both.values > plain.values + 1e-9).any()
    assert (np.abs(both.values - plain.values) < 1e-12).any()


# -- invariance ---------------------------------------------------------------------------------


def test_float64_scores_do_not_move_with_batches_order_or_company(double, query):
    data = double.data
    whole = double.abu(batch_size=640).attribute(query)
    at = dict(zip(whole.ids, whole.values, strict=True))
    order = np.random.default_rng(0).permutation(data.ids).tolist()
    others = [double.abu(batch_size=size).attribute(query) for size in (1, 7, 64)]
    others.append(double.abu(data=data.select(order)).attribute(query))
    others.append(double.abu(data=data.select(order[:5])).attribute(query))
    others.append(double.abu().attribute(query, candidates=order[:7]))
    assert others[-1].ids == order[:7] and others[-3].ids == order
    for other in others:
        expected = [at[i] for i in other.ids]
        np.testing.assert_allclose(other.values, expected, rtol=0, atol=1e-9)  # the requirement
    assert np.abs(whole.values).max() > 1e-5


def test_float32_scores_move_less_than_the_reported_floor(single, query):
    whole = single.abu(batch_size=640).attribute(query)
    for size in (4, 28):
        other = single.abu(batch_size=size).attribute(query)
        # The query's own passes are in other batches too: rounding of float32.
        expected = pytest.approx(whole.settings["step_sizes"], rel=1e-6)
        assert other.settings["step_sizes"] == expected
        assert spearman(whole.values, other.values) >= 0.9999  # the requirement
        assert np.abs(whole.values - other.values).max() <= whole.settings["noise_floor"]
    assert whole.settings["noise_floor"] < 0.01 * np.abs(whole.values).max()


def test_float32_scores_are_those_of_float64(single, double, query):
    whole = single.abu().attribute(query)
    fine = dataclasses.replace(
        double.abu(step_size=whole.settings["step_sizes"][0]), curvature=single.fisher
    ).attribute(query)
    assert spearman(whole.values, fine.values) >= 0.999
    # rounding of losses, and of the weights themselves, which the floor does not hold: 1e-6 of
    # losses of size 1
    assert np.abs(whole.values - fine.values).max() < 3e-6


def test_two_runs_are_bit_identical(single, query):
    first, second = single.abu().attribute(query), single.abu().attribute(query)
    assert first.values.tobytes() == second.values.tobytes()
    assert first.settings["step_sizes"] == second.settings["step_sizes"]


def test_candidates_of_one_batch_are_bit_identical(single, query):
    """The same examples in the same batches."""
    ids = single.data.ids[:8]
    whole = single.abu(batch_size=4 * 4).attribute(query)
    some = single.abu(batch_size=4 * 4).attribute(query, candidates=ids)
    assert some.ids == ids
    # four captions to a batch: the first six examples fill two batches
    assert whole.values[:6].tobytes() == some.values[:6].tobytes()


def test_another_seed_gives_other_scores_of_the_same_kind(single, query):
    first = single.abu(draws=Draws(seed=0, n=4)).attribute(query)
    second = single.abu(draws=Draws(seed=5, n=4)).attribute(query)
    assert not np.array_equal(first.values, second.values)


def test_the_model_is_left_as_it_was(single, query):
    before = {n: p.detach().clone() for n, p in single.model.network.named_parameters()}
    flags = [p.requires_grad for p in single.model.network.parameters()]
    single.abu(steps=2, flips=True).attribute(query)
    for name, parameter in single.model.network.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None
    assert [p.requires_grad for p in single.model.network.parameters()] == flags
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in single.model.network.modules())


def test_no_loss_is_computed_in_tensorfloat(single, query):
    seen = set()
    network = single.model.network
    handle = network.register_forward_hook(
        lambda *_: seen.add((torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32))
    )
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")  # users do, to generate pictures faster
        single.abu().attribute(query)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
        handle.remove()
    assert seen == {("highest", False)}


def test_a_pipeline_makes_the_same_picture_after_an_attribution(tiny_pipeline, image_folder):
    def picture() -> bytes:
        generator = torch.Generator().manual_seed(0)
        return tiny_pipeline(
            "a red square", num_inference_steps=2, generator=generator
        ).images[0].tobytes()  # fmt: skip

    before = picture()
    model = Denoiser.from_pipeline(tiny_pipeline)
    encoded = encode_dataset(model, load_dataset("imagefolder", data_dir=image_folder))
    fisher = fit_diagonal_fisher(model, encoded, Draws(seed=-1, n=1))
    abu = ForwardAbU(
        model, encoded, fisher, rise=0.05, draws=Draws(n=2), query_draws=Draws(seed=1, n=4)
    )
    scores = abu.attribute(model.generate("a red square", seed=0, steps=2))
    assert len(scores) == 12 and np.isfinite(scores.values).all()
    assert picture() == before


# -- what scores mean ---------------------------------------------------------------------------


def test_a_tiny_step_is_the_first_order(double, query):
    """score_i = size * gradient_i . direction, as an influence function has it."""
    abu = double.abu(rise=1e-5)
    result = abu.attribute(query)
    gradient = query_gradient(double.model, query, abu.query_draws)
    direction = double.fisher.precondition(gradient, abu.damping)
    first_order = []
    for row, identifier in enumerate(double.data.ids):
        total = torch.zeros(())
        for caption in range(double.data.caption_counts[row]):
            t, e = abu.draws.of(identifier, (4, 8, 8), caption)
            latents, text = double.data.latents([row]), double.data.text([row], caption)
            total = total + double.model.loss(latents, text, t[None], e[None]).mean()
        mean = total / double.data.caption_counts[row]
        own = torch.autograd.grad(mean, list(double.model.parameters.values()))
        slope = sum(float((g * d).sum()) for g, d in zip(own, direction.values(), strict=True))
        first_order.append(result.settings["step_sizes"][0] * slope)
    assert np.corrcoef(result.values, first_order)[0, 1] > 0.999
    scale = np.abs(first_order).max()
    # what is left is of second order: 1e-5 of the loss against its slope
    np.testing.assert_allclose(result.values, first_order, rtol=0, atol=0.02 * scale)


def test_unlearning_a_training_example_hurts_it_most(double, query):
    """The query is an example itself: picture, caption."""
    data = double.data
    query = dataclasses.replace(
        query, id="again", latents=data.latents([7])[0], text=data.text([7], 0)[0]
    )
    scores = double.abu(draws=Draws(n=20), query_draws=Draws(seed=1, n=40)).attribute(query)
    assert scores.rank_of("picture-7") == 1


# -- settings -----------------------------------------------------------------------------------


def test_everything_that_fixes_the_scores_is_recorded(single, query):
    abu = single.abu(rise=0.06, steps=2, flips=True)
    scores = abu.attribute(query)
    about = scores.settings
    assert scores.method == "AbU" and scores.query is query
    assert about["parameters"] == list(single.model.parameters)
    assert about["steps"] == 2 and about["damping"] == 0.1 and about["flips"] is True
    assert about["rise_wanted"] == 0.06 and about["rise"] == pytest.approx(0.06, rel=0.01)
    assert about["draws"] == dataclasses.asdict(abu.draws)
    assert about["query_draws"] == dataclasses.asdict(abu.query_draws)
    assert about["curvature"]["kind"] == "per_draw" and about["curvature"]["examples"] == 8
    before, after = about["query_loss"]
    assert after / before - 1 == about["rise"]
    assert set(about["seconds"]) == {"losses before", "unlearning", "losses after"}
    fixed = single.abu(step_size=1e-6).attribute(query)
    assert fixed.settings["rise_wanted"] is None and fixed.settings["step_sizes"] == [1e-6]


def test_a_cache_serves_the_losses_before_to_every_query(single, query, tmp_path: Path):
    plain = single.abu().attribute(query)
    cached = single.abu(cache=tmp_path)
    assert cached.attribute(query).values.tobytes() == plain.values.tobytes()
    folders = set(tmp_path.iterdir())
    assert len(folders) == 2  # before and after
    assert cached.attribute(query).values.tobytes() == plain.values.tobytes()
    assert set(tmp_path.iterdir()) == folders
    cached.attribute(dataclasses.replace(query, id="other draws"))
    assert len(set(tmp_path.iterdir())) == 3  # only its own losses after


def test_a_cache_follows_what_losses_depend_on(single, query, tmp_path: Path):
    rows = range(6)
    single.abu(cache=tmp_path).losses(rows)
    variants = [
        (single.abu(cache=tmp_path, draws=Draws(seed=2, n=4)), rows),
        (single.abu(cache=tmp_path, flips=True), rows),
        (single.abu(cache=tmp_path), range(5)),
        (single.abu(cache=tmp_path, data=examples(count=17)), rows),
    ]
    for number, (abu, some) in enumerate(variants, start=2):
        abu.losses(some)
        assert len(list(tmp_path.iterdir())) == number
    bias = single.model.network.conv_in.bias  # not selected, but losses depend on it
    before = single.abu(cache=tmp_path).losses(rows)
    try:
        with torch.no_grad():
            bias += 0.1
        assert not np.array_equal(single.abu(cache=tmp_path).losses(rows), before)
    finally:
        with torch.no_grad():
            bias -= 0.1


# -- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rise": 0.0}, r"rise = 0.0 must be positive"),
        ({"rise": float("nan")}, "rise = nan must be positive"),
        ({"steps": 0}, "steps = 0 must be at least 1"),
    ],
)
def test_settings_out_of_range_are_refused(single, options, message):
    with pytest.raises(ValueError, match=message):
        single.abu(**options)


def test_flips_must_have_been_encoded(single):
    data = EncodedDataset(["a"], torch.zeros(1, 4, 8, 8), torch.zeros(1, 5, 12), [[0]])
    with pytest.raises(ValueError, match="flips were not encoded"):
        single.abu(data=data, flips=True)


def test_unknown_or_no_candidates_are_refused(single, query):
    with pytest.raises(ValueError, match="'picture-99' is no training example"):
        single.abu().attribute(query, candidates=["picture-1", "picture-99"])
    with pytest.raises(ValueError, match="the list is empty"):
        single.abu().attribute(query, candidates=[])


def test_a_step_below_the_noise_floor_is_refused(single, query):
    with pytest.raises(ValueError, match=r"less than the .* that rounding does|no step"):
        single.abu(rise=1e-9).attribute(query)
    with pytest.raises(ValueError, match=r"less than the .* that rounding does"):
        single.abu(step_size=1e-14).attribute(query)


def test_a_query_whose_loss_is_not_finite_is_named(single, query):
    broken = dataclasses.replace(query, latents=torch.full((4, 8, 8), torch.nan))
    with pytest.raises(ValueError, match="the loss of the query 'query' is nan"):
        single.abu().unlearn(broken)


def test_a_step_that_breaks_the_model_is_named(single, query):
    with pytest.raises(ValueError, match=r"unlearning 'query': the loss is .* use a smaller step"):
        single.abu(step_size=1e38).unlearn(query)


def test_a_rise_out_of_reach_is_named(single, query):
    """Attention gives a mean of values: there is an end to what it can spoil."""
    with pytest.raises(ValueError, match=r"no step raises its loss from .* use a smaller rise"):
        single.abu(rise=10.0).unlearn(query)


def test_a_query_without_a_gradient_is_named(single, query):
    """A text of zeros: keys and values are zero whatever their weights."""
    blank = dataclasses.replace(query, text=torch.zeros_like(query.text))
    with pytest.raises(ValueError, match="no gradient in the selected parameters"):
        single.abu().unlearn(blank)


def test_the_query_heeds_the_batch_size(double, query, monkeypatch) -> None:
    seen = []
    loss = double.model.loss
    monkeypatch.setattr(double.model, "loss", lambda *a: seen.append(a[2].numel()) or loss(*a))
    double.abu(batch_size=3).unlearn(query)
    assert max(seen) == 3
