"""What names the source that made a number."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from cotree.base import machine


def test_a_checkout_is_named_by_its_commit_and_dirty_only_where_its_package_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, table = tmp_path / "src" / "cotree" / "base" / "machine.py", tmp_path / "docs" / "step.json"
    for path in (module, table, tmp_path / "pyproject.toml"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("1\n")
    monkeypatch.setattr(machine, "__file__", str(module))

    def git(*words: str) -> str:
        owner = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        return subprocess.run(["git", *owner, *words], cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    assert "git" not in machine.versions(), "no repository"
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "All")
    commit = git("rev-parse", "--short", "HEAD").strip()
    assert machine.versions()["git"] == commit
    table.write_text("2\n")
    assert machine.versions()["git"] == commit, "a run's own numbers are no change of the source"
    module.write_text("2\n")
    assert machine.versions()["git"] == f"{commit}-dirty"
    (tmp_path / "pyproject.toml").unlink()
    assert "git" not in machine.versions(), "installed"
