"""What the evaluation table allows to be said, computed from its numbers.

Invariant: nothing is claimed about two rows whose 95% intervals overlap.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cotree.base.numbers import interval, listed, percent
from cotree.base.statistics import minimum_detectable_difference
from cotree.report.summary import MODELS, EvalRow, Summary


def reading(summary: Summary | Mapping[str, Any]) -> dict[str, list[str]]:
    """A few plain sentences for each task: the final student against every other row, and what n can tell apart."""
    summary = Summary.model_validate(summary)
    return {task: _task(summary, task) for task in summary.tasks()}


def _task(summary: Summary, task: str) -> list[str]:
    rows = summary.rows(task)
    student = ([row for row in rows if row.model in MODELS] or rows)[-1]
    others = [row for row in rows if row is not student]
    above = [row for row in others if student.low > row.high]
    below = [row for row in others if student.high < row.low]
    unclear = [row.model for row in others if row not in above and row not in below]
    named = f"{student.model} at {percent(student.accuracy)}% ({interval(student)})"
    sentences = []
    for word, group in (("above", above), ("below", below)):
        if group:
            names = listed([f"{row.model} ({percent(row.accuracy)}%)" for row in group])
            sentences.append(f"{named} is {word} {names}: the intervals do not overlap.")
    if unclear:
        verb = "overlaps with that of" if len(unclear) == 1 else "overlaps with those of"
        start = "Its interval" if sentences else f"{named}: its interval"
        sentences.append(f"{start} {verb} {listed(unclear)}: no claim.")
    if not others:
        sentences.append(f"{named} is the only row.")
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
