"""Format numbers for tables, pages and the terminal: fractions in percent, a dash for None."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

ABSENT = "–"


def percent(fraction: float | None) -> str:
    """0.7417 -> "74.2", without the percent sign, which is in the column head."""
    return ABSENT if fraction is None else f"{100 * fraction:.1f}"


def interval(low: float, high: float) -> str:
    """An interval of fractions in percent: "68.3–79.3"."""
    return f"{percent(low)}–{percent(high)}"


def paper_form(accuracy: float, no_answer: float) -> str:
    """A cell of the paper's tables, "87.4 (0.23%)": accuracy, and the share of outputs without an answer."""
    ratio = f"{100 * no_answer:.2f}".rstrip("0").rstrip(".")
    return f"{percent(accuracy)} ({ratio}%)"


def group_name(task: str, group: str, turn: int) -> str:
    """The name of an instruction group: "multi_if IF(En), turn 2"; without the turn for 0, the mean over turns."""
    return f"{task} {group}" + (f", turn {turn}" if turn else "")


def number(value: float | None) -> str:
    """A count or a mean: "1,234", "61.4"."""
    if value is None:
        return ABSENT
    return f"{value:,}" if isinstance(value, int) else f"{value:,.1f}"


def counted(n: int, noun: str) -> str:
    """A count with its noun: "1 rollout", "1,234 rollouts"."""
    return f"{number(n)} {noun}{'s' if n != 1 else ''}"


def signed(value: float | None) -> str:
    """A difference with its sign: "+3.5", "−12.0"."""
    return ABSENT if value is None else f"{value:+,.1f}".replace("-", "−")


def duration(seconds: float | None) -> str:
    """Seconds in words: "8.4 s", "4 min 10 s", "2 h 05 min"."""
    if seconds is None:
        return ABSENT
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def sparkline(values: Sequence[float], width: int = 12) -> str:
    """A one-line plot of a series in at most `width` characters, scaled from minimum to maximum: "▁▄▆█"."""
    each = math.ceil(len(values) / width)
    means = [fmean(values[at : at + each]) for at in range(0, len(values), each)]
    low, span = min(means), max(means) - min(means)
    return "".join("▁▂▃▄▅▆▇█"[round(7 * (mean - low) / span) if span else 0] for mean in means)
