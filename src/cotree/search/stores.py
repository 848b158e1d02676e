"""The tree stores and Parquet files of a run and its shards, read as one without copying."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Self

from cotree.base.errors import NotFoundError
from cotree.search.parquet import ParquetTrees
from cotree.search.store import StoredTree, TreeStore

# An open store holds up to three files, and a process may often have 1,024.
_MOST_OPEN = 200


class TreeStores:
    """A read-only union of tree stores, plus one open store (`own`) that receives new trees.

    Use as a context manager. A tree that several stores have is listed once. Paths that end with .parquet are files of
    trees (`search.parquet`).
    """

    def __init__(self, paths: Iterable[Path], own: TreeStore | None = None) -> None:
        """Raises UsageError if a file is damaged or not a tree store."""
        self._paths, self._own = list(paths), own
        self._open: OrderedDict[Path, TreeStore | ParquetTrees] = OrderedDict()
        self._finished: dict[str | None, dict[str, int]] = {}
        self._place: dict[str, Path] = {}
        for path in self._paths:
            for tree_id in self._store(path).finished():
                self._place.setdefault(tree_id, path)

    @property
    def own(self) -> TreeStore:
        """The store that receives new trees."""
        assert self._own is not None, "opened to be read only"
        return self._own

    @property
    def path(self) -> Path:
        """The path of the own store."""
        return self.own.path

    def finished(self, config: str | None = None) -> dict[str, int]:
        """{tree id: rollouts} of all trees (of one config)."""
        if config not in self._finished:  # the other stores do not change meanwhile
            found: dict[str, int] = {}
            for path in reversed(self._paths):
                found |= self._store(path).finished(config)
            self._finished[config] = found
        return self._finished[config] | (self._own.finished(config) if self._own is not None else {})

    def tree(self, tree_id: str) -> StoredTree:
        """One tree by its id.

        Raises:
            UsageError: no store has it, or it is damaged.
        """
        if tree_id in self._place:
            return self._store(self._place[tree_id]).tree(tree_id)
        if self._own is not None:
            return self._own.tree(tree_id)
        others = ", nor have other shards" * (len(self._paths) > 1)
        raise NotFoundError(f"{self._paths[0]} has no tree {tree_id}{others}")

    def trees(self, config: str | None = None) -> Iterator[StoredTree]:
        """Iterate over all trees (of one config), ordered by id."""
        return map(self.tree, sorted(self.finished(config)))

    def checksums(self, tree_id: str | None = None) -> Iterator[tuple[str, int | None]]:
        """(id, checksum) of every tree stored by now, or of one."""
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
        """A number that differs after any of the stores changed."""
        files = (Path(f"{path}{end}") for path in self._paths for end in ("", "-wal"))
        stats = [file.stat() if file.exists() else None for file in files]
        return hash(tuple(None if stat is None else (stat.st_mtime_ns, stat.st_size) for stat in stats))

    def paths_with(self, config: str) -> list[Path]:
        """The paths of the other stores that have trees of a config."""
        return [path for path in self._paths if self._store(path).finished(config)]

    def put(self, *trees: StoredTree) -> None:
        """Insert trees into the own store, in one transaction."""
        self.own.put(*trees)

    def _store(self, path: Path) -> TreeStore | ParquetTrees:
        """The open store at a path; with many open, the least recently used one is closed."""
        if path not in self._open:
            if len(self._open) >= _MOST_OPEN:
                self._open.popitem(last=False)[1].__exit__()
            self._open[path] = ParquetTrees(path) if path.suffix == ".parquet" else TreeStore(path, reading=True)
        self._open.move_to_end(path)
        return self._open[path]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for store in self._open.values():
            store.__exit__()


Stores = TreeStore | TreeStores
