"""What a run came to, for the terminal: its table, then a line or two for each node."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cotree.report.grid import write_grids
from cotree.report.summary import Summary
from cotree.report.table import make_table
from cotree.report.templates import lines, sentence

if TYPE_CHECKING:
    from rich.console import RenderableType


def summary_lines(summary: Summary) -> Iterator[RenderableType]:
    """The evaluation table with its notes; then what each search, dataset and training came to, and time and tokens."""
    if summary.eval:
        table = make_table([(summary.name, summary)])
        yield write_grids(table.grids(), (*table.notes, *table.limits()), "terminal")
        yield ""
    yield from lines("searches", summary)
    yield from (f"  {line}" for line in comparison_lines(summary.compared))
    yield from lines("datasets", summary)
    yield from lines("times", summary)


def comparison_lines(compared: Sequence[Mapping[str, Any]]) -> list[str]:
    """Ways of growing chains at equal generated tokens: what each found, and who is ahead where one is."""
    found = lines("compared", compared)
    return [*found, f"at equal tokens: {comparison_verdict(compared)}"] if found else []


def comparison_verdict(compared: Sequence[Mapping[str, Any]]) -> str:
    """Where one of two ways is ahead with 95% intervals that do not overlap; that none is, otherwise."""
    return sentence("verdict", compared)
