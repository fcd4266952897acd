"""Which parameters an attribution looks at."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase


def select_parameters(
    names: Iterable[str], parameters: str | Sequence[str], presets: Mapping[str, Sequence[str]]
) -> list[str]:
    """Returns the names that match, in the order of the model.

    Args:
        names: all parameter names of the network.
        parameters: a preset, or fnmatch patterns such as `"*attn2.to_k.weight"`.
        presets: the architecture's own presets: name -> patterns.

    Raises:
        ValueError: no pattern, or one that matches nothing.
    """
    names = list(names)
    named = isinstance(parameters, str)
    patterns = presets.get(parameters, [parameters]) if named else parameters
    if not patterns:
        raise ValueError(f"parameters: no pattern is given; use one of {', '.join(presets)}")
    for pattern in patterns:
        if not any(_matches(name, pattern) for name in names):
            lora = presets.get("lora", ())
            adapted = any(_matches(name, p) for name in names for p in lora)
            hint = "`--parameters lora`, as it has LoRA weights, " if adapted else ""
            raise ValueError(
                f"parameters: {pattern!r} matches none of the model's {len(names)} parameters; "
                f"use {hint}one of {', '.join(presets)}, or a pattern like {names[0]!r}"
            )
    return [name for name in names if any(_matches(name, p) for p in patterns)]


def _matches(name: str, pattern: str) -> bool:
    # PEFT puts a layer that has an adapter one level down; it is the same layer to a pattern.
    return fnmatchcase(name, pattern) or fnmatchcase(name.replace(".base_layer.", "."), pattern)
