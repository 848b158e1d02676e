"""What went into a dataset and what was left out, by reason: for its card, the terminal, and the error of no rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from importlib.resources import files

import yaml

from cotree.base.rows import Row

# The columns that count the tokens of a part of a row, by the part; a pair's prefix is in both of its sides.
_TOKENS = {"completion": "length_tokens"} | {part: f"{part}_tokens" for part in ("chosen", "rejected", "prefix")}


# By name: {clause: what follows the number of chains or rows, remedy: what would let more of them in}.
REASONS: dict[str, dict[str, str]] = yaml.safe_load((files("cotree.data") / "reasons.yaml").read_text("utf-8"))


@dataclass
class DatasetCounts:
    """The numbers of one dataset. Every judged chain of its trees is in a row or in `chains_left_out`, and every
    candidate row is written or in `rows_left_out`.

    Attributes:
        kind: of its rows: sft, dpo, step_pairs or stepwise.
        rows: how many were written. tasks: how many of each task.
        verified: rows of a file that a task judged correct; None where no task judged them.
        trees, chains: how many were read; a chain is a path to a judged leaf. Both are 0 for rows of a file.
        chains_left_out, rows_left_out: how many, by reason (`REASONS`).
        completion_tokens: of all rows together; of pairs both sides.
        mean_tokens: of a row's `completion`, or of its `chosen`, `rejected` and the `prefix` that these two share.
        faults: what is wrong with the first malformed rows of a file.
        columns_left_out: of a file, those that our rows do not have.
    """

    kind: str
    rows: int = 0
    tasks: dict[str, int] = field(default_factory=dict)
    verified: int | None = None
    trees: int = 0
    chains: int = 0
    chains_left_out: dict[str, int] = field(default_factory=dict)
    rows_left_out: dict[str, int] = field(default_factory=dict)
    completion_tokens: int = 0
    mean_tokens: dict[str, float] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    columns_left_out: list[str] = field(default_factory=list)

    def leave_out(self, reason: str, *, chains: int = 0, rows: int = 0) -> None:
        """Count chains that become no row, or candidate rows that are not written."""
        assert reason in REASONS
        for left_out, number in ((self.chains_left_out, chains), (self.rows_left_out, rows)):
            if number:
                left_out[reason] = left_out.get(reason, 0) + number

    def add_written(self, statistics: ColumnStatistics) -> None:
        """Fill in the numbers of the rows that were written."""
        self.rows, self.tasks = statistics.tasks.total(), dict(sorted(statistics.tasks.items()))
        totals = {part: statistics.total(name) for part, name in _TOKENS.items() if name in statistics.values}
        self.mean_tokens = {part: total / self.rows for part, total in totals.items()}
        self.completion_tokens = int(sum(total for part, total in totals.items() if part != "prefix"))

    def lines(self) -> list[str]:
        """For the terminal: what was written, and what was left out."""
        tasks = ", ".join(f"{task} {number}" for task, number in self.tasks.items())
        left_out = ", ".join(f"{reason} {number}" for reason, number in self._left_out())
        verified = "" if self.verified is None else f", {self.verified} of them verified"
        lines = [f"{self.rows} {self.kind} rows ({tasks}){verified}", f"left out: {left_out or 'nothing'}"]
        lines += [f"the first malformed row: {fault}" for fault in self.faults[:1]]
        if self.columns_left_out:
            lines.append(f"columns that are not kept: {', '.join(self.columns_left_out)}")
        return lines

    def why_empty(self) -> str:
        """One line about a dataset without rows: where its chains and rows went, and what would help most."""
        left_out = self._left_out()
        if not left_out:
            nothing = f"{self.trees} trees with no judged chain" if self.trees else "no trees and no rows of a file"
            return f"no rows, because there is nothing to choose from: {nothing}"
        source = f"of {self.chains} chains in {self.trees} trees" if self.trees else "of the file's rows"
        clauses = ", ".join(f"{number} {REASONS[reason]['clause']}" for reason, number in left_out)
        first = f" (the first: {self.faults[0]})" if self.faults else ""
        return f"no rows: {source}, {clauses}{first}; {REASONS[left_out[0][0]]['remedy']}"

    def _left_out(self) -> list[tuple[str, int]]:
        """Reasons and numbers of chains, then of rows, the largest number first."""
        chains, rows = Counter(self.chains_left_out), Counter(self.rows_left_out)
        return [*chains.most_common(), *rows.most_common()]


@dataclass
class ColumnStatistics:
    """How the values of a dataset's columns are distributed, counted while its rows are written; memory grows with no
    row. `values` has each column's values with their numbers, `first` the first row of each task."""

    tasks: Counter[str] = field(default_factory=Counter)
    values: dict[str, Counter[float]] = field(default_factory=dict)
    first: dict[str, Row] = field(default_factory=dict)

    def watch(self, rows: Iterable[Row]) -> Iterator[Row]:
        """Pass rows on and count them; fractions are counted in hundredths."""
        for row in rows:
            self.tasks[row["task"]] += 1
            self.first.setdefault(row["task"], row)
            for name, value in row.items():
                if isinstance(value, int | float) and not name.endswith(("_id", "_leaf")):
                    self.values.setdefault(name, Counter())[round(value, 2)] += 1
            yield row

    def total(self, column: str) -> float:
        """The sum of a column's values."""
        return sum(value * number for value, number in self.values.get(column, {}).items())
