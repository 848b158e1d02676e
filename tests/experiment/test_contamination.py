"""Which training questions repeat an evaluation question, and who judges a chain of a tree again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tests.support.trees import tree_of

from cotree.base.progress import Output
from cotree.base.run_folder import RunFolder
from cotree.experiment.fingerprints import Fingerprints
from cotree.experiment.recipe import Recipe, load_recipe
from cotree.experiment.work import Worker
from cotree.tasks import task
from cotree.tasks.plan_text import zero_shot
from cotree.tasks.strips import Problem

LAPTOP = Path(__file__).parents[2] / "recipes" / "laptop.yaml"


def contaminated(recipe: Recipe) -> set[tuple[str, str]]:
    return Fingerprints(recipe).contaminated(recipe.nodes["datasets/sft"])


def with_questions(train: str, test: str) -> list[str]:
    return [f"trees.train.questions={train}", f"evaluations.test.questions={test}"]


def test_the_laptop_recipe_judges_its_trees_again_and_repeats_no_held_out_question(tmp_path: Path) -> None:
    recipe = load_recipe(LAPTOP)
    assert contaminated(recipe) == set()
    question = task("letters").questions("train", 1)[0]
    tree = replace(tree_of("x", [], "letters"), question_id=question.id, messages=list(question.messages),
                   gold=question.gold)  # fmt: skip
    worker = Worker(recipe, RunFolder(tmp_path), Fingerprints(recipe), Output(quiet=True))
    judge = worker._judge([recipe.nodes["trees/train"]])
    assert judge(tree, f"\\boxed{{{question.gold}}}").kind == "correct"
    assert judge(tree, "\\boxed{9}").kind == "wrong"


def test_templates_are_no_repetition_and_own_tasks_are_known_by_their_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COTREE_DATA", str(tmp_path))
    rows = [
        {"id": f"b-{i}", "query": zero_shot(Problem({"a": "", "b": ""}, goal)), "ground_truth_plan": ["(pick-up a)"]}
        for i, goal in enumerate(({"a": "b"}, {"b": "a"}))
    ]
    (tmp_path / "blocksworld.jsonl").write_text("\n".join(map(json.dumps, rows)))
    # Every plan is asked for in the same three hundred words.
    assert contaminated(load_recipe(LAPTOP, with_questions("{blocksworld: 20}", "{blocksworld: 2}"))) == set()
    same = [{"question": "Is seven times six forty-two?", "answer": "yes"}] * 30
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, same)))
    own = tmp_path / "own.yaml"
    own.write_text("name: mine\ndata: rows.jsonl\nprompt: '{question}'\nverifier: text\n")
    recipe = load_recipe(LAPTOP, with_questions(f"{{{own}: 1}}", f"{{{own}: 1}}"))
    assert {name for name, _ in contaminated(recipe)} == {"mine"}
