"""How numbers look in tables, pages and the terminal.

Invariant: files hold fractions, people read percents; a number that is absent reads as a dash, never as 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from cotree.report.summary import EvalRow

ABSENT = "–"


def percent(fraction: float | None) -> str:
    """0.7417 -> "74.2", without the sign: the column's head has it."""
    return ABSENT if fraction is None else f"{100 * fraction:.1f}"


def interval(row: EvalRow) -> str:
    """The 95% interval in percent: "68.3–79.3"."""
    return f"{percent(row.low)}–{percent(row.high)}"


def paper_form(accuracy: float, no_answer: float) -> str:
    """A cell of the paper's tables, "87.4 (0.23%)": accuracy, and the ratio of no-answer outputs in parentheses."""
    ratio = f"{100 * no_answer:.2f}".rstrip("0").rstrip(".")
    return f"{percent(accuracy)} ({ratio}%)"


def group_name(score: Mapping[str, Any]) -> str:
    """Whose instructions were followed: "multi_if IF(En), turn 2"; without a turn it is the mean of all."""
    return f"{score['task']} {score['group']}" + (f", turn {score['turn']}" if score["turn"] else "")


def number(value: float | None) -> str:
    """A count or a mean: "1,234" and "61.4"."""
    if value is None:
        return ABSENT
    return f"{value:,}" if isinstance(value, int) else f"{value:,.1f}"


def signed(value: float | None) -> str:
    """A difference with its sign: "+3.5", "−12.0"."""
    return ABSENT if value is None else f"{value:+,.1f}".replace("-", "−")


def duration(seconds: float | None) -> str:
    """ "8.4 s", "4 min 10 s", "2 h 05 min"."""
    if seconds is None:
        return ABSENT
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def sparkline(values: Sequence[float], width: int = 12) -> str:
    """The course of some numbers between their least and their greatest, in at most `width` characters: "▁▄▆█"."""
    each = math.ceil(len(values) / width)
    means = [fmean(values[at : at + each]) for at in range(0, len(values), each)]
    low, span = min(means), max(means) - min(means)
    return "".join("▁▂▃▄▅▆▇█"[round(7 * (mean - low) / span) if span else 0] for mean in means)


def listed(names: Sequence[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
