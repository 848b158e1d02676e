"""The data verbs on the command line: what they print, and a mistake in one line."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from tests.support.tiny_student import tiny_tokenizer
from tests.support.trees import random_tree

from cotree.base.rows import read_rows
from cotree.cli import main
from cotree.data.build import build, built_lines
from cotree.experiment.datasets import contaminated_questions, judge_of
from cotree.experiment.recipe import Build, load_recipe
from cotree.experiment.run import run as run_recipe
from cotree.experiment.run_folder import open_run
from cotree.search.store import StoredTree, TreeStore
from cotree.tasks import task

LAPTOP = Path(__file__).parents[2] / "recipes" / "laptop.yaml"


def run(monkeypatch: pytest.MonkeyPatch, *words: str | Path) -> int:
    monkeypatch.setattr(sys, "argv", ["cotree", *map(str, words)])
    with pytest.raises(SystemExit) as left:
        main()
    return int(left.value.code or 0)


def test_check_export_and_diagnose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trees = [random_tree(seed) for seed in range(6)]
    built = build(trees, tiny_tokenizer(), Build(), tmp_path / "data", seed=0)
    n = built.counts["dpo_pairs"]
    assert f"{n} DPO pairs (arithmetic {n})" in built_lines(built.counts)[0]
    with TreeStore(tmp_path / "trees.db") as store:
        for tree in trees:
            store.put(tree)
    rows = tmp_path / "data" / "dpo" / "train.parquet"
    assert run(monkeypatch, "build", "--check", rows) == 0
    assert capsys.readouterr().out == f"{rows}: {len(list(read_rows(rows)))} faultless dpo rows\n"
    assert run(monkeypatch, "export", tmp_path / "data", "--to", "axolotl", "-o", tmp_path / "axolotl") == 0
    assert str(tmp_path / "axolotl" / "dpo.yml") in capsys.readouterr().out
    assert run(monkeypatch, "export", tmp_path / "trees.db", "--to", "trees", "-o", tmp_path / "trees.parquet") == 0
    assert capsys.readouterr().out == f"{tmp_path / 'trees.parquet'}: 6 trees\n"
    assert run(monkeypatch, "diagnose", rows, "--field", "rejected") == 0
    assert "arithmetic" in capsys.readouterr().out


def test_build_on_a_finished_run_tells_its_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = load_recipe(LAPTOP)
    built = build([random_tree(seed) for seed in range(6)], tiny_tokenizer(), Build(), tmp_path / "data", seed=0)
    with open_run(tmp_path / "runs", recipe) as folder:
        for stage, result in (("search", {}), ("build", {"counts": built.counts}), ("report", {})):
            with folder.stage(stage) as kept:
                kept.update(result)
    run_recipe(recipe, tmp_path / "runs", only="build")
    said = capsys.readouterr().out.splitlines()
    assert said[0].endswith("all done (build)")
    assert [line.strip() for line in said[1:]] == built_lines(built.counts)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["build"], "name a recipe, or a file with --check"),
        (["build", LAPTOP, "--out", "x"], "no finished search"),
        (["build", "--check", "nowhere.parquet"], "no file at nowhere.parquet"),
        (["build", LAPTOP, "build.sft.select=best"], "`build.sft.select`: must be 'length' or 'value'"),
        (["preview", LAPTOP], "run `cotree build` first"),
        (["preview", LAPTOP, "--kind", "dpo"], "no rows at"),
        (["preview", LAPTOP, "--data", "other"], "no rows at other/sft/train.parquet"),
        (
            ["preview", LAPTOP, "--kind", "speech"],
            "unknown kind `speech`; known: sft, control, dpo, step_pairs, stepwise",
        ),
        (["export", "x", "--to", "csv", "-o", "y"], "unknown form `csv`"),
        (["export", "x.db", "--to", "trees", "-o", "y"], "no store at x.db"),
        (["export", "x.db", "--to", "jsonl", "-o", "y"], "export it with --to trees"),
        (["import", "x.jsonl", "--student", "nobody", "-o", "y"], "unknown embedded model `nobody`"),
        (["diagnose", "x.jsonl"], "no file at x.jsonl"),
    ],
)
def test_a_mistake_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, *words) == 2
    said = capsys.readouterr().err
    assert message in said and said.startswith("cotree: ") and said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_the_laptop_recipe_judges_its_trees_again_and_repeats_no_held_out_question() -> None:
    recipe = load_recipe(LAPTOP)
    assert contaminated_questions(recipe) == set()
    question = task("letters").questions("train", 1)[0]
    tree = StoredTree("x", "letters", question.id, 0, "c", "count", list(question.messages), question.gold, "plain", 1,
                      "rollouts", 1, 1, 0, 1, [])  # fmt: skip
    assert judge_of(recipe)(tree, f"\\boxed{{{question.gold}}}").kind == "correct"
    assert judge_of(recipe)(tree, "\\boxed{9}").kind == "wrong"


def test_trees_of_a_held_out_question_give_no_rows(tmp_path: Path) -> None:
    kinds = [random_tree(seed, name=f"q{seed}") for seed in (3, 5, 9)]
    everything = build(kinds, tiny_tokenizer(), Build(), tmp_path / "all", seed=0).counts
    held = {("arithmetic", "q3")}
    left = build(kinds, tiny_tokenizer(), Build(), tmp_path / "left", seed=0, contaminated=held).counts
    assert left["removed"]["contaminated"] == everything["chains"] - left["chains"] > 0
    assert "q3" not in {row["question_id"] for row in read_rows(tmp_path / "left" / "sft" / "train.parquet")}


def test_templates_are_no_repetition_and_own_tasks_are_known_by_their_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COTREE_DATA", str(tmp_path))
    rows = [{"id": f"b-{i}", "init": ["ontable a", "ontable b"], "goal": [goal], "ground_truth_plan": ["(pick-up a)"]}
            for i, goal in enumerate(("on a b", "on b a"))]  # fmt: skip
    (tmp_path / "blocksworld.jsonl").write_text("\n".join(map(json.dumps, rows)))
    # Every plan is asked for in the same three hundred words.
    blocks = load_recipe(LAPTOP, ["tasks={train: {blocksworld: 20}, dev: {blocksworld: 5}, eval: {blocksworld: 2}}"])
    assert contaminated_questions(blocks) == set()
    same = [{"question": "Is seven times six forty-two?", "answer": "yes"}] * 30
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, same)))
    own = tmp_path / "own.yaml"
    own.write_text("name: mine\ndata: rows.jsonl\nprompt: '{question}'\nverifier: text\n")
    recipe = load_recipe(LAPTOP, [f"tasks={{train: {{{own}: 1}}, dev: {{{own}: 1}}, eval: {{{own}: 1}}}}"])
    assert {name for name, _ in contaminated_questions(recipe)} == {"mine"}
