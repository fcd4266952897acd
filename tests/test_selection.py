from __future__ import annotations

import pytest

from unsee.selection import select_parameters

NAMES = ["a.attn1.to_k.weight", "b.attn2.to_v.weight", "a.attn2.to_k.weight", "a.conv.bias"]
PRESETS = {"kv": ("*attn2.to_k.weight", "*attn2.to_v.weight"), "all": ("*",)}


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ("kv", ["b.attn2.to_v.weight", "a.attn2.to_k.weight"]),
        ("all", NAMES),
        ("a.*", ["a.attn1.to_k.weight", "a.attn2.to_k.weight", "a.conv.bias"]),
        (["a.conv.*", "b*"], ["b.attn2.to_v.weight", "a.conv.bias"]),
        (["*attn2*", "*to_k*"], NAMES[:3]),  # a name that matches twice comes once
        ("a.conv.bias", ["a.conv.bias"]),
    ],
)
def test_selection_keeps_the_order_of_the_model(parameters, expected):
    assert select_parameters(NAMES, parameters, PRESETS) == expected


def test_a_generator_of_names_will_do():
    assert select_parameters((n for n in NAMES), "all", PRESETS) == NAMES


@pytest.mark.parametrize("parameters", ["cross-attn", ["a.*", "c.*"], "A.conv.*"])
def test_a_pattern_without_a_match_is_named(parameters):
    culprit = parameters if isinstance(parameters, str) else parameters[1]
    with pytest.raises(ValueError, match="matches none of the model's 4 parameters") as error:
        select_parameters(NAMES, parameters, PRESETS)
    assert repr(culprit) in str(error.value)
    assert "kv, all" in str(error.value)


@pytest.mark.parametrize("parameters", [[], ()])
def test_an_empty_selection_is_refused(parameters):
    with pytest.raises(ValueError, match="parameters"):
        select_parameters(NAMES, parameters, PRESETS)


def test_a_layer_under_an_adapter_is_the_same_layer():
    names = ["a.attn2.to_k.base_layer.weight", "a.attn2.to_k.lora_A.weight", "a.attn2.to_v.weight"]
    assert select_parameters(names, "kv", PRESETS) == [names[0], names[2]]
    assert select_parameters(names, "*lora_*", PRESETS) == [names[1]]


def test_where_nothing_matches_lora_weights_are_pointed_at():
    presets = {**PRESETS, "lora": ("*lora_*",)}
    names = [*NAMES, "a.attn2.to_k.lora_A.default.weight"]
    with pytest.raises(ValueError, match="use `--parameters lora`, as it has LoRA weights"):
        select_parameters(names, "*to_kk*", presets)
    with pytest.raises(ValueError) as error:
        select_parameters(NAMES, "*to_kk*", presets)
    assert "LoRA" not in str(error.value)
