"""Evaluations in the paper's table form, `87.4 (0.23%)`: for the terminal, Markdown, LaTeX and HTML.

Invariants: a row is a model and a column a task, or one of the paper's IF groups; below stands what a reader needs to
judge the numbers; and no name of a model or task can be taken for markup.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cotree.base.errors import UsageError
from cotree.base.numbers import ABSENT, group_name, number, paper_form, percent
from cotree.eval.results import Evaluation
from cotree.models.wire import one_line

_WORDS = {"\\": "backslash", "~": "asciitilde", "^": "asciicircum", "<": "less", ">": "greater"}
_LATEX = str.maketrans(
    {sign: rf"\text{word}{{}}" for sign, word in _WORDS.items()} | {sign: f"\\{sign}" for sign in "{}$&#_%"}
)


def paper_table(evaluations: Sequence[Evaluation], form: str = "terminal") -> str:
    """The table of these models and its notes, ready to print.

    Raises:
        UsageError: no such format.
    """
    if form not in _FORMS:
        raise UsageError(f"unknown format `{form}`; known: {', '.join(_FORMS)}")
    escape, layout = _FORMS[form]
    cells = [_cells(evaluation) for evaluation in evaluations]
    columns = list(dict.fromkeys(column for found in cells for column in found))
    grid = [["model", *columns]]
    for evaluation, found in zip(evaluations, cells, strict=True):
        grid.append([evaluation.model, *(found.get(column, ABSENT) for column in columns)])
    notes = ["accuracy in %, in parentheses the ratio of no-answer outputs", *_notes(evaluations)]
    # What a model says must not drive the terminal, nor be markup.
    shown = [[escape(one_line(cell)) for cell in row] for row in grid]
    return "\n".join(layout(shown, [escape(one_line(note)) for note in notes]))


def _cells(evaluation: Evaluation) -> dict[str, str]:
    """Column -> cell. A task of instructions has a column for each group, with the mean of Multi-IF's four shares."""
    groups: dict[str, Mapping[str, Any]] = {}
    for score in evaluation.instructions:
        # The mean over turns comes last, where there are several.
        groups[f"{score['task']} {score['group']}"] = score
    followed = {score["task"] for score in evaluation.instructions}
    cells = {
        row["task"]: paper_form(row["accuracy"], row["no_answer"])
        for row in evaluation.rows
        if row["task"].partition(", turn ")[0] not in followed
    }
    return cells | {name: paper_form(s["average"], s["no_answer"]) for name, s in groups.items()}


def _notes(evaluations: Sequence[Evaluation]) -> list[str]:
    """What stands behind each number, a line a row; then what the constant answers score."""
    lines = []
    for evaluation in evaluations:
        for row in evaluation.rows:
            lines.append(f"{evaluation.model}, {row['task']}: {_told(row)}")
            for family, found in row["families"].items():
                best = f", {percent(found['optimal'])}% of the correct plans optimal" if "optimal" in found else ""
                cell = paper_form(found["accuracy"], found["no_answer"])
                lines.append(f"{evaluation.model}, {row['task']}, {family}: {cell} of {found['n']}{best}")
        for s in evaluation.instructions:
            shares = (percent(s[f"{of}_{how}"]) for of in ("prompt", "instruction") for how in ("strict", "loose"))
            told = "followed, strict / loose: prompts {} / {}, instructions {} / {}".format(*shares)
            lines.append(f"{evaluation.model}, {group_name(s)}: {told}")
    constant = {(b["task"], b["answer"], b["accuracy"]) for e in evaluations for b in e.baselines}
    return lines + [f"{task}: always “{answer}” scores {percent(share)}" for task, answer, share in sorted(constant)]


def _told(row: Mapping[str, Any]) -> str:
    """One row in words."""
    samples, temperature, decoding = row["samples"], row["temperature"], row["decoding"]
    asked = f"{samples} sample{'s' if samples > 1 else ''} each at temperature {temperature:g}"
    asked = asked if temperature else "greedy"
    asked += f", top_p {row['top_p']:g}" if row["top_p"] < 1 else ""
    asked += f", {decoding}" if decoding else ""
    parts = [f"{_with_interval([row['accuracy'], row['low'], row['high']])} of {row['n']}, {asked}"]
    parts.append(f"lenient {percent(row['lenient'])}")
    of = " of a tree" if decoding.startswith("mcts") else ""
    parts += [f"Test@{k}{of} {_with_interval(share)}" for k, share in row["test_at"].items()]
    if row["majority"] is not None:
        parts.append(f"maj@{samples} {_with_interval(row['majority'])}")
    split = (percent(row[name]) for name in ("loop", "truncated", "finished_without_answer"))
    parts.append("no answer {}% = loop {} + cut off {} + finished {}".format(percent(row["no_answer"]), *split))
    tokens = "/".join(str(row[name]) for name in ("tokens_p50", "tokens_p90", "tokens_p99"))
    parts.append(f"{number(float(row['mean_tokens']))} tokens (p50/p90/p99 {tokens})")
    parts.append(f"max_tokens {row['max_tokens']}")
    if row["detectable"] is not None:
        parts.append(f"differences below {percent(row['detectable'])} points cannot be expected to show")
    return "; ".join(parts)


def _with_interval(share: Sequence[float]) -> str:
    value, low, high = map(percent, share)
    return f"{value} [{low}–{high}]"


def _terminal(grid: Sequence[Sequence[str]], notes: Sequence[str]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*grid, strict=True)]
    rows = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in grid]
    return [rows[0], "-" * len(rows[0]), *rows[1:], "", *notes]


def _markdown(grid: Sequence[Sequence[str]], notes: Sequence[str]) -> list[str]:
    rows = ["| " + " | ".join(row) + " |" for row in grid]
    return [rows[0], "|---|" + "---:|" * (len(grid[0]) - 1), *rows[1:], "", *(f"- {note}" for note in notes)]


def _latex(grid: Sequence[Sequence[str]], notes: Sequence[str]) -> list[str]:
    # The `\\` before a row takes a `[` or `*` that follows for its own argument.
    safe = ([rf"\textnormal{{}}{row[0]}" if row[0].startswith(("[", "*")) else row[0], *row[1:]] for row in grid)
    head, *rows = (" & ".join(row) + r" \\" for row in safe)
    begin = r"\begin{tabular}{l" + "r" * (len(grid[0]) - 1) + "}"
    rule = r"\hline"
    return [begin, rule, head, rule, *rows, rule, r"\end{tabular}", "", *(rf"{note}\par" for note in notes)]


def _html(grid: Sequence[Sequence[str]], notes: Sequence[str]) -> list[str]:
    head, *rows = ("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in grid)
    told = (f"<li>{note}</li>" for note in notes)
    return ["<table>", f"<thead>{head.replace('td>', 'th>')}</thead>", *rows, "</table>", "<ul>", *told, "</ul>"]


# Outside of code spans these begin emphasis, links, tags, cells or maths.
_MARKDOWN = str.maketrans({sign: f"\\{sign}" for sign in "\\`*_[]<>|$#~&"})
_FORMS: Mapping[str, tuple[Callable[[str], str], Callable[..., list[str]]]] = {
    "terminal": (str, _terminal),
    "markdown": (lambda text: text.translate(_MARKDOWN), _markdown),
    "latex": (lambda text: text.translate(_LATEX), _latex),
    "html": (html.escape, _html),
}
