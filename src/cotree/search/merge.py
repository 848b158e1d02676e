"""Merge tree stores or journals of several files into one without duplicates.

Invariant: an item is copied with all its rows in one transaction, so a killed merge resumes; items that the target has
are kept, and sources are not changed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from itertools import chain, islice
from pathlib import Path
from typing import Any

from cotree.base.errors import UsageError
from cotree.search.journal import Journal
from cotree.search.store import TreeStore

_BATCH = 500  # items in a transaction


def merge_stores(sources: Iterable[Path], target: Path) -> int:
    """Copy all trees of the sources into the target (created if missing); returns how many were new.

    Raises:
        UsageError: a source is missing, damaged, of another schema version or not a tree store.
    """
    new = 0
    with TreeStore(target) as into:
        for path in sources:
            with TreeStore(path, reading=True) as source:
                there = into.finished()
                new += copy_items(source, into, [tree_id for tree_id in source.finished() if tree_id not in there])
    return new


def merge_journals(sources: Iterable[Path], target: Path) -> int:
    """Copy all completions of the sources, and which trees use them, into the target; returns how many were new.

    Raises:
        UsageError: a source is missing, damaged, of another schema version or not a journal.
    """
    new = 0
    with Journal(target) as into:
        for path in sources:
            with Journal(path, reading=True) as source:
                keys = (key for (key,) in source.execute("SELECT key FROM completions"))
                new += copy_items(source, into, into.missing_keys(keys))
                for table in ("uses", "current", "shares"):
                    rows = source.execute(f"SELECT * FROM {table}")  # noqa: S608
                    while batch := list(islice(rows, _BATCH)):
                        into.insert({table: batch})
    return new


def take_completions(sources: Iterable[Path], journal: Journal, questions: Collection[str]) -> int:
    """Copy the completions of these questions (`question_name`) into a journal; returns how many were new."""
    new = 0
    for path in sources:
        with Journal(path, reading=True) as source:
            rows = (
                source.execute("SELECT key FROM completions WHERE question = ?", (name,))
                for name in sorted(source.questions.intersection(questions))
            )
            keys = (key for (key,) in chain.from_iterable(rows))
            new += copy_items(source, journal, journal.missing_keys(keys))
    return new


def copy_items(source: TreeStore | Journal, target: TreeStore | Journal, keys: Iterable[Any]) -> int:
    """Copy the items with these keys, with all their rows; returns how many were copied.

    Raises:
        UsageError: source and target have different schema versions, or an item is damaged.
    """
    if source.version() != target.version():
        raise UsageError(
            f"{source.path} has schema version {source.version()}, not {target.version()}; `cotree run` on its run "
            "brings it up to date"
        )
    left, copied = iter(keys), 0
    while batch := list(islice(left, _BATCH)):
        source.check_items(batch)
        target.insert({table: source.rows_of(table, batch) for table in source.tables_of_items})
        copied += len(batch)
    return copied
