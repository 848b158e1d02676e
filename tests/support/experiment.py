"""A small experiment: a fake server that knows the answers writes the trees, a tiny model in llama.cpp is trained."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from tests.support.knowing import TASKS
from tests.support.tiny_student import tiny_model, tiny_tokenizer, write_tiny_gguf

from cotree.base.progress import Output
from cotree.experiment.recipe import build_recipe
from cotree.experiment.run import run


def tiny_student(folder: Path) -> Path:
    """A tiny llama as a GGUF, which llama.cpp serves and cotree trains; the search's worked examples fit into it."""
    model = tiny_model()
    model.config.max_position_embeddings = 4096
    return write_tiny_gguf(model, tiny_tokenizer(), folder / "tiny.gguf")


def step_by_step(url: str, student: Path, **more: Any) -> dict[str, Any]:
    """The paper's step-by-step arms in miniature, as a written recipe."""
    questions = dict.fromkeys(TASKS, 2)
    arms = ["sft", "control", "dpo", "balanced", "cdpo", "joint", "masked"]
    written: dict[str, Any] = {
        "name": "steps",
        "seed": 0,
        "models": {"far": {"url": url, "model": "fake", "mode": "chat"}, "tiny": {"weights": str(student)}},
        "trees": {"train": {"questions": questions, "roles": {"thinker": "far"}, "rollouts": 8, "patterns": ["plain"]}},
        "datasets": {
            "longest": {"trees": "train", "rows": "sft", "length": "longest"},
            "unverified": {"like": "longest", "verified": False, "size_of": "longest"},
            "pairs_long": {"trees": "train", "rows": "dpo", "length": "longest"},
            "pairs": {"like": "pairs_long", "length": "shortest"},
        },
        "students": {
            "sft": {"from": "tiny", "method": "sft", "data": "longest"},
            "control": {"like": "sft", "data": "unverified"},
            "dpo": {"from": "sft", "method": "dpo", "data": "pairs_long", "label_smoothing": 0, "alpha": 0,
                    "mask_prefix": False},
            "balanced": {"like": "dpo", "data": "pairs"},
            "cdpo": {"like": "balanced", "label_smoothing": 0.1},
            "joint": {"like": "cdpo", "alpha": 1.0},
            "masked": {"like": "joint", "mask_prefix": True},
        },
        "evaluations": {"test": {"models": ["tiny", *arms], "questions": questions, "max_tokens": 8}},
    }  # fmt: skip
    for key, value in more.items():
        section, name = key.split("__")
        written[section][name] = value
    return written


def small(url: str, student: Path) -> dict[str, Any]:
    """Three arms instead of seven, asked one question."""
    written = step_by_step(url, student)
    for name in ("control", "dpo", "balanced"):
        del written["students"][name]
    written["students"]["cdpo"] = {"from": "sft", "method": "dpo", "data": "pairs", "mask_prefix": False, "alpha": 0}
    written["evaluations"]["test"] |= {"models": ["sft", "joint", "masked"], "questions": {"letters": 1}}
    return written


class KeptOutput(Output):
    """Keeps what is said instead of printing it."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.lines: list[str] = []

    def print(self, line: object = "") -> None:
        self.lines.append(str(line))


def changed_recipe(written: dict[str, Any], *changes: tuple[str, Any]) -> dict[str, Any]:
    """A copy of a written recipe with `a.b.c` values changed."""
    written = copy.deepcopy(written)
    for key, value in changes:
        *sections, last = key.split(".")
        place = written
        for section in sections:
            place = place[section]
        place[last] = value
    return written


def begun(written: dict[str, Any], runs: Path, *changes: tuple[str, Any], **options: Any) -> list[str]:
    """Run a written recipe with `a.b.c` values changed; the names of nodes and cells that were worked on, in order."""
    output = KeptOutput()
    run(build_recipe(changed_recipe(written, *changes)), runs, output=output, **options)
    suffixes = (": begins", ": going on")
    return [line.removesuffix(end) for line in output.lines for end in suffixes if line.endswith(end)]
