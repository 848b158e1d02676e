"""Show how far a stage is: a live bar on a terminal, a plain line every few seconds without one.

Invariant: nothing is printed with `quiet`, and what is printed is never needed to understand the result; no word of a
model or a data set drives the terminal. What is said is also kept in the run's `log.jsonl`, with the time.
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

Update = Callable[[int, int, str], None]  # done, wanted, a remark of a few lines
_PLAIN_SECONDS = 15.0
# Control characters but line feed and tab, marks that turn the direction of writing, halves of characters.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def harmless(text: str) -> str:
    """A text as a terminal may show it."""
    return _UNSAFE.sub("\ufffd", text)


class Output:
    """Where a run's words go. `say` prints a line; `progress` shows a counter while a block runs.

    log: a file that keeps what is said, a JSON line each. on_update: called whenever a counter moves.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet
        self.log: Path | None = None
        self.on_update: Callable[[], None] = lambda: None

    def say(self, line: object = "") -> None:
        """A line, or a rich table."""
        if isinstance(line, str):
            line = harmless(line)
            self._keep(line)
        if self.quiet:
            return
        from rich.console import Console

        Console(highlight=False, markup=False, soft_wrap=not sys.stdout.isatty()).print(line)

    @contextmanager
    def progress(self, title: str) -> Iterator[Update]:
        """A counter; the yielded function sets what is done, how much there is, and a remark of a few lines."""
        if self.quiet:
            yield lambda done, total, remark: self.on_update()
        elif sys.stdout.isatty():
            yield from self._bar(title)
        else:
            yield from self._lines(title)

    def _bar(self, title: str) -> Iterator[Update]:
        from rich.console import Group
        from rich.live import Live
        from rich.padding import Padding
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
        from rich.text import Text

        title_of = TextColumn("  {task.description}", markup=False)
        bar = Progress(title_of, BarColumn(30), MofNCompleteColumn(), TimeRemainingColumn())
        shown = bar.add_task(title, total=None)
        with Live(bar, transient=True) as live:

            def update(done: int, total: int, remark: str) -> None:
                bar.update(shown, completed=done, total=total)
                live.update(Group(bar, Padding(Text(harmless(remark)), (0, 0, 0, 4))))
                self.on_update()

            yield update

    def _lines(self, title: str) -> Iterator[Update]:
        last = time.monotonic()

        def update(done: int, total: int, remark: str) -> None:
            nonlocal last
            self.on_update()
            if time.monotonic() - last >= _PLAIN_SECONDS:
                last = time.monotonic()
                words = ", ".join(" ".join(part.split()) for part in remark.splitlines())
                line = harmless(f"  {title} {done}/{total}  {words}")
                self._keep(line)
                print(line, flush=True)

        yield update

    def _keep(self, line: str) -> None:
        """Append to the log; a log that cannot be written stops nothing."""
        if self.log is not None:
            entry = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "line": line.strip()}
            with contextlib.suppress(OSError), self.log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry, ensure_ascii=False) + "\n")
