"""What the README shows, run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image

README = Path(__file__).parents[1] / "README.md"


def test_the_python_block_runs(
    tiny_pipeline_dir: Path, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    for big, tiny in {
        "write_demo_model())": f"{str(tiny_pipeline_dir)!r})",
        'load_dataset("twemoji")': f'load_dataset("imagefolder", data_dir={str(image_folder)!r})',
    }.items():
        assert block.count(big) == 1
        block = block.replace(big, tiny)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(block, names)
    assert len(names["scores"].values) == 12
    assert Image.open("contact-sheet.png").size > (100, 100)
