"""The command that runs the paper's tables arm by arm (`benchmarks.paper`), on a run that trains a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from benchmarks.paper import KEYS, add_to_table, arms, run_tables
from tests.experiment.conftest import Done

from cotree.base.errors import UsageError
from cotree.experiment.opened import open_run
from cotree.experiment.recipe import load_recipe


def tables(path: Path) -> dict[str, Any]:
    return {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in path.glob("*.json")}


@pytest.fixture
def recipe(done: Done, tmp_path: Path) -> Path:
    """The recipe of the finished run as a file."""
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(done[0]), encoding="utf-8")
    return path


def test_a_table_has_the_numbers_of_its_run_and_of_all_behind_them(recipe: Path, tmp_path: Path) -> None:
    assert run_tables(recipe, ["test"], runs_dir=tmp_path / "runs", out=tmp_path / "out") == []
    (table,) = tables(tmp_path / "out").values()
    measured = open_run(tmp_path / "runs" / "steps").table()
    assert [row["model"] for row in table["rows"]] == ["sft", "joint", "masked"]
    for row, found in zip(table["rows"], measured, strict=True):
        assert {key: row[key] for key in row.keys() & found.keys() - {"seed"}} == {
            key: found[key] for key in row.keys() & found.keys() - {"seed"}
        }
        assert (row["tier"], row["evaluation"], row["seed"], row["machine"]["cores"] > 0) == ("tiny", "test", 0, True)
        assert row["instruction_failure"] >= row["no_answer"] >= row["over_reflection"] >= 0
    assert {row["model"] for row in table["students"]} == {"sft", "joint", "masked"}
    assert {row["name"] for row in table["trees"]} == {"train"}
    assert {row["name"] for row in table["datasets"]} == {"longest", "pairs"}


def test_a_table_that_was_stopped_and_completed_is_that_of_one_go(recipe: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    run_tables(recipe, ["test"], ["evaluations.test.models=[sft]"], runs_dir=runs, out=tmp_path / "parts")
    assert [row["model"] for row in tables(tmp_path / "parts")["test"]["rows"]] == ["sft"]
    run_tables(recipe, ["test"], runs_dir=runs, out=tmp_path / "parts")
    run_tables(recipe, ["test"], runs_dir=runs, out=tmp_path / "whole")
    assert tables(tmp_path / "parts") == tables(tmp_path / "whole")


def test_an_arm_that_cannot_begin_is_named_and_the_others_are_run(recipe: Path, tmp_path: Path) -> None:
    overrides = [
        "datasets.distant={file: nowhere.jsonl, rows: sft}",
        "students.distant={like: sft, data: distant}",
        "evaluations.test.models=[distant, sft]",
    ]
    (line,) = run_tables(recipe, ["test"], overrides, runs_dir=tmp_path / "runs", out=tmp_path / "out")
    assert line.startswith("test/distant: ") and "nowhere.jsonl" in line
    assert [row["model"] for row in tables(tmp_path / "out")["test"]["rows"]] == ["sft"]
    with pytest.raises(UsageError, match=r"no table `tets` in steps; did you mean `test`\?"):
        run_tables(recipe, ["tets"], runs_dir=tmp_path / "runs", out=tmp_path / "out")


def test_an_evaluation_whose_tokens_another_one_spends_is_run_arm_by_arm_too(recipe: Path, tmp_path: Path) -> None:
    overrides = ["evaluations.test_vote={like: test, models: [joint], strategy: vote, temperature: 1, tokens_of: test}"]
    assert run_tables(recipe, ["test"], overrides, runs_dir=tmp_path / "runs", out=tmp_path / "out") == []
    rows = [(row["evaluation"], row["model"]) for row in tables(tmp_path / "out")["test"]["rows"]]
    assert rows == [("test", "sft"), ("test", "joint"), ("test", "masked"), ("test_vote", "joint")]


def test_arms_are_run_seed_after_seed(recipe: Path) -> None:
    seeded = load_recipe(recipe, ["students.sft.seeds=[0, 1]", "evaluations.test.models=[tiny, sft, joint]"])
    assert arms(seeded, "test") == ["tiny", "sft@seed=0", "joint@seed=0", "sft@seed=1", "joint@seed=1"]


def test_a_new_entry_takes_the_place_of_the_one_with_its_names_alone(tmp_path: Path) -> None:
    one, two = ({"tier": "small", "name": name, "counts": {"trees": 1}} for name in ("train", "other"))
    add_to_table(tmp_path / "t.json", {"trees": [one, two]})
    add_to_table(tmp_path / "t.json", {"trees": [one | {"counts": {"trees": 2}}], "rows": []})
    assert tables(tmp_path)["t"] == {key: [] for key in KEYS} | {"trees": [one | {"counts": {"trees": 2}}, two]}
