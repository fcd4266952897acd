"""Which training images made this picture possible?

Data attribution for text-to-image diffusion models, by unlearning the synthesized picture.
Public names are imported when they are first used, so that `import unsee` stays fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .curvature.diagonal import DiagonalFisher
    from .data.dataset import Example, ImageDataset, load_dataset
    from .data.latents import EncodedDataset, encode_dataset
    from .draws import Draws
    from .index.fisher import fit_diagonal_fisher
    from .index.index import Index
    from .index.sketch import Sketch
    from .methods.base import Scores
    from .methods.indexed import AbU
    from .methods.similarity import Similarity
    from .methods.trak import TRAK
    from .methods.unlearning import ForwardAbU, Unlearned
    from .models.base import Denoiser
    from .query import Query

__version__ = "0.1.0"

__all__ = [
    "TRAK",
    "AbU",
    "Denoiser",
    "DiagonalFisher",
    "Draws",
    "EncodedDataset",
    "Example",
    "ForwardAbU",
    "ImageDataset",
    "Index",
    "Query",
    "Scores",
    "Similarity",
    "Sketch",
    "Unlearned",
    "__version__",
    "encode_dataset",
    "fit_diagonal_fisher",
    "load_dataset",
]

_HOMES = {
    "AbU": "methods.indexed",
    "Denoiser": "models.base",
    "DiagonalFisher": "curvature.diagonal",
    "Draws": "draws",
    "EncodedDataset": "data.latents",
    "Example": "data.dataset",
    "ForwardAbU": "methods.unlearning",
    "ImageDataset": "data.dataset",
    "Index": "index.index",
    "Query": "query",
    "Scores": "methods.base",
    "Similarity": "methods.similarity",
    "Sketch": "index.sketch",
    "TRAK": "methods.trak",
    "Unlearned": "methods.unlearning",
    "encode_dataset": "data.latents",
    "fit_diagonal_fisher": "index.fisher",
    "load_dataset": "data.dataset",
}


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first asked for (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value  # the next access does not come here
    return value


def __dir__() -> list[str]:
    """Public names, imported or not."""
    return sorted({*globals(), *__all__})
