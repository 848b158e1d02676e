"""A search on servers alone: no training library, no engine, one stage of the run, by the public function."""

from __future__ import annotations

import importlib.util
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
from tests.support.fake_server import FakeServerThread

from cotree.base.errors import CotreeError, UsageError
from cotree.base.progress import Output
from cotree.experiment.recipe import load_recipe
from cotree.experiment.run import run

LAPTOP = Path(__file__).parents[2] / "recipes" / "laptop.yaml"


def test_a_search_on_servers_needs_no_training_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec

    def missing(name: str, package: str | None = None) -> ModuleSpec | None:
        return None if name in ("torch", "accelerate", "xllamacpp") else find(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", missing)
    with FakeServerThread(chat_only=True) as server:
        far = f"models.far={{url: '{server.url}', model: fake, mode: chat}}"
        recipe = load_recipe(LAPTOP, [far, "roles={thinker: far}", "tasks.train={letters: 2}"])
        folder = run(recipe, tmp_path, only="search", output=Output(quiet=True))
        assert (folder / "trees.db").is_file()
        assert server.calls > 0
    with pytest.raises(UsageError, match="xllamacpp is not installed"):
        run(recipe, tmp_path, output=Output(quiet=True))


def test_what_fails_side_by_side_is_one_error(tmp_path: Path) -> None:
    function = tmp_path / "reward.py"
    function.write_text("def twice(question, text, verdict):\n    return 2\n")
    with FakeServerThread(chat_only=True) as server:
        far = f"models.far={{url: '{server.url}', model: fake, mode: chat}}"
        reward = f"search.reward={{function: '{function}:twice'}}"
        recipe = load_recipe(LAPTOP, [far, "roles={thinker: far}", "tasks.train={letters: 4}", reward])
        with pytest.raises(CotreeError, match="a reward is in"):
            run(recipe, tmp_path / "runs", only="search", output=Output(quiet=True))
