"""One self-contained report.html for a run.

Invariant: the page loads nothing, runs nothing and says nothing that is not in the run folder. Model text is untrusted:
the template escapes everything but our own drawings, and a content security policy forbids scripts and requests.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml

from cotree.errors import UsageError
from cotree.report import format as show
from cotree.report.plots import interval_axis, interval_plot, training_figures
from cotree.report.reading import reading
from cotree.report.search_lines import model_lines, share, verdict
from cotree.report.summary import Search, SearchCounts, Summary, read_log, read_manifest, read_samples, read_summary
from cotree.report.table import length_gap, tokens_per_second

PAPER = "https://arxiv.org/abs/2503.01461"
LOGS = ("sft", "control", "dpo")


def write_report(run: Path) -> Path:
    """Write `run/report.html` from the run folder's files and return its path.

    Reads summary.json (required), manifest.json, recipe.yaml, samples.json and checkpoints/{sft,control,dpo}/log.jsonl;
    what is missing is left out of the page. Raises UsageError for a file that cannot be read. The page is replaced in
    one step: a kill leaves the old one or the new one.
    """
    import jinja2

    summary = read_summary(run)
    recipe_text, student = _recipe(run / "recipe.yaml")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("cotree.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        percent=show.percent, number=show.number, signed=show.signed, duration=show.duration, interval=show.interval
    )
    final = _final_model(summary)
    logs = {name: read_log(run / "checkpoints" / name / "log.jsonl") for name in LOGS}
    page = environment.get_template("report.html.jinja").render(
        summary=summary,
        manifest=read_manifest(run),
        samples=read_samples(run),
        recipe=recipe_text,
        student=student,
        paper=PAPER,
        final=final,
        machine=_machine(summary),
        reading=reading(summary),
        paper_form=show.paper_form,
        interval_plot=interval_plot,
        interval_axis=interval_axis,
        figures=training_figures(logs),
        warnings=[(name, line.step, line.warning) for name, log in logs.items() for line in log if line.warning],
        search=_search(summary.search),
        share=share,
        verdict=verdict(summary.search.compared) if summary.search.compared else "",
        models=model_lines(summary.search),
        gap=length_gap(summary),
        stages=[
            (stage, seconds, summary.tokens.get(stage), tokens_per_second(summary, stage))
            for stage, seconds in summary.seconds.items()
        ],
    )
    path = run / "report.html"
    partial = path.with_suffix(".html.partial")
    # A model may emit half a surrogate pair, which has no UTF-8.
    partial.write_text(page, encoding="utf-8", errors="replace")
    os.replace(partial, path)
    return path


def _recipe(path: Path) -> tuple[str, str | None]:
    """The recipe's text and the name of the student's weights, where the recipe is there and has one."""
    if not path.is_file():
        return "", None
    text = path.read_text(encoding="utf-8")
    try:
        recipe = yaml.safe_load(text)
        student = recipe["train"]["student"]
        weights = recipe["models"][student].get("embedded") or recipe["models"][student].get("model")
        return text, str(weights or student)
    except yaml.YAMLError as error:
        raise UsageError(f"{path}: no valid YAML ({error})") from None
    except (KeyError, TypeError, AttributeError):
        return text, None


def _final_model(summary: Summary) -> str | None:
    """The model that the page points out: what the run was for."""
    evaluated = {row.model for row in summary.eval}
    return next((model for model in ("dpo", "sft") if model in evaluated), None)


def _machine(summary: Summary) -> str:
    machine = summary.machine
    parts = [
        machine.cpu,
        f"{machine.cores} cores" if machine.cores else None,
        f"{machine.memory_gb:.0f} GB" if machine.memory_gb else None,
    ]
    return ", ".join(part for part in parts if part)


def _search(search: Search) -> dict[str, Any]:
    """Rows (name, cells) over the columns: all tasks, then each."""
    columns: dict[str, SearchCounts] = {"all": search} if len(search.by_task) != 1 else {}
    columns |= search.by_task

    def of(part: int | None, whole: int | None) -> str:
        return (
            f"{show.number(part)} ({show.percent(part / whole)}%)" if part is not None and whole else show.number(part)
        )

    rows = {
        "trees": [show.number(c.trees) for c in columns.values()],
        "thoughts": [show.number(c.thoughts) for c in columns.values()],
        "answers": [show.number(c.answers) for c in columns.values()],
        "correct": [of(c.correct, c.answers) for c in columns.values()],
        "wrong": [of(c.wrong, c.answers) for c in columns.values()],
        "no answer": [of(c.no_answer, c.answers) for c in columns.values()],
        "other thoughts cut by max_tokens": [show.number(c.cut) for c in columns.values()],
        "rollouts": [show.number(c.rollouts) for c in columns.values()],
        "questions with a correct chain, %": [show.percent(c.questions_with_correct) for c in columns.values()],
        "questions with a correct and a wrong chain, %": [
            show.percent(c.questions_with_both) for c in columns.values()
        ],
        "reflections": [show.number(c.reflections) for c in columns.values()],
        "reflections that led to a correct answer": [of(c.repaired, c.reflections) for c in columns.values()],
    }
    return {"columns": list(columns), "rows": rows} if search.trees is not None else {"columns": [], "rows": {}}
