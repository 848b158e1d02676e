"""The drawing of an experiment: every node once, right of what it reads, no two boxes on each other."""

from __future__ import annotations

import re
from operator import mul

from hypothesis import given, settings
from hypothesis import strategies as st

from cotree.report.graph import draw_graph
from cotree.report.summary import NodeState

KINDS = ("trees", "datasets", "students", "evaluations")


@st.composite
def experiments(draw: st.DrawFn) -> list[NodeState]:
    """Nodes of every kind, each reading some of those before it; evaluations are read by evaluations only."""
    nodes: list[NodeState] = []
    for number in range(draw(st.integers(1, 14))):
        kind = draw(st.sampled_from(KINDS))
        before = [node.name for node in nodes if kind == "evaluations" or not node.name.startswith("evaluations/")]
        reads = draw(st.lists(st.sampled_from(before), unique=True, max_size=4)) if before else []
        seed = f"@seed={draw(st.integers(0, 1))}" if draw(st.booleans()) else ""
        nodes.append(NodeState(name=f"{kind}/n{number}{seed}", reads=reads, done=draw(st.booleans())))
    return nodes


def boxes_of(svg: str) -> dict[str, tuple[str, float, float, float]]:
    """Title -> class, x, y, width."""
    found = re.findall(r'<title>([^<]*)</title><rect class="(\w+)" x="([\d.]+)" y="([\d.]+)" width="([\d.]+)"', svg)
    return {title: (kind, float(x), float(y), float(width)) for title, kind, x, y, width in found}


def points_of(svg: str) -> list[tuple[float, float]]:
    """Points along all lines: their curves between columns, and straight parts through these."""
    points: list[tuple[float, float]] = []
    for path in re.findall(r'<path d="([^"]*)"', svg):
        x = y = 0.0
        for command, numbers in re.findall(r"([MCH])([^MCH]*)", path):
            values = [float(number) for number in numbers.split()]
            if command == "H":
                points += [(x + t / 5 * (values[0] - x), y) for t in range(6)]
            elif command == "C":
                ends = (x, *values[::2]), (y, *values[1::2])
                for t in (step / 8 for step in range(9)):
                    weights = ((1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3)
                    points.append((sum(map(mul, weights, ends[0])), sum(map(mul, weights, ends[1]))))
            x, y = (values[0], y) if command == "H" else values[-2:]
    return points


@settings(deadline=None)
@given(experiments())
def test_every_node_stands_once_right_of_what_it_reads(nodes: list[NodeState]) -> None:
    svg = draw_graph(nodes, {node.name: "a caption" for node in nodes})
    drawn = boxes_of(svg)
    names = {node.name: node.name.partition("@")[0] for node in nodes}
    assert drawn.keys() == set(names.values())
    for node in nodes:
        kind, x, _, width = drawn[names[node.name]]
        assert kind == node.name.partition("/")[0]
        for read in node.reads:
            assert drawn[names[read]][1] + width <= x
    places = [(x, y) for _, x, y, _ in drawn.values()]
    assert len(set(places)) == len(places)
    edges = {(names[read], names[node.name]) for node in nodes for read in node.reads}
    assert svg.count("<path") == len(edges)
    match = re.match(r'<svg class="graph" width="(\d+)" height="(\d+)"', svg)
    assert match is not None
    points = points_of(svg)
    for _, x, y, width in drawn.values():
        assert x + width <= float(match[1]) and y + 40 <= float(match[2])
        behind = [point for point in points if x < point[0] < x + width and y < point[1] < y + 40]
        assert not behind, "no line goes behind a box"


def test_evaluations_stand_last_also_those_of_models_alone() -> None:
    nodes = [
        NodeState(name="trees/t"),
        NodeState(name="datasets/d", reads=["trees/t"]),
        NodeState(name="evaluations/shots"),
        NodeState(name="students/s", reads=["datasets/d"]),
        NodeState(name="evaluations/test", reads=["students/s"]),
    ]
    drawn = boxes_of(draw_graph(nodes, {}))
    assert drawn["evaluations/shots"][1] == drawn["evaluations/test"][1] > drawn["students/s"][1]


def test_a_dataset_of_a_file_stands_before_its_student() -> None:
    nodes = [
        NodeState(name="trees/t"),
        NodeState(name="datasets/d", reads=["trees/t"]),
        NodeState(name="students/s", reads=["datasets/d"]),
        NodeState(name="datasets/file"),
        NodeState(name="students/u", reads=["datasets/file", "students/s"]),
    ]
    drawn = boxes_of(draw_graph(nodes, {}))
    assert drawn["datasets/file"][1] == drawn["students/s"][1]


def test_what_is_not_finished_is_dashed_and_nothing_is_empty() -> None:
    assert draw_graph([], {}) == ""
    svg = draw_graph([NodeState(name="trees/t", done=True), NodeState(name="trees/u")], {})
    assert svg.count("stroke-dasharray") == 1


def test_a_long_or_hostile_name_is_shortened_and_escaped() -> None:
    svg = draw_graph([NodeState(name="students/<script>" + "x" * 80)], {"students/none": "x"})
    assert "<script>" not in svg and "…</text>" in svg and "&lt;script&gt;" + "x" * 80 in svg
