"""The evaluation of the demo model: its measures on arrays, and the whole on a tiny pipeline."""

from __future__ import annotations

import itertools
import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from unsee.data.dataset import ImageDataset, load_dataset

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes" / "twemoji"))

import blind
import captions
import evaluate
import measures
import pictures
import sheets

RNG = np.random.default_rng


@pytest.fixture(scope="module")
def emoji() -> ImageDataset:
    return load_dataset("twemoji")


@pytest.fixture(scope="module")
def training(emoji: ImageDataset) -> pictures.Training:
    """Forty pictures of all nine categories."""
    every = emoji.ids[:: len(emoji) // 40][:40]
    return pictures.Training.of(emoji.select(every), 64)


# -- measures -----------------------------------------------------------------------------------


def test_box_downscale_is_pillows_box_filter():
    picture = RNG(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    ours = measures.box_downscale(picture[None] / 255.0, 16)[0] * 255
    theirs = np.asarray(Image.fromarray(picture).resize((16, 16), Image.Resampling.BOX))
    # Pillow rounds to whole grey levels twice, after the columns and after the rows.
    assert np.abs(ours - theirs).max() <= 1 + 1e-6


def test_box_downscale_refuses_a_side_that_does_not_divide():
    with pytest.raises(ValueError, match="64x64 pictures"):
        measures.box_downscale(np.zeros((1, 64, 64, 3)), 10)


def test_rms_distances_agree_with_a_loop():
    a, b = RNG(0).random((5, 8, 8, 3)), RNG(1).random((7, 8, 8, 3))
    b[2] = a[3]
    slow = [[np.sqrt(np.mean((x - y) ** 2)) for y in b] for x in a]
    # |x|² + |y|² - 2xy cancels: 1e-16 of a mean square becomes 1e-8 of a distance of zero.
    assert np.allclose(measures.rms_distances(a, b), slow, rtol=0, atol=3e-8)


def test_retrieval_ranks_count_from_one_and_share_ties():
    distances = np.array([[0.3, 0.1, 0.2], [0.2, 0.2, 0.1], [0.5, 0.4 + 1e-8, 0.4]])
    assert measures.retrieval_ranks(distances, np.array([0, 0, 1])).tolist() == [3, 2, 1]


def test_nearest_distinct_ignores_the_picture_itself_and_its_doubles():
    points = np.array([0.0, 0.0, 0.5, 0.8]).reshape(4, 1, 1, 1)
    nearest = measures.nearest_distinct(measures.rms_distances(points, points))
    assert np.allclose(nearest, [0.5, 0.5, 0.3, 0.3])


def test_copy_threshold_separates_what_can_be_separated():
    reconstruction, neighbour = RNG(0).uniform(0, 0.1, 100), RNG(1).uniform(0.2, 0.4, 100)
    threshold = measures.copy_threshold(reconstruction, neighbour)
    assert reconstruction.max() < threshold <= neighbour.min()


def test_copy_threshold_makes_equal_mistakes_where_they_overlap():
    reconstruction, neighbour = RNG(0).normal(0.1, 0.05, 400), RNG(1).normal(0.2, 0.05, 900)
    threshold = measures.copy_threshold(reconstruction, neighbour)
    missed, mistaken = np.mean(reconstruction >= threshold), np.mean(neighbour < threshold)
    # Neither share can move by less than one picture of its own set.
    assert abs(missed - mistaken) <= 1 / 400
    assert 0.1 < missed < 0.22  # two normals one sigma from their midpoint: 0.159


def test_the_training_pictures_themselves_are_first_and_near_copies(training: pictures.Training):
    own = list(range(len(training.ids)))
    rows = evaluate.compare(training.pictures, own, training)
    assert measures.retrieval_report(rows)["first"]["share"] == 1
    report = measures.copy_report(rows, threshold=1e-6)
    assert report["near_copies_of_own"]["share"] == 1
    assert report["near_copies_of_any"]["share"] == 1


def test_white_pictures_are_no_copies(training: pictures.Training):
    white = np.ones((len(training.ids), 64, 64, 3), np.float32)
    rows = evaluate.compare(white, list(range(len(white))), training)
    # All get the ranking of one and the same picture, so the ranks are a permutation.
    assert sorted(row["rank"] for row in rows) == list(range(1, len(white) + 1))
    assert measures.copy_report(rows, 0.05)["near_copies_of_own"]["share"] == 0


# -- captions -----------------------------------------------------------------------------------


def test_novel_prompts_are_twenty_and_not_in_the_data_set(emoji: ImageDataset):
    assert len(captions.NOVEL) == 20
    captions.check_novel(captions.NOVEL, [c for several in emoji.captions for c in several])


@pytest.mark.parametrize("prompts", [["a Blue  heart"], ["a fish", "the fish"]])
def test_a_prompt_that_is_a_caption_or_comes_twice_is_refused(prompts: list[str]):
    with pytest.raises(ValueError, match="novel prompt"):
        captions.check_novel(prompts, ["blue heart"])


def test_captions_are_stratified_fixed_and_independent_of_order(emoji: ImageDataset):
    texts, categories = [c[0] for c in emoji.captions], list(emoji.table["category"])
    rows = captions.stratified_rows(emoji.ids, texts, categories, 200)
    assert len(set(rows)) == 200
    assert all(texts.count(texts[row]) == 1 for row in rows)
    # Each category has its share, to within one caption; so have the forty of the grid.
    for n in (40, 200):
        got = Counter(categories[row] for row in rows[:n])
        for category, size in Counter(categories).items():
            assert abs(got[category] - n * size / len(texts)) <= 1
    turned = captions.stratified_rows(emoji.ids[::-1], texts[::-1], categories[::-1], 200)
    assert [emoji.ids[row] for row in rows] == [emoji.ids[::-1][row] for row in turned]
    # The published numbers are of these captions: changing the choice must be a decision.
    assert [texts[row] for row in rows[:3]] == PINNED


PINNED = ["lungs", "u.s. virgin islands flag", "spiral calendar"]


def test_more_captions_than_there_are_is_an_error():
    with pytest.raises(ValueError, match="cannot choose 3 captions: 1 examples"):
        captions.stratified_rows(["a", "b", "c"], ["x", "x", "y"], ["k"] * 3, 3)


# -- blind test ---------------------------------------------------------------------------------


def test_questions_are_fixed_by_the_seed_and_no_caption_of_the_data_is_asked(emoji: ImageDataset):
    every = [caption for group in captions.GROUPS for caption in group]
    captions.check_novel(every, [c for several in emoji.captions for c in several])
    questions = blind.make_questions(captions.GROUPS, seed=0)
    assert [q.number for q in questions] == list(range(1, 21))
    asked = {frozenset(q.captions) for q in questions}
    assert asked == {frozenset(group) for group in captions.GROUPS}
    assert questions == blind.make_questions(captions.GROUPS, seed=0)
    assert questions != blind.make_questions(captions.GROUPS, seed=1)


def test_no_answer_of_the_blind_test_tells_of_another_or_of_the_wording():
    rights, letters = Counter(), Counter()
    for seed in range(200):
        for question in blind.make_questions(captions.GROUPS, seed):
            rights[question.prompt] += 1
            letters[question.answer] += 1
    # Each caption 40 times, each letter 800 times on average: within five standard deviations.
    assert len(rights) == 100 and max(abs(n - 40) for n in rights.values()) < 5 * 32**0.5
    assert max(abs(n - 800) for n in letters.values()) < 5 * 640**0.5
    twice = [captions.GROUPS[0], captions.GROUPS[0]]
    with pytest.raises(ValueError, match="in no other group"):
        blind.make_questions(twice, seed=0)


def test_the_question_text_does_not_tell():
    questions = blind.make_questions(captions.GROUPS, seed=0)
    other = [blind.Question(q.number, q.captions[0], q.captions) for q in questions]
    assert blind.question_text(questions) == blind.question_text(other)


def test_grading_counts_right_picks_and_missing_ones_as_wrong():
    result = blind.grade({"1": "A", "2": "B", "3": "C"}, {"1": "A", "2": "C"})
    assert (result["right"], result["of"]) == (1, 3)
    assert result["wrong"] == {
        "2": {"pick": "C", "answer": "B"}, "3": {"pick": None, "answer": "C"},
    }  # fmt: skip
    guesses = list(itertools.product(blind.LETTERS, repeat=3))
    as_well = sum(any(a == b for a, b in zip(g, "ABC", strict=True)) for g in guesses)
    assert result["probability_of_guessing_as_well"] == pytest.approx(as_well / len(guesses))


@pytest.mark.parametrize("picks", [{"9": "A"}, {"1": "F"}, {"1": ""}, {"1": 2}])
def test_picks_that_cannot_be_graded_are_refused(picks: dict):
    with pytest.raises(ValueError, match="picks:"):
        blind.grade({"1": "A"}, picks)


# -- sheets -------------------------------------------------------------------------------------


def test_wrapped_lines_fit_and_what_is_cut_ends_in_an_ellipsis():
    font = sheets._font(15)
    text = "smiling face with open mouth and tightly-closed eyes"
    lines = sheets.wrap(text, font, 150, most=2)
    assert len(lines) == 2
    assert all(font.getlength(line) <= 150 for line in lines)
    assert lines[-1].endswith("…")
    assert " ".join(sheets.wrap(text, font, 250, most=2)) == text
    assert sheets.wrap("são tomé & príncipe flag", font, 250, most=1) == [
        "sao tome & principe flag"
    ]


def test_a_sheet_shows_its_pictures():
    red = Image.new("RGB", (64, 64), (200, 0, 0))
    blue = Image.new("RGB", (64, 64), (0, 0, 200))
    sheet = sheets.card_sheet([sheets.Card((red, blue), "two")] * 3, 2, "title", "subtitle")
    colours = Counter(sheet.get_flattened_data())
    assert colours[(200, 0, 0)] == colours[(0, 0, 200)] == 3 * sheets.TILE**2


# -- the whole ----------------------------------------------------------------------------------


def test_pictures_do_not_depend_on_their_batch(tiny_pipeline):
    prompts = ["a red square", "a blue heart", "a green star"]
    settings = pictures.Settings(steps=2, batch_size=3)
    together = pictures.generate(tiny_pipeline, prompts, settings)
    alone = pictures.generate(tiny_pipeline, prompts[1:2], settings)
    # Sums are grouped otherwise in another batch: float32 rounding through some 40 layers.
    assert np.allclose(together[1], alone[0], rtol=0, atol=1e-4)
    # Noise is each prompt's own: else all would share one.
    assert np.abs(together[0] - together[1]).max() > 0.01


def test_evaluation_of_a_tiny_model(tiny_pipeline, training: pictures.Training, tmp_path: Path):
    unseen = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    settings = pictures.Settings(steps=1, captions=9)
    report = evaluate.evaluate(tiny_pipeline, training, unseen, settings, tmp_path)
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert report["autoencoder"]["training"]["pictures"] == 40
    assert report["autoencoder"]["unseen"]["pictures"] == 3
    assert sum(r["pictures"] for r in report["retrieval_by_category"].values()) == 9
    assert all(row["nearest_rms"] <= row["own_rms"] for row in report["pictures"])
    # Random weights make no emoji: nothing can be a near-copy at a sharp threshold.
    assert min(row["nearest_rms"] for row in report["pictures"]) > 0.02
    for name in ("grid.png", "novel.png"):
        with Image.open(tmp_path / name) as sheet:
            assert sheet.width > 1000
    assert "| **all** | 9 |" in evaluate.markdown(report)


def test_a_sweep_keeps_the_captions_and_changes_the_guidance(tiny_pipeline, training):
    settings = pictures.Settings(steps=2, captions=9)
    results = evaluate.sweep(tiny_pipeline, training, settings, [1.0, 9.0])
    assert [r["guidance"] for r in results] == [1.0, 9.0]
    assert results[0]["own_rms"] != results[1]["own_rms"]
    assert "| 9 |" in evaluate.sweep_markdown(results)


def test_blind_test_from_the_command_line(tiny_pipeline_dir: Path, tmp_path: Path, capsys):
    out = tmp_path / "out"
    assert (
        evaluate.main([str(tiny_pipeline_dir), "--out", str(out), "--steps", "1", "--blind"]) == 0
    )
    names = [f"question_{number:02d}.png" for number in range(1, 21)]
    assert sorted(p.name for p in (out / "blind").iterdir()) == [*names, "questions.txt"]
    assert len(json.loads((out / "answers.json").read_text())) == 20
    assert evaluate.main(["--out", str(out), "--grade", str(out / "answers.json")]) == 0
    assert "20 of 20 right" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["nowhere"], ["--grade", "no-picks.json"]])
def test_what_is_missing_is_one_line_and_exit_code_2(arguments: list[str], tmp_path: Path, capsys):
    assert evaluate.main([*arguments, "--out", str(tmp_path / "out")]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
