"""Instruction following in an evaluation: the paper's IF(Zh), IF(En) and IF(Other), by turn, out of judged samples.

Invariant: a score comes from the stored responses alone, so an interrupted evaluation and an uninterrupted one agree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from cotree.eval.journal import EvalSample
from cotree.tasks import Question, Task
from cotree.tasks.instructions import if_scores, instruction_results


def instruction_scores(
    questions: Sequence[tuple[Task, Question]], samples: Sequence[EvalSample]
) -> list[dict[str, Any]]:
    """The rows of `instructions.if_scores` for each task that has instructions, with the task's name."""
    asked = {key: question for _, first in questions for key, question in _turns(first).items()}
    rows: list[dict[str, Any]] = []
    for name in dict.fromkeys(sample.task for sample in samples):
        found = [
            instruction_results(asked[name, sample.id, sample.turn], sample.response, sample.finish_reason)
            for sample in samples
            if sample.task == name and "instructions" in asked[name, sample.id, sample.turn].spec
        ]
        rows += [{"task": name, **asdict(score)} for score in if_scores(found)]
    return rows


def _turns(question: Question) -> Mapping[tuple[str, str, int], Question]:
    """A question and its later turns; what was replied between them decides no instruction."""
    turns = {}
    following: Question | None = question
    while following is not None:
        turns[following.task, following.id, following.turn] = following
        following = following.follow_up("")
    return turns
