from __future__ import annotations

import pytest
import torch

from unsee.models.loading import choose_device


def test_a_device_is_the_one_asked_for_or_the_best() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device(None).type in ("cpu", "cuda", "mps")


@pytest.mark.parametrize("name", ["cpu:x", "gpu", "", "cuda:-1", "cpu:0:1"])
def test_what_is_no_device_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"device '{name}' is none; there is: .*cpu"):
        choose_device(name)


@pytest.mark.parametrize("name", ["cuda:99", "xpu", "cpu:1"])
def test_a_device_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"device '{name}' is not available here; there is: .*cpu"):
        choose_device(name)
