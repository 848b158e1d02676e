"""Tables rendered for the terminal (rich), Markdown, LaTeX and HTML.

Every format escapes every cell, so names of models, tasks or answers cannot inject markup or control the terminal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from cotree.base.errors import UsageError
from cotree.base.progress import one_line
from cotree.report.templates import rendered

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

Row = tuple[str, ...]
_LATEX_WORDS = {"\\": "backslash", "~": "asciitilde", "^": "asciicircum", "<": "less", ">": "greater"}
_LATEX = {sign: rf"\text{word}{{}}" for sign, word in _LATEX_WORDS.items()}
# {format, rendered by `table.FORMAT.jinja`: {special character: its escape}}
_ESCAPES = {
    # Characters that start emphasis, links, tags, cells or maths.
    "markdown": str.maketrans({sign: f"\\{sign}" for sign in "\\`*_[]<>|$#~&"}),
    "latex": str.maketrans(_LATEX | {sign: f"\\{sign}" for sign in "{}$&#_%"}),
    "html": {},  # its template escapes
}


@dataclass(frozen=True)
class Grid:
    """A table of rows grouped in sections. A row may be shorter than the head; its last cells are empty.

    title: "" for none. head: column names, the first for the rows' names; `\\n` marks possible line breaks.
    sections: {name: rows}; a table without sections has one named "".
    named: the name of the section column in formats that have one ("task").
    """

    head: Row
    sections: dict[str, list[Row]]
    title: str = ""
    named: str = ""

    def to_rows(self, written: Callable[[str], str] = one_line) -> list[Row]:
        """Head and rows, with the section as the first column if there are several.

        Args:
            written: escapes a cell for the format.
        """
        rows = [(self.named, *self.head), *((name, *row) for name, rows in self.sections.items() for row in rows)]
        rows = [row if any(self.sections) else row[1:] for row in rows]
        padding = [""] * len(rows[0])
        return [tuple(written(cell) for cell in [*row, *padding][: len(padding)]) for row in rows]


def write_grids(grids: Sequence[Grid], notes: Sequence[str], form: str) -> RenderableType:
    """Render grids one below the other, then the notes.

    Returns:
        A string; for `terminal` a rich renderable.

    Raises:
        UsageError: unknown format.
    """
    if form == "terminal":
        return _terminal(grids, notes)
    if form not in _ESCAPES:
        raise UsageError(f"unknown format `{form}`; known: terminal, {', '.join(_ESCAPES)}")

    def escaped(text: str) -> str:
        return one_line(text).translate(_ESCAPES[form])

    tables = [(escaped(grid.title), grid.to_rows(escaped), 2 if any(grid.sections) else 1) for grid in grids]
    return rendered(f"table.{form}.jinja", grids=tables, notes=[escaped(note) for note in notes]).rstrip()


def _terminal(grids: Sequence[Grid], notes: Sequence[str]) -> RenderableType:
    """Render as rich tables, within 80 columns if possible; sections are bold lines."""
    from rich.console import Group
    from rich.text import Text  # a Text, so that brackets in a name are no markup

    parts: list[RenderableType] = []
    for grid in grids:
        if grid.title:
            parts.append(Text(f"\n{one_line(grid.title)}", style="bold"))
        table = terminal_table(grid.head, left=1)
        for name, rows in grid.sections.items():
            if name:
                table.add_row(Text(one_line(name), style="bold"))
            for row in rows:
                table.add_row(*(Text(one_line(cell)) for cell in row))
            table.add_section()
        parts.append(table)
    if notes:
        parts += [Text(""), *(Text(one_line(note)) for note in notes)]
    return Group(*parts)


def terminal_table(head: Sequence[str], left: int, vertical: Literal["bottom", "top"] = "bottom") -> Table:
    """Create an empty rich table without a frame. left: number of left-aligned (text) columns.

    vertical: alignment of short cells: "bottom" for multi-line heads, "top" for multi-line rows.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for place, name in enumerate(head):
        table.add_column(Text(name), justify="left" if place < left else "right", vertical=vertical, overflow="fold")
    return table
