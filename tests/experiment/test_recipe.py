"""A recipe is checked before anything is spent, and errors name the fault and the fix."""

from __future__ import annotations

from pathlib import Path

import pytest

from cotree.base.errors import UsageError
from cotree.experiment.recipe import Recipe, load_recipe, recipe_hash, recipe_yaml

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.mark.parametrize("path", sorted(RECIPES.rglob("*.yaml")), ids=lambda p: p.name)
def test_shipped_recipes_load(path: Path) -> None:
    assert load_recipe(path).name == path.stem


def test_the_resolved_recipe_is_the_same_recipe(tmp_path: Path) -> None:
    recipe = load_recipe(RECIPES / "laptop.yaml", ["search.rollouts=3", "name=x"])
    assert recipe.search.rollouts == 3
    (tmp_path / "r.yaml").write_text(recipe_yaml(recipe))
    assert recipe_hash(load_recipe(tmp_path / "r.yaml")) == recipe_hash(recipe)
    assert recipe_hash(recipe) != recipe_hash(load_recipe(RECIPES / "laptop.yaml"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("search.rolouts=3", r"`search`: unknown key `rolouts`; did you mean `rollouts`\?"),
        ("models.smollm2.embeded=x", r"`models.smollm2`: unknown key `embeded`; did you mean `embedded`\?"),
        ("serch.rollouts=3", r"unknown key `serch`; did you mean `search`\?"),
        ("roles.thinker=smollm", r"roles: unknown model `smollm`; did you mean `smollm2`\?"),
        ("roles={}", "`thinker` is missing"),
        ("tasks.train.leters=3", r"unknown task `leters`; did you mean `letters`\?"),
        ("search.patterns=[plane]", r"unknown pattern `plane`; did you mean `plain`\?"),
        ("train.student=gpt", "unknown model `gpt`; known: smollm2; for another GGUF: models.mine.embedded="),
        ("search.rollouts=0", "`search.rollouts`: must be greater than or equal to 1$"),
        ("train.sft.micro_batch_size=2", "`train.sft`: unknown key `micro_batch_size`"),
        ("models.smollm2.url=http://x", "exactly one of `embedded`"),
        ("search.thoughts={answer: {prefixes: ['So:']}}", r"`So:` opens no box; end it with \\boxed\{"),
        ("name=a/b", "`name`: must match pattern"),
        ("{search: 3}", "is no override"),
        ("search=3", "`search`: must be a section of keys, like {}$"),
        ("search.rollouts=2.5", "`search.rollouts`: must be a whole number$"),
        ("search.baselines=maybe", "`search.baselines`: must be true or false$"),
        ("search.patterns=plain", "`search.patterns`: must be a list$"),
        ("tasks.train={}", "`tasks.train`: must have at least 1 item$"),
        ("eval.gguf=Q4", "`eval.gguf`: must be 'F32', 'F16' or 'Q8_0'$"),
        ("models.a={x: 1, y: 2}", "unknown key `x`; known: embedded, [a-z_, ]*$"),
        ("search.rollouts", "is no override"),
        ("name.x.y=1", "is a value, not a section"),
    ],
)
def test_faults_are_named(override: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_recipe(RECIPES / "laptop.yaml", [override])


def test_a_student_must_have_weights_here() -> None:
    raw = {
        "name": "a",
        "models": {"s": {"url": "http://127.0.0.1:1", "tokenizer": "t"}},
        "roles": {"thinker": "s"},
        "tasks": {"train": {"letters": 1}, "eval": {"letters": 1}},
        "train": {"student": "s"},
    }
    with pytest.raises(UsageError, match="`s` is a server"):
        Recipe.parse(raw, "x")


def test_a_folder_is_no_recipe_but_may_hold_one(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"is a folder; name a recipe$"):
        load_recipe(tmp_path)
    (tmp_path / "recipe.yaml").touch()
    with pytest.raises(UsageError, match=r"is a folder; name a recipe: its own is .*recipe\.yaml$"):
        load_recipe(tmp_path)


@pytest.mark.parametrize("text", ["{", "- a\n- b", "just words", "\x00"])
def test_files_that_are_no_recipe(tmp_path: Path, text: str) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(UsageError, match=r"r\.yaml"):
        load_recipe(tmp_path / "r.yaml")
