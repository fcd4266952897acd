"""`unsee reproduce` against recorded results, and against a slow implementation."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import unsee.methods.published
import unsee.reproduce
from tests.reference import abu
from tests.reference.released import write_experiment
from unsee.data.published import PublishedConfig, PublishedExamples
from unsee.draws import Draws
from unsee.methods.published import Experiment, UnlearningDraws, unlearn
from unsee.reproduce import reproduce

GOLDEN = Path(__file__).parent / "golden" / "abu-mscoco-tiny"


def assert_agrees(influence: np.ndarray, rank: np.ndarray, expected: np.ndarray) -> None:
    """Checks what golden/README.md asks for."""
    tolerance = min(1e-5, 1e-3 * np.abs(expected).max())
    assert np.abs(influence - expected).max() <= tolerance
    order = np.argsort(-expected, kind="stable")
    clear = -np.diff(expected[order]) > tolerance
    settled = np.concatenate([[True], clear]) & np.concatenate([clear, [True]])
    assert np.array_equal(rank[settled], order[settled])
    assert np.array_equal(np.sort(rank), np.arange(len(expected)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small experiment of two steps; tests do not change it."""
    path = tmp_path_factory.mktemp("experiment") / "data"
    return write_experiment(path, lr=1e-4, steps=2, num_captions=2)


@pytest.fixture
def own(folder: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(folder, tmp_path / "data"))


# -- the numbers --------------------------------------------------------------------------------


@pytest.mark.parametrize("query", [0, 1, 2])
def test_golden(query: int, tmp_path: Path) -> None:
    out = tmp_path / "out.npz"
    result = reproduce(GOLDEN, query, out, GOLDEN / "draws.npz")
    expected = np.load(GOLDEN / "expected.npz")
    assert_agrees(result.influence, result.rank, expected[f"influence_{query}"])
    # The recorded ones are float32 near 1, accumulated in float32: 1e-6 is a few roundings.
    assert np.abs(result.pretrain_loss - expected["pretrain_loss"]).max() < 1e-6
    written = np.load(out)
    assert np.array_equal(written["influence"], result.influence)
    assert np.array_equal(written["rank"], result.rank)
    # With these arrays no two neighbours are closer than the tolerance's order of magnitude.
    assert np.array_equal(written["rank"], expected[f"rank_{query}"])


@pytest.mark.parametrize("batch_size", [7, 64])
def test_golden_with_other_batch_sizes(batch_size: int, tmp_path: Path) -> None:
    result = reproduce(GOLDEN, 2, tmp_path / "o.npz", GOLDEN / "draws.npz", batch_size=batch_size)
    expected = np.load(GOLDEN / "expected.npz")
    assert_agrees(result.influence, result.rank, expected["influence_2"])


def test_the_slow_implementation_agrees_with_golden() -> None:
    expected = np.load(GOLDEN / "expected.npz")
    rows = [0, 17]
    before, after = abu.attribute(GOLDEN, 0, rows)
    influence = (after - before).max(axis=1)
    assert np.abs(influence - expected["influence_0"][rows]).max() <= 1e-5
    recorded = expected["pretrain_loss"].reshape(2, -1)[:, rows].T
    assert np.abs(before - recorded).max() < 1e-6  # float32 against float64


VARIANTS: dict[str, dict[str, Any]] = {
    "three steps, one caption of two": {
        "steps": 3, "num_captions": 1, "time_samples": 3, "lr": 1e-4,
    },
    "cross-attn, three levels of two layers": {
        "weight_selection": "cross-attn", "steps": 2, "n": 2, "captions": 3, "num_captions": 3,
        "unlearn_batch": 2, "lr": 1e-5,
        "unet": {
            "layers_per_block": 2, "block_out_channels": [8, 16, 16], "cross_attention_dim": 20,
            "down_block_types": [*["CrossAttnDownBlock2D"] * 2, "DownBlock2D"],
            "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 2], "attention_head_dim": 4,
        },
    },
    "attn, self-attention blocks, heads by level, another dataset_size": {
        "weight_selection": "attn", "n": 4, "dataset_size": 9, "time_samples": 1,
        "num_captions": 2, "unlearn_batch": 4, "grad_accum": 1, "lr": 1e-4,
        "unet": {
            "down_block_types": ["CrossAttnDownBlock2D", "AttnDownBlock2D"],
            "up_block_types": ["AttnUpBlock2D", "CrossAttnUpBlock2D"], "attention_head_dim": [2, 4],
        },
    },
    "all, linear projections, two layers in a block": {
        "weight_selection": "all", "steps": 2, "n": 2, "unlearn_batch": 1, "grad_accum": 4,
        "num_captions": 2, "lr": 1e-4,
        "unet": {"use_linear_projection": True, "transformer_layers_per_block": 2},
    },
    "attn, oblong latents, text in the self-attention too, no middle": {
        "weight_selection": "attn", "shape": (3, 8, 16), "steps": 2, "num_captions": 2, "n": 2,
        "lr": 1e-4,
        "unet": {
            "in_channels": 3, "out_channels": 3, "only_cross_attention": True,
            "mid_block_type": None,
        },
    },
    "all, text read outside transformer blocks": {
        "weight_selection": "all", "num_captions": 2, "n": 2, "lr": 1e-4,
        "unet": {
            "down_block_types": ["CrossAttnDownBlock2D", "SimpleCrossAttnDownBlock2D"],
            "up_block_types": ["SimpleCrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
            "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
            "addition_embed_type": "text", "addition_embed_type_num_heads": 4,
        },
    },
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_any_configuration_agrees_with_the_slow_implementation(
    variant: str, tmp_path: Path
) -> None:
    folder = write_experiment(tmp_path / "data", **VARIANTS[variant])
    before, after = abu.attribute(folder, 1)
    expected = (after - before).max(axis=1)
    # The step must have done something: far more than the tolerance.
    assert np.abs(expected).max() > 2e-4
    for batch_size in (1, 5):
        out = tmp_path / f"{batch_size}.npz"
        result = reproduce(folder, 1, out, folder / "draws.npz", batch_size=batch_size)
        # Losses near 1 in float32 against float64.
        assert np.abs(result.pretrain_loss - before.T.reshape(-1)).max() < 1e-6
        assert_agrees(result.influence, result.rank, expected)


def test_two_runs_are_bit_identical(folder: Path, tmp_path: Path) -> None:
    one, two = (
        reproduce(folder, 0, tmp_path / name, folder / "draws.npz") for name in ("1.npz", "2.npz")
    )
    assert np.array_equal(one.influence, two.influence)
    assert np.array_equal(one.unlearned_loss, two.unlearned_loss)


def test_the_file_needs_no_pickle_and_says_what_it_holds(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "er" / "result"  # the name is taken as it is
    reproduce(folder, 1, out, folder / "draws.npz")
    assert [path.name for path in out.parent.iterdir()] == ["result"]  # no work folder, no parts
    written = np.load(out, allow_pickle=False)
    before, after = (written[n].reshape(2, 3).T for n in ("pretrain_loss", "unlearned_loss"))
    assert np.array_equal(written["influence"], (after - before).max(axis=1))
    assert np.array_equal(written["rank"], np.argsort(-written["influence"], kind="stable"))
    assert written["rank"].dtype == np.int64
    assert written["query_loss"][1] > written["query_loss"][0]
    settings = json.loads(str(written["settings"]))
    assert settings["query"] == 1
    assert settings["config.lr"] == 1e-4
    assert settings["config.unet.block_out_channels"] == [8, 16]


# -- our own draws ------------------------------------------------------------------------------


def test_own_draws_are_the_papers_kind(folder: Path, tmp_path: Path) -> None:
    """Recording our draws and playing them gives the same bits as not recording them."""
    config = PublishedConfig.load(folder)
    data = PublishedExamples(folder, config)
    draws = Draws(5, config.time_samples, "grid")
    assert draws.of("0", data.latent_shape)[0].tolist() == [0, 500]
    query = UnlearningDraws(5, 1, config.unlearn_batch, data.latent_shape)
    noise = np.stack(
        [
            [draws.of(i, data.latent_shape, c, flipped)[1].numpy() for c in range(2)]
            for flipped in (False, True)
            for i in data.ids
        ]
    )
    # A mirror image has its picture's noise, mirrored.
    assert np.array_equal(noise[3:], noise[:3, ..., ::-1])
    # Every picture, caption and timestep has noise of its own.
    assert len(np.unique(noise[:3].reshape(-1, *data.latent_shape), axis=0)) == 3 * 2 * 2
    parts = [[query(s, a) for a in range(config.grad_accum)] for s in range(config.steps)]
    np.savez(
        tmp_path / "draws.npz",
        loss_timesteps=draws.of("0", data.latent_shape)[0],
        loss_noise=noise,
        unlearn_timesteps_1=np.array([[t.numpy() for t, _ in step] for step in parts]),
        unlearn_noise_1=np.array([[e.numpy() for _, e in step] for step in parts]),
    )
    played = reproduce(folder, 1, tmp_path / "played.npz", tmp_path / "draws.npz")
    made = reproduce(folder, 1, tmp_path / "made.npz", seed=5)
    assert np.array_equal(made.influence, played.influence)
    other = reproduce(folder, 1, tmp_path / "other.npz", seed=6)
    assert not np.array_equal(made.influence, other.influence)


def test_own_draws_and_recorded_ones_mostly_agree_on_golden(tmp_path: Path) -> None:
    result = reproduce(GOLDEN, 0, tmp_path / "out.npz")
    expected = np.load(GOLDEN / "expected.npz")["influence_0"]
    ranks = [values.argsort().argsort() for values in (result.influence, expected)]
    # Twenty draws of 24 examples are noisy, and golden's flips have noise of their own; unrelated
    # scores would exceed 0.5 with a probability of less than 0.01.
    assert np.corrcoef(*ranks)[0, 1] > 0.5


def test_timesteps_of_a_micro_batch_do_not_repeat() -> None:
    draws = UnlearningDraws(0, 0, 80, (4, 2, 2))
    seen = []
    for step, micro_batch in ((0, 0), (0, 1), (1, 0)):
        timesteps, noise = draws(step, micro_batch)
        assert timesteps.dtype == torch.int64
        assert len(set(timesteps.tolist())) == 80
        assert set(timesteps.tolist()) <= set(range(1000))
        assert noise.shape == (80, 4, 2, 2)
        seen.append(timesteps.tolist())
        again = draws(step, micro_batch)
        assert torch.equal(again[0], timesteps) and torch.equal(again[1], noise)
    assert len({tuple(t) for t in seen}) == 3
    whole = UnlearningDraws(0, 0, 1000, (1, 1, 1))(0, 0)[0]
    assert sorted(whole.tolist()) == list(range(1000))
    with pytest.raises(ValueError, match="unlearn_batch = 1001 is more than the 1000"):
        UnlearningDraws(0, 0, 1001, (4, 2, 2))


# -- the step -----------------------------------------------------------------------------------


def test_unlearning_leaves_the_model_as_it_is(folder: Path) -> None:
    experiment = Experiment.open(folder, 0)
    network = experiment.model.network
    before = {name: value.clone() for name, value in network.state_dict().items()}
    grads = [p.requires_grad for p in network.parameters()]
    draws = UnlearningDraws(0, 0, 3, (4, 8, 8))
    weights = unlearn(experiment, draws)
    for name, value in network.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, before[name])
    assert [p.requires_grad for p in network.parameters()] == grads
    assert set(weights) == set(experiment.model.parameters)
    assert all(not torch.equal(w, before[name]) for name, w in weights.items())
    assert {w.dtype for w in weights.values()} == {torch.float32}


def test_a_step_is_undamped_and_in_float64(folder: Path) -> None:
    experiment = Experiment.open(folder, 0)
    fisher = experiment.fisher.values
    weights = {name: p.detach().clone() for name, p in experiment.model.parameters.items()}
    generator = torch.Generator().manual_seed(0)
    gradient = {n: torch.randn(f.shape, generator=generator).double() for n, f in fisher.items()}
    moved = experiment.ascend(weights, gradient)
    for name, weight in weights.items():
        expected = weight.double() + 1e-4 / 3 * gradient[name] / fisher[name]
        assert torch.equal(moved[name], expected.float())


def test_fisher_of_zero_is_refused_only_where_there_is_a_gradient(own: Path) -> None:
    values = torch.load(own / "fisher_info.pt", weights_only=True)
    name = next(n for n in values if n.endswith("attn2.to_v.weight"))
    values[name][0, :2] = 0
    torch.save(values, own / "fisher_info.pt")
    with pytest.raises(ValueError, match=rf"{name} is zero at 2 of \d+ weights"):
        reproduce(own, 0, own / "out.npz", own / "draws.npz")
    experiment = Experiment.open(own, 0)
    weights = {n: p.detach().clone() for n, p in experiment.model.parameters.items()}
    gradient = {n: torch.ones_like(w).double() for n, w in weights.items()}
    gradient[name][0, :2] = 0
    moved = experiment.ascend(weights, gradient)
    assert torch.equal(moved[name][0, :2], weights[name][0, :2])
    assert not torch.equal(moved[name][0, 2:], weights[name][0, 2:])


def test_a_step_out_of_range_is_refused(folder: Path) -> None:
    experiment = Experiment.open(folder, 0)
    weights = {n: p.detach().clone() for n, p in experiment.model.parameters.items()}
    gradient = {n: torch.full_like(w, 1e45, dtype=torch.float64) for n, w in weights.items()}
    with pytest.raises(ValueError, match=r"query 0: unlearning takes .*attn2.* out of the range"):
        experiment.ascend(weights, gradient)


# -- resuming -----------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
import torch
import unsee.methods.forward as forward, unsee.methods.published as published
import unsee.reproduce as experiment
torch.set_num_threads(1)
published.CHECKPOINT_SECONDS, experiment.SHARD_PASSES = 0.0, 8
write, left = forward.write_atomically, int(sys.argv[4])
def killed(path, content):
    global left
    write(path, content)
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
forward.write_atomically = published.write_atomically = killed
experiment.reproduce(sys.argv[1], 0, sys.argv[2], sys.argv[3])
"""


@pytest.mark.slow
def test_a_killed_run_continues_to_the_same_bits(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, draws = tmp_path / "out.npz", folder / "draws.npz"
    arguments = [sys.executable, "-c", KILLED, str(folder), str(out), str(draws)]
    work = tmp_path / "out.npz.work"
    # Three shards of losses, then a checkpoint after each of four micro-batches: the first run
    # dies in the second step, the second after the first shard of losses after.
    for writes, finished in ((3 + 3, 3), (1 + 1 + 1, 4)):
        killed = subprocess.run(
            [*arguments, str(writes)], capture_output=True, text=True, timeout=300, check=False
        )
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert len(list(work.rglob("*.npy"))) == finished
        assert not out.exists()
    kept = {path: path.stat().st_mtime_ns for path in work.rglob("*.npy")}
    monkeypatch.setattr(unsee.reproduce, "SHARD_PASSES", 8)
    monkeypatch.setattr(unsee.reproduce.shutil, "rmtree", lambda _: None)
    resumed = reproduce(folder, 0, out, draws)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    fresh = reproduce(folder, 0, tmp_path / "fresh.npz", draws)
    assert np.array_equal(resumed.influence, fresh.influence)
    assert np.array_equal(resumed.unlearned_loss, fresh.unlearned_loss)


def test_one_work_folder_serves_all_queries(folder: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    first = reproduce(folder, 0, tmp_path / "0.npz", work=work)
    before = {path: path.stat().st_mtime_ns for path in (work / "before").iterdir()}
    second = reproduce(folder, 1, tmp_path / "1.npz", work=work)
    assert {path: path.stat().st_mtime_ns for path in (work / "before").iterdir()} == before
    assert np.array_equal(first.pretrain_loss, second.pretrain_loss)
    alone = reproduce(folder, 1, tmp_path / "alone.npz")
    assert np.array_equal(second.influence, alone.influence)
    assert not np.array_equal(second.influence, first.influence)


def test_parts_of_other_settings_are_not_mixed(own: Path, tmp_path: Path) -> None:
    work, out = tmp_path / "work", tmp_path / "out.npz"
    reproduce(own, 0, out, work=work)
    with pytest.raises(ValueError, match=r"begun with draws = 'seed 0', this run has 'seed 1'"):
        reproduce(own, 0, out, work=work, seed=1)
    with pytest.raises(ValueError, match="begun with batch_size = 80, this run has 7"):
        reproduce(own, 0, out, work=work, batch_size=7)
    latents = np.load(own / "coco17_train_latents.npy")
    np.save(own / "coco17_train_latents.npy", latents + 1)
    with pytest.raises(ValueError, match="begun with training data = "):
        reproduce(own, 0, out, work=work)
    np.save(own / "coco17_train_latents.npy", latents)
    config = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(json.dumps({**config, "lr": 0.5}))
    with pytest.raises(ValueError, match=r"begun with config.lr = 0.0001, this run has 0.5"):
        reproduce(own, 0, out, work=work)


def test_a_folder_of_other_things_is_left_alone(folder: Path, tmp_path: Path) -> None:
    precious = tmp_path / "out.npz.work" / "thesis.txt"
    precious.parent.mkdir()
    precious.write_text("years")
    with pytest.raises(ValueError, match="holds other things than parts of a run"):
        reproduce(folder, 0, tmp_path / "out.npz")
    assert precious.read_text() == "years"


def test_damaged_parts_are_named(folder: Path, tmp_path: Path) -> None:
    work, out = tmp_path / "work", tmp_path / "out.npz"
    reproduce(folder, 0, out, work=work)
    for name in ("unlearned.safetensors", "after/*.npy", "settings.json"):
        path = next(work.rglob(name))
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ValueError, match=rf"{path.name} is damaged .*: delete"):
            reproduce(folder, 0, out, work=work)
        path.write_bytes(whole)


# -- bad input ----------------------------------------------------------------------------------


def test_missing_folder_and_impossible_outputs_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere: no such folder"):
        reproduce(tmp_path / "nowhere", 0, tmp_path / "out.npz")
    with pytest.raises(ValueError, match=r"is a folder: name the \.npz file"):
        reproduce(folder, 0, tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be made a folder"):
        reproduce(folder, 0, tmp_path / "file" / "out.npz")
    with pytest.raises(ValueError, match="batch_size = 0 must be at least 1"):
        reproduce(folder, 0, tmp_path / "out.npz", batch_size=0)


def test_losses_that_are_not_finite_are_named(own: Path, tmp_path: Path) -> None:
    queries = np.load(own / "coco17_sample_latents.npy")
    queries[0, 0, 0, 0] = np.nan
    np.save(own / "coco17_sample_latents.npy", queries)
    with pytest.raises(ValueError, match="query 0: its loss is not finite"):
        reproduce(own, 0, tmp_path / "out.npz", own / "draws.npz")
    latents = np.load(own / "coco17_train_latents.npy")
    latents[3 + 1, 0, 0, 0] = np.inf  # a mirror image
    np.save(own / "coco17_train_latents.npy", latents)
    with pytest.raises(ValueError, match="the loss of example '1' is not finite"):
        reproduce(own, 1, tmp_path / "other.npz", own / "draws.npz")
