"""Question sets, prompts, extraction and verifiers. `task(name)` is the way in."""

from __future__ import annotations

import difflib

from cotree.errors import UsageError
from cotree.tasks.arithmetic import Arithmetic
from cotree.tasks.base import Message, Question, Split, Task, Verdict, WorkedExample
from cotree.tasks.letters import Letters

TASKS: dict[str, type[Task]] = {task.name: task for task in (Arithmetic, Letters)}


def task(name: str) -> Task:
    """The task of that name; UsageError with the nearest known name otherwise."""
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, n=1)
        hint = f"did you mean `{near[0]}`?" if near else f"known: {', '.join(TASKS)}"
        raise UsageError(f"unknown task `{name}`; {hint}")
    return TASKS[name]()


__all__ = ["TASKS", "Message", "Question", "Split", "Task", "Verdict", "WorkedExample", "task"]
