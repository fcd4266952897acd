"""The fixed training recipe of the twemoji benchmark."""

from __future__ import annotations

import math

from unsee.training.loop import Optimization
from unsee.training.text_to_image import UNetRecipe

RECIPE = UNetRecipe(channels=(32, 64))
"""1.3 M parameters, a quarter of the demo model's: eighty of them are trained."""

EPOCHS = 56
BATCH = 32


def optimization(examples: int, seed: int) -> Optimization:
    """Returns how a model on `examples` examples is trained: as often on each, whatever their
    number."""
    steps = math.ceil(EPOCHS * examples / BATCH)
    return Optimization(
        steps=steps, batch_size=BATCH, learning_rate=2e-3, warmup=100, ema_decay=0.995, seed=seed
    )
