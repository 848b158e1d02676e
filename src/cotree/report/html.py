"""One self-contained report.html for a run.

Invariant: the page loads nothing, runs nothing and says nothing that is not in the run folder. Model text is untrusted:
the template escapes everything but our own drawings, and a content security policy forbids scripts and requests.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cotree.base import numbers as show
from cotree.base.atomic import write_text
from cotree.base.errors import UsageError
from cotree.experiment.run_folder import read_json
from cotree.report.plots import training_figures
from cotree.report.reading import reading
from cotree.report.summary import Summary, read_log, read_summary
from cotree.report.table import length_gap, model_lines, share, tokens_per_second, verdict

PAPER = "https://arxiv.org/abs/2503.01461"
LOGS = ("sft", "control", "dpo")


def write_report(run: Path) -> Path:
    """Write `run/report.html` from the run folder's files and return its path.

    Reads summary.json (required), manifest.json, recipe.yaml, samples.json and checkpoints/{sft,control,dpo}/log.jsonl;
    what is missing is left out of the page. Raises UsageError for a file that cannot be read. The page is replaced in
    one step: a kill leaves the old one or the new one.
    """
    summary = read_summary(run)
    try:
        page = _page(run, summary)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        fix = "run its recipe again with this one"
        raise UsageError(f"{run}: its files are not those of this version of cotree ({error!r}); {fix}") from None
    path = run / "report.html"
    # A model may emit half a surrogate pair, which has no UTF-8.
    write_text(path, page.encode("utf-8", "replace").decode("utf-8"))
    return path


def _page(run: Path, summary: Summary) -> str:
    import jinja2

    recipe = run / "recipe.yaml"
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("cotree.report", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        percent=show.percent, number=show.number, signed=show.signed, duration=show.duration, interval=show.interval
    )
    final = _final_model(summary)
    logs = {name: read_log(run / "checkpoints" / name / "log.jsonl") for name in LOGS}
    return environment.get_template("report.html.jinja").render(
        summary=summary,
        manifest=read_json(run / "manifest.json") or {},
        samples=read_json(run / "samples.json") or [],
        recipe=recipe.read_text(encoding="utf-8") if recipe.is_file() else "",
        paper=PAPER,
        final=final,
        machine=_machine(summary.machine),
        reading=reading(summary),
        paper_form=show.paper_form,
        group_name=show.group_name,
        figures=training_figures(logs),
        warnings=[(name, line) for name, log in logs.items() for line in log if line.get("warning")],
        search=_search(summary.search) if summary.search else {},
        share=share,
        verdict=verdict,
        models=model_lines(summary.search.get("by_model", {})),
        gap=length_gap(summary.data) if summary.data else None,
        stages=[
            (stage, seconds, summary.tokens.get(stage), tokens_per_second(summary, stage))
            for stage, seconds in summary.seconds.items()
        ],
    )


def _final_model(summary: Summary) -> str | None:
    """The model that the page points out: what the run was for."""
    evaluated = {row.model for row in summary.eval}
    return next((model for model in ("dpo", "sft") if model in evaluated), None)


def _machine(machine: Mapping[str, Any]) -> str:
    named = (("cpu", "{}"), ("cores", "{} cores"), ("memory_gb", "{:.0f} GB"))
    return ", ".join(form.format(machine[name]) for name, form in named if machine.get(name))


# Name, count, and what it is a part of.
_SEARCH_ROWS = (
    ("trees", "trees", None),
    ("thoughts", "thoughts", None),
    ("answers", "answers", None),
    ("correct", "correct", "answers"),
    ("wrong", "wrong", "answers"),
    ("no answer", "no_answer", "answers"),
    ("other thoughts cut by max_tokens", "cut", None),
    ("rollouts", "rollouts", None),
    ("questions with a correct chain, %", "questions_with_correct", None),
    ("questions with a correct and a wrong chain, %", "questions_with_both", None),
    ("reflections", "reflections", None),
    ("reflections that led to a correct answer", "repaired", "reflections"),
)


def _search(search: Mapping[str, Any]) -> dict[str, Any]:
    """Rows (name, cells) over the columns: all tasks, then each."""
    columns = {"all": search} if len(search["by_task"]) != 1 else {}
    columns |= search["by_task"]

    def cell(counts: Mapping[str, Any], name: str, whole: str | None) -> str:
        value, of = counts.get(name), counts.get(whole or "")
        if isinstance(value, float):
            return show.percent(value)
        share = f" ({show.percent(value / of)}%)" if value is not None and of else ""
        return show.number(value) + share

    rows = {label: [cell(of, *counted) for of in columns.values()] for label, *counted in _SEARCH_ROWS}
    return {"columns": list(columns), "rows": rows}
