"""Where does a caption's own training image stand among the scores of a picture made for it?

For pictures generated from training captions, unlearns each with steps of several sizes and
reports the rank of the caption's own image (1 is the most influential). Nothing says that the own
image must come first: this is a description, not a test.

    python recipes/twemoji/own_image_rank.py MODEL_DIR --out DIR
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from captions import stratified_rows
from tqdm.auto import tqdm

from unsee.attribution import attributor, prepare
from unsee.data.dataset import load_dataset
from unsee.models.base import Denoiser
from unsee.models.loading import load_pipeline


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--queries", type=int, default=20)
    parser.add_argument("--rises", default="0.01,0.05,0.25,1.0")
    parser.add_argument("--dampings", default="0.1")
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=0, help="of pictures and of draws")
    args = parser.parse_args()

    data = load_dataset("twemoji")
    model = Denoiser.from_pipeline(load_pipeline(args.model))
    prepared = prepare(model, data, args.out / "work")
    rows = []
    settings = [
        (float(damping), float(rise))
        for damping in args.dampings.split(",")
        for rise in args.rises.split(",")
    ]
    captions = [c[0] for c in data.captions]
    categories = [data.metadata(row)["category"] for row in range(len(data))]
    chosen = stratified_rows(data.ids, captions, categories, args.queries)
    bar = tqdm(total=len(chosen) * len(settings), unit="attribution")
    for own, caption in ((data.ids[row], captions[row]) for row in chosen):
        query = model.generate(caption, args.seed, guidance_scale=args.guidance)
        for damping, rise in settings:
            method = attributor(
                prepared, draws=args.draws, rise=rise, damping=damping, seed=args.seed
            )
            scores = method.attribute(query)
            rows.append(
                {
                    "id": own,
                    "caption": caption,
                    "damping": damping,
                    "rise": rise,
                    "rank": scores.rank_of(own),
                    "query_loss": scores.settings["query_loss"][0],
                    "spread": float(scores.values.std()),
                    "noise_floor": scores.settings["noise_floor"],
                }
            )
            bar.update()
    args.out.mkdir(parents=True, exist_ok=True)
    record = {"settings": {**vars(args), "model": str(args.model.name), "out": ""}, "rows": rows}
    text = json.dumps(record, indent=1, default=str) + "\n"
    (args.out / "own_image_rank.json").write_text(text, encoding="utf-8")
    print(table(rows))


def table(rows: list[dict]) -> str:
    """Returns a Markdown table: per damping and rise, quantiles of the own image's rank."""
    lines = [
        "| damping | rise of the query's loss | first | in first ten | median rank | worst |",
        "|---|---|---|---|---|---|",
    ]
    for damping, rise in dict.fromkeys((r["damping"], r["rise"]) for r in rows):
        ranks = np.array([r["rank"] for r in rows if (r["damping"], r["rise"]) == (damping, rise)])
        lines.append(
            f"| {damping:g} | {rise:.0%} | {(ranks == 1).sum()} of {len(ranks)} "
            f"| {(ranks <= 10).sum()} of {len(ranks)} | {np.median(ranks):g} | {ranks.max()} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
