"""A run as Python and `cotree preview` read it."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import yaml
from tests.experiment.conftest import Done

import cotree
from cotree.base.errors import UsageError
from cotree.cli import main


def test_a_run_gives_its_nodes_trees_rows_and_students(done: Done) -> None:
    _, runs = done
    run = cotree.open_run(runs / "steps")
    assert run.nodes["students/joint"].done and run.nodes["students/joint"].reads == ("students/sft", "datasets/pairs")
    assert set(run.cells) == {("test", "sft"), ("test", "joint"), ("test", "masked")}
    trees = list(run.trees("train"))
    assert len(trees) == 4 and len({(tree.task, tree.question_id) for tree in trees}) == 4
    assert {node.verdict for tree in trees for node in tree.nodes} == {None, "correct", "wrong"}
    rows = list(run.dataset("pairs"))
    assert len(rows) == run.nodes["datasets/pairs"].result["counts"]["rows"] and "chosen" in rows[0]
    assert (run.student("joint") / "model.safetensors").is_file()
    assert [(row["model"], row["task"]) for row in run.table()] == [
        (model, "letters") for model in ("sft", "joint", "masked")
    ]


def test_what_is_not_there_is_named_at_once(done: Done) -> None:
    _, runs = done
    run = cotree.open_run(str(runs / "steps"))
    for ask, message in (
        (lambda: run.trees("trian"), r"steps has no trees/trian; did you mean `trees/train`\?"),
        (lambda: run.dataset("pair"), r"has no datasets/pair; did you mean `datasets/pairs`\?"),
        (lambda: run.student("jiont"), r"has no students/jiont; did you mean `students/joint`\?"),
    ):
        with pytest.raises(UsageError, match=message):
            ask()
    (runs / "steps" / "trees" / "train" / "trees.db").unlink()
    shutil.rmtree(runs / "steps" / "students" / "sft" / "model")
    for ask in (lambda: run.trees("train"), lambda: run.student("sft")):
        with pytest.raises(
            UsageError, match=r"is not there \(yet\); `cotree run .*steps --only (trees/train|students/sft)`"
        ):
            ask()
    assert not (runs / "steps" / "trees" / "train" / "trees.db").exists(), "reading makes nothing"
    with pytest.raises(UsageError, match="is no run folder"):
        cotree.open_run(runs)


def test_a_dataset_is_previewed(
    done: Done, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written, runs = done
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(written, sort_keys=False))
    for recipe in ([str(runs / "steps")], [str(tmp_path / "r.yaml"), "--runs-dir", str(runs)]):
        monkeypatch.setattr(sys, "argv", ["cotree", "preview", recipe[0], "pairs", "--rows", "1", *recipe[1:]])
        with pytest.raises(SystemExit) as left:
            main()
        out = capsys.readouterr().out
        assert left.value.code == 0 and "chosen" in out and "boxed" in out
