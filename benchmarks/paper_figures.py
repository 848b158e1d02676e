"""The figures of docs/results.md, drawn from a table's file by matplotlib as SVG.

Each has the sha256 of the file that it was drawn from in its metadata, so that a test knows an old one.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from cotree.base.atomic import content_sha256

Row = Mapping[str, Any]
_COLORS = ("#3b6ea5", "#c8553d", "#4f8a5b", "#8a5fa8", "#b8860b", "#6b7280")
_STYLE = {
    "figure.constrained_layout.use": True,
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e5e7eb",
    "axes.axisbelow": True,
    "svg.fonttype": "none",
}


def figures(path: Path) -> dict[str, str]:
    """A figure for each tier of a table's file, by the names of their files (`figure_of`)."""
    content = json.loads(path.read_text(encoding="utf-8"))
    found: dict[str, str] = {}
    for tier in dict.fromkeys(row["tier"] for row in content.get("rows", ())):
        name, digest = figure_of(path.stem, tier, content["students"]), content_sha256(path)
        if name.endswith("-training"):
            probed = [row for row in content["students"] if row["tier"] == tier and row["curve"]]
            found[f"{name}.svg"] = _training(probed, name, digest)
        else:
            found[f"{name}.svg"] = _accuracies([row for row in content["rows"] if row["tier"] == tier], name, digest)
    return found


def figure_of(table: str, tier: str, students: Sequence[Row]) -> str:
    """The name of a table's figure: `step-small-training` (output length and no answer along training) where the
    students of `step` were probed, else `alpha-small` (accuracy and no answer of each student)."""
    probed = table == "step" and any(row["tier"] == tier and row["curve"] for row in students)
    return f"{table}-{tier}{'-training' if probed else ''}"


def _accuracies(rows: Sequence[Row], name: str, digest: str) -> str:
    """For each task a panel: accuracy of each arm with its interval (of several seeds the widest), no answer hollow."""
    from matplotlib import rc_context

    models = list(dict.fromkeys((row["evaluation"], row["model"]) for row in rows))
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    with rc_context({**_STYLE, "svg.hashsalt": name}):
        canvas, panels = _panels(len(tasks), 0.6 + 0.22 * len(models))
        for panel, task in zip(panels, tasks, strict=True):
            for place, model in enumerate(models):
                found = [row for row in rows if (row["task"], (row["evaluation"], row["model"])) == (task, model)]
                if not found:
                    continue
                accuracy, no_answer = (100 * fmean(row[key] for row in found) for key in ("accuracy", "no_answer"))
                if all(row.get("low") is not None for row in found):
                    ends = [100 * min(row["low"] for row in found), 100 * max(row["high"] for row in found)]
                    panel.plot(ends, [place, place], color=_COLORS[0], linewidth=1.2)
                of = {"marker": "o", "linestyle": "none", "markersize": 4}
                panel.plot([accuracy], [place], color=_COLORS[0], **of, label="" if place else "accuracy (95%)")
                hollow = {"color": _COLORS[1], "markerfacecolor": "white", **of}
                panel.plot([no_answer], [place], **hollow, label="" if place else "no answer")
            panel.set_title(task, fontsize=8)
            panel.set_xlim(-3, 103)
            panel.set_xlabel("%")
            panel.set_yticks(range(len(models)), [model for _, model in models])
            panel.set_ylim(len(models) - 0.5, -0.5)
        _legend(canvas, panels[0])
        return _svg(canvas, digest)


def _training(students: Sequence[Row], name: str, digest: str) -> str:
    """Output length and no answer on training prompts over optimizer steps: a line an arm, the mean of its seeds."""
    from matplotlib import rc_context

    with rc_context({**_STYLE, "svg.hashsalt": name}):
        canvas, panels = _panels(2, 2.4)
        for model, color in zip(dict.fromkeys(row["model"] for row in students), _COLORS * 9, strict=False):
            curves = [row["curve"] for row in students if row["model"] == model]
            steps = [step for step, *_ in curves[0]]
            for panel, place, scale in zip(panels, (1, 3), (1, 100), strict=True):
                values = [scale * fmean(point[place] for point in points) for points in zip(*curves, strict=False)]
                panel.plot(steps[: len(values)], values, color=color, marker=".", linewidth=1.2, label=model)
        for panel, words in zip(panels, ("tokens a reply", "no answer %"), strict=True):
            panel.set_title(words, fontsize=8)
            panel.set_xlabel("optimizer step")
            panel.xaxis.get_major_locator().set_params(integer=True)
            panel.set_ylim(bottom=0 if words.startswith("tokens") else -3)
        _legend(canvas, panels[0])
        return _svg(canvas, digest)


def _panels(count: int, height: float) -> tuple[Any, list[Any]]:
    """A figure with so many panels side by side."""
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(2.0 + 2.6 * count, height))
    return canvas, list(canvas.subplots(1, count, squeeze=False)[0])


def _legend(canvas: Any, panel: Any) -> None:
    """What the lines and marks of the first panel, and so of all, mean, below them."""
    canvas.legend(*panel.get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=7, frameon=False)


def _svg(canvas: Any, digest: str) -> str:
    out = io.StringIO()
    canvas.savefig(out, format="svg", metadata={"Date": None, "Description": digest}, facecolor="white")
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"
