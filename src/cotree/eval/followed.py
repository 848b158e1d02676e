"""Instruction following in an evaluation: the paper's IF(Zh), IF(En) and IF(Other), by turn, out of judged samples.

Invariant: a score comes from the stored responses alone, so an interrupted evaluation and an uninterrupted one agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any

from cotree.eval.asking import Asked, turns_of
from cotree.eval.journal import EvalSample
from cotree.tasks.instructions import if_scores, instruction_results


def instruction_scores(questions: Sequence[Asked], samples: Sequence[EvalSample]) -> list[dict[str, Any]]:
    """The rows of `instructions.if_scores` for each task that has instructions, with the task's name and the ratio of
    no-answer outputs."""
    # What was replied between two turns decides no instruction.
    asked = {(turn.task, turn.id, turn.turn): turn for _, first in questions for turn in turns_of(first)}
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
