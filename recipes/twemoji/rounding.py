"""How far rounding moves the scores of the demo model: python recipes/twemoji/rounding.py MODEL_DIR

One generated picture, attributed with a step of 5%: twice alike, and in batches of another size.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from unsee.attribution import attributor, prepare
from unsee.data.dataset import load_dataset
from unsee.evaluation.metrics import spearman
from unsee.models.base import Denoiser
from unsee.models.loading import load_pipeline


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--batch-sizes", type=int, nargs="*", default=[80, 80, 21])
    args = parser.parse_args()
    data = load_dataset("twemoji")
    model = Denoiser.from_pipeline(load_pipeline(args.model))
    query = model.generate("a blue heart with a star", 0, guidance_scale=3.0)
    results = []
    for size in args.batch_sizes:
        with TemporaryDirectory() as work:  # nothing is taken over from the run before
            prepared = prepare(model, data, Path(work))
            method = attributor(prepared, rise=0.05, draws=args.draws, batch_size=size)
            results.append(method.attribute(query))
    first = results[0]
    print(f"noise floor {first.settings['noise_floor']:.2g}, scores' standard deviation "
          f"{first.values.std():.2g}")  # fmt: skip
    for size, other in zip(args.batch_sizes[1:], results[1:], strict=True):
        change = np.abs(other.values - first.values)
        print(
            f"batch size {args.batch_sizes[0]} and {size}: largest difference {change.max():.2g}, "
            f"equal to the bit: {bool((change == 0).all())}, "
            f"rank correlation {float(spearman(first.values, other.values)):.7f}"
        )


if __name__ == "__main__":
    main()
