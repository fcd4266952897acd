"""What `unsee attribute` refuses before anything is opened."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.index.conftest import build_index, small_model
from tests.methods.conftest import examples
from unsee.cli import main

ASKED = ["--prompt", "a red square", "--seed", "0"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index of which nobody knows the model: good enough for what is not opened."""
    path = tmp_path_factory.mktemp("run")
    build_index(path, small_model(), examples(4))
    return path


@pytest.mark.parametrize("damping", ["0", "0.1", "5"])
def test_damping_is_refused_where_there_is_no_curvature(
    run: Path, capsys: pytest.CaptureFixture, damping: str
) -> None:
    options = ["--curvature", "identity", "--damping", damping]
    assert main(["attribute", str(run), *ASKED, *options]) == 2
    assert "--damping does nothing with --curvature identity" in capsys.readouterr().err
