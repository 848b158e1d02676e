"""Many stores of trees, read as one without copying anything: those of a run and of its shards."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Self

from cotree.base.errors import UsageError
from cotree.search.store import StoredTree, TreeStore

# An open store holds up to three files, and a process may often have 1,024.
_MOST_OPEN = 200


class TreeStores:
    """Stores read as one, each tree once; use as a context manager.

    own: an open store among them, which new trees are put into.
    """

    def __init__(self, paths: Iterable[Path], own: TreeStore | None = None) -> None:
        """Raises UsageError where a store is damaged, or is another file."""
        self._paths, self._own = list(paths), own
        self._open: OrderedDict[Path, TreeStore] = OrderedDict()
        self._finished: dict[str | None, dict[str, int]] = {}
        self._place: dict[str, Path] = {}
        for path in self._paths:
            for tree_id in self._store(path).finished():
                self._place.setdefault(tree_id, path)

    @property
    def own(self) -> TreeStore:
        """The store that new trees are put into."""
        assert self._own is not None, "opened to be read only"
        return self._own

    @property
    def path(self) -> Path:
        """The own store's."""
        return self.own.path

    def finished(self, config: str | None = None) -> dict[str, int]:
        """The ids of all trees (of one config), with the rollouts that each took."""
        if config not in self._finished:  # none of the others is written to meanwhile
            found: dict[str, int] = {}
            for path in reversed(self._paths):
                found |= self._store(path).finished(config)
            self._finished[config] = found
        return self._finished[config] | (self._own.finished(config) if self._own is not None else {})

    def tree(self, tree_id: str) -> StoredTree:
        """One tree by its id.

        Raises:
            UsageError: no store has it, or it is damaged there.
        """
        if tree_id in self._place:
            return self._store(self._place[tree_id]).tree(tree_id)
        if self._own is not None:
            return self._own.tree(tree_id)
        raise UsageError(f"{self._paths[0]} has no tree {tree_id}{', nor have other shards' * (len(self._paths) > 1)}")

    def trees(self, config: str | None = None) -> Iterator[StoredTree]:
        """All trees (of one config) in the order of their ids, read one at a time."""
        return map(self.tree, sorted(self.finished(config)))

    def checksums(self, tree_id: str | None = None) -> Iterator[tuple[str, int | None]]:
        """The ids of all trees that are there by now (or one), each with the checksum of its content."""
        if tree_id is not None:
            yield from self._store(self._place[tree_id]).checksums(tree_id)
            return
        seen: set[str] = set()
        for path in self._paths:
            for found, checksum in list(self._store(path).checksums()):
                if found not in seen:
                    seen.add(found)
                    self._place[found] = path
                    yield found, checksum

    def changes(self) -> int:
        """A number that is another one after one of the stores was changed."""
        files = (Path(f"{path}{end}") for path in self._paths for end in ("", "-wal"))
        stats = [file.stat() if file.exists() else None for file in files]
        return hash(tuple(None if stat is None else (stat.st_mtime_ns, stat.st_size) for stat in stats))

    def paths_with(self, config: str) -> list[Path]:
        """The stores that have trees of a config, the own one left out."""
        return [path for path in self._paths if self._store(path).finished(config)]

    def put(self, tree: StoredTree) -> None:
        """Insert a tree into the own store."""
        self.own.put(tree)

    def _store(self, path: Path) -> TreeStore:
        """The open store at a path; one that was not used for long is closed where many are open."""
        if path not in self._open:
            if len(self._open) >= _MOST_OPEN:
                self._open.popitem(last=False)[1].__exit__()
            self._open[path] = TreeStore(path, reading=True)
        self._open.move_to_end(path)
        return self._open[path]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for store in self._open.values():
            store.__exit__()


Stores = TreeStore | TreeStores
