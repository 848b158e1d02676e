"""The data verbs on the command line: what they print, and a mistake in one line."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from tests.support.datasets import dataset_of
from tests.support.trees import random_tree

from cotree.base.rows import read_rows
from cotree.cli import main
from cotree.search.store import TreeStore


def run(monkeypatch: pytest.MonkeyPatch, *words: str | Path) -> int:
    monkeypatch.setattr(sys, "argv", ["cotree", *map(str, words)])
    with pytest.raises(SystemExit) as left:
        main()
    return int(left.value.code or 0)


def test_check_export_and_diagnose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trees = [random_tree(seed) for seed in range(6)]
    counts = dataset_of(trees, tmp_path / "run" / "datasets" / "pairs", "dpo")
    node = tmp_path / "run" / "trees" / "train"
    node.mkdir(parents=True)
    with TreeStore(node / "trees.db") as store:
        for tree in trees:
            store.put(tree)
    rows = tmp_path / "run" / "datasets" / "pairs" / "train.parquet"
    assert run(monkeypatch, "check-data", rows) == 0
    assert capsys.readouterr().out == f"{rows}: {counts.rows} faultless dpo rows\n"
    assert run(monkeypatch, "export", tmp_path / "run", "--to", "axolotl", "-o", tmp_path / "axolotl") == 0
    assert str(tmp_path / "axolotl" / "pairs.yml") in capsys.readouterr().out
    assert run(monkeypatch, "export", node, "--to", "trees", "-o", tmp_path / "trees.parquet") == 0
    assert capsys.readouterr().out == f"{tmp_path / 'trees.parquet'}: 6 trees\n"
    assert run(monkeypatch, "diagnose", rows, "--field", "rejected") == 0
    assert "arithmetic" in capsys.readouterr().out


def test_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": "How often?", "response": f"So \\boxed{{{n}}}", "gold": 2, "source": "x"} for n in (1, 2)]
    (tmp_path / "theirs.jsonl").write_text("\n".join(map(json.dumps, [*rows, {"words": "none"}])))
    out = tmp_path / "ours.parquet"
    student = ("--student", "smollm2-135m-instruct", "--task", "letters", "--held-out", "arithmetic")
    assert run(monkeypatch, "import", tmp_path / "theirs.jsonl", *student, "-o", out) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{out}: 1 sft rows (letters 1), 1 of them verified",
        "left out: wrong 1, malformed 1",
        "the first malformed row: row 2: no `conversations`, no `messages`, and no prompt with a response; "
        "it has words",
        "columns that are not kept, and how many rows have them: gold 2, source 2",
    ]
    assert [row["completion"][0]["content"] for row in read_rows(out)] == ["So \\boxed{2}"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["check-data", "nowhere.parquet"], "no file at nowhere.parquet"),
        (["export", "x", "--to", "csv", "-o", "y"], "unknown form `csv`"),
        (["export", "x.db", "--to", "trees", "-o", "y"], "no store at x.db"),
        (["export", "x.db", "--to", "jsonl", "-o", "y"], "export it with --to trees"),
        (["export", ".", "--to", "jsonl", "-o", "y"], "no datasets in .; give a run, a folder of datasets, or one"),
        (["import", "x.jsonl", "--student", "nobody", "-o", "y"], "nobody"),
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
