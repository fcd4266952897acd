"""The README's Python runs: on a tiny model and a dozen pictures in place of the demo's."""

from __future__ import annotations

import re
from pathlib import Path

import pytest


def test_the_python_of_the_readme_runs(
    tiny_pipeline_dir: Path, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readme = Path(__file__).parents[1] / "README.md"
    (code,) = re.findall(r"```python\n(.*?)```", readme.read_text(encoding="utf-8"), re.DOTALL)
    for there, here in (
        ("write_demo_model())", f"{str(tiny_pipeline_dir)!r})"),
        ('load_dataset("twemoji")', f'load_dataset("imagefolder", data_dir={str(image_folder)!r})'),
    ):
        assert there in code
        code = code.replace(there, here)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    assert len(names["scores"]) == 12
    assert (tmp_path / "contact-sheet.png").stat().st_size > 0
