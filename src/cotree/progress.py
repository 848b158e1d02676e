"""Show how far a stage is: a live bar on a terminal, a plain line every few seconds without one.

Invariant: nothing is printed with `quiet`, and what is printed is never needed to understand the result.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Update = Callable[[int, int, str], None]  # done, wanted, a short remark
_PLAIN_SECONDS = 15.0


class Output:
    """Where a run's words go. `say` prints a line; `progress` shows a counter while a block runs."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet

    def say(self, line: object = "") -> None:
        """A line, or a rich table."""
        if self.quiet:
            return
        from rich.console import Console

        Console(highlight=False, markup=False, soft_wrap=not sys.stdout.isatty()).print(line)

    @contextmanager
    def progress(self, title: str) -> Iterator[Update]:
        """A counter; the yielded function sets what is done, how much there is, and a short remark."""
        if self.quiet:
            yield lambda done, total, remark: None
        elif sys.stdout.isatty():
            yield from self._bar(title)
        else:
            yield from self._lines(title)

    def _bar(self, title: str) -> Iterator[Update]:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("  {task.description}"), BarColumn(30), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, TextColumn("{task.fields[remark]}"), transient=True) as bar:
            shown = bar.add_task(title, total=None, remark="")
            yield lambda done, total, remark: bar.update(shown, completed=done, total=total, remark=remark)

    def _lines(self, title: str) -> Iterator[Update]:
        last = time.monotonic()

        def update(done: int, total: int, remark: str) -> None:
            nonlocal last
            if time.monotonic() - last >= _PLAIN_SECONDS:
                last = time.monotonic()
                print(f"  {title} {done}/{total}  {remark}", flush=True)

        yield update
