from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest

from cotree.report.plots import MAX_POINTS, SERIES, Figure
from cotree.report.plots import training_figures as figures_of
from cotree.report.summary import LogLine, read_log


def line(step: int, **values: float) -> LogLine:
    return {"step": step, **values}


METHODS = {"sft": "sft", "control": "sft", "dpo": "dpo"}


def training_figures(logs: dict[str, list[LogLine]]) -> list[Figure]:
    return figures_of(logs, METHODS)


def points_of(svg: str, which: int | None = None) -> list[tuple[float, float]]:
    """The vertices of the one curve, or of one of them (a clipped path without fill), in drawing units."""
    paths = re.findall(r'<path d="([^"]*)" clip-path="[^"]*" style="fill: none; stroke: var\(--c1\)', svg)
    assert len(paths) == 1 or which is not None
    return [(float(x), float(y)) for x, y in re.findall(r"[ML] ([-\d.]+) ([-\d.]+)", paths[which or 0])]


def test_a_curve_is_drawn_through_its_points() -> None:
    values = [1.0, 0.5, 0.75, 0.0]
    (figure,) = training_figures({"sft": [line(step, loss=value) for step, value in enumerate(values, 1)]})
    assert (figure.title, figure.keys, figure.note) == ("SFT loss", [("sft", "var(--c1)")], "")
    points = points_of(figure.svg)
    xs, ys = [x for x, _ in points], [y for _, y in points]
    assert [(x - xs[0]) / (xs[-1] - xs[0]) for x in xs] == pytest.approx([0, 1 / 3, 2 / 3, 1], abs=1e-4)
    assert [(ys[-1] - y) / (ys[-1] - ys[0]) for y in ys] == pytest.approx(values, abs=1e-4)


def test_only_what_was_logged_is_drawn() -> None:
    assert training_figures({}) == training_figures({"sft": []}) == []
    terms = {"dpo_loss": 0.7, "sft_loss": 0.3, "grad_norm": 2.0}
    dpo = [line(step, loss=1.0, accuracy=0.5, margin=0.1, learning_rate=1e-6, **terms) for step in (1, 2)]
    titles = [figure.title for figure in training_figures({"dpo": dpo})]
    assert titles == [
        "DPO loss",
        "DPO terms of the loss: preference, and SFT of the chosen (dashed)",
        "DPO margin",
        "DPO pairs with margin above 0",
        "DPO gradient norm",
        "DPO learning rate",
    ]


def test_any_number_of_students_has_curves_and_methods_are_not_mixed() -> None:
    names = [f"student{n}" for n in range(len(SERIES) + 2)]
    logs = {name: [line(step, loss=1.0 / step) for step in (1, 2)] for name in [*names, "other"]}
    figures = figures_of(logs, dict.fromkeys(names, "sft") | {"other": "dpo"})
    assert [(figure.title, [name for name, _ in figure.keys]) for figure in figures] == [
        ("SFT loss, 1", names[: len(SERIES)]),
        ("SFT loss, 2", names[len(SERIES) :]),
        ("DPO loss", ["other"]),
    ]
    assert len({color for _, color in figures[0].keys}) == len(SERIES)


def test_a_metric_that_only_a_new_method_has_is_drawn_by_its_name() -> None:
    log = [line(step, loss=1.0, group_reward=0.1 * step) | {"warning": "w"} for step in (1, 2)]
    assert [figure.title for figure in figures_of({"a": log}, {"a": "grpo"})] == ["GRPO loss", "GRPO group reward"]


def test_a_run_of_one_step_has_one_step_on_its_axis() -> None:
    (figure,) = training_figures({"sft": [line(1, loss=1.0)]})
    assert re.findall(r">([\d.]+)</text>", figure.svg)[0] == "1"
    both = training_figures({"sft": [line(1, loss=1.0)], "control": [line(1, loss=2.0)]})
    assert both[0].keys == [("sft", "var(--c1)"), ("control", "var(--c2)")]


def test_probes_and_rewards_are_drawn() -> None:
    dpo = [line(step, chosen_reward=-0.1 * step, rejected_reward=-0.3 * step) for step in (1, 2, 3)]
    probed = [line(step, probe_tokens=20.0 * step, probe_loop=0.0, probe_no_answer=step / 4) for step in (1, 3)]
    figures = {figure.title: figure for figure in training_figures({"dpo": dpo, "sft": probed})}
    rewards, tokens, ratios = (
        "DPO rewards (beta times the log-ratio): chosen, and rejected (dashed)",
        "SFT probes: mean tokens",
        "SFT probes: no answer, and loops (dashed)",
    )
    assert list(figures) == [rewards, tokens, ratios]
    assert figures[rewards].keys == [("dpo", "var(--c1)")], "both curves of a student have its colour"
    assert len(re.findall("stroke-dasharray", figures[rewards].svg)) == 1
    (left, low), (right, high) = points_of(figures[ratios].svg, which=0)
    assert left < right and low > high, "the no-answer ratio rises"


def test_the_few_probes_of_a_long_log_are_all_drawn() -> None:
    log = [line(step, **({"probe_tokens": 1.0} if step % 500 == 0 else {})) for step in range(1, 10 * MAX_POINTS)]
    (figure,) = training_figures({"dpo": log})
    assert (len(points_of(figure.svg)), figure.note) == (5, "")


def test_a_student_has_one_colour_in_all_figures() -> None:
    loss = [line(step, loss=1.0 / step) for step in (1, 2)]
    figures = training_figures({"sft": loss, "control": [item | {"grad_norm": 1.0} for item in loss]})
    assert [dict(figure.keys)["control"] for figure in figures] == ["var(--c2)", "var(--c2)"]


def test_a_long_log_is_averaged_and_says_so() -> None:
    log = [line(step, loss=float(step % 4)) for step in range(1, 4 * MAX_POINTS + 1)]
    (figure,) = training_figures({"sft": log})
    assert figure.note == "each point is the mean of 4 steps"
    points = points_of(figure.svg)
    assert len({round(y, 3) for _, y in points}) == 1, "the mean of each four is 1.5"


def test_a_loss_that_is_no_number_leaves_a_gap() -> None:
    (figure,) = training_figures(
        {"sft": [line(1, loss=1.0), line(2, loss=math.nan), line(3, loss=0.5), line(4, loss=0.4)]}
    )
    assert "nan" not in figure.svg.lower()


def test_a_resumed_log_counts_each_step_once(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    lines = [{"step": step, "loss": 1.0} for step in (1, 2, 3, 4)] + [{"step": step, "loss": 2.0} for step in (3, 4, 5)]
    path.write_text("".join(json.dumps(item) + "\n" for item in lines) + '{"step": 6, "lo')
    assert [(item["step"], item["loss"]) for item in read_log(path)] == [
        (1, 1.0),
        (2, 1.0),
        (3, 2.0),
        (4, 2.0),
        (5, 2.0),
    ]


def test_a_missing_or_empty_log_is_no_log(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("")
    assert read_log(tmp_path / "empty") == read_log(tmp_path / "missing") == []


def test_damaged_lines_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step"\n{"loss": 2}\n{"step": 3}\n')
    warning = {"step": 0, "warning": "2 damaged lines of log.jsonl left out"}
    assert read_log(path) == [warning, {"step": 1}, {"step": 3}]
    assert not training_figures({"sft": read_log(path)})
