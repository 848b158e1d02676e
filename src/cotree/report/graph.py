"""The nodes of an experiment as a small drawing: trees, datasets, students, evaluations, and what reads what.

A layered drawing of our own, one <svg> element without scripts, links or colours of its own. A node stands to the right
of all that it reads; nodes that differ in their seed alone are one box.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from graphlib import TopologicalSorter
from statistics import fmean

from cotree.report.summary import NodeState, split_seed
from cotree.report.templates import rendered


@dataclass(eq=False)
class _Box:
    """Nodes that are drawn as one. column, row: its place, from 0."""

    kind: str
    name: str
    caption: str
    done: bool = True
    seeds: int = 0
    reads: list[_Box] = field(default_factory=list)
    column: int = 0
    row: int = 0

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
    columns = _columns(_boxes(nodes, captions))
    for column in columns:  # fewer crossings: in the order of what they read; what reads nothing stands below
        column.sort(key=lambda box: fmean(read.row for read in box.reads) if box.reads else math.inf)
        for row, box in enumerate(column):
            box.row = row
    return rendered("graph.svg.jinja", columns=columns) if columns else ""


def _boxes(nodes: Sequence[NodeState], captions: Mapping[str, str]) -> list[_Box]:
    """The boxes, each after those that it reads."""
    named = {node.name: split_seed(node.name)[0] for node in nodes}
    boxes: dict[str, _Box] = {}
    reads: dict[str, dict[str, None]] = {}
    for node in nodes:
        key = named[node.name]
        kind, _, name = key.partition("/")
        box = boxes.setdefault(key, _Box(kind, name, captions.get(node.name, "")))
        box.seeds += 1
        box.done = box.done and node.done
        reads.setdefault(key, {}).update((named[read], None) for read in node.reads if named.get(read, key) != key)
    for key, box in boxes.items():
        box.reads = [boxes[read] for read in reads[key]]
    return [boxes[key] for key in TopologicalSorter(reads).static_order()]


def _columns(boxes: Sequence[_Box]) -> list[list[_Box]]:
    """The columns from left to right: a box stands right of all that it reads, evaluations last, and a dataset that
    reads nothing beside the others of its readers."""
    for box in boxes:
        box.column = max((read.column + 1 for read in box.reads), default=0)
    last = max((box.column for box in boxes if box.kind != "evaluations"), default=-1)
    for box in boxes:
        readers = [other.column for other in boxes if box in other.reads]
        if box.kind == "evaluations":
            box.column = last + 1
        elif not box.reads and box.kind != "trees" and readers:
            box.column = min(readers) - 1
    width = 1 + max((box.column for box in boxes), default=-1)
    return [[box for box in boxes if box.column == place] for place in range(width)]
