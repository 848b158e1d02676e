"""`trees_index.db` beside `trees.db`: per-tree statistics and a full-text index, to filter, sort and search many trees.

Invariant: it is a cache of the stored trees. Missing and outdated rows are recomputed by `fill`; a damaged index or one
of another version is rebuilt.
"""

from __future__ import annotations

import json
import os
import re
import sqlite3
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, Self

from cotree.base.disk import sqlite_journal_mode
from cotree.base.errors import CotreeError
from cotree.search.store import StoredNode, StoredTree, TreeStore
from cotree.search.stores import TreeStores
from cotree.search.thoughts import chain_text
from cotree.tasks.diagnosis import LONG_TEXT, diagnose

_VERSION = 1
_SHOWN = 200  # characters of a question in a list
_BATCH = 100  # trees per commit
_COLUMNS = (
    ("tree", "TEXT NOT NULL UNIQUE"), ("checksum", "INTEGER"), ("config", "TEXT"), ("place", "TEXT"), ("task", "TEXT"),
    *((name, "INTEGER") for name in ("correct", "wrong", "no_answer", "undecided", "depth", "thoughts",
                                     "tokens", "forced", "looped")),
    ("correct_share", "REAL"), ("reflection", "TEXT"), ("question", "TEXT"), ("text", "TEXT"), ("looping", "TEXT"),
)  # fmt: skip
_SCHEMA = (
    # AUTOINCREMENT: numbers are never reused, because `words` keeps the rows of deleted trees.
    f"CREATE TABLE trees (number INTEGER PRIMARY KEY AUTOINCREMENT, {', '.join(map(' '.join, _COLUMNS))})",
    "CREATE INDEX trees_by_place ON trees (config, place)",
    # Covers all filter and sort columns without the texts: a third of the bytes to read.
    "CREATE INDEX trees_by_numbers ON trees (config, task, correct, wrong, no_answer, depth, thoughts, tokens, forced, "
    "looped, correct_share, reflection, place, tree)",
    # Contentless: stores the index only, not the texts.
    "CREATE VIRTUAL TABLE words USING fts5(text, content='', tokenize='unicode61 remove_diacritics 2')",
    f"PRAGMA user_version = {_VERSION}",
)
_SHOWN_COLUMNS = [name for name, _ in _COLUMNS if name not in ("checksum", "config", "place", "looping")]
_MIXES = {
    "mixed": "correct > 0 AND wrong + no_answer > 0",
    "all_correct": "correct > 0 AND wrong + no_answer = 0",
    "all_wrong": "correct = 0 AND wrong > 0",
    "no_answer": "correct + wrong = 0 AND no_answer > 0",
}
# Compare row numbers, because comparing text ids for every tree is slower.
_ANNOTATED = "number IN (SELECT number FROM trees WHERE tree IN (SELECT value FROM json_each(:annotated)))"


@dataclass(frozen=True, kw_only=True)
class TreeQuery:
    """Filters and sort order for a list of trees; None: no filter.

    verdicts: the mix of verdicts of a tree's chains; `no_answer`: no chain has an answer; in the other mixes a chain
        without an answer counts as not correct. reflected: a correct answer follows a reflection (`helped`), or none
        does (`failed`). forced, looped: the tree has a forced answer, or a chain that repeats itself.
    annotated: with or without an annotation. words: full-text search (word prefixes) in question and thoughts.
    sort: a column; `hard`: lowest share of correct chains first, annotated trees last. Ties are sorted by question.
    """

    task: str | None = None
    verdicts: Literal["mixed", "all_correct", "all_wrong", "no_answer"] | None = None
    min_depth: int = 0
    reflected: Literal["helped", "failed"] | None = None
    forced: bool = False
    looped: bool = False
    annotated: bool | None = None
    words: str = ""
    sort: Literal["question", "tokens", "thoughts", "depth", "correct_share", "forced", "hard"] = "question"
    descending: bool = False

    def conditions(self) -> Iterator[str]:
        """Yield SQL conditions for the filters that are set, with the fields' names as parameters."""
        given = {
            "task = :task": self.task is not None,
            _MIXES[self.verdicts or "mixed"]: self.verdicts is not None,
            "depth >= :min_depth": self.min_depth > 0,
            "reflection = :reflected": self.reflected is not None,
            "forced > 0": self.forced,
            "looped > 0": self.looped,
            f"{_ANNOTATED} = :annotated_is": self.annotated is not None,
            "number IN (SELECT rowid FROM words WHERE words MATCH :words)": bool(_match(self.words)),
        }
        return (condition for condition, is_given in given.items() if is_given)

    def order(self) -> str:
        """The SQL ORDER BY expression."""
        way = "DESC" if self.descending else "ASC"
        if self.sort == "question":
            return f"place {way}"
        if self.sort == "hard":
            last = f"{_ANNOTATED}, " if self.annotated is None else ""
            return f"{last}correct_share IS NULL, correct_share {way}, place"
        return f"{self.sort} IS NULL, {self.sort} {way}, place"


class TreeIndex:
    """The index of one or several stores; use as a context manager. Several processes may open it at once."""

    def __init__(self, store: TreeStore | TreeStores, path: Path | None = None) -> None:
        """Open or create the index beside a store, or in a temporary folder if the store's folder is read-only.

        Args:
            path: the store whose folder holds the index; required for several stores.
        """
        self._store, self._kept = store, ExitStack()
        self._totals: dict[str, tuple[int, dict[str, dict[str, int]]]] = {}  # by config, as of so many changes
        beside = path or store.path
        self.path = beside.with_name(f"{beside.stem}_index.db")
        if not os.access(self.path.parent, os.W_OK) or (self.path.exists() and not os.access(self.path, os.W_OK)):
            self.path = Path(self._kept.enter_context(TemporaryDirectory(prefix="cotree-"))) / self.path.name
        with self._guard():
            try:
                self._open()
            except sqlite3.DatabaseError as error:
                if isinstance(error, sqlite3.OperationalError) and "no such" not in str(error):
                    raise
                self._db.close()
                for end in ("", "-wal", "-shm"):
                    Path(f"{self.path}{end}").unlink(missing_ok=True)
                self._open()

    def _open(self) -> None:
        self._db = sqlite3.connect(self.path, isolation_level=None)
        self._db.execute(f"PRAGMA journal_mode = {sqlite_journal_mode(self.path)}")
        self._db.execute("PRAGMA synchronous = NORMAL")
        if (found := self._version()) == 0:
            with self._transaction():
                if self._version() == 0:  # another process may have created it meanwhile
                    for statement in _SCHEMA:
                        self._db.execute(statement)
        elif found != _VERSION:
            raise sqlite3.DatabaseError("it is of another version")
        self._db.execute("SELECT count(*) FROM trees WHERE number < 2").fetchone()

    def _version(self) -> int:
        return int(self._db.execute("PRAGMA user_version").fetchone()[0])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._db.close()
        self._kept.close()

    @contextmanager
    def _guard(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            fix = "free some space, or delete this file: it is made again of the trees"
            raise CotreeError(f"{self.path}: {error}; {fix}") from None

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._guard(), self._db:
            self._db.execute("BEGIN IMMEDIATE")
            yield

    def add(self, trees: Iterable[StoredTree]) -> None:
        """Index trees of the store, replacing their old rows."""
        names = ", ".join(name for name, _ in _COLUMNS)
        places = ", ".join(f":{name}" for name, _ in _COLUMNS)
        insert = f"INSERT INTO trees ({names}) VALUES ({places})"  # noqa: S608
        left = iter(trees)
        for first in left:
            with self._transaction():
                for tree in chain([first], islice(left, _BATCH - 1)):
                    row = _row(tree) | {"checksum": dict(self._store.checksums(tree.tree_id))[tree.tree_id]}
                    self._db.execute("DELETE FROM trees WHERE tree = :tree", row)
                    number = self._db.execute(insert, row).lastrowid
                    texts = [*(message["content"] for message in tree.messages), *(node.text for node in tree.nodes)]
                    self._db.execute("INSERT INTO words (rowid, text) VALUES (?, ?)", (number, "\n".join(texts)))

    def fill(self) -> int:
        """Index missing or changed trees of the store and drop deleted ones; returns how many were indexed."""
        with self._guard():
            self._db.execute("CREATE TEMP TABLE IF NOT EXISTS stored (tree TEXT PRIMARY KEY, checksum) WITHOUT ROWID")
            with self._db:
                self._db.execute("BEGIN")
                self._db.execute("DELETE FROM stored")
                self._db.executemany("INSERT INTO stored VALUES (?, ?)", self._store.checksums())
            if self._db.execute("DELETE FROM trees WHERE tree NOT IN (SELECT tree FROM stored)").rowcount:
                self._totals.clear()
            missing = self._db.execute("SELECT tree, checksum FROM stored EXCEPT SELECT tree, checksum FROM trees")
            ids = [tree_id for tree_id, _ in missing]
        self.add(map(self._store.tree, ids))
        return len(ids)

    def changes(self) -> int:
        """A number that differs after trees were added."""
        with self._guard():
            return int(self._db.execute("SELECT coalesce(max(number), 0) FROM trees").fetchone()[0])

    def totals(self, config: str) -> dict[str, dict[str, int]]:
        """Counts of trees and thoughts of one config: {task: {"trees": n, "thoughts": n}}."""
        changes = self.changes()
        if self._totals.get(config, (None, {}))[0] != changes:
            query = "SELECT task, count(*), sum(thoughts) FROM trees WHERE config = ? GROUP BY task"
            with self._guard():
                rows = self._db.execute(query, (config,)).fetchall()
            found = {task: {"trees": trees, "thoughts": thoughts} for task, trees, thoughts in rows}
            self._totals[config] = changes, found
        return self._totals[config][1]

    def looping(self, tree_id: str) -> list[int]:
        """The ids of leaves whose chains repeat themselves, from the index."""
        with self._guard():
            (found,) = self._db.execute("SELECT looping FROM trees WHERE tree = ?", (tree_id,)).fetchone() or ("[]",)
        return list(json.loads(found))

    def list(
        self, config: str, query: TreeQuery, annotated: Collection[str] = (), *, offset: int = 0, limit: int = 100
    ) -> tuple[int, list[dict[str, Any]]]:
        """Run a query on the trees of a config; returns the total number of hits and one page as {column: value}.

        annotated: the ids of annotated trees.
        """
        values = vars(query) | {"config": config, "annotated": json.dumps([*annotated]), "offset": offset}
        values |= {"limit": limit, "annotated_is": query.annotated, "words": _match(query.words)}
        conditions = [*query.conditions()]
        where = " AND ".join(["config = :config", *conditions])
        page = f"SELECT number FROM trees WHERE {where} ORDER BY {query.order()} LIMIT :limit OFFSET :offset"  # noqa: S608
        shown = ", ".join(_SHOWN_COLUMNS)
        with self._guard():
            if conditions:
                (total,) = self._db.execute(f"SELECT count(*) FROM trees WHERE {where}", values).fetchone()  # noqa: S608
            else:
                total = sum(counts["trees"] for counts in self.totals(config).values())
            rows = [
                self._db.execute(f"SELECT {shown} FROM trees WHERE number = ?", found).fetchone()  # noqa: S608
                for found in self._db.execute(page, values).fetchall()
            ]
        return total, [dict(zip(_SHOWN_COLUMNS, row, strict=True)) for row in rows]


def _match(words: str) -> str:
    """An FTS5 query for all of these words as prefixes, with FTS5's syntax escaped."""
    return " ".join('"{}"*'.format(word.replace('"', '""')) for word in words.replace("\0", " ").split())


def looping_leaves(tree: StoredTree) -> list[int]:
    """The ids of leaves whose chains repeat themselves, computed from the tree."""
    return [leaf.node_id for leaf in tree.nodes if leaf.verdict is not None and _loops(tree, leaf)]


def _row(tree: StoredTree) -> dict[str, Any]:
    """The index row of a tree, without its checksum."""
    leaves = [node for node in tree.nodes if node.verdict is not None]
    verdicts = Counter(leaf.verdict for leaf in leaves)
    judged = len(leaves) - verdicts["undecided"]
    looping = looping_leaves(tree)
    reflects = any(node.type == "reflection" for node in tree.nodes)
    right = chain.from_iterable(tree.chain(leaf.node_id) for leaf in leaves if leaf.verdict == "correct")
    helped = any(node.type == "reflection" for node in right)
    return {
        **{name: getattr(tree, name) for name in ("config", "task")},
        **{kind: verdicts[kind] for kind in ("correct", "wrong", "no_answer", "undecided")},
        "tree": tree.tree_id,
        "place": "/".join(map(_natural_place, (tree.task, tree.question_id, str(tree.turn)))),
        "depth": max(node.depth for node in tree.nodes),
        "thoughts": len(tree.nodes) - 1,
        "tokens": tree.completion_tokens,
        "forced": sum(node.is_forced for node in tree.nodes),
        "looped": len(looping),
        "looping": json.dumps(looping),
        "correct_share": verdicts["correct"] / judged if judged else None,
        "reflection": ("helped" if helped else "failed") if reflects else None,
        "question": tree.question_id + (f", turn {tree.turn + 1}" if tree.turn else ""),
        "text": tree.messages[-1]["content"][:_SHOWN] if tree.messages else "",
    }


def _loops(tree: StoredTree, leaf: StoredNode) -> bool:
    """Whether the chain to a leaf repeats itself (`diagnose`); short uncut chains never do and are skipped."""
    text, end = chain_text(tree.chain(leaf.node_id)), "length" if leaf.is_cut else "stop"
    return (leaf.is_cut or len(text) > LONG_TEXT) and diagnose(text, finish_reason=end).loop


def _natural_place(name: str) -> str:
    """A text key for natural sorting: "q-9" before "q-10"."""
    return re.sub(r"\d+", lambda digits: f"{len(digits[0].lstrip('0')):04}{digits[0].lstrip('0')}", name)
