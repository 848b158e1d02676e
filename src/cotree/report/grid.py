"""A grid of cells, written for the terminal (rich), Markdown, LaTeX and HTML.

No name of a model, task or answer can be taken for markup or drive a terminal: every form escapes every cell.
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
# What each form, written by the template `table.FORM.jinja`, has instead of its special characters.
_ESCAPES = {
    # Outside of code spans these begin emphasis, links, tags, cells or maths.
    "markdown": str.maketrans({sign: f"\\{sign}" for sign in "\\`*_[]<>|$#~&"}),
    "latex": str.maketrans(_LATEX | {sign: f"\\{sign}" for sign in "{}$&#_%"}),
    "html": {},  # its template escapes
}


@dataclass(frozen=True)
class Grid:
    """Rows of cells under sections. A row may be shorter than the head; its last cells are empty.

    title: said above, "" for none. head: of the columns, the first of them that of a row's name; `\\n` where a narrow
    head may break. sections: by name; a grid without sections has one, whose name is "".
    named: what a section is, for the forms in which it is a column ("task").
    """

    head: Row
    sections: dict[str, list[Row]]
    title: str = ""
    named: str = ""

    def to_rows(self, written: Callable[[str], str] = one_line) -> list[Row]:
        """The head and the rows, with the section as the first column where there are several.

        Args:
            written: how a form writes the text of a cell.
        """
        rows = [(self.named, *self.head), *((name, *row) for name, rows in self.sections.items() for row in rows)]
        rows = [row if any(self.sections) else row[1:] for row in rows]
        padding = [""] * len(rows[0])
        return [tuple(written(cell) for cell in [*row, *padding][: len(padding)]) for row in rows]


def write_grids(grids: Sequence[Grid], notes: Sequence[str], form: str) -> RenderableType:
    """Grids one below the other, then the notes.

    Returns:
        A string; for the form `terminal` something that rich prints.

    Raises:
        UsageError: no such form.
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
    """Rich tables that fit 80 columns where their cells do; sections are bold lines."""
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
    """An empty rich table without a frame. left: so many of its first columns are not of numbers.

    vertical: where the short cells of a row stand: "bottom" suits heads of several lines, "top" rows of several.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for place, name in enumerate(head):
        table.add_column(Text(name), justify="left" if place < left else "right", vertical=vertical, overflow="fold")
    return table
