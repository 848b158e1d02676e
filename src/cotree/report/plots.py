"""The report's training curves, drawn by matplotlib.

Invariant: a drawing is one <svg> element without scripts, links or colours of its own; colours are CSS variables of the
page, so light, dark and print need one drawing. Labels are ours, never a model's text.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from cotree.report.summary import LogLine

# matplotlib wants colours, the page wants variables: these stand for each other.
COLORS = {"#010101": "var(--ink)", "#020202": "var(--muted)", "#030303": "var(--rule)"}
SERIES = {"#0a0a01": "var(--c1)", "#0a0a02": "var(--c2)"}
MAX_POINTS = 300


@dataclass(frozen=True)
class Figure:
    """A drawing with its title and the names of its curves, each with a CSS colour."""

    title: str
    keys: list[tuple[str, str]]
    svg: str
    note: str = ""


def training_figures(logs: Mapping[str, Sequence[LogLine]]) -> list[Figure]:
    """Curves over optimizer steps from the logs of `sft`, `control` and `dpo`; a figure without any point is left out.

    Logs longer than 300 points are averaged over equal spans, and the figure says so.
    """
    sft, control, dpo = (logs.get(name, ()) for name in ("sft", "control", "dpo"))
    rewards = [("chosen", dpo, "chosen_reward"), ("rejected", dpo, "rejected_reward")]
    figures = [
        _curves("SFT loss", [("sft", sft, "loss"), ("control", control, "loss")]),
        _curves("DPO loss", [("dpo", dpo, "loss")]),
        _curves("Terms of the DPO loss", [("preference", dpo, "dpo_loss"), ("SFT of chosen", dpo, "sft_loss")]),
        _curves("DPO margin", [("dpo", dpo, "margin")]),
        _curves("Pairs with margin above 0", [("dpo", dpo, "accuracy")], limits=(0.0, 1.0)),
        _curves("Log-probabilities", [("chosen", dpo, "chosen_logps"), ("rejected", dpo, "rejected_logps")]),
        _curves("Rewards (beta times the log-ratio)", rewards),
        _curves("Gradient norm", [("sft", sft, "grad_norm"), ("dpo", dpo, "grad_norm")]),
        _curves("Learning rate", [("sft", sft, "learning_rate"), ("dpo", dpo, "learning_rate")]),
    ]
    for name, log in (("sft", sft), ("control", control), ("dpo", dpo)):
        ratios = [("no answer", log, "probe_no_answer"), ("loop", log, "probe_loop")]
        figures.append(_curves(f"Probes of {name}: mean tokens", [("tokens", log, "probe_tokens")]))
        figures.append(_curves(f"Probes of {name}: ratios", ratios, limits=(0.0, 1.0)))
    return [figure for figure in figures if figure is not None]


def _curves(
    title: str, series: Sequence[tuple[str, Sequence[LogLine], str]], limits: tuple[float, float] | None = None
) -> Figure | None:
    """Curves of (name, log, key of its lines)."""
    import matplotlib
    from matplotlib.figure import Figure as Canvas
    from matplotlib.ticker import MaxNLocator

    style = {
        "svg.fonttype": "none",
        "svg.hashsalt": title,
        "font.size": 8,
        "text.color": "#010101",
        "axes.edgecolor": "#030303",
        "axes.labelcolor": "#020202",
        "xtick.color": "#030303",
        "ytick.color": "#030303",
        "xtick.labelcolor": "#020202",
        "ytick.labelcolor": "#020202",
        "grid.color": "#030303",
        "grid.linewidth": 0.5,
        "axes.linewidth": 0.5,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "xtick.major.width": 0.5,
        "ytick.major.size": 0,
    }
    drawn = [[(line["step"], y) for line in log if (y := line.get(key)) is not None] for _, log, key in series]
    span = max(1, *(-(-len(points) // MAX_POINTS) for points in drawn))
    keys = []
    with matplotlib.rc_context(style):
        canvas = Canvas(figsize=(3.3, 1.9), layout="constrained")
        axes = canvas.add_subplot()
        axes.grid(axis="y")
        axes.set_axisbelow(True)
        for (name, *_), points, (stand_in, color) in zip(series, drawn, SERIES.items(), strict=False):
            if not points:
                continue
            steps, values = zip(*_averaged(points, span), strict=True)
            axes.plot(steps, values, color=stand_in, linewidth=1.4, marker="o" if len(steps) < 2 else None)
            keys.append((name, color))
        if not keys:
            return None
        if limits:
            axes.set_ylim(limits[0] - 0.03, limits[1] + 0.03)
        axes.set_xlabel("optimizer step")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 5, 10], integer=True))
        places = {step for points in drawn for step, _ in points}
        if len(places) == 1:  # else the axis would show parts of a step
            axes.set_xticks([*places])
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
        out = io.StringIO()
        canvas.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    note = f"each point is the mean of {span} steps" if span > 1 else ""
    return Figure(title, keys, _inline(out.getvalue(), title), note)


def _averaged(points: Sequence[tuple[int, float]], span: int) -> list[tuple[float, float]]:
    groups = [points[start : start + span] for start in range(0, len(points), span)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def _inline(svg: str, title: str) -> str:
    """matplotlib's file as an element of a page: no prolog, metadata, size or fonts, and ids unique in the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    head, rest = svg.split(">", 1)
    viewbox = re.search(r'viewBox="[^"]*"', head)
    assert viewbox is not None, "matplotlib writes a viewBox"
    slug = re.sub(r"\W+", "-", title.lower())
    rest = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{slug}-", rest)
    rest = re.sub(r" font-family: [^;\"]*;?", "", rest)
    for stand_in, variable in {**COLORS, **SERIES}.items():
        rest = rest.replace(stand_in, variable)
    return f'<svg {viewbox[0]} role="img" aria-label="{escape(title, quote=True)}">{rest.strip()}'
