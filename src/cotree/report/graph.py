"""Lay out and draw an experiment's graph of trees, datasets, students and evaluations.

A layered layout: a node is right of its dependencies, and no line passes behind another's box. The report shows one
<svg> element without scripts, links or fixed colours, with one box for nodes that differ only in their seed; the
viewer's page draws the layout with the nodes' states.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from graphlib import TopologicalSorter
from itertools import pairwise
from statistics import fmean

from cotree.report.summary import NodeState, split_seed
from cotree.report.templates import rendered

_ACROSS, _DOWN, _MARGIN = 46, 14, 2  # pixels between columns, between boxes, and around all
_LONGEST = 26  # maximum characters of a name
_CHARACTER = 6.9  # maximum width in pixels of a 12px character
_Slot = tuple[int, str]  # (column, box in it, or box elsewhere whose lines have a lane here)


@dataclass(frozen=True)
class Drawing:
    """Positions of equally sized boxes and their lines, in pixels. boxes: {name: upper left corner}. lines: the `d`
    attribute of each path."""

    width: int
    height: int
    box: tuple[int, int]
    boxes: dict[str, tuple[int, float]]
    lines: list[str]


@dataclass(eq=False)
class _Box:
    """A box for one or more nodes."""

    kind: str
    name: str
    caption: str
    done: bool = True
    seeds: int = 0
    reads: dict[str, None] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The box's name, with the number of seeds."""
        return self.name + (f" × {self.seeds} seeds" if self.seeds > 1 else "")


def draw_graph(nodes: Sequence[NodeState], captions: Mapping[str, str]) -> str:
    """Draw the graph as an <svg> element; "" without nodes.

    Args:
        nodes: the nodes, with their dependencies.
        captions: {node id: short text}.
    """
    boxes = _boxes(nodes, captions)
    longest = max((min(len(box.label), _LONGEST) for box in boxes.values()), default=0)
    width = 20 + round(_CHARACTER * max([longest, *(len(box.caption) for box in boxes.values())]))
    drawing = lay_out({name: [*box.reads] for name, box in boxes.items()}, (width, 40))
    return rendered("graph.svg.jinja", boxes=boxes, drawing=drawing, longest=_LONGEST) if boxes else ""


def lay_out(reads: Mapping[str, Sequence[str]], box: tuple[int, int]) -> Drawing:
    """Lay out boxes of one size, given {box: boxes that it reads}.

    A line that crosses a column runs in a lane between its boxes, shared by lines that start or end at the same box.
    """
    column = _columns(reads)
    edges = [(read, name) for name in reads for read in reads[name]]
    ends = Counter(end for read, name in edges if column[name] - column[read] > 1 for end in (read, name))
    routes: list[list[_Slot]] = []
    for read, name in edges:
        lane = max(read, name, key=ends.__getitem__)
        between = range(column[read] + 1, column[name])
        routes.append([(column[read], read), *((passed, lane) for passed in between), (column[name], name)])
    middle = _middles([*((column[name], name) for name in column), *(slot for route in routes for slot in route)],
                      [step for route in routes for step in pairwise(route)], column, box[1])  # fmt: skip
    left = {place: _MARGIN + place * (box[0] + _ACROSS) for place, _ in middle}
    lines = []
    for route in routes:
        path = f"M{left[route[0][0]] + box[0]} {middle[route[0]]:g}"
        for before, slot in pairwise(route):
            x, y = left[slot[0]], middle[slot]
            path += f"C{x - _ACROSS / 2:g} {middle[before]:g} {x - _ACROSS / 2:g} {y:g} {x} {y:g}"
            path += f"H{x + box[0]}" if slot != route[-1] else ""
        lines.append(path)
    boxes = {name: (left[place], middle[place, name] - box[1] / 2) for name, place in column.items()}
    right = max((x + box[0] for x in left.values()), default=0)
    below = max([0, *middle.values(), *(y + box[1] for _, y in boxes.values())])
    return Drawing(right + _MARGIN, math.ceil(below) + _MARGIN, box, boxes, lines)


def _middles(
    slots: Sequence[_Slot], steps: Sequence[tuple[_Slot, _Slot]], column: Mapping[str, int], height: int
) -> dict[_Slot, float]:
    """The vertical centre of each box and lane: ordered by neighbours in the adjacent columns for fewer crossings, each
    column centred beside the tallest; in the first, boxes without dependencies come last."""
    columns = defaultdict[int, list[_Slot]](list)
    for slot in dict.fromkeys(slots):
        columns[slot[0]].append(slot)
    beside: dict[int, dict[_Slot, list[_Slot]]] = {1: defaultdict(list), -1: defaultdict(list)}
    for before, slot in dict.fromkeys(steps):
        beside[1][slot].append(before)
        beside[-1][before].append(slot)

    def room(slot: _Slot) -> int:
        return _DOWN + (height if column[slot[1]] == slot[0] else 0)

    tallest = max((sum(map(room, each)) for each in columns.values()), default=0)
    middle: dict[_Slot, float] = {}
    for way in (1, -1, 1):
        for place in sorted(columns)[::way]:
            near = {slot: [middle[other] for other in beside[way][slot]] for slot in columns[place]}
            columns[place].sort(key=lambda slot: fmean(near[slot]) if near[slot] else middle.get(slot, math.inf))
            y = _MARGIN + (tallest - sum(map(room, columns[place]))) / 2
            for slot in columns[place]:
                middle[slot] = y + (room(slot) - _DOWN) / 2
                y += room(slot)
    return middle


def _boxes(nodes: Sequence[NodeState], captions: Mapping[str, str]) -> dict[str, _Box]:
    """{node id without seed: box}."""
    named = {node.name: split_seed(node.name)[0] for node in nodes}
    boxes: dict[str, _Box] = {}
    for node in nodes:
        key = named[node.name]
        kind, _, name = key.partition("/")
        box = boxes.setdefault(key, _Box(kind, name, captions.get(node.name, "")))
        box.seeds += 1
        box.done = box.done and node.done
        box.reads.update((named[read], None) for read in node.reads if named.get(read, key) != key)
    return boxes


def _columns(reads: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """{box: column}, from the left: right of its dependencies, evaluations after all else, and a dataset without
    dependencies in the column of its readers' other inputs."""
    column: dict[str, int] = {}
    for name in TopologicalSorter(reads).static_order():
        column[name] = max((column[read] + 1 for read in reads[name]), default=0)
    last = max((place for name, place in column.items() if not name.startswith("evaluations/")), default=-1)
    for name in column:
        readers = [column[other] for other in reads if name in reads[other]]
        if name.startswith("evaluations/"):
            column[name] = max([last + 1, *(column[read] + 1 for read in reads[name])])
        elif not reads[name] and not name.startswith("trees/") and readers:
            column[name] = min(readers) - 1
    return column
