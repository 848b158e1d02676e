"""Read trees by id from a Parquet file written by `cotree export --to trees`.

Invariant: memory holds at most one row group of a file, plus its footer and tree ids.
"""

from __future__ import annotations

import zlib
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, Field, fields
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cotree.base.errors import NotFoundError, UsageError
from cotree.search.store import StoredNode, StoredTree

if TYPE_CHECKING:
    import pyarrow as pa

# Reading a tree decodes its whole row group, so groups are small.
TREES_PER_GROUP = 128


class ParquetTrees:
    """An open Parquet file of trees with the read methods of `TreeStore`; use as a context manager."""

    def __init__(self, path: Path) -> None:
        """Raises UsageError if the file is missing, damaged, or has no trees."""
        import pyarrow.parquet as pq

        if not path.is_file():
            raise UsageError(f"{path} is missing; `cotree run` on its run looks where the recipe says")
        self.path = path
        with self._guard():
            self._file = pq.ParquetFile(path, page_checksum_verification=True)
            schema, metadata = self._file.schema_arrow, self._file.metadata
            self._check_columns("columns", schema.names, fields(StoredTree))
            nodes = schema.field("nodes").type
            of_nodes = [field.name for field in getattr(nodes, "value_type", ())]
            self._check_columns("columns of `nodes`", of_nodes, fields(StoredNode))
            groups = (metadata.row_group(n).num_rows for n in range(metadata.num_row_groups))
            self._starts = [0, *accumulate(groups)]
            self._rows = {row["tree_id"]: number for number, row in enumerate(self._columns("tree_id"))}
        self._group: tuple[int, pa.Table] | None = None  # (number, rows) of the row group read last

    def finished(self, config: str | None = None) -> dict[str, int]:
        """{tree id: rollouts} of all trees (of one config)."""
        with self._guard():
            rows = self._columns("tree_id", "rollouts", "config")
            return {row["tree_id"]: row["rollouts"] for row in rows if config in (None, row["config"])}

    def checksums(self, tree_id: str | None = None) -> Iterator[tuple[str, int | None]]:
        """(id, number) of every tree, or of one; the number differs after the file changed."""
        status = self.path.stat()
        changed = zlib.crc32(f"{status.st_mtime_ns}/{status.st_size}".encode())
        yield from ((found, changed) for found in (self._rows if tree_id is None else [tree_id]))

    def tree(self, tree_id: str) -> StoredTree:
        """One tree by its id.

        Raises:
            UsageError: the file has no such tree, or is damaged.
        """
        row = self._rows.get(tree_id)
        if row is None:
            raise NotFoundError(f"{self.path} has no tree {tree_id}")
        number = bisect_right(self._starts, row) - 1
        with self._guard():
            if self._group is None or self._group[0] != number:
                self._group = None  # before the next one is read
                self._group = number, self._file.read_row_group(number, use_threads=False)
            (values,) = self._group[1].slice(row - self._starts[number], 1).to_pylist()
            nodes = [StoredNode(**_known(node, StoredNode)) for node in values["nodes"] or ()]
            if not nodes or [node.node_id for node in nodes] != list(range(len(nodes))):
                raise OSError(f"the tree {tree_id} is not whole")
            return StoredTree(**_known(values, StoredTree) | {"nodes": nodes})

    def _columns(self, *names: str) -> Iterator[dict[str, Any]]:
        """Iterate over all rows, with only these columns."""
        for batch in self._file.iter_batches(columns=[*names], use_threads=False):
            yield from batch.to_pylist()

    def _check_columns(self, what: str, found: list[str], wanted: tuple[Field[Any], ...]) -> None:
        lacking = [column.name for column in wanted if column.default is MISSING and column.name not in found]
        if lacking:
            fix = "`cotree export RUN --to trees` writes such files"
            raise UsageError(f"{self.path} holds no trees: the {what} lack {', '.join(lacking)}; {fix}")

    @contextmanager
    def _guard(self) -> Iterator[None]:
        import pyarrow as pa

        try:
            yield
        except (pa.ArrowException, OSError, TypeError, ValueError) as error:
            why = str(error).partition("\n")[0]
            fix = "export the trees again, or copy the file anew"
            raise UsageError(f"{self.path} is damaged or no Parquet file of trees ({why}); {fix}") from None

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _known(values: dict[str, Any], of: type[StoredNode] | type[StoredTree]) -> dict[str, Any]:
    """Select the fields of a dataclass; files of other versions of cotree may lack some or have more."""
    return {column.name: values[column.name] for column in fields(of) if column.name in values}
