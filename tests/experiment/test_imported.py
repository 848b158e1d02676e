"""Rollouts of others as a trees node: a run like any other, whose datasets and fingerprints follow the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.data.test_rollouts import ASKED, RIGHT, WRONG, write

from cotree.base.errors import UsageError
from cotree.base.progress import Output
from cotree.base.rows import read_rows
from cotree.base.run_folder import RunFolder
from cotree.experiment.fingerprints import Fingerprints
from cotree.experiment.imported import import_as
from cotree.experiment.plan import plan
from cotree.experiment.recipe import build_recipe, load_recipe
from cotree.experiment.run import run
from cotree.search.index import TreeIndex, TreeQuery
from cotree.search.store import TreeStore


def rows(*asked: int) -> list[dict[str, Any]]:
    """Questions of several lengths of answers, each with two right and two wrong rollouts."""
    found = []
    for n in asked:
        prompt, texts = (
            f"{n}. {ASKED['content']}",
            [RIGHT, WRONG, f"{n} more words.\n\n{RIGHT}", f"Or {n} is it.\n\n{WRONG}"],
        )
        found.append({"prompt": prompt, "completions": texts, "rewards": [1, 0, 1, 0.5], "answer": 5})
    return found


@pytest.fixture
def recipe(tmp_path: Path, student: Path) -> dict[str, Any]:
    write(tmp_path / "theirs.jsonl", *rows(0, 1, 2))
    entry = {"file": str(tmp_path / "theirs.jsonl"), "tokenizer": "tiny"}
    return {
        "name": "theirs",
        "models": {"tiny": {"weights": str(student)}},
        "trees": {"theirs": entry},
        "datasets": {
            "chains": {"trees": "theirs", "rows": "sft", "annotations": "use_fixed"},
            "pairs": {"trees": "theirs", "rows": "dpo"},
        },
    }


def states(written: dict[str, Any], runs: Path) -> dict[str, str]:
    return {each.name: each.state for each in plan(build_recipe(written), runs)}


def test_a_file_of_rollouts_is_a_node_of_a_run(recipe: dict[str, Any], tmp_path: Path) -> None:
    runs, quiet = tmp_path / "runs", Output(quiet=True)
    folder = run(build_recipe(recipe), runs, output=quiet)
    assert set(states(recipe, runs).values()) == {"done"}
    pairs = list(read_rows(folder.path / "datasets/pairs/train.parquet"))
    assert len(pairs) == 3 and all(row["prefix_tokens"] >= 0 for row in pairs)
    sides = [(row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in pairs]
    assert all("{5}" in chosen and "{6}" in rejected for chosen, rejected in sides)
    record = folder.nodes()["trees/theirs"]
    assert record.result["counts"]["trees"] == 3 and record.result["counts"]["answers"] == 12
    store_path = folder.node("trees/theirs").path / "trees.db"
    with TreeStore(store_path, reading=True) as store, TreeIndex(store) as index:
        assert index.list(record.base, TreeQuery(words="more words"))[0] == 3 and index.fill() == 0
        before = {tree.question_id: tree for tree in store.trees(record.base)}

    write(Path(recipe["trees"]["theirs"]["file"]), *rows(0, 1, 2, 3))
    changed = dict.fromkeys(("datasets/chains", "datasets/pairs"), "changed")
    assert states(recipe, runs) == {"trees/theirs": "partial", **changed}
    run(build_recipe(recipe), runs, output=quiet)
    with TreeStore(store_path, reading=True) as store:
        after = {tree.question_id: tree for tree in store.trees(record.base)}
    assert len(after) == 4 and {key: after[key] for key in before} == before

    recipe["trees"]["theirs"]["correct_at"] = 0.5
    assert states(recipe, runs)["trees/theirs"] == "changed"
    run(build_recipe(recipe), runs, output=quiet)
    assert RunFolder(runs / "theirs").nodes()["trees/theirs"].result["counts"]["correct"] == 12


def test_what_decides_its_trees_is_in_the_fingerprint(recipe: dict[str, Any], tmp_path: Path) -> None:
    before = Fingerprints(build_recipe(recipe)).of("trees/theirs")
    entry = recipe["trees"]["theirs"]
    for change in ({"task": "arithmetic"}, {"correct_at": 0.5}):
        found = Fingerprints(build_recipe({**recipe, "trees": {"theirs": entry | change}})).of("trees/theirs")
        assert found.base != before.base, change
    (tmp_path / "moved.jsonl").write_bytes((tmp_path / "theirs.jsonl").read_bytes())
    moved = build_recipe({**recipe, "trees": {"theirs": entry | {"file": str(tmp_path / "moved.jsonl")}}})
    assert Fingerprints(moved).of("trees/theirs").base == before.base


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rollouts": 3}, "`rollouts` is of a search"),
        ({"questions": {"letters": 1}}, "`questions` is of a search"),
        ({"tokenizer": None}, "needs `tokenizer`"),
        ({"file": None}, "`thinker` is missing"),
        ({"tokenizer": "absent"}, "absent"),
    ],
)
def test_settings_that_do_not_fit_are_refused(recipe: dict[str, Any], change: dict[str, Any], words: str) -> None:
    entry = {key: value for key, value in (recipe["trees"]["theirs"] | change).items() if value is not None}
    with pytest.raises(UsageError, match=words):
        build_recipe({**recipe, "trees": {"theirs": entry}})


def test_the_verb_makes_a_run_whose_recipe_loads(recipe: dict[str, Any], tmp_path: Path, student: Path) -> None:
    file, out = Path(recipe["trees"]["theirs"]["file"]), tmp_path / "here" / "mine"
    (line,) = import_as("trees", file, str(student), out, task="arithmetic")
    assert f"cotree view {out}" in line
    loaded = load_recipe(out)
    assert loaded.nodes["trees/imported"].settings.task == "arithmetic"
    assert {each.state for each in plan(loaded)} == {"done"}
    with pytest.raises(UsageError, match="are for rows"):
        import_as("trees", file, str(student), replace_name(out), max_tokens=5)
    with pytest.raises(UsageError, match="no file at"):
        import_as("trees", tmp_path / "absent", str(student), replace_name(out))
    assert not replace_name(out).exists()


def replace_name(path: Path) -> Path:
    return path.with_name("another")
