"""A run folder with invented numbers, for looking at pages and tables. Nothing here was measured."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest

from cotree.base.statistics import wilson


def invented_row(model: str, task: str, n: int, correct: int, cut: int, finished: int, tokens: int) -> dict[str, Any]:
    low, high = wilson(correct, n)
    return {
        "model": model, "task": task, "n": n, "accuracy": correct / n, "low": low, "high": high,
        "no_answer": (cut + finished) / n, "loop": 0.0, "truncated": cut / n, "finished_without_answer": finished / n,
        "accuracy_answered": correct / (n - cut - finished), "mean_tokens": (cut * 128 + (n - cut) * tokens) / n,
        "max_tokens": 128,
    }  # fmt: skip


def invented_summary() -> dict[str, Any]:
    by_task = {
        "arithmetic": {
            "trees": 240, "thoughts": 3312, "answers": 1490, "correct": 611, "wrong": 846, "no_answer": 33,
            "rollouts": 1500, "cut": 40,
            "questions_with_correct": 0.7125, "questions_with_both": 0.5542, "reflections": 402, "repaired": 41,
        },
        "letters": {
            "trees": 160, "thoughts": 2101, "answers": 980, "correct": 262, "wrong": 701, "no_answer": 17,
            "rollouts": 1000, "cut": 9,
            "questions_with_correct": 0.6437, "questions_with_both": 0.6062, "reflections": 318, "repaired": 57,
        },
    }  # fmt: skip
    counts = (
        "trees",
        "thoughts",
        "rollouts",
        "cut",
        "answers",
        "correct",
        "wrong",
        "no_answer",
        "reflections",
        "repaired",
    )
    return {
        "name": "laptop",
        "seed": 7,
        "created": "2026-11-23",
        "machine": {"cpu": "AMD EPYC", "cores": 2, "memory_gb": 23.4},
        "eval": [
            invented_row("base", "arithmetic", 240, 3, 31, 184, 71),
            invented_row("base+examples", "arithmetic", 240, 66, 0, 2, 48),
            invented_row("control", "arithmetic", 240, 93, 4, 1, 52),
            invented_row("sft", "arithmetic", 240, 132, 3, 0, 55),
            invented_row("dpo", "arithmetic", 240, 141, 1, 0, 47),
            invented_row("base", "letters", 200, 1, 12, 171, 64),
            invented_row("base+examples", "letters", 200, 49, 0, 0, 39),
            invented_row("control", "letters", 200, 48, 2, 1, 41),
            invented_row("sft", "letters", 200, 71, 1, 0, 44),
            invented_row("dpo", "letters", 200, 78, 0, 0, 38),
        ],
        "baselines": [
            {"task": "arithmetic", "answer": "12", "accuracy": 0.0375},
            {"task": "letters", "answer": "2", "accuracy": 0.25},
        ],
        "search": {
            **{key: sum(part[key] for part in by_task.values()) for key in counts},
            "questions_with_correct": 0.685,
            "questions_with_both": 0.575,
            "by_task": by_task,
            "by_model": {"small": {"thoughts": 5413, "tokens": 61240, "reflections": 720, "repaired": 98}},
            "compared": [],
            "stopped": {"rollouts": 300, "solved": 100},
        },
        "data": {
            "sft_rows": 274, "control_rows": 274, "dpo_pairs": 221, "mean_sft_tokens": 63.2,
            "mean_chosen_tokens": 48.7, "mean_rejected_tokens": 55.9, "mean_prefix_tokens": 19.4,
        },
        "seconds": {
            "search": 251.3, "build": 3.1, "train_sft": 171.8, "train_dpo": 203.4, "eval": 95.2, "report": 1.4,
        },
        "tokens": {
            "search": {"prompt": 120345, "cached": 884120, "completion": 61240},
            "train_sft": {"trained": 34730},
            "train_dpo": {"trained": 23110},
            "eval": {"prompt": 210400, "cached": 0, "completion": 97120},
        },
    }  # fmt: skip


def invented_samples() -> list[dict[str, Any]]:
    return [
        {
            "title": "arithmetic-train-0012",
            "prompt": "Nina has 14 apples. She buys 3 bags with 6 apples each. How many apples does she have?\n"
            "Think step by step and put the final answer in \\boxed{}.",
            "chains": [
                {
                    "text": "Firstly, I need to break down this task: find the apples in the bags, then add.\n"
                    "3 bags with 6 apples each are 3 * 6 = 18 apples.\n14 + 18 = 32.\nThe answer is: \\boxed{32}",
                    "verdict": "correct",
                    "kind": "chosen",
                },
                {
                    "text": "Firstly, I need to break down this task: add the numbers.\n14 + 3 + 6 = 23.\n"
                    "The answer is: \\boxed{23}",
                    "verdict": "wrong",
                    "kind": "rejected",
                },
            ],
        },
        {
            "title": "letters-train-0101",
            "prompt": "How many times does the letter r occur in the word strawberry?",
            "chains": [
                {"text": "Let me spell it: s-t-r-a-w-b-e-r-r-y.\nThe answer is: \\boxed{3}", "verdict": "correct"},
                {"text": "r r r r r r r r r r r r r r r r r r", "verdict": "no_answer", "kind": "cut off"},
            ],
        },
    ]


def write_log(path: Path, steps: int, seed: int, *, dpo: bool) -> None:
    rng = random.Random(seed)
    path.parent.mkdir(parents=True)
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


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A complete run folder."""
    folder = tmp_path / "laptop"
    folder.mkdir()
    (folder / "summary.json").write_text(json.dumps(invented_summary()))
    (folder / "samples.json").write_text(json.dumps(invented_samples()))
    (folder / "manifest.json").write_text(
        json.dumps({"versions": {"cotree": "0.1.0", "torch": "2.13.0"}, "git": "0123abc", "stages": {"search": {}}})
    )
    (folder / "recipe.yaml").write_text(
        "name: laptop\nmodels:\n  small: {embedded: smollm2-135m-instruct}\ntrain: {student: small}\n"
    )
    write_log(folder / "checkpoints/sft/log.jsonl", 35, 1, dpo=False)
    write_log(folder / "checkpoints/control/log.jsonl", 35, 2, dpo=False)
    write_log(folder / "checkpoints/dpo/log.jsonl", 56, 3, dpo=True)
    return folder
