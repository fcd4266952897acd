"""The package as users meet it: a fast import, public names, types, a wheel."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata, resources
from pathlib import Path

import pytest

import unsee

ROOT = Path(__file__).parents[1]


def _fresh(code: str) -> str:
    """Runs code in a fresh interpreter, outside the repository, and returns what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd="/", capture_output=True, text=True, check=True
    )
    return done.stdout


def test_import_is_fast_and_light() -> None:
    code = """
import json, sys, time
import unsee
print(json.dumps([time.process_time(), sorted(sys.modules)]))
"""
    seconds, loaded = json.loads(_fresh(code))
    # Two seconds is what users are promised. In processor time of the whole process, start of the
    # interpreter included, because wall time depends on what else the machine does.
    assert seconds < 2
    heavy = {"torch", "diffusers", "transformers", "gradio", "ray", "matplotlib", "torchvision"}
    assert heavy.isdisjoint(loaded)


def test_public_names_bring_no_optional_package() -> None:
    code = """
import json, sys
import unsee
for name in unsee.__all__:
    getattr(unsee, name)
print(json.dumps(sorted(sys.modules)))
"""
    loaded = set(json.loads(_fresh(code)))
    assert {"torch", "unsee.methods.unlearning"} <= loaded  # the names were really imported
    assert loaded.isdisjoint({"gradio", "ray", "matplotlib", "torchvision", "unsee.cli"})


def test_every_public_name_is_defined_where_it_says() -> None:
    assert set(unsee._HOMES) == set(unsee.__all__) - {"__version__"}
    for name, home in unsee._HOMES.items():
        value = getattr(unsee, name)
        assert value is getattr(importlib.import_module(f"unsee.{home}"), name)
        assert value.__module__ == f"unsee.{home}", f"{name} is re-exported by another module"
        assert value.__doc__
    assert set(unsee.__all__) <= set(dir(unsee))


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'unsee' has no attribute 'Indx'"):
        unsee.Indx  # noqa: B018


def test_version_and_command() -> None:
    assert metadata.version("unsee") == unsee.__version__
    (command,) = metadata.entry_points(group="console_scripts", name="unsee")
    assert command.load() is importlib.import_module("unsee.cli").main


def test_types_ship() -> None:
    assert (resources.files("unsee") / "py.typed").is_file()


def test_requirements_are_pinned_together() -> None:
    """Every requirement of pyproject.toml that `make` installs has one version in constraints."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["demo"], *extras["dev"], *extras["lora"]]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = [line.split("==")[0] for line in lines if line and not line.startswith("#")]
    assert len(pinned) == len(set(pinned))
    for requirement in wanted:
        name = requirement.split(">=")[0].split("[")[0]
        assert name in pinned, f"{name} is not in constraints.txt"
    assert "torch==2.13.0" in lines  # as in the Makefile, which installs it first


def test_wheel_holds_the_package(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation",
         "--wheel-dir", str(tmp_path), str(ROOT)],
        check=True, capture_output=True,
    )  # fmt: skip
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == f"unsee-{unsee.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    source = ROOT / "src"
    expected = {
        str(path.relative_to(source))
        for path in (source / "unsee").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert "unsee/py.typed" in expected
    assert expected <= names
    licences = {Path(name).name for name in names if "/licenses/" in name}
    assert licences == {"LICENSE", "NOTICE"}
    ours = ("unsee/", f"unsee-{unsee.__version__}.dist-info/")
    assert all(name.startswith(ours) for name in names)
