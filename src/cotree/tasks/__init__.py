"""Question sets, prompts, extraction and verifiers. `task(name)` is the way in."""

from __future__ import annotations

import difflib
from pathlib import Path

from cotree.base.errors import UsageError
from cotree.tasks.arithmetic import Arithmetic
from cotree.tasks.base import Message, Question, Split, Task, Verdict, WorkedExample
from cotree.tasks.blocksworld import Blocksworld, BlocksworldOneShot
from cotree.tasks.ifeval import IFEval, MIFEval, MultiIF
from cotree.tasks.letters import Letters
from cotree.tasks.mathematics import AIME24, AIME25, GSM8K, MATH500, MATHTraining

_KINDS: tuple[type[Task], ...] = (
    GSM8K, MATH500, MATHTraining, AIME24, AIME25, Blocksworld, BlocksworldOneShot, IFEval, MultiIF, MIFEval, Arithmetic,
    Letters,
)  # fmt: skip
TASKS: dict[str, type[Task]] = {kind.name: kind for kind in _KINDS}


def task(name: str, data: str | Path | None = None) -> Task:
    """The task of that name, of a YAML file, or of a class (`file.py:Class`); else UsageError with the nearest name.

    data: where a benchmark's rows are (file, folder or hub id); by default the folder in COTREE_DATA, else the hub.
    """
    if is_own(name):
        from cotree.tasks.own import own_task

        return own_task(name, data)
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, n=1)
        hint = f"did you mean `{near[0]}`?" if near else f"known: {', '.join(TASKS)}"
        raise UsageError(f"unknown task `{name}`; {hint}")
    return TASKS[name](data)


def is_own(name: str) -> bool:
    """Whether a name is that of a user's file: `task.yaml` or `file.py:Class`."""
    return name.endswith((".yaml", ".yml")) or ".py:" in name


def listing() -> str:
    """All tasks as a table: name, questions, licence, hub id, description."""
    rows = [("task", "questions", "licence", "source", "description")]
    for name, kind in TASKS.items():
        source = kind.source
        told = ("any", "-", "generated") if source is None else (f"{source.size:,}", source.licence, source.hub)
        rows.append((name, *told, kind.description))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(f"{cell:{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


__all__ = ["TASKS", "Message", "Question", "Split", "Task", "Verdict", "WorkedExample", "is_own", "listing", "task"]
