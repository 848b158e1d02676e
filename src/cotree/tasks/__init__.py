"""Tasks: question sets with prompts, answer extraction and verifiers. `task(name)` loads one."""

from __future__ import annotations

from pathlib import Path

from cotree.base.errors import UsageError
from cotree.tasks.base import Message, Question, Split, Task, Verdict, WorkedExample
from cotree.tasks.blocksworld import Blocksworld, BlocksworldOneShot
from cotree.tasks.generated import Arithmetic, Letters
from cotree.tasks.ifeval import IFEval, MIFEval, MultiIF
from cotree.tasks.mathematics import MATHEMATICS

_OTHERS = (Blocksworld, BlocksworldOneShot, IFEval, MultiIF, MIFEval, Arithmetic, Letters)
TASKS: dict[str, type[Task]] = {kind.name: kind for kind in (*MATHEMATICS, *_OTHERS)}


def task(name: str, data: str | Path | None = None) -> Task:
    """Load a task by name, or a user's own from a file: `task.yaml` or `file.py:Class`.

    Args:
        name: one that `cotree tasks` lists, or a file.
        data: source of a benchmark's rows (file, folder or hub id); by default the folder in COTREE_DATA, else the hub.

    Raises:
        UsageError: no such task (suggests the nearest name), or an invalid file.
    """
    if is_own_task(name):
        from cotree.tasks.own_tasks import load_own_task

        return load_own_task(name, data)
    if name not in TASKS:
        from cotree.base.settings import nearest

        raise UsageError(f"unknown task `{name}`; {nearest(name, TASKS)}")
    return TASKS[name](data)


def is_own_task(name: str) -> bool:
    """Whether a name refers to a user's file: `task.yaml` or `file.py:Class`."""
    return name.endswith((".yaml", ".yml")) or ".py:" in name


def task_table() -> str:
    """All shipped tasks as a text table: name, number of questions, licence, source, description."""
    rows = [("task", "questions", "licence", "source", "description")]
    for name, kind in TASKS.items():
        source = kind.source
        origin = ("any", "-", "generated") if source is None else (f"{source.size:,}", source.licence, source.hub)
        rows.append((name, *origin, kind.description))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(f"{cell:{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


__all__ = ["TASKS", "Message", "Question", "Split", "Task", "Verdict", "WorkedExample", "task", "task_table"]
