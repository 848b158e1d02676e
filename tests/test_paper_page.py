"""The paper's tables in miniature: their recipes, the chains that are written by rule, and docs/results.md."""

from __future__ import annotations

import itertools
import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from benchmarks.paper import OUT, RECIPES
from benchmarks.paper_chains import doubting_chain, gsm8k_solutions, steps_of
from benchmarks.paper_figures import figures
from benchmarks.paper_page import Results, render_page, write_page
from tests.support.benchmark_data import benchmark_rows

import cotree
from cotree.base.atomic import content_sha256
from cotree.base.statistics import minimum_detectable_difference, wilson_interval
from cotree.experiment.recipe import Recipe, load_recipe
from cotree.tasks import task

TIERS = ("small", "real")
TABLES = ("step", "alpha", "length", "sources", "rounds")
STEPS = ["dpo", "balanced", "cdpo", "joint", "masked"]


def settings(recipe: Recipe, name: str) -> dict[str, Any]:
    found = next(node.settings for node in recipe.of_kind("students") if node.entry == name)
    training: dict[str, Any] = found.training.model_dump()
    return training | {"parent": found.parent, "method": found.method, "data": found.data}


@pytest.mark.parametrize("tier", TIERS)
def test_each_step_adds_one_remedy(tier: str) -> None:
    recipe = load_recipe(RECIPES / f"{tier}.yaml")
    arms = [settings(recipe, name) for name in STEPS]
    changed = [{key for key in new if new[key] != old[key]} for old, new in pairwise(arms)]
    assert changed == [{"data"}, {"label_smoothing"}, {"alpha"}, {"mask_prefix"}]
    assert (arms[0]["data"], arms[0]["label_smoothing"], arms[0]["alpha"]) == ("pairs_longest", 0, 0)
    of_alpha = {node.settings.training.alpha for node in recipe.of_kind("students") if node.entry == "alpha"}
    assert of_alpha | {arms[2]["alpha"], arms[3]["alpha"]} == {0, 0.5, 1, 1.5, 2}
    questions = recipe.nodes["evaluations/step"].settings.questions
    assert all(
        node.settings.questions == questions for node in recipe.of_kind("evaluations") if "testk" not in node.name
    )


def test_the_length_table_and_the_grid_are_whole() -> None:
    recipe = load_recipe(RECIPES / "small.yaml")
    asked = {name.partition(",seed")[0] for name in recipe.nodes["evaluations/length"].settings.models}
    arms = [
        recipe.nodes[f"students/{name},seed=0" if "," in name or "=" in name else f"students/{name}"].settings
        for name in asked
        if "@data" in name
    ]
    arms.append(recipe.nodes["students/masked@seed=0"].settings)
    lengths = {"sft@seed=0": "longest", "sft_medium@seed=0": "medium", "sft_shortest@seed=0": "shortest"}
    combinations = {(lengths[arm.parent], arm.data.removeprefix("pairs_")) for arm in arms}
    assert combinations == {(one, two) for one in lengths.values() for two in lengths.values()}
    for entry in ("grid_plain", "grid_remedy"):
        found = [node.settings for node in recipe.of_kind("students") if node.entry == entry]
        values = {(arm.training.beta, arm.training.learning_rate, arm.training.epochs, arm.data) for arm in found}
        assert len(values) == 16 and all(len(set(column)) == 2 for column in zip(*values, strict=True))
        assert {arm.training.probe for arm in found} == {None}


@pytest.mark.parametrize("name", ["arithmetic", "letters"])
def test_chains_written_by_rule_are_right_and_full_of_doubts(name: str) -> None:
    asked = task(name)
    for question in asked.questions("train", 24):
        chain = doubting_chain(steps_of(question), question.gold, question.id)
        assert asked.judge(question, chain).kind == "correct"
        assert chain == doubting_chain(steps_of(question), question.gold, question.id)
        found = cotree.diagnose(chain)
        assert found.evidence.reflection_markers >= 1 and not found.loop


def test_solutions_of_gsm8k_are_lengthened_by_rule() -> None:
    benchmark_rows("gsm8k_train_500.jsonl")
    asked, solutions = task("gsm8k"), gsm8k_solutions()
    for question in asked.questions("train", 8):
        steps = solutions[question.id]
        chain = doubting_chain(steps, question.gold, question.id)
        assert "<<" not in chain and all(step in chain for step in steps)
        assert asked.judge(question, chain).kind == "correct"


def test_blocks_has_the_problems_of_three_blocks_alone() -> None:
    benchmark_rows("blocksworld.jsonl.gz")
    found = task(f"{RECIPES / 'blocks.py'}:ThreeBlocks").questions("test", 20)
    assert {question.family for question in found} == {"3 blocks"} and len(found) == 20


def row(model: str, correct: int, none: int, seed: int | None = 0, n: int = 100) -> dict[str, Any]:
    low, high = wilson_interval(correct, n)
    shares = dict.fromkeys(("no_answer", "loop", "instruction_failure"), none / n) | {"over_reflection": 0.0}
    return {
        "tier": "small", "evaluation": "step", "model": model, "seed": seed, "task": "arithmetic", "n": n,
        "accuracy": correct / n, "low": low, "high": high, "mean_tokens": 40.0, "test_at": {}, **shares,
        "fingerprint": f"{model}{seed}", "date": "2026-11-30", "seconds": 60.0, "git": "0123abc",
        "machine": {"cpu": "AMD EPYC", "cores": 2, "memory_gb": 23.5},
    }  # fmt: skip


@pytest.fixture
def step(tmp_path: Path) -> Path:
    """A table's file with invented numbers."""
    curve = [[1, 30.0, 0.0, 0.0], [7, 90.0, 0.5, 0.75]]
    student = {"tier": "small", "model": "dpo", "seed": 0, "curve": curve, "fingerprint": "x", "seconds": 100.0}
    rows = [row("sft", 50, 0), row("sft", 60, 0, seed=1), row("dpo", 20, 40), row("balanced", 45, 5)]
    path = tmp_path / "results" / "step.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"rows": rows, "students": [student], "datasets": [], "trees": []}), encoding="utf-8")
    return path


def test_the_page_has_the_numbers_of_its_files_and_claims_no_more_than_they_show(step: Path) -> None:
    distance = {"computed": "packed", "precision": "fp32", "gradient": 0.0, "margin": 1e-6}
    masking = {
        "date": "2026-11-30",
        "machine": {"cpu": "AMD EPYC", "cores": 1},
        "pairs": 8,
        "run": "pairs",
        "model": "sft",
    }
    masking |= {"shared": 0.5, "distances": [distance], "bf16_to_fp32": 0.04}
    (step.parent / "masking.json").write_text(json.dumps(masking), encoding="utf-8")
    page = write_page(step.parent).read_text(encoding="utf-8")
    assert "| packed | fp32 | 0.0e+00 | 1.0e-06 |" in page
    assert "| `sft` | arithmetic | 55.0 ± 7.1 | 0.0 | 0.0 | 0.0 | 0.0 | 40.0 | 2 × 100 |" in page
    assert "| `dpo` | arithmetic | 20.0 (13.3–28.9) | 40.0 | 40.0 | 0.0 | 40.0 | 40.0 | 100 |" in page
    assert (
        "2026-11-30, 2 cores of an AMD EPYC, seeds 0, 1, commit 0123abc; 5 min 40 s with all that it rests on" in page
    )
    found, least = Results(step), minimum_detectable_difference(100, 0.55)
    assert least is not None and 0.1 < least < 0.35
    assert f"Least difference that two rows can show, one seed each: arithmetic {100 * least:.1f} points" in page
    assert found.beside("small", "dpo", "sft") == "arithmetic 55.0 → 20.0%"
    assert found.beside("small", "balanced", "sft") == "arithmetic 55.0 → 45.0% (not shown)"
    assert "`sft` → `dpo`, no answer, small tier: arithmetic 0.0 → 40.0%<br>`sft` → `dpo`, accuracy" in page
    assert found.beside("small", "masked", "sft") == "not measured yet"
    assert "Not measured yet:\nalpha, length, sources, testk, rounds, losses, brevity, mixed, models, grid;" in page
    assert "## Step by step" in page and "## Alpha" not in page and "Alpha 1 is best" not in page
    for name in re.findall(r"\(results/([\w-]+\.(?:svg|json))\)", page):
        assert (step.parent / name).is_file(), name


def test_the_page_of_the_repository_is_that_of_its_numbers() -> None:
    page = OUT.with_suffix(".md")
    files = sorted(OUT.glob("*.json"))
    assert page.is_file() == bool(files), "python -m benchmarks.paper --page writes it"
    if files:
        assert page.read_text(encoding="utf-8") == render_page(OUT), "python -m benchmarks.paper --page writes it anew"
    for path in files:
        for name in figures(path):
            assert content_sha256(path) in (OUT / name).read_text(encoding="utf-8"), f"{name} is of other numbers"
    assert {path.name for path in OUT.glob("*.svg")} == {name for path in files for name in figures(path)}


def test_what_the_page_says_in_words_is_true_of_its_numbers() -> None:
    """The paragraphs `What it shows` of the small tier."""
    step, alpha, length, sources, rounds = (Results(OUT / f"{name}.json") for name in TABLES)

    def mean(table: Results, model: str, name: str, key: str = "accuracy") -> float:
        arm = table.arm("small", model, name)
        found = None if arm is None else arm.mean(key)
        assert found is not None
        return found

    def shown(table: Results, model: str, other: str, name: str) -> bool:
        words = table.beside("small", model, other).split(", ")
        return not next(each for each in words if each.startswith(name)).endswith("(not shown)")

    for name in ("arithmetic", "letters"):
        longer = mean(step, "dpo", name, "mean_tokens") / mean(step, "sft", name, "mean_tokens")
        assert 1.8 < longer < 3
        assert mean(step, "joint", name, "no_answer") == 0
        assert mean(step, "joint", name) >= mean(step, "sft", name) or not shown(step, "joint", "sft", name)
        assert mean(step, "joint", name, "mean_tokens") < 1.1 * mean(step, "sft", name, "mean_tokens")
        assert not shown(step, "masked", "joint", name)
        for one, other in pairwise(["alpha@alpha=0.5", "joint", "alpha@alpha=1.5", "alpha@alpha=2.0"]):
            assert not shown(alpha, one, other, name)
        assert mean(rounds, "twice", name) > mean(rounds, "sft", name)
        assert not shown(rounds, "two_rounds", "twice", name)
        for model in ("doubts", "sky_t1"):
            longer = mean(sources, model, name, "mean_tokens") / mean(sources, "sft", name, "mean_tokens")
            assert 1.8 < longer < 5
            assert mean(sources, model, name, "no_answer") > mean(sources, "sft", name, "no_answer")
    for model in ("dpo", "balanced", "cdpo"):
        assert mean(step, model, "arithmetic") < mean(step, "sft", "arithmetic") / 2
    for model in ("alpha@alpha=0.5", "joint", "alpha@alpha=1.5", "alpha@alpha=2.0"):
        assert mean(alpha, model, "arithmetic") > 2 * mean(alpha, "cdpo", "arithmetic")
        assert shown(alpha, model, "cdpo", "arithmetic")
    assert shown(rounds, "twice", "sft", "letters")
    for table in (sources, Results(OUT / "earlier" / "sources.json")):
        assert all(mean(table, "sampled", name) > mean(table, "sft", name) for name in table.tasks("small"))
    combinations = [arm for arm in length.arms("small") if arm.model == "masked" or "_then@" in arm.model]
    assert len(combinations) == 2 * 9
    for arm, another in itertools.permutations(combinations, 2):
        assert arm.task != another.task or not shown(length, arm.model, another.model, arm.task)
    tokens = [arm.mean("mean_tokens") or 0.0 for arm in combinations]
    assert max(tokens) < 1.25 * min(tokens)
    rows = {row["model"]: row["rows"] for row in sources.students}
    assert rows["sampled"] > rows["sft"]
