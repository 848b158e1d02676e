"""Write the HTML report of a run, and the comparison page of two runs, as self-contained files.

Invariant: a page loads nothing, and shows only data from the run folders. Model output is untrusted: templates escape
everything but our own SVG, and a content security policy forbids requests and all scripts but the one that draws the
trees (`web/src/report.ts`), by its hash.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from cotree.base.atomic import write_text
from cotree.base.errors import UsageError
from cotree.base.numbers import interval, number, percent, signed
from cotree.base.run_folder import RunFolder, find_run
from cotree.eval.compare import compare_row, samples_by_row
from cotree.report.graph import draw_graph
from cotree.report.grid import Grid, Row, write_grids
from cotree.report.plots import training_figures
from cotree.report.summary import EvalRow, Summary, read_log, summarize_run
from cotree.report.table import make_table, unique_names
from cotree.report.templates import rendered, sentence, setting
from cotree.report.tree_json import tree_json
from cotree.report.tree_view import trees_to_show
from cotree.search.index import looping_leaves

PAPER = "https://arxiv.org/abs/2503.01461"
_TREES_SHOWN = 3
_BUILT = Path(__file__).parents[1] / "view" / "static"  # output of `make web`


def write_report(run: RunFolder, summary: Summary | None = None, out: Path | None = None) -> Path:
    """Write the report of a run atomically, by default to `report.html` in its folder; returns its path.

    Args:
        summary: of the run; by default read from its node.json files.
        out: another output file.

    Raises:
        UsageError: a file cannot be read, or is of another version.
    """
    summary = summary or summarize_run(run)
    logs = {name: read_log(run.node(f"students/{name}").path / "log.jsonl") for name in summary.names("students")}
    students = {node.partition("/")[2]: record for node, record in run.nodes().items() if node.startswith("students/")}
    methods = {name: str(record.parts.get("method", "")) for name, record in students.items()}
    trees = trees_to_show(run, summary.names("trees"), _TREES_SHOWN)
    script = built("report.js")
    with _one_line_for_another_version(run.path):
        page = rendered(
            "report.html.jinja",
            summary=summary,
            recipe=(run.path / "recipe.yaml").read_text(encoding="utf-8"),
            paper=PAPER,
            graph=_graph(summary),
            table=make_table([(summary.name, summary)]),
            figures=training_figures(logs, methods),
            warnings=[(name, line) for name, log in logs.items() for line in log if line.get("warning")],
            trees=trees,
            trees_json=_in_a_script([tree_json(view, looping_leaves(view.tree)) for view in trees]),
            tree_css=built("report.css"),
            script=script,
            script_hash=f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}",
        )
    return _write_page(out or run.path / "report.html", page)


def write_comparison(paths: Sequence[Path], out: Path) -> Path:
    """Write a page that compares two runs: changed settings, accuracies with paired differences, questions gained and
    lost, and both graphs; returns its path.

    Args:
        paths: two run folders.
        out: the output file.

    Raises:
        UsageError: not two run folders, or a file cannot be read.
    """
    if len(paths) != 2:
        raise UsageError(f"name two runs to compare, not {len(paths)}, or one whose report.html is written again")
    runs = [find_run(path) for path in paths]
    called = unique_names(paths)
    names = [called[path] for path in paths]
    summaries = [summarize_run(run) for run in runs]
    grid, notes, questions = _comparison(runs, names, summaries)
    changes = _changed_settings(runs, names)
    graphs = []
    for run, name, summary in zip(runs, names, summaries, strict=True):
        with _one_line_for_another_version(run.path):
            graphs.append((name, _graph(summary)))
    table = write_grids([grid], notes, "html")
    page = rendered(
        "comparison.html.jinja",
        names=names,
        changes=write_grids([changes], [], "html") if changes.sections[""] else "",
        table=table,
        questions=questions,
        graphs=graphs,
        tree_css=built("report.css"),
    )
    return _write_page(out, page)


def _changed_settings(runs: Sequence[RunFolder], names: Sequence[str]) -> Grid:
    """The settings that differ between two recipes, by dotted keys; "–" if a recipe lacks one."""
    written = [_flat(yaml.safe_load((run.path / "recipe.yaml").read_text(encoding="utf-8"))) for run in runs]
    keys = [key for key in dict.fromkeys([*written[0], *written[1]]) if key != "name"]
    rows: list[Row] = [(key, *(each.get(key, "–") for each in written)) for key in keys]
    return Grid(("setting", *names), {"": [row for row in rows if row[1] != row[2]]})


def _flat(value: Any, key: str = "") -> dict[str, str]:
    """Flatten a recipe's value to dotted keys: {"students.dpo.beta": "0.1"}."""
    if isinstance(value, Mapping) and value:
        parts = (_flat(inner, f"{key}.{name}" if key else str(name)) for name, inner in value.items())
        return {name: text for part in parts for name, text in part.items()}
    return {key: setting(value)}


def _comparison(
    runs: Sequence[RunFolder], names: Sequence[str], summaries: Sequence[Summary]
) -> tuple[Grid, list[str], list[tuple[str, list[str]]]]:
    """Compare two runs: a table by task with both accuracies and the paired difference, reasons for missing
    differences, and report lines per row with the questions gained and lost.

    A row is one model (or seed of a student) in evaluations of the same name.
    """
    rows: dict[str, dict[tuple[str, str], dict[int, EvalRow]]] = {}
    for place, summary in enumerate(summaries):
        for row in summary.eval:
            rows.setdefault(row.task, {}).setdefault((row.evaluation, row.model), {})[place] = row
    sections: dict[str, list[Row]] = {}
    notes: list[str] = []
    questions: list[tuple[str, list[str]]] = []
    read = cache(samples_by_row)
    for task, models in rows.items():
        for (evaluation, model), found in models.items():
            label = f"{model} ({evaluation})"
            cells = [_accuracy(found.get(place)) for place in (0, 1)]
            if len(found) == 2:
                try:
                    both = [read(run.node(f"evaluations/{evaluation}", model).path).get(task, {}) for run in runs]
                    compared = compare_row(task, both[0], both[1], names)
                    between = f"{signed(100 * compared.low)} to {signed(100 * compared.high)}"
                    gained = sum(after > before for before, after in compared.changed.values())
                    counts = map(number, (gained, len(compared.changed) - gained, compared.n))
                    cells += [signed(100 * compared.difference), between, f"{compared.p_value:.3g}", *counts]
                    if compared.changed:
                        questions.append((f"{label} on {task}: gained and lost", compared.lines()))
                except UsageError as error:
                    notes.append(f"{label} on {task} is not compared: {error}")
            sections.setdefault(task, []).append((label, *cells))
    head = ("model", *(f"{name}, %" for name in names), "difference", "95% interval", "p", "gained", "lost", "n")
    return Grid(head, sections, named="task"), notes, questions


def _accuracy(row: EvalRow | None) -> str:
    """An accuracy with its 95% interval, in percent."""
    return "–" if row is None else f"{percent(row.accuracy)} ({interval(row.low, row.high)})"


def _graph(summary: Summary) -> str:
    """The SVG graph of a run's nodes."""
    return draw_graph(summary.nodes, {node.name: sentence("caption", summary, node.name) for node in summary.nodes})


@contextmanager
def _one_line_for_another_version(path: Path) -> Iterator[None]:
    """Convert errors in the block about missing values in a run's files to a one-line UsageError."""
    import jinja2

    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, jinja2.UndefinedError) as error:
        fix = "run its recipe again with this one"
        raise UsageError(f"{path}: its files are not those of this version of cotree ({error!r}); {fix}") from None


@cache
def built(name: str) -> str:
    """Read a file built by `make web`."""
    return (_BUILT / name).read_text(encoding="utf-8")


def _in_a_script(value: Any) -> str:
    """JSON escaped for use inside a <script> element."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")


def _write_page(path: Path, page: str) -> Path:
    # Model output may contain lone surrogates, which have no UTF-8 encoding.
    write_text(path, page.encode("utf-8", "replace").decode("utf-8"))
    return path
