"""One self-contained report.html for a run.

Invariant: the page loads nothing, runs nothing and says nothing that is not in the run folder. Model text is untrusted:
the template escapes everything but our own drawings, and a content security policy forbids scripts and requests.
"""

from __future__ import annotations

from pathlib import Path

from cotree.base.atomic import write_text
from cotree.base.errors import UsageError
from cotree.base.run_folder import RunFolder
from cotree.report.graph import draw_graph
from cotree.report.plots import training_figures
from cotree.report.summary import Summary, read_log, summarize_run
from cotree.report.table import make_table
from cotree.report.templates import lines, rendered, sentence
from cotree.report.terminal import comparison_verdict
from cotree.report.tree_view import trees_to_show

PAPER = "https://arxiv.org/abs/2503.01461"
_TREES_SHOWN = 3


def write_report(run: RunFolder, summary: Summary | None = None) -> Path:
    """Write `report.html` into a run folder and return its path.

    The page is replaced in one step: a kill leaves the old one or the new one.

    Args:
        summary: of the run; by default it is read from its node.json files.

    Raises:
        UsageError: a file cannot be read, or is of another version.
    """
    import jinja2

    summary = summary or summarize_run(run)
    try:
        page = _page(run, summary)
    except (KeyError, TypeError, ValueError, AttributeError, jinja2.UndefinedError) as error:
        fix = "run its recipe again with this one"
        raise UsageError(f"{run.path}: its files are not those of this version of cotree ({error!r}); {fix}") from None
    path = run.path / "report.html"
    # A model may write half a surrogate pair, which has no UTF-8.
    write_text(path, page.encode("utf-8", "replace").decode("utf-8"))
    return path


def _page(run: RunFolder, summary: Summary) -> str:
    captions = {node.name: sentence("caption", summary, node.name) for node in summary.nodes}
    logs = {name: read_log(run.node(f"students/{name}").path / "log.jsonl") for name in summary.names("students")}
    students = {node.partition("/")[2]: record for node, record in run.nodes().items() if node.startswith("students/")}
    methods = {name: str(record.parts.get("method", "")) for name, record in students.items()}
    return rendered(
        "report.html.jinja",
        summary=summary,
        recipe=(run.path / "recipe.yaml").read_text(encoding="utf-8"),
        paper=PAPER,
        graph=draw_graph(summary.nodes, captions),
        table=make_table([(summary.name, summary)]),
        figures=training_figures(logs, methods),
        warnings=[(name, line) for name, log in logs.items() for line in log if line.get("warning")],
        writers=[line for counts in summary.search.values() for line in lines("writers", counts.get("by_model", {}))],
        verdict=comparison_verdict(summary.compared),
        trees=trees_to_show(run, summary.names("trees"), _TREES_SHOWN),
    )
