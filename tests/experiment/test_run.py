"""The whole spine on the real embedded model, in small; and killed, it ends as if it had not been."""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from cotree.experiment.recipe import load_recipe
from cotree.experiment.run import run

LAPTOP = Path(__file__).parents[2] / "recipes" / "laptop.yaml"
SMALL = [
    "name=small",
    "tasks.train={arithmetic: 4, letters: 2}",
    "tasks.eval={arithmetic: 1, letters: 1}",
    "search.patterns=[plain]",
    "search.rollouts=6",
    "search.stop={correct: 1, wrong: 1}",
    "search.max_thought_tokens=24",
    "search.baselines=false",
    "build.sft.chains_per_tree=1",
    "eval.max_tokens=24",
    "eval.control=false",
    "eval.examples=false",
    "train.sft.epochs=1",
    "train.sft.save_steps=2",
]

pytestmark = [pytest.mark.real, pytest.mark.timeout(900)]


def start(folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "cotree.cli", "run", str(LAPTOP), *SMALL]
    return subprocess.Popen(command, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def trees(folder: Path) -> dict[str, list[tuple[object, ...]]]:
    """Finished trees with all their nodes."""
    path = folder / "runs" / "small" / "trees.db"
    if not path.exists():
        return {}
    with sqlite3.connect(path) as db:
        ids = [row[0] for row in db.execute("SELECT tree_id FROM trees")]
        return {i: db.execute("SELECT * FROM nodes WHERE tree_id = ? ORDER BY node_id", (i,)).fetchall() for i in ids}


def check_complete(folder: Path) -> None:
    path = folder / "runs" / "small"
    summary = json.loads((path / "summary.json").read_text())
    assert [(row["model"], row["task"]) for row in summary["eval"]] == [
        (model, task) for model in ("base", "sft", "dpo") for task in ("arithmetic", "letters")
    ]
    assert set(summary["seconds"]) == {"search", "build", "train_sft", "train_dpo", "eval", "report"}
    assert len(trees(folder)) == 6
    assert summary["data"]["dpo_pairs"] >= 1
    for name in ("base", "sft", "dpo"):
        assert (path / "checkpoints" / name / "model" / "model.safetensors").is_file()
        assert (path / "student" / f"{name}-Q8_0.gguf").is_file()
    assert "<html" in (path / "report.html").read_text()
    first = json.loads((path / "checkpoints" / "dpo" / "log.jsonl").read_text().split("\n")[0])
    assert first["margin"] == pytest.approx(0.0, abs=1e-5), "the reference must be the SFT checkpoint"
    assert not list(path.rglob(".*.draft"))


def test_a_run_killed_in_every_stage_ends_complete(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A kill -9 when the first tree is finished, one in training, a Ctrl-C in evaluation; the same command finishes."""
    finished: dict[str, list[tuple[object, ...]]] = {}
    for stage, stop in (("search", signal.SIGKILL), ("train_sft", signal.SIGKILL), ("eval", signal.SIGINT)):
        process = start(tmp_path)
        assert process.stdout is not None
        seen = ""
        for line in process.stdout:
            seen += line
            if line.startswith(f"{stage}:"):
                break
        assert f"{stage}:" in seen, seen
        time.sleep(random.Random(stage).uniform(0.5, 2.0))
        while stage == "search" and not finished and process.poll() is None:
            time.sleep(0.1)
            with suppress(sqlite3.OperationalError):  # the store is not made yet
                finished = trees(tmp_path)
        process.send_signal(stop)
        rest, _ = process.communicate(timeout=120)
        if stop == signal.SIGINT:
            assert "run the same command again to resume" in seen + rest
            assert process.returncode == 130
        assert "Traceback" not in seen + rest, rest
        now = trees(tmp_path)
        assert finished, "no tree was finished before the kill"
        assert all(now[tree] == nodes for tree, nodes in finished.items()), "a finished tree changed"
        finished |= now
    process = start(tmp_path)
    rest, _ = process.communicate(timeout=600)
    assert process.returncode == 0, rest
    assert "growing" not in rest, "a finished search was begun again"
    assert "train_sft:" not in rest
    assert {tree: trees(tmp_path)[tree] for tree in finished} == finished
    check_complete(tmp_path)

    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "runs" / "small" / "checkpoints").rglob("*") if p.is_file()}
    run(load_recipe(LAPTOP, SMALL), tmp_path / "runs")
    assert "all done" in capfd.readouterr().out
    assert before == {p: p.stat().st_mtime_ns for p in before}
    assert os.path.getsize(tmp_path / "runs" / "small" / "report.html") > 10_000
