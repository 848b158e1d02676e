"""The paper's four recipes: one experiment with four students, which passes `cotree check` against fakes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.support.benchmark_data import benchmark_rows
from tests.support.experiment import KeptOutput
from tests.support.fake_server import FakeServerThread, tell

from cotree.experiment.check import check
from cotree.experiment.recipe import load_recipe

RECIPES = sorted((Path(__file__).parents[2] / "recipes" / "paper").glob("*.yaml"))
STUDENTS = {
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B-Instruct",
    "llama-3.2-1b": "meta-llama/Llama-3.2-1B-Instruct",
    "qwen2.5-1.5b": "Qwen/Qwen2.5-1.5B-Instruct",
    "qwen2.5-7b": "Qwen/Qwen2.5-7B-Instruct",
}


def test_they_differ_in_the_student_only() -> None:
    found: list[dict[str, Any]] = [yaml.safe_load(path.read_text()) for path in RECIPES]
    assert {each.pop("name"): each["models"].pop("base")["weights"] for each in found} == STUDENTS
    assert all(each == found[0] for each in found)


def test_the_arms_of_every_table_are_there() -> None:
    recipe = load_recipe(RECIPES[0])
    changed = {}
    steps = ["dpo", "balanced", "cdpo", "joint", "masked"]
    for before, after in zip(["dpo", *steps], steps, strict=False):
        one, other = (recipe.nodes[f"students/{name}"].settings for name in (before, after))
        changed[after] = {
            *(key for key in ("parent", "method", "data") if getattr(one, key) != getattr(other, key)),
            *(
                key
                for key in type(one.training).model_fields
                if getattr(one.training, key) != getattr(other.training, key)
            ),
        }
    assert changed == {
        "dpo": set(), "balanced": {"data"}, "cdpo": {"label_smoothing"}, "joint": {"alpha"}, "masked": {"mask_prefix"},
    }  # fmt: skip
    arms = [node.settings for node in recipe.of_kind("students")]
    alphas = {
        arm.training.alpha
        for arm in arms
        if arm.method == "dpo" and not arm.training.mask_prefix and arm.data == "pairs_shortest"
    }
    assert alphas == {0, 0.5, 1.0, 1.5, 2.0}
    masked = {(arm.parent, arm.data) for arm in arms if arm.method == "dpo" and arm.training.mask_prefix}
    assert masked == {
        (sft, f"pairs_{length}")
        for sft in ("sft", "sft_medium", "sft_shortest")
        for length in ("longest", "medium", "shortest")
    }
    asked = {name for node in recipe.of_kind("evaluations") for name in node.settings.models}
    assert asked >= {node.name for node in recipe.of_kind("students")}


@pytest.mark.real
def test_check_passes_against_fakes(tokenizer: str, tmp_path: Path) -> None:
    """Only the servers, their tokenizer, the student and the numbers of questions and tokens are not the recipe's; the
    other recipes are this one with other weights."""
    for name in ("gsm8k_train_500.jsonl", "math500.jsonl", "blocksworld.jsonl.gz", "multi_if_en.jsonl.gz"):
        benchmark_rows(name)
    few = {"gsm8k": 2, "math500": 2, "aime24": 2, "aime25": 2, "blocksworld": 2, "multi_if": 2}
    with FakeServerThread(reply=tell) as server:
        overrides = [
            *(f"models.{role}.{key}={value}" for role in ("thinker", "reflector")
              for key, value in (("url", server.url), ("tokenizer", tokenizer))),
            "models.base.weights=smollm2-135m-instruct",
            *(f"evaluations.{name}.max_tokens=1024" for name in ("test", "length", "test_at_k")),
            "trees.train.questions={gsm8k: 4, math: 4}",
            *(f"evaluations.{name}.questions={few}" for name in ("test", "length", "test_at_k")),
        ]  # fmt: skip
        output = KeptOutput()
        check(load_recipe(RECIPES[0], overrides), output, tmp_path)
    assert [line for line in output.lines if not line.startswith("ok")] == []
