"""What the evaluation table allows to be said, computed from its numbers.

Invariant: nothing is claimed about two rows whose 95% intervals overlap.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cotree.eval.metrics import minimum_detectable_difference
from cotree.report.format import interval, listed, percent
from cotree.report.summary import MODELS, EvalRow, Summary


def reading(summary: Summary | Mapping[str, Any]) -> dict[str, list[str]]:
    """A few plain sentences for each task: the final student against every other row, and what n can tell apart."""
    summary = Summary.model_validate(summary)
    return {task: _task(summary, task) for task in summary.tasks()}


def overlap(a: EvalRow, b: EvalRow) -> bool:
    """Whether the 95% intervals of two rows share a point."""
    return a.low <= b.high and b.low <= a.high


def _task(summary: Summary, task: str) -> list[str]:
    rows = summary.rows(task)
    known = [row for row in rows if row.model in MODELS] or rows
    student = known[-1]
    others = [row for row in rows if row is not student]
    sentences = []
    for word, group in (
        ("above", [row for row in others if student.low > row.high]),
        ("below", [row for row in others if student.high < row.low]),
    ):
        if group:
            names = listed([f"{row.model} ({percent(row.accuracy)}%)" for row in group])
            sentences.append(f"{_named(student)} is {word} {names}: the intervals do not overlap.")
    unclear = [row.model for row in others if overlap(student, row)]
    if unclear:
        verb = "overlaps with that of" if len(unclear) == 1 else "overlaps with those of"
        start = "Its interval" if sentences else f"{_named(student)}: its interval"
        sentences.append(f"{start} {verb} {listed(unclear)}: no claim.")
    if not others:
        sentences.append(f"{_named(student)} is the only row.")
    baseline = summary.baseline(task)
    if baseline:
        place = "lies above" if student.low > baseline.accuracy else "does not lie above"
        sentences.append(
            f"Its interval {place} the best constant answer, “{baseline.answer}” ({percent(baseline.accuracy)}%)."
        )
    sentences += [f"{row.constant}: it has learnt to answer, not what." for row in rows if row.constant]
    if others:
        sentences.append(_resolution(rows))
    return sentences


def _named(row: EvalRow) -> str:
    return f"{row.model} at {percent(row.accuracy)}% ({interval(row)})"


def _resolution(rows: list[EvalRow]) -> str:
    """The minimum detectable difference at the row where it is largest: the one nearest to one half."""
    n = min(row.n for row in rows)
    widest = min(rows, key=lambda row: abs(row.accuracy - 0.5))
    difference = minimum_detectable_difference(n, widest.accuracy)
    if difference is None:
        return f"n\u00a0=\u00a0{n} is too small to tell any two rows apart."
    return (
        f"With n\u00a0=\u00a0{n}, two rows have to differ by up to {percent(difference)} points "
        "for a two-proportion test to find it four times in five."
    )
