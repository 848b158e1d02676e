"""The pages: one self-contained report.html for a run, and one page for two runs compared.

Invariant: a page loads nothing, runs nothing and says nothing that is not in the run folders. Model text is untrusted:
the templates escape everything but our own drawings, and a content security policy forbids scripts and requests.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

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
from cotree.report.templates import rendered, sentence
from cotree.report.tree_view import trees_to_show

PAPER = "https://arxiv.org/abs/2503.01461"
_TREES_SHOWN = 3


def write_report(run: RunFolder, summary: Summary | None = None, out: Path | None = None) -> Path:
    """Write the report of a run, by default `report.html` in its folder, and return its path.

    The page is replaced in one step: a kill leaves the old one or the new one.

    Args:
        summary: of the run; by default it is read from its node.json files.
        out: the page's file, if it is to be another.

    Raises:
        UsageError: a file cannot be read, or is of another version.
    """
    summary = summary or summarize_run(run)
    logs = {name: read_log(run.node(f"students/{name}").path / "log.jsonl") for name in summary.names("students")}
    students = {node.partition("/")[2]: record for node, record in run.nodes().items() if node.startswith("students/")}
    methods = {name: str(record.parts.get("method", "")) for name, record in students.items()}
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
            trees=trees_to_show(run, summary.names("trees"), _TREES_SHOWN),
        )
    return _write_page(out or run.path / "report.html", page)


def write_comparison(paths: Sequence[Path], out: Path) -> Path:
    """Write one page that compares two runs and return its path: the rows of both with their differences, the graphs.

    Args:
        paths: two run folders.
        out: the file.

    Raises:
        UsageError: they are not two run folders, or a file of them cannot be read.
    """
    if len(paths) != 2:
        raise UsageError(f"name two runs to compare, not {len(paths)}, or one whose report.html is written again")
    runs = [find_run(path) for path in paths]
    called = unique_names(paths)
    names = [called[path] for path in paths]
    summaries = [summarize_run(run) for run in runs]
    grid, notes = _comparison(runs, names, summaries)
    graphs = []
    for run, name, summary in zip(runs, names, summaries, strict=True):
        with _one_line_for_another_version(run.path):
            graphs.append((name, _graph(summary)))
    table = write_grids([grid], notes, "html")
    return _write_page(out, rendered("comparison.html.jinja", names=names, table=table, graphs=graphs))


def _comparison(
    runs: Sequence[RunFolder], names: Sequence[str], summaries: Sequence[Summary]
) -> tuple[Grid, list[str]]:
    """The rows of two runs by task, each with the accuracies of both and the paired difference; and why some have none.

    A row is one model (of a seeded student each seed) in the evaluation of one name.
    """
    rows: dict[str, dict[tuple[str, str], dict[int, EvalRow]]] = {}
    for place, summary in enumerate(summaries):
        for row in summary.eval:
            rows.setdefault(row.task, {}).setdefault((row.evaluation, row.model), {})[place] = row
    sections: dict[str, list[Row]] = {}
    notes: list[str] = []
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
                    cells += [signed(100 * compared.difference), between, f"{compared.p_value:.3g}", number(compared.n)]
                except UsageError as error:
                    notes.append(f"{label} on {task} is not compared: {error}")
            sections.setdefault(task, []).append((label, *cells))
    head = ("model", *(f"{name}, %" for name in names), "difference", "95% interval", "p", "n")
    return Grid(head, sections, named="task"), notes


def _accuracy(row: EvalRow | None) -> str:
    """An accuracy with its 95% interval, in percent."""
    return "–" if row is None else f"{percent(row.accuracy)} ({interval(row.low, row.high)})"


def _graph(summary: Summary) -> str:
    """The drawing of a run's nodes."""
    return draw_graph(summary.nodes, {node.name: sentence("caption", summary, node.name) for node in summary.nodes})


@contextmanager
def _one_line_for_another_version(path: Path) -> Iterator[None]:
    """Turn what goes wrong in the block, because a run's files lack a number, into a UsageError."""
    import jinja2

    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, jinja2.UndefinedError) as error:
        fix = "run its recipe again with this one"
        raise UsageError(f"{path}: its files are not those of this version of cotree ({error!r}); {fix}") from None


def _write_page(path: Path, page: str) -> Path:
    # A model may write half a surrogate pair, which has no UTF-8.
    write_text(path, page.encode("utf-8", "replace").decode("utf-8"))
    return path
