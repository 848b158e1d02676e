"""Results of a run for the viewer's page: node states, training curves, tables, and replies side by side."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict
from itertools import chain
from typing import Any, Literal

from cotree.base.errors import NotFoundError
from cotree.base.rows import read_rows
from cotree.base.run_folder import NodeRecord, RunFolder
from cotree.base.settings import nearest
from cotree.report.graph import lay_out
from cotree.report.summary import LogLine, NodeReads, natural_sort_key, read_log, summarize_run
from cotree.report.table import make_table

Changed = Literal["gained", "lost", "same", "all"]
Reply = dict[str, Any]
_BOX = 190, 46  # pixels of a node in the experiment's graph
_WORKS = 30.0  # seconds since the last write of node.json


def about_run(run: RunFolder, nodes: Sequence[NodeReads]) -> dict[str, Any]:
    """A run's name, recipe and version, and its nodes in order with states, counts and positions in the graph.

    nodes: of the experiment, including those without content.
    """
    summary = summarize_run(run, nodes)
    counts = {"trees": summary.search, "datasets": summary.data, "students": summary.train}
    described = []
    for node in summary.nodes:
        kind, _, name = node.name.partition("/")
        begun = node.name in summary.seconds
        state = "done" if node.done else "new" if not begun else "growing" if _is_growing(run, node.name) else "partial"
        seconds, found = summary.seconds.get(node.name), counts.get(kind, {}).get(name, {})
        described.append({**node.model_dump(), "kind": kind, "state": state, "seconds": seconds, "counts": found})
    rows = {name: [row for row in summary.eval if row.evaluation == name] for name in summary.names("evaluations")}
    evaluations = [
        {"name": name} | {f"{key}s": [*dict.fromkeys(getattr(row, key) for row in found)] for key in ("model", "task")}
        for name, found in rows.items()
    ]
    return {
        "name": summary.name,
        "nodes": described,
        "graph": asdict(lay_out({node.name: node.reads for node in summary.nodes}, _BOX)),
        "datasets": summary.names("datasets"),
        "students": [_about_student(run, name) for name in summary.names("students")],
        "evaluations": evaluations,
        "version": summary.versions.get("cotree", ""),
        "recipe": (run.path / "recipe.yaml").read_text(encoding="utf-8"),
    }


def _about_student(run: RunFolder, name: str) -> dict[str, Any]:
    """A student's name, and its parent and settings (None before training starts)."""
    record = run.node(f"students/{name}").record() or NodeRecord("", "")
    method = record.result.get("method") or record.parts.get("method")
    return {"name": name, "parent": record.result.get("parent"), "method": method}


def _is_growing(run: RunFolder, node: str) -> bool:
    """Whether a process works on a node, by the time of its record, which is saved every few seconds."""
    files = run.node(node).path.glob("**/node.json")
    return any(time.time() - file.stat().st_mtime < _WORKS for file in files)


def curves(run: RunFolder) -> list[dict[str, Any]]:
    """The training log of each student, with the metrics of each step."""
    names = [node.partition("/")[2] for node in run.nodes() if node.startswith("students/")]
    names.sort(key=natural_sort_key)
    logs = {name: read_log(run.node(f"students/{name}").path / "log.jsonl") for name in names}
    return [{**_about_student(run, name), "curve": list(map(_without_nan, log))} for name, log in logs.items()]


def _without_nan(line: LogLine) -> LogLine:
    """Replace NaN and infinities in a log line by None, for JSON."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in line.items()
    }


def tables(run: RunFolder, nodes: Sequence[NodeReads]) -> list[dict[str, Any]]:
    """The report's tables as titles, heads and rows of text; the first also carries the notes."""
    summary = summarize_run(run, nodes)
    if not summary.eval:
        return []
    table = make_table([(summary.name, summary)])
    found = []
    for grid in (*table.grids(), table.paper()):
        header, *rows = grid.to_rows()
        found.append({"title": grid.title or "Accuracy", "header": header, "rows": rows, "note": ""})
    found[0]["note"] = "\n".join((*table.notes, *table.limits()))
    return found


def replies(
    run: RunFolder,
    evaluation: str,
    model: str,
    *,
    beside: str | None = None,
    show: Changed = "all",
    offset: int = 0,
    limit: int = 50,
) -> dict[str, Any]:
    """A page of a model's replies in an evaluation, next to another model's replies to the same questions.

    Args:
        beside: the other model; by default the student's parent.
        show: `gained`: only questions that the other model gets wrong, `lost`: only those that only it gets right.

    Raises:
        NotFoundError: the evaluation has no such model, or no replies of it yet.
    """
    models = [name for of, name in run.cells() if of == evaluation]
    if beside is None:
        parent = (run.nodes().get(f"students/{model}"),)
        beside = next((str(record.result.get("parent")) for record in parent if record is not None), model)
    for name in (model, beside):
        if name not in models:
            raise NotFoundError(f"evaluations/{evaluation} has no model `{name}`; {nearest(name, models)}")
    mine, other = _replies_of(run, evaluation, model), _replies_of(run, evaluation, beside)
    rows: dict[str, list[Reply]] = {"gained": [], "lost": [], "same": []}
    for key, reply in mine.items():
        if key in other:
            right = [each["verdict"] == "correct" for each in (reply, other[key])]
            kind = "same" if right[0] == right[1] else "gained" if right[0] else "lost"
            besides = {f"beside_{name}": other[key][name] for name in ("reply", "verdict")}
            rows[kind].append(reply | besides)
    shown = list(chain.from_iterable(rows.values())) if show == "all" else rows[show]
    counts = {kind: len(found) for kind, found in rows.items()}
    return {"total": len(shown), "beside": beside, **counts, "rows": shown[offset : offset + limit]}


def _replies_of(run: RunFolder, evaluation: str, model: str) -> dict[tuple[str, str, int, int], Reply]:
    """{(task, question id, turn, sample number): reply} of a model."""
    folder = run.node(f"evaluations/{evaluation}", model).path
    found = {}
    for path in sorted(folder.glob("samples_*.jsonl")):
        for row in read_rows(path):
            if row["filter"] in ("strict-match", "none"):
                doc = row["doc"]
                about = {"question": doc["id"], "task": doc["task"], "text": doc["question"], "gold": doc["answer"]}
                texts = chain.from_iterable(row["resps"])
                for sample, (text, verdict) in enumerate(zip(texts, row["cotree"]["verdicts"], strict=True)):
                    found[doc["task"], doc["id"], doc["turn"], sample] = about | {"reply": text, "verdict": verdict}
    if not found:
        raise NotFoundError(f"no replies of {model} in evaluations/{evaluation} yet; `cotree run {run.path}` asks it")
    return found
