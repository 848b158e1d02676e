"""Which answers to one question say the same: what a vote counts.

Invariant: the gold is never looked at, so whoever decodes without it may vote; `1/2` and `0.5` are one answer where the
task's verifier says so.
"""

from __future__ import annotations

from collections.abc import Sequence

from cotree.tasks.base import Question, Task


def groups(task: Task, question: Question, answers: Sequence[str | None]) -> list[int | None]:
    """The number of each answer's group, in the order in which the groups appear; None where there is no answer.

    An answer joins the first group whose first member says the same. May wait for the math workers: an event loop calls
    this in a thread.

    Raises:
        ValueError: the task's answers cannot be compared.
    """
    if not task.comparable:
        raise ValueError(f"answers of {task.name} are free texts: no two say the same")
    firsts: list[str] = []
    known: dict[str | None, int | None] = {None: None}
    for answer in answers:
        if answer is not None and answer not in known:
            same = (i for i, first in enumerate(firsts) if task.same_answer(answer, first, question))
            known[answer] = next(same, len(firsts))
            if known[answer] == len(firsts):
                firsts.append(answer)
    return [known[answer] for answer in answers]
