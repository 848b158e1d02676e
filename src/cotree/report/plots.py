"""The report's training curves, drawn with matplotlib as SVG.

Each is one <svg> element without scripts, links or fixed colours: CSS variables adapt it to light, dark and print.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import chain
from pathlib import Path
from statistics import fmean

import yaml

from cotree.report.summary import LogLine

Point = tuple[float, float]  # (step, value)
# {placeholder colour for matplotlib: CSS variable}
_STYLE = Path(__file__).with_name("curves.mplstyle")
COLORS = {"#010101": "var(--ink)", "#020202": "var(--muted)", "#030303": "var(--rule)"}
SERIES = {f"#0a0a0{place}": f"var(--c{place})" for place in range(1, 7)}
MAX_POINTS = 300
_FIGURES: dict[str, list[str]] = yaml.safe_load(Path(__file__).with_name("curves.yaml").read_text(encoding="utf-8"))
_SHARES = ("accuracy", "probe_no_answer", "probe_loop")
_NO_METRICS = ("step", "total_steps", "seconds")


@dataclass(frozen=True)
class Figure:
    """An SVG drawing with its title, and its curves' names and CSS colours."""

    title: str
    keys: list[tuple[str, str]]
    svg: str
    note: str = ""


def training_figures(logs: Mapping[str, Sequence[LogLine]], methods: Mapping[str, str]) -> list[Figure]:
    """Draw training curves: one figure per metric and method, with one curve per student.

    Methods are not mixed, because their losses are not comparable; a method with more students than colours gets
    several figures per metric. Figures without points are left out. Logs longer than 300 points are averaged over equal
    spans, as the figure notes.

    Args:
        logs: {student: log}.
        methods: {student: method}, if known.
    """
    by_method: dict[str, list[str]] = {}
    for student in logs:
        by_method.setdefault(methods.get(student, ""), []).append(student)
    figures = []
    for method, students in by_method.items():
        groups = [students[start : start + len(SERIES)] for start in range(0, len(students), len(SERIES))]
        for title, keys in _metrics([logs[student] for student in students]).items():
            for place, group in enumerate(groups, 1):
                curves = {(student, key): _points(logs[student], key) for student in group for key in keys}
                colors = dict(zip(group, SERIES, strict=False))
                of = f", {place}" if len(groups) > 1 else ""
                if any(curves.values()):
                    figures.append(_draw(f"{method.upper()} {title}{of}".strip(), keys, curves, colors))
    return figures


def _metrics(logs: Sequence[Sequence[LogLine]]) -> dict[str, list[str]]:
    """{title: metrics} of a method's figures."""
    known = {*_NO_METRICS, *chain(*_FIGURES.values())}
    logged = (item for log in logs for line in log for item in line.items())
    further = [key for key, value in logged if key not in known and isinstance(value, int | float)]
    return _FIGURES | {key.replace("_", " "): [key] for key in further}


def _points(log: Sequence[LogLine], key: str) -> list[Point]:
    return [(line["step"], line[key]) for line in log if line.get(key) is not None]


def _draw(
    title: str, keys: Sequence[str], curves: Mapping[tuple[str, str], Sequence[Point]], colors: Mapping[str, str]
) -> Figure:
    """Draw one figure of curves by student and metric; a second metric is dashed."""
    from matplotlib import style
    from matplotlib.figure import Figure as Canvas
    from matplotlib.ticker import MaxNLocator

    curves = {name: points for name, points in curves.items() if points}
    span = max(-(-len(points) // MAX_POINTS) for points in curves.values())
    with style.context([_STYLE, {"svg.hashsalt": title}]):
        canvas = Canvas()
        axes = canvas.add_subplot()
        for (student, key), points in curves.items():
            steps, values = zip(*_averaged(points, span), strict=True)
            line, marker = "-" if key == keys[0] else "--", "o" if len(steps) < 2 else None
            axes.plot(steps, values, color=colors[student], linestyle=line, marker=marker)
        if keys[0] in _SHARES:
            axes.set_ylim(-0.03, 1.03)
        axes.set_xlabel("optimizer step")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 5, 10], integer=True))
        steps_logged = {step for step, _ in chain(*curves.values())}
        if len(steps_logged) == 1:  # else the axis would show parts of a step
            axes.set_xticks([*steps_logged])
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
        out = io.StringIO()
        canvas.savefig(out, format="svg", metadata={"Date": None})
    named = dict.fromkeys((student, SERIES[colors[student]]) for student, _ in curves)
    note = f"each point is the mean of {span} steps" if span > 1 else ""
    return Figure(title, list(named), _inline(out.getvalue(), title), note)


def _averaged(points: Sequence[Point], span: int) -> list[Point]:
    """Average each `span` consecutive points."""
    groups = [zip(*points[start : start + span], strict=True) for start in range(0, len(points), span)]
    return [(fmean(steps), fmean(values)) for steps, values in groups]


def _inline(svg: str, title: str) -> str:
    """Convert matplotlib's SVG file to an inline element: without prolog, metadata, size and fonts, with unique ids."""
    unwanted = r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->| xmlns(:\w+)?=\"[^\"]*\"| font-family: [^;\"]*;?"
    svg = re.sub(unwanted, "", svg[svg.index("<svg") :], flags=re.DOTALL)
    head, rest = svg.split(">", 1)
    viewbox = re.search(r'viewBox="[^"]*"', head)
    assert viewbox is not None, "matplotlib writes a viewBox"
    slug = re.sub(r"\W+", "-", title.lower())
    rest = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{slug}-", rest)
    for stand_in, variable in {**COLORS, **SERIES}.items():
        rest = rest.replace(stand_in, variable)
    return f'<svg {viewbox[0]} role="img" aria-label="{escape(title, quote=True)}">{rest.strip()}'
