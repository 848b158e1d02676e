"""Print lines and progress: a live bar on a terminal, a plain line every few seconds elsewhere, nothing with `quiet`.

Invariant: text of models, servers and files cannot control the terminal, neither through `Output` nor through stderr
(`SafeStream`). Lines also go to the run's `log.jsonl`.
"""

from __future__ import annotations

import json
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from cotree.base.numbers import duration

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.segment import Segment

Update = Callable[[int, int, str], None]  # (done, total, remark of a few lines)
_PLAIN_SECONDS = 15.0  # between plain lines while progress changes
_SILENT_SECONDS = 60.0  # without progress before a line says that work continues
# Control characters except line feed and tab, other line ends, Unicode direction marks, lone surrogates.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_OF_PROGRESS_BARS = re.compile("\r|(\x1b\\[A)+\\Z")


def terminal_safe(text: str) -> str:
    """Replace all characters that could control a terminal."""
    return _UNSAFE.sub("\ufffd", text)


def one_line(text: str) -> str:
    """Join the text to one line, without characters that could control a terminal."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


class SafeStream:
    """Wraps stderr so that errors, tracebacks, warnings and logs cannot control the terminal.

    Lets progress bars pass: a carriage return before a line, and cursor movements.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write `terminal_safe(text)`."""
        start = found.end() if (found := _OF_PROGRESS_BARS.match(text)) else 0
        return self._stream.write(text[:start] + terminal_safe(text[start:]))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _Safe:
    """A rich renderable whose text is made `terminal_safe`."""

    def __init__(self, shown: RenderableType) -> None:
        self.shown = shown

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        for segment in console.render(self.shown, options):
            yield segment if segment.control else segment._replace(text=terminal_safe(segment.text))


class Output:
    """Prints a command's lines and progress.

    log: a file that receives every line as a JSON object with the time. on_update: called with (done, total) at each
    change of a counter.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet
        self.log: Path | None = None
        self.on_update: Callable[[int, int], None] = lambda done, total: None

    def print(self, line: RenderableType = "") -> None:
        """Print a text or a rich table; texts also go to the log, whose write errors are ignored."""
        if isinstance(line, str):
            line = terminal_safe(line)
            if self.log is not None:
                entry = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "line": line.strip()}
                with suppress(OSError), self.log.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(entry, ensure_ascii=False) + "\n")
        if self.quiet:
            return
        from rich.console import Console

        shown = line if isinstance(line, str) else _Safe(line)
        console = Console(highlight=False, markup=False, soft_wrap=not sys.stdout.isatty())
        if console.soft_wrap and not isinstance(line, str):  # rich assumes 80 columns in files and pipes
            widest = console.measure(line, options=console.options.update(width=1000)).maximum
            console.width = max(console.width, widest)
        console.print(shown)

    @contextmanager
    def progress(self, title: str) -> Iterator[Update]:
        """Show a counter while the block runs; yields a function that sets done, total and a remark of a few lines."""
        if self.quiet:
            yield lambda done, total, remark: self.on_update(done, total)
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

        title_column = TextColumn("  {task.description}", markup=False)
        bar = Progress(title_column, BarColumn(30), MofNCompleteColumn(), TimeRemainingColumn())
        shown = bar.add_task(title, total=None)
        with Live(_Safe(bar), transient=True) as live:

            def update(done: int, total: int, remark: str) -> None:
                bar.update(shown, completed=done, total=total)
                live.update(_Safe(Group(bar, Padding(Text(remark), (0, 0, 0, 4)))))
                self.on_update(done, total)

            yield update

    def _lines(self, title: str) -> Iterator[Update]:
        started = printed = time.monotonic()
        line, ended = f"  {title}", threading.Event()

        def show(line: str) -> None:
            nonlocal printed
            printed = time.monotonic()
            self.print(line)

        def update(done: int, total: int, remark: str) -> None:
            nonlocal line
            words = ", ".join(" ".join(part.split()) for part in remark.splitlines())
            line = f"  {title} {done}/{total}  {words}"
            self.on_update(done, total)
            if time.monotonic() - printed >= _PLAIN_SECONDS:
                show(line)

        def watch() -> None:
            while not ended.wait(_SILENT_SECONDS / 4):
                if time.monotonic() - printed >= _SILENT_SECONDS:
                    show(f"{line.rstrip()}  (working for {duration(time.monotonic() - started)})")

        watching = threading.Thread(target=watch, daemon=True)
        watching.start()
        try:
            yield update
        finally:
            ended.set()
            watching.join()
