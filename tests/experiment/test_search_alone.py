"""Trees on servers alone need no training library and no engine, and everything else asks for what it needs."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import yaml
from tests.support.experiment import KeptOutput
from tests.support.fake_server import FakeServerThread

from cotree.base.errors import UsageError
from cotree.experiment.recipe import build_recipe, load_recipe
from cotree.experiment.run import run

LAPTOP = Path(__file__).parents[2] / "recipes" / "laptop.yaml"
# Importing any of these fails, as where they are not installed.
ABSENT = """
import sys
sys.modules.update(dict.fromkeys(["torch", "accelerate", "peft", "xllamacpp", "safetensors", "gguf"]))
from cotree.cli import main
main()
"""


def test_a_recipe_of_trees_needs_neither_torch_nor_an_engine(tmp_path: Path) -> None:
    with FakeServerThread(chat_only=True) as server:
        models = {"far": {"url": server.url, "model": "fake", "mode": "chat"}}
        trees = {"train": {"questions": {"letters": 2}, "roles": {"thinker": "far"}, "rollouts": 2}}
        trees["sampled"] = {"like": "train", "method": "sampling", "tokens_of": "train", "questions": {"letters": 1}}
        evaluations = {"test": {"models": ["far"], "questions": {"letters": 2}, "max_tokens": 8}}
        recipe = {"name": "alone", "models": models, "trees": trees, "evaluations": evaluations}
        (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
        for verb in ("plan", "run", "run"):
            command = [sys.executable, "-c", ABSENT, verb, "r.yaml"]
            done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
            assert (done.returncode, done.stderr) == (0, ""), done.stderr
        calls = server.calls
        for words in (
            ["report", "runs/alone"],
            ["report", "runs/alone", "-o", "page.html"],
            ["show", "runs/alone"],
            ["table", "runs/alone"],
            ["clean", "runs/alone"],
        ):
            command = [sys.executable, "-c", ABSENT, *words]
            done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
            assert (done.returncode, done.stderr) == (0, ""), done.stderr
        assert server.calls == calls
    assert (tmp_path / "runs" / "alone" / "trees" / "sampled" / "trees.db").is_file()
    assert "<html" in (tmp_path / "runs" / "alone" / "report.html").read_text()
    assert (tmp_path / "page.html").read_text() == (tmp_path / "runs" / "alone" / "report.html").read_text()
    compared = json.loads((tmp_path / "runs" / "alone" / "trees" / "sampled" / "node.json").read_text())["result"]
    assert [row["questions"] for row in compared["compared"]] == [1, 1], "on the questions that both have"


def test_only_trees_of_a_larger_recipe_need_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec

    def missing(name: str, package: str | None = None) -> ModuleSpec | None:
        return None if name in ("torch", "accelerate", "xllamacpp") else find(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", missing)
    with FakeServerThread(chat_only=True) as server:
        far = f"models.far={{url: '{server.url}', model: fake, mode: chat}}"
        roles = ["trees.train.roles={thinker: far}", "trees.train.questions={letters: 2}"]
        roles += ["trees.sampled.questions={letters: 2}"]
        recipe = load_recipe(LAPTOP, [far, *roles])
        folder = run(recipe, tmp_path, only=["trees"], output=KeptOutput())
        assert sorted(folder.nodes()) == ["trees/sampled", "trees/train"]
        assert server.calls > 0
    with pytest.raises(UsageError, match=r"torch is not installed; pip install 'cotree\[train\]'"):
        run(recipe, tmp_path, only=["students"], output=KeptOutput())
    with pytest.raises(UsageError, match=r"xllamacpp is not installed; pip install 'cotree\[local\]'"):
        run(recipe, tmp_path, output=KeptOutput())


def test_tokens_of_with_more_questions_is_refused_before_anything_is_asked(tmp_path: Path) -> None:
    with FakeServerThread(chat_only=True) as server:
        models = {"far": {"url": server.url, "model": "fake", "mode": "chat"}}
        trees = {"train": {"questions": {"letters": 1}, "roles": {"thinker": "far"}, "rollouts": 2}}
        trees["sampled"] = {"like": "train", "method": "sampling", "tokens_of": "train", "questions": {"letters": 3}}
        recipe = build_recipe({"name": "more", "models": models, "trees": trees})
        with pytest.raises(UsageError, match=r"trees.sampled.tokens_of: `train` lacks question .* \(2 are lacking\)"):
            run(recipe, tmp_path, output=KeptOutput())
        assert server.calls == 0
