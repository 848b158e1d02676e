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
from pathlib import Path

import pytest

LAPTOP = Path(__file__).parent.parent / "recipes" / "laptop.yaml"
SMALL = [
    "name=small",
    "tasks.train={arithmetic: 4, letters: 2}",
    "tasks.eval={arithmetic: 1, letters: 1}",
    "search.patterns=[plain, double_check]",
    "search.rollouts=5",
    "eval.max_tokens=24",
    "eval.control=false",
    "eval.examples=false",
    "train.sft.epochs=1",
    "train.sft.save_steps=2",
]

pytestmark = [pytest.mark.real, pytest.mark.timeout(900)]


def start(folder: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "cotree.cli", "run", str(LAPTOP), *SMALL, *more]
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
    run = folder / "runs" / "small"
    summary = json.loads((run / "summary.json").read_text())
    assert [(row["model"], row["task"]) for row in summary["eval"]] == [
        (model, task) for model in ("base", "sft", "dpo") for task in ("arithmetic", "letters")
    ]
    assert set(summary["seconds"]) == {"search", "build", "train_sft", "train_dpo", "eval", "report"}
    assert len(trees(folder)) == 6
    assert summary["data"]["dpo_pairs"] >= 1
    for name in ("base", "sft", "dpo"):
        assert (run / "checkpoints" / name / "model" / "model.safetensors").is_file()
        assert (run / "student" / f"{name}-Q8_0.gguf").is_file()
    assert "<html" in (run / "report.html").read_text()
    first = json.loads((run / "checkpoints" / "dpo" / "log.jsonl").read_text().split("\n")[0])
    assert first["margin"] == pytest.approx(0.0, abs=1e-5), "the reference must be the SFT checkpoint"
    assert not list(run.rglob("*.partial"))


def test_a_run_killed_in_every_stage_ends_complete(tmp_path: Path) -> None:
    """One kill -9 early in the search, one Ctrl-C, one kill in training; then the same command finishes."""
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
        time.sleep(random.Random(stage).uniform(1.0, 5.0) + (8.0 if stage == "search" else 0.0))
        process.send_signal(stop)
        rest, _ = process.communicate(timeout=120)
        if stop == signal.SIGINT:
            assert "run the same command again to resume" in seen + rest
            assert process.returncode == 130
        assert "Traceback" not in seen + rest, rest
        now = trees(tmp_path)
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
    process = start(tmp_path)
    rest, _ = process.communicate(timeout=120)
    assert "all done" in rest
    assert before == {p: p.stat().st_mtime_ns for p in before}
    assert os.path.getsize(tmp_path / "runs" / "small" / "report.html") > 10_000
