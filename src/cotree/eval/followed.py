"""Instruction following in an evaluation: the paper's IF(Zh), IF(En) and IF(Other), by turn, out of judged samples.

Invariant: a score comes from the stored responses alone, so an interrupted evaluation and an uninterrupted one agree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any

from cotree.eval.journal import EvalSample
from cotree.tasks import Question, Task
from cotree.tasks.instructions import if_scores, instruction_results


def instruction_scores(
    questions: Sequence[tuple[Task, Question]], samples: Sequence[EvalSample]
) -> list[dict[str, Any]]:
    """The rows of `instructions.if_scores` for each task that has instructions, with the task's name and the ratio of
    no-answer outputs."""
    asked = {key: question for _, first in questions for key, question in _turns(first).items()}
    rows: list[dict[str, Any]] = []
    for name in dict.fromkeys(sample.task for sample in samples):
        found = [
            (instruction_results(asked[name, s.id, s.turn], s.response, s.finish_reason), s.kind == "no_answer")
            for s in samples
            if s.task == name and "instructions" in asked[name, s.id, s.turn].spec
        ]
        for score in if_scores(result for result, _ in found):
            none = [none for r, none in found if r.group == score.group and score.turn in (None, r.turn)]
            rows.append({"task": name, **asdict(score), "no_answer": fmean(none)})
    return rows


def _turns(question: Question) -> Mapping[tuple[str, str, int], Question]:
    """A question and its later turns; what was replied between them decides no instruction."""
    turns = {}
    following: Question | None = question
    while following is not None:
        turns[following.task, following.id, following.turn] = following
        following = following.follow_up("")
    return turns
