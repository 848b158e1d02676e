"""Which answers to one question mean the same, so that samples can vote.

Invariant: the gold answer is never read, so decoding may use this. `1/2` and `0.5` are one answer where the task's
verifier says that they are equal.
"""

from __future__ import annotations

from collections.abc import Sequence

from cotree.tasks.base import Question, Task


def group_answers(task: Task, question: Question, answers: Sequence[str | None]) -> list[int | None]:
    """Group answers by meaning: a group number for each, from 0 in order of appearance; None where there is no answer.

    An answer joins the first group whose first member means the same. May wait for the math workers, so call it in a
    thread from an event loop.

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
