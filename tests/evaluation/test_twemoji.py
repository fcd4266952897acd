"""The benchmark that ships: what is committed fits the data set and itself."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from unsee import load_dataset
from unsee.evaluation.benchmark import members_and_decoys, read_outcomes
from unsee.evaluation.metrics import lds
from unsee.evaluation.twemoji import shipped


@pytest.fixture(scope="module")
def ids() -> list[str]:
    return load_dataset("twemoji").ids


def test_outcomes_are_of_this_data_set_and_these_queries(ids: list[str]) -> None:
    queries = json.loads((shipped() / "queries.json").read_text(encoding="utf-8"))
    got = read_outcomes(shipped() / "outcomes.parquet", ids, [q["id"] for q in queries])
    members, decoys = members_and_decoys(ids)
    assert got.masks.shape == (len(got.numbers), len(ids))
    assert (got.masks.sum(1) == round(len(members) / 2)).all()
    assert not got.masks[:, decoys].any()
    assert got.losses.shape == (len(got.numbers), len(queries))
    latents = load_file(shipped() / "queries.safetensors")["latents"]
    assert latents.shape[0] == len(queries) == 40
    owns = [q["own"] for q in queries if q["own"] is not None]
    assert len(owns) == 20 and set(owns) <= {ids[r] for r in members}


def test_the_encoder_is_the_one_that_every_outcome_was_made_with() -> None:
    """Losses depend on latents, so on the encoder's every bit; the decoder may change."""
    path = shipped().parent / "twemoji" / "vae" / "diffusion_pytorch_model.safetensors"
    digest = hashlib.sha256()
    for name, values in sorted(load_file(path).items()):
        if name.startswith(("encoder.", "quant_conv.")):
            digest.update(name.encode() + values.tobytes())
    assert digest.hexdigest()[:16] == "740df26e76baa5a6"


def test_leaving_the_own_image_out_raises_the_loss(ids: list[str]) -> None:
    """The one thing that retraining must show: models without it are worse at the query."""
    queries = json.loads((shipped() / "queries.json").read_text(encoding="utf-8"))
    got = read_outcomes(shipped() / "outcomes.parquet", ids, [q["id"] for q in queries])
    gaps = []
    for column, query in enumerate(queries[:20]):
        inside = got.masks[:, ids.index(query["own"])]
        if inside.any() and not inside.all():
            losses = got.losses[:, column] - got.losses.mean(1)  # less what a run has in common
            gaps.append(losses[~inside].mean() - losses[inside].mean())
    assert np.mean(gaps) > 0


def test_chance_predicts_nothing(ids: list[str]) -> None:
    queries = json.loads((shipped() / "queries.json").read_text(encoding="utf-8"))
    got = read_outcomes(shipped() / "outcomes.parquet", ids, [q["id"] for q in queries])
    rng = np.random.default_rng(0)
    values = [lds(rng.normal(size=(40, len(ids))), got.masks, got.losses).mean() for _ in range(50)]
    # The queries share their subsets, so that one draw of 40 scores scatters by about 0.1.
    assert abs(np.mean(values)) < 0.05
