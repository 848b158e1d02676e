"""The trees of a run for the viewer's page: filtered lists from the index, and single trees with all their data."""

from __future__ import annotations

import os
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cotree.base.errors import NotFoundError
from cotree.base.run_folder import NodeRecord, RunFolder
from cotree.base.settings import nearest
from cotree.base.shards import stores_of
from cotree.data.annotations import FILE, Annotations, read_annotations
from cotree.report.tree_json import tree_json
from cotree.report.tree_view import TreeView, dataset_rows
from cotree.search.index import TreeIndex, TreeQuery
from cotree.search.stores import TreeStores


@dataclass(frozen=True)
class _Opened:
    """A node's open stores, their common index, and the identities of their files."""

    store: TreeStores
    index: TreeIndex
    files: list[tuple[int, int]]


class TreesOfRun:
    """All trees of a run, also while it is growing; use as a context manager, in one thread.

    Stores are opened at first use, and reopened if the file was replaced or its index deleted.
    """

    def __init__(self, run: RunFolder) -> None:
        self.run = run
        self._opened: dict[str, _Opened] = {}
        self._changes: dict[str, int] = {}
        self._annotations: Annotations | None = None
        self._annotated_in: tuple[int, int] | None = None
        self._kept: defaultdict[str, ExitStack] = defaultdict(ExitStack)

    def __enter__(self) -> TreesOfRun:
        return self

    def __exit__(self, *_: object) -> None:
        for kept in self._kept.values():
            kept.close()

    def names(self) -> list[str]:
        """The names of trees nodes that have a store."""
        nodes = (name.partition("/")[2] for name in self.run.nodes() if name.startswith("trees/"))
        return [name for name in nodes if self._paths(name)]

    def open(self, name: str) -> _Opened:
        """The open stores of a node, with an up-to-date index.

        Raises:
            NotFoundError: the run has no such trees.
        """
        paths = self._paths(name)
        if not paths:
            raise NotFoundError(f"{self.run.path} has no trees `{name}`; {nearest(name, self.names())}")
        opened, files = self._opened.get(name), [*map(_identity, paths)]
        if opened is None or opened.files != files or not opened.index.path.is_file():
            self._kept[name].close()
            store = self._kept[name].enter_context(TreeStores(paths))
            place = self.run.node(f"trees/{name}").path / "trees.db"
            opened = _Opened(store, self._kept[name].enter_context(TreeIndex(store, place)), files)
            self._opened[name] = opened
            self._changes.pop(name, None)
        if (changes := opened.store.changes()) != self._changes.get(name):
            opened.index.fill()
            self._changes[name] = changes
        return opened

    def _paths(self, name: str) -> list[Path]:
        return stores_of(self.run, name)

    def record(self, name: str) -> NodeRecord:
        """A node's record."""
        record = self.run.node(f"trees/{name}").record()
        if record is None:
            raise NotFoundError(f"{self.run.path} has no trees `{name}`, or its node.json is damaged")
        return record

    def totals(self, name: str) -> dict[str, dict[str, int]]:
        """Counts of a node's trees and thoughts by task."""
        return self.open(name).index.totals(self.record(name).base)

    def changes(self, name: str) -> int:
        """A number that differs after a tree or an annotation was added."""
        annotations = self.annotations()
        return self.open(name).index.changes() + (annotations.saves() if annotations is not None else 0)

    def annotations(self) -> Annotations | None:
        """The run's annotations, kept open; None if there are none."""
        path = self.run.path / FILE
        file = _identity(path) if path.is_file() else None
        if file != self._annotated_in:
            self._kept[FILE].close()
            opened = read_annotations(self.run.path)
            self._annotations = None if opened is None else self._kept[FILE].enter_context(opened)
            self._annotated_in = file
        return self._annotations

    def page(self, name: str, query: TreeQuery, offset: int, limit: int) -> dict[str, Any]:
        """One page of a node's list of trees."""
        index, base, annotations = self.open(name).index, self.record(name).base, self.annotations()
        annotated = {} if annotations is None else annotations.counts(name)
        total, rows = index.list(base, query, annotated, offset=offset, limit=limit)
        for row in rows:
            row["annotated"] = annotated.get(row["tree"], 0)
        tasks = {task: counts["trees"] for task, counts in index.totals(base).items()}
        return {"total": total, "tasks": tasks, "rows": rows}

    def tree(self, name: str, tree_id: str) -> dict[str, Any]:
        """One tree with its thoughts, the dataset rows of its chains, and its annotations."""
        opened, record = self.open(name), self.record(name)
        tree = opened.store.tree(tree_id)
        view = TreeView(name, tree, dataset_rows(self.run, tree_id)[tree_id], record.parts)
        stored = self.annotations()
        annotations = [] if stored is None else [each.shown for each in stored.all(tree=tree_id)]
        return {**tree_json(view, {*opened.index.looping(tree_id)}), "annotations": annotations}


def _identity(path: Path) -> tuple[int, int]:
    """A file's device and inode, which identify it after a rename."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        raise NotFoundError(f"{path} is missing; `cotree run` on its run looks where the recipe says") from None
    return status.st_dev, status.st_ino
