"""A run folder made by hand, with invented numbers, for looking at pages and tables. Nothing here was measured."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from tests.support.trees import random_tree, tree_of

from cotree.base.run_folder import NodeFolder, NodeRecord, RunFolder
from cotree.base.statistics import wilson_interval
from cotree.search.store import StoredNode, StoredTree, TreeStore

RECIPE: dict[str, Any] = {
    "name": "laptop",
    "seed": 7,
    "models": {"small": {"weights": "smollm2-135m-instruct"}},
    "trees": {
        "train": {"questions": {"arithmetic": 240, "letters": 160}, "roles": {"thinker": "small"}},
        "sampled": {"like": "train", "method": "sampling", "tokens_of": "train"},
    },
    "datasets": {
        "sft": {"trees": "train", "rows": "sft"},
        "control": {"like": "sft", "verified": False, "size_of": "sft"},
        "pairs": {"trees": "train", "rows": "dpo"},
        "pairs_long": {"like": "pairs", "length": "longest"},
    },
    "students": {
        "sft": {"from": "small", "method": "sft", "data": "sft"},
        "control": {"like": "sft", "data": "control"},
        "seeded": {"like": "sft", "seeds": [0, 1, 2]},
        "dpo": {"from": "sft", "method": "dpo", "data": "pairs"},
        "plain_dpo": {"like": "dpo", "data": "pairs_long", "alpha": 0, "label_smoothing": 0},
        "alpha": {"like": "dpo", "sweep": {"alpha": [0.5, 2.0]}},
    },
    "evaluations": {
        "test": {"models": ["small", "control", "sft", "seeded", "dpo", "plain_dpo", "alpha"],
                 "questions": {"arithmetic": 240, "letters": 200}, "max_tokens": 128},
        "shots": {"like": "test", "models": ["small"], "examples": True},
    },
}  # fmt: skip
VERSIONS = {"python": "3.11.7", "cotree": "0.1.0", "torch": "2.13.0", "git": "0123abc"}
MACHINE = {"cpu": "AMD EPYC", "cores": 2, "memory_gb": 23.4}
STUDENTS: dict[str, dict[str, Any]] = {
    "sft": {"parent": "small", "method": "sft", "data": "sft", "differs": {}},
    "control": {
        "parent": "small", "method": "sft", "data": "control",
        "differs": {"from": "students/sft", "keys": {"data": ["sft", "control"]}},
    },
    **{
        f"seeded@seed={seed}": {"parent": "small", "method": "sft", "data": "sft",
                                "differs": {"from": "students/sft", "keys": {}}}
        for seed in (0, 1, 2)
    },
    "dpo": {"parent": "sft", "method": "dpo", "data": "pairs", "differs": {}},
    "plain_dpo": {
        "parent": "sft", "method": "dpo", "data": "pairs_long",
        "differs": {
            "from": "students/dpo",
            "keys": {"data": ["pairs", "pairs_long"], "label_smoothing": [0.1, 0], "alpha": [1.0, 0]},
        },
    },
    **{
        f"alpha@alpha={alpha}": {"parent": "sft", "method": "dpo", "data": "pairs",
                                 "differs": {"from": "students/dpo", "keys": {"alpha": [1.0, alpha]}}}
        for alpha in (0.5, 2.0)
    },
}  # fmt: skip
# Of each model on (arithmetic, letters): correct, cut off, finished without an answer, and mean tokens.
ANSWERED: dict[str, list[tuple[int, int, int, int]]] = {
    "small": [(3, 31, 184, 71), (1, 12, 171, 64)],
    "sft": [(132, 3, 0, 55), (71, 1, 0, 44)],
    "control": [(93, 4, 1, 52), (48, 2, 1, 41)],
    "seeded@seed=0": [(132, 3, 0, 55), (70, 0, 0, 44)],
    "seeded@seed=1": [(120, 3, 0, 55), (76, 0, 0, 44)],
    "seeded@seed=2": [(126, 3, 0, 55), (64, 0, 0, 44)],
    "dpo": [(141, 1, 0, 47), (78, 0, 0, 38)],
    "plain_dpo": [(0, 200, 0, 120), (2, 160, 0, 110)],
    "alpha@alpha=0.5": [(139, 1, 0, 48), (72, 0, 0, 39)],
    "alpha@alpha=2.0": [(135, 1, 0, 48), (77, 0, 0, 39)],
}
SIZES = {"arithmetic": 240, "letters": 200}


def invented_row(task: str, n: int, answered: tuple[int, int, int, int]) -> dict[str, Any]:
    correct, cut, finished, tokens = answered
    low, high = wilson_interval(correct, n)
    return {
        "task": task, "n": n, "accuracy": correct / n, "low": low, "high": high, "lenient": correct / n,
        "no_answer": (cut + finished) / n, "loop": 0.0, "truncated": cut / n, "finished_without_answer": finished / n,
        "accuracy_answered": correct / (n - cut - finished), "mean_tokens": (cut * 128 + (n - cut) * tokens) / n,
        "max_tokens": 128, "samples": 1, "temperature": 0.0, "top_p": 1.0, "decoding": "",
    }  # fmt: skip


def invented_cell(answered: list[tuple[int, int, int, int]], *, examples: bool = False) -> dict[str, Any]:
    rows = [invented_row(task, n, counts) for (task, n), counts in zip(SIZES.items(), answered, strict=True)]
    return {
        "rows": rows,
        "instructions": [],
        "baselines": [
            {"task": "arithmetic", "answer": "12", "accuracy": 0.0375},
            {"task": "letters", "answer": "2", "accuracy": 0.25},
        ],
        "tokens": {"prompt": 21040, "completion": 9712},
        "asking": {"max_tokens": 128, "split": "test", "examples": examples, "questions": SIZES},
    }


def invented_search() -> dict[str, Any]:
    by_task = {
        "arithmetic": {
            "trees": 240, "thoughts": 3312, "answers": 1490, "correct": 611, "wrong": 846, "no_answer": 33,
            "rollouts": 1500, "cut": 40, "questions_with_correct": 0.7125, "questions_with_both": 0.5542,
            "reflections": 402, "repaired": 41, "stopped": {"rollouts": 240},
        },
        "letters": {
            "trees": 160, "thoughts": 2101, "answers": 980, "correct": 262, "wrong": 701, "no_answer": 17,
            "rollouts": 1000, "cut": 9, "questions_with_correct": 0.6437, "questions_with_both": 0.6062,
            "reflections": 318, "repaired": 57, "stopped": {"rollouts": 60, "exhausted": 100},
        },
    }  # fmt: skip
    counts = ("trees", "thoughts", "rollouts", "cut", "answers", "correct", "wrong", "no_answer", "reflections",
              "repaired")  # fmt: skip
    return {
        **{key: sum(part[key] for part in by_task.values()) for key in counts},
        "questions_with_correct": 0.685, "questions_with_both": 0.575, "by_task": by_task,
        "by_pattern": {"plain": {"trees": 300, "answers": 2000, "correct": 700},
                       "reclarify": {"trees": 100, "answers": 470, "correct": 173}},
        "by_model": {"small": {"thoughts": 5413, "tokens": 61240, "reflections": 720, "repaired": 98}},
        "stopped": {"rollouts": 300, "exhausted": 100},
        "tokens": {"prompt": 120345, "cached": 884120, "completion": 61240},
        "unused": {"completions": 0, "tokens": 0},
    }  # fmt: skip


def invented_data(kind: str, rows: int, **mean_tokens: float) -> dict[str, Any]:
    return {"counts": {
        "kind": kind, "rows": rows, "tasks": {"arithmetic": rows - 10, "letters": 10}, "trees": 400, "chains": 2470,
        "chains_left_out": {"wrong": 1547, "contaminated": 3}, "rows_left_out": {"duplicate": 2},
        "completion_tokens": rows * 50, "mean_tokens": mean_tokens, "verified": 0,
    }}  # fmt: skip


def thought(i: int, parent: int | None, kind: str | None, text: str = "", verdict: str | None = None, **more: Any
            ) -> StoredNode:  # fmt: skip
    reward = None if verdict is None else float(verdict == "correct")
    named = {
        "node_id": i, "parent_id": parent, "type": kind, "text": text, "prefix": "", "model": "small", "depth": 1,
        "visits": 0, "value": 0.0, "verdict": verdict, "reward": reward, "answer": None, "tokens": 9,
        "finish_reason": "stop", "seed": 0, "seconds": 0.1,
    }  # fmt: skip
    return StoredNode(**(named | more))


APPLES = "Nina has 14 apples. She buys 3 bags with 6 apples each. How many apples does she have?"
SPLIT = "Firstly, I need to break down this task."


def apples_tree(*, hostile: str = "") -> StoredTree:
    """A tree that every kind of dataset row was taken from."""
    nodes = [
        thought(0, None, None, model=""),
        thought(1, 0, "sub_task", f"{SPLIT} find the apples in the bags, then add{hostile}.", prefix=SPLIT),
        thought(2, 1, "thinking", f"3 bags with 6 apples each are 3 * 6 = 18 apples. 14 + 18 = 32.{hostile}"),
        thought(3, 2, "answer", "The answer is: \\boxed{32}", "correct", prefix="The answer is: \\boxed{"),
        thought(4, 1, "thinking", "14 + 3 + 6 = 23."),
        thought(5, 4, "answer", "The answer is: \\boxed{23}", "wrong", prefix="The answer is: \\boxed{"),
        thought(6, 4, "reflection", "Wait! something is wrong... the bags have 6 each.",
                prefix="Wait! something is wrong...", model="reflector"),
        thought(7, 6, "thinking", "3 * 6 = 18, and 18 + 14 = 32."),
        thought(8, 7, "answer", "The answer is: \\boxed{32}", "correct", prefix="The answer is: \\boxed{"),
        thought(9, 1, "thinking", "6 6 6 6 6 6 6", "no_answer", finish_reason="length"),
    ]  # fmt: skip
    tree = tree_of("apples", nodes)
    prompt = [{"role": "user", "content": f"{APPLES}{hostile}"}]
    return replace(tree, tree_id="a" * 16, question_id="bags-12", config="c", messages=prompt, gold="32",
                   completion_tokens=402, rollouts=5)  # fmt: skip


def write_log(path: Path, steps: int, seed: int, *, dpo: bool) -> None:
    rng = random.Random(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        for step in range(1, steps + 1):
            done = step / steps
            line = {
                "step": step,
                "total_steps": steps,
                "loss": (0.9 if dpo else 1.6) * math.exp(-2 * done) + 0.3 + rng.gauss(0, 0.04),
                "learning_rate": (5e-6 if dpo else 5e-5) * min(10 * done, 1) * (1 - done),
            }
            if dpo:
                line |= {
                    "accuracy": min(1.0, 0.5 + 0.4 * done + rng.gauss(0, 0.08)),
                    "margin": 0.9 * done + rng.gauss(0, 0.06),
                    "chosen_logps": -18 - 1.5 * done + rng.gauss(0, 0.7),
                    "rejected_logps": -21 - 9 * done + rng.gauss(0, 0.7),
                }
            file.write(json.dumps(line) + "\n")


def record_of(
    folder: NodeFolder, fingerprint: str, reads: tuple[str, ...] = (), seconds: float = 1.0, **more: Any
) -> None:
    """Leave a finished node's record."""
    record = NodeRecord(fingerprint, more.pop("base", fingerprint), reads=reads, done=True, seconds=seconds,
                        created="2026-11-23", versions=VERSIONS, machine=MACHINE)  # fmt: skip
    folder.write(replace(record, **more))


def edit(folder: NodeFolder, **result: Any) -> None:
    """Change what a node left for tables."""
    record = folder.record()
    assert record is not None
    folder.write(replace(record, result={**record.result, **result}))


def rows_of_apples(dpo: bool, length: str) -> list[dict[str, Any]]:
    if dpo:
        chosen = 3 if length == "shortest" else 8
        return [{"tree_id": "a" * 16, "chosen_leaf": chosen, "rejected_leaf": 5, "prefix_tokens": 12,
                 "chosen_tokens": 41 if chosen == 3 else 51, "rejected_tokens": 30,
                 "rejected_finished": True}]  # fmt: skip
    return [{"tree_id": "a" * 16, "leaf_id": 8, "length_tokens": 51, "length_rank": 3, "value": 0.5}]


def make_run(path: Path, *, hostile: str = "") -> RunFolder:
    """A complete run with a sweep, seeds, two searches and two evaluations."""
    path.mkdir(parents=True)
    (path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE, sort_keys=False))
    run = RunFolder(path)
    record_of(run.node("trees/train"), "t1", seconds=251.3, base="c", result={"counts": invented_search()})
    with TreeStore(path / "trees/train/trees.db") as store:
        store.put(apples_tree(hostile=hostile))
        for seed in range(6):
            store.put(replace(random_tree(seed), task=["arithmetic", "letters"][seed % 2], question_id=f"q-{seed + 5}"))
    sampled = invented_search() | {"tokens": {"prompt": 500, "cached": 100, "completion": 61000}}
    record_of(run.node("trees/sampled"), "t2", ("trees/train",), 90.0, result={"counts": sampled})
    with TreeStore(run.node("trees/sampled").path / "trees.db"):
        pass  # its trees are not shown
    for name, (kind, length, rows, mean) in {
        "sft": ("sft", "longest", 274, {"completion": 63.2}),
        "control": ("sft", "longest", 274, {"completion": 50.0}),
        "pairs": ("dpo", "shortest", 221, {"chosen": 48.7, "rejected": 55.9, "prefix": 19.4}),
        "pairs_long": ("dpo", "longest", 221, {"chosen": 60.0, "rejected": 61.5, "prefix": 18.0}),
    }.items():
        parts = {"rows": kind, "length": length} | ({"verified": False} if name == "control" else {})
        folder = run.node(f"datasets/{name}")
        reads: tuple[str, ...] = ("trees/train", "datasets/sft") if name == "control" else ("trees/train",)
        record_of(folder, f"d-{name}", reads, 3.1, parts=parts, result=invented_data(kind, rows, **mean))
        pq.write_table(pa.Table.from_pylist(rows_of_apples(kind == "dpo", length)), folder.path / "train.parquet")
    for place, (name, about) in enumerate(STUDENTS.items()):
        reads = (*[f"students/{about['parent']}"] * (about["parent"] != "small"), f"datasets/{about['data']}")
        dpo = about["method"] == "dpo"
        trained = {"steps": 35, "tokens": 34730, "rows": 274, "first": {}, "final": {"loss": 0.4}}
        folder = run.node(f"students/{name}")
        record_of(folder, f"s-{name}", reads, 171.8, parts={"method": about["method"]},
                  result={**about, "train": trained, "tokens": {"trained": 34730}})  # fmt: skip
        write_log(folder.path / "log.jsonl", 56 if dpo else 35, place, dpo=dpo)
    reads = tuple(f"students/{name}" for name in STUDENTS)
    for name, answered in ANSWERED.items():
        record_of(run.node("evaluations/test", name), f"e-{name}", reads, 9.52, result=invented_cell(answered))
    shots = invented_cell([(66, 0, 2, 48), (49, 0, 0, 39)], examples=True)
    record_of(run.node("evaluations/shots", "small"), "e-shots", (), 12.0, result=shots)
    return run


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A complete run folder."""
    return make_run(tmp_path / "laptop")
