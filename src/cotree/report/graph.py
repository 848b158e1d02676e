"""The nodes of an experiment as a small drawing: trees, datasets, students, evaluations, and what reads what.

A layered drawing of our own: a node stands to the right of all that it reads, and no line goes behind another's box.
For the report it is one <svg> element without scripts, links or colours of its own, in which nodes that differ in their
seed alone are one box; the viewer's page draws it with the nodes' states.
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
_LONGEST = 26  # characters of a name that are shown
_CHARACTER = 6.9  # pixels of one in 12px, at most
_Slot = tuple[int, str]  # a column with a box in it, or with the lane of lines to or from a box elsewhere


@dataclass(frozen=True)
class Drawing:
    """Where boxes of one size and their lines stand, in pixels. boxes: the upper left corner of each, by its name.
    lines: the `d` of a path for each read box and its reader."""

    width: int
    height: int
    box: tuple[int, int]
    boxes: dict[str, tuple[int, float]]
    lines: list[str]


@dataclass(eq=False)
class _Box:
    """Nodes that are drawn as one."""

    kind: str
    name: str
    caption: str
    done: bool = True
    seeds: int = 0
    reads: dict[str, None] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Its name, with the number of its seeds."""
        return self.name + (f" × {self.seeds} seeds" if self.seeds > 1 else "")


def draw_graph(nodes: Sequence[NodeState], captions: Mapping[str, str]) -> str:
    """The drawing, "" without nodes.

    Args:
        nodes: the nodes, with what they read.
        captions: a few words on each node, by its id.
    """
    boxes = _boxes(nodes, captions)
    longest = max((min(len(box.label), _LONGEST) for box in boxes.values()), default=0)
    width = 20 + round(_CHARACTER * max([longest, *(len(box.caption) for box in boxes.values())]))
    drawing = lay_out({name: [*box.reads] for name, box in boxes.items()}, (width, 40))
    return rendered("graph.svg.jinja", boxes=boxes, drawing=drawing, longest=_LONGEST) if boxes else ""


def lay_out(reads: Mapping[str, Sequence[str]], box: tuple[int, int]) -> Drawing:
    """The places of boxes of one size, by what each of them reads.

    A line that passes a column has a lane between its boxes, with all others that begin, or end, in the same box.
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
    """How far down the middle of each box and lane is: in the order of what is left and right of them, for fewer
    crossings, each column centred beside the tallest; of the first what reads nothing stands below."""
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
    """The boxes by the ids of their nodes, without seeds."""
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
    """The column of each box, from the left: right of all that it reads, evaluations last, and a dataset that reads
    nothing beside the others of its readers."""
    column: dict[str, int] = {}
    for name in TopologicalSorter(reads).static_order():
        column[name] = max((column[read] + 1 for read in reads[name]), default=0)
    last = max((place for name, place in column.items() if not name.startswith("evaluations/")), default=-1)
    for name in column:
        readers = [column[other] for other in reads if name in reads[other]]
        if name.startswith("evaluations/"):
            column[name] = last + 1
        elif not reads[name] and not name.startswith("trees/") and readers:
            column[name] = min(readers) - 1
    return column
