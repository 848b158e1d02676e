"""A whole experiment on the real embedded model, in small; and killed, it ends as if it had not been."""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.support.experiment import KeptOutput, small
from tests.support.fake_server import FakeServerThread
from tests.support.knowing import knowing_reply

from cotree.experiment.recipe import load_recipe
from cotree.experiment.run import run

LAPTOP = Path(__file__).parents[2] / "recipes" / "laptop.yaml"
Tree = list[tuple[Any, ...]]


def small_laptop() -> dict[str, Any]:
    """The laptop's recipe with one arm, few questions and short replies."""
    written: dict[str, Any] = yaml.safe_load(LAPTOP.read_text())
    written["name"] = "small"
    del written["trees"]["sampled"]
    written["trees"]["train"] |= {
        "questions": {"arithmetic": 4, "letters": 2}, "patterns": ["plain"], "rollouts": 6,
        "stop": {"correct": 1, "wrong": 1}, "max_thought_tokens": 24,
    }  # fmt: skip
    sft, pairs = written["datasets"]["sft"], written["datasets"]["pairs_long"]
    written["datasets"] = {"sft": sft | {"per_tree": 1}, "pairs": pairs | {"length": "shortest"}}
    fast = {"epochs": 1, "batch_size": 2, "save_steps": 1}
    written["students"] = {name: written["students"][name] | fast for name in ("sft", "dpo")}
    written["evaluations"] = {
        "test": {"models": ["smollm2", "sft", "dpo"], "questions": {"arithmetic": 1, "letters": 1}, "max_tokens": 24}
    }
    return written


@contextmanager
def started(folder: Path, written: dict[str, Any], **environment: str) -> Iterator[subprocess.Popen[str]]:
    """`cotree run` in a process of its own, whose lines go to `folder/output`; it is gone after the block."""
    (folder / "r.yaml").write_text(yaml.safe_dump(written, sort_keys=False))
    with (folder / "output").open("a") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "cotree.cli", "run", "r.yaml"],
            cwd=folder,
            text=True,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | environment,
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def trees(path: Path) -> dict[str, Tree]:
    """The finished trees of a store with all their nodes."""
    found: dict[str, Tree] = {}
    with suppress(sqlite3.OperationalError), closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as db:
        for (tree,) in db.execute("SELECT tree_id FROM trees"):
            found[tree] = db.execute("SELECT * FROM nodes WHERE tree_id = ? ORDER BY node_id", (tree,)).fetchall()
    return found


def lines_in(path: Path) -> int:
    return path.read_text().count("\n") if path.is_file() else 0


def wait_for(ready: Callable[[], object], process: subprocess.Popen[str], seconds: float = 400) -> None:
    until = time.monotonic() + seconds
    while not ready():
        assert process.poll() is None, "it ended before that"
        assert time.monotonic() < until, "it never came to that"
        time.sleep(0.05)


def check_complete(path: Path) -> None:
    summary = json.loads((path / "summary.json").read_text())
    assert [(row["model"], row["task"]) for row in summary["eval"]] == [
        (model, task) for model in ("smollm2", "sft", "dpo") for task in ("arithmetic", "letters")
    ]
    assert [node["name"] for node in summary["nodes"] if node["done"]] == list(load_recipe(path).nodes)
    assert all(summary["seconds"][node["name"]] > 0 for node in summary["nodes"])
    assert summary["data"]["pairs"]["rows"] >= 1
    for name in ("sft", "dpo"):
        assert (path / "students" / name / "model" / "model.safetensors").is_file()
        assert (path / "students" / name / "student-Q8_0.gguf").is_file()
    assert "<html" in (path / "report.html").read_text()
    assert os.path.getsize(path / "report.html") > 10_000
    first = json.loads((path / "students" / "dpo" / "log.jsonl").read_text().split("\n")[0])
    assert first["margin"] == pytest.approx(0.0, abs=1e-5), "the reference must be the SFT checkpoint"
    assert not [*path.rglob(".*.draft"), *path.rglob("moving.json")]


@pytest.mark.real
@pytest.mark.timeout(900)
def test_a_run_killed_in_every_kind_of_node_ends_complete(tmp_path: Path) -> None:
    """A kill -9 when the first tree is finished, one in training, a Ctrl-C in evaluation; the same command finishes."""
    written, path = small_laptop(), tmp_path / "runs" / "small"
    store = path / "trees" / "train" / "trees.db"
    stages: list[tuple[Callable[[], object], signal.Signals]] = [
        (lambda: trees(store), signal.SIGKILL),
        (lambda: lines_in(path / "students" / "sft" / "log.jsonl") >= 2, signal.SIGKILL),
        (lambda: lines_in(path / "evaluations" / "test" / "smollm2" / "journal.jsonl"), signal.SIGINT),
    ]
    finished: dict[str, Tree] = {}
    for ready, stop in stages:
        with started(tmp_path, written) as process:
            wait_for(ready, process)
            process.send_signal(stop)
            process.wait(timeout=120)
        now = trees(store)
        assert now and all(now[tree] == nodes for tree, nodes in finished.items()), "a finished tree changed"
        finished |= now
    assert process.returncode == 130
    said = (tmp_path / "output").read_text()
    assert said.endswith("cotree: stopped; nothing is lost: run the same command again to resume\n")
    with started(tmp_path, written) as process:
        process.wait(timeout=600)
    whole = (tmp_path / "output").read_text()
    assert process.returncode == 0 and "Traceback" not in whole, whole
    begun = [line for line in whole.split("\n") if line.endswith((": begins", ": going on"))]
    names = ["trees/train", "datasets/sft", "datasets/pairs", "students/sft", "students/dpo"]
    names += [f"evaluations/test/{model}" for model in ("smollm2", "sft", "dpo")]
    assert [line for line in begun if line.endswith(": begins")] == [f"{name}: begins" for name in names]
    # What was finished before a kill is not touched after it.
    rest = whole[len(said) :]
    assert not any(f"{name}:" in rest for name in names[:5])
    assert trees(store) == finished and len(finished) == 6
    check_complete(path)

    # A store that was read by others while it was written keeps a file beside it until it is opened again.
    there = [file for file in path.rglob("*") if file.is_file() and file.parent != path]
    files = [file for file in there if not file.name.endswith(("-wal", "-shm"))]
    before = {file: file.stat().st_mtime_ns for file in files}
    output = KeptOutput()
    run(load_recipe(tmp_path / "r.yaml"), tmp_path / "runs", output=output)
    assert not [line for line in output.lines if line.endswith((": begins", ": going on"))]
    assert before == {file: file.stat().st_mtime_ns for file in files}


def content(path: Path) -> dict[str, Any]:
    """All that a run made, without times and places."""
    import pyarrow.parquet as pq
    from safetensors.torch import load_file

    stores = path.glob("trees/*/trees.db")
    found: dict[str, Any] = {
        str(store.relative_to(path)): {
            tree: [tuple(v for v in row if not isinstance(v, float) or v == int(v)) for row in rows]
            for tree, rows in trees(store).items()
        }
        for store in stores
    }
    found |= {
        str(file.relative_to(path)): pq.read_table(file).to_pylist() for file in path.glob("datasets/*/*.parquet")
    }
    found |= {
        str(file.relative_to(path)): {name: values.numpy().tobytes() for name, values in load_file(file).items()}
        for file in path.glob("students/*/model/*.safetensors")
    }
    summary = json.loads((path / "summary.json").read_text())
    timed = ("seconds_p50", "seconds_p95")
    scores = {
        key: [{name: value for name, value in row.items() if name not in timed} for row in summary[key]]
        for key in ("eval", "baselines")
    }
    return found | scores | {"data": summary["data"]}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_killed_at_random_moments_is_bit_equal_to_one_that_was_not(student: Path, tmp_path: Path) -> None:
    rng = random.Random(7)
    with FakeServerThread(chat_only=True, reply=knowing_reply, latency=0.05) as server:
        written = small(server.url, student)
        for name, patience in (("whole", [600.0]), ("killed", [rng.uniform(2.0, 14.0) for _ in range(8)] + [600.0])):
            (tmp_path / name).mkdir()
            for seconds in patience:
                # Sums of several threads round differently.
                with started(tmp_path / name, written, OMP_NUM_THREADS="1") as process:
                    try:
                        process.wait(timeout=seconds)
                        break
                    except subprocess.TimeoutExpired:
                        continue  # and so it is killed
            assert process.returncode == 0, (tmp_path / name / "output").read_text()
    whole, killed = (content(tmp_path / name / "runs" / "steps") for name in ("whole", "killed"))
    assert whole.keys() == killed.keys() and len(whole) == 1 + 4 + 4 + 3
    for part in whole:
        assert whole[part] == killed[part], part
