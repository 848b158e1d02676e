"""`trees.db`: every tree that was grown, and the journal of every completion on the way there.

Invariant: what is in the file survives a kill -9 at any moment. A completion is committed on arrival under the hash of
its request, so a resumed search replays its rounds from the journal and no completed call is made twice. A tree is
inserted whole in one transaction under (task, question, search-config hash); a changed config makes new trees and never
destroys old ones.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import Field, dataclass, fields
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

from cotree.base.errors import CotreeError, UsageError

SCHEMA_VERSION = 3


class Call(NamedTuple):
    """A row of `calls`, the journal."""

    key: bytes  # sha256 of request and model
    tree_id: str
    model: str
    completion: str  # JSON: choices, token counts, seconds


@dataclass(frozen=True, slots=True)
class StoredNode:
    """A row of `nodes`, without its tree's id; the fields are its columns in their order."""

    node_id: int  # 0 is the root; parents come before children
    parent_id: int | None
    type: str | None  # thought type; None for the root
    text: str  # with its prefix
    prefix: str
    model: str
    depth: int
    visits: int  # judged leaves at or below
    value: float  # the sum of their rewards
    verdict: str | None  # correct, wrong or no_answer; None if not a leaf that was judged
    reward: float | None
    answer: str | None
    tokens: int
    finish_reason: str
    seed: int
    seconds: float  # of the request that wrote it

    @property
    def is_open(self) -> bool:
        """Whether its line goes on: a mini-step that ended by its token count and not by itself."""
        return self.finish_reason == "length" and self.verdict is None


@dataclass(frozen=True, slots=True)
class StoredTree:
    """A row of `trees`, the fields its columns in their order, with its nodes in id order."""

    tree_id: str  # sha256 of task, question and config, 16 hex digits
    task: str
    question_id: str
    turn: int  # 0; more for the later turns of a conversation
    config: str  # hash of everything that decides the tree
    family: str
    messages: list[dict[str, str]]  # the plain prompt
    gold: str
    pattern: str
    rollouts: int  # descents to a judged leaf
    stopped: str  # why: rollouts, exhausted, enough, easy, hopeless, tokens, deadline
    calls: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int  # all that was generated, duplicates dropped from the tree included
    nodes: list[StoredNode]

    def chain(self, leaf_id: int) -> list[StoredNode]:
        """The thoughts from the first below the root down to a leaf."""
        nodes: list[StoredNode] = []
        step: int | None = leaf_id
        while step:
            nodes.append(self.nodes[step])
            step = self.nodes[step].parent_id
        return nodes[::-1]


_NODE = fields(StoredNode)
_TREE = [field for field in fields(StoredTree) if field.name != "nodes"]
_node_values, _tree_values = (attrgetter(*(field.name for field in columns)) for columns in (_NODE, _TREE))
_SQL_TYPES = {"str": "TEXT", "int": "INTEGER", "float": "REAL", "list[dict[str, str]]": "TEXT"}  # messages: JSON


def _columns(columns: Sequence[Field[Any]]) -> str:
    """Columns as SQL declares them, from the fields' annotations."""
    kinds = [(field.name, str(field.type).partition(" | None")) for field in columns]
    return ", ".join(f"{name} {_SQL_TYPES[kind]}{'' if none else ' NOT NULL'}" for name, (kind, none, _) in kinds)


_SCHEMA = f"""
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS calls (
  key BLOB PRIMARY KEY, tree_id TEXT NOT NULL, model TEXT NOT NULL, completion TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS trees (
  {_columns(_TREE)}, PRIMARY KEY (tree_id), UNIQUE (task, question_id, turn, config)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS nodes (
  tree_id TEXT NOT NULL REFERENCES trees, {_columns(_NODE)}, PRIMARY KEY (tree_id, node_id)
) WITHOUT ROWID;
"""


class TreeStore:
    """One SQLite file in WAL mode. Use as a context manager; one writing process at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._guard():
            self._db = sqlite3.connect(path, isolation_level=None)
            tables = {name for (name,) in self._db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            if tables and "meta" not in tables:
                self._db.close()
                raise sqlite3.DatabaseError("it is another program's database")
            # WAL with NORMAL keeps every commit through a killed process, at 40 microseconds a commit.
            self._db.executescript("PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL; PRAGMA busy_timeout=5000;")
            self._db.executescript(_SCHEMA)
            self._db.execute("INSERT OR IGNORE INTO meta VALUES ('schema_version', ?)", (str(SCHEMA_VERSION),))
            (version,) = self._db.execute("SELECT value FROM meta WHERE key = 'schema_version'").fetchone()
            if int(version) != SCHEMA_VERSION:
                self._db.close()
                fix = "choose another name= (the trees are kept), or use the cotree that wrote it"
                raise UsageError(f"{path} has schema version {version}, this cotree writes {SCHEMA_VERSION}; {fix}")
            # A new search asks nothing twice, so most look-ups would find nothing: 32 bytes a call say which do.
            self._journalled = {key for (key,) in self._db.execute("SELECT key FROM calls")}

    def __enter__(self) -> TreeStore:
        return self

    def __exit__(self, *_: object) -> None:
        self._db.close()

    @contextmanager
    def _guard(self) -> Iterator[None]:
        """SQLite's faults in one line each."""
        try:
            yield
        except sqlite3.OperationalError as error:
            fix = "free some space" if "full" in str(error) or "disk I/O" in str(error) else "close other users of it"
            raise CotreeError(f"{self.path}: {error}; {fix}, then re-run the same command to resume") from None
        except sqlite3.DatabaseError as error:
            raise UsageError(f"{self.path} is not a tree store ({error}); move it away or name another run") from None

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """All that is written in the block, or nothing of it."""
        with self._guard(), self._db:
            self._db.execute("BEGIN IMMEDIATE")
            yield

    def recall(self, key: bytes) -> str | None:
        """The journalled completion of a request, as JSON, or None."""
        if key not in self._journalled:
            return None
        with self._guard():
            row = self._db.execute("SELECT completion FROM calls WHERE key = ?", (key,)).fetchone()
        return str(row[0])

    def journal(self, calls: Sequence[Call]) -> None:
        """Keep completions for good; committed, all or none, when this returns."""
        with self._transaction():
            self._db.executemany("INSERT OR IGNORE INTO calls VALUES (?, ?, ?, ?)", calls)
        self._journalled.update(call.key for call in calls)

    def finished(self, config: str) -> dict[str, int]:
        """The ids of the trees grown under a config, and the rollouts of each."""
        with self._guard():
            rows = self._db.execute("SELECT tree_id, rollouts FROM trees WHERE config = ?", (config,))
            return {str(tree_id): int(rollouts) for tree_id, rollouts in rows}

    def asked(self, tree_id: str) -> tuple[list[dict[str, str]], str]:
        """The messages and the gold answer of the question that a tree was grown for."""
        with self._guard():
            query = "SELECT messages, gold FROM trees WHERE tree_id = ?"
            messages, gold = self._db.execute(query, (tree_id,)).fetchone()
        return json.loads(messages), str(gold)

    def put(self, tree: StoredTree) -> None:
        """Insert a tree with all its nodes, or nothing; a tree that is there already stays as it is."""
        row = [json.dumps(value) if isinstance(value, list) else value for value in _tree_values(tree)]
        nodes = [(tree.tree_id, *_node_values(node)) for node in tree.nodes]
        with self._transaction():
            done = self._db.execute("INSERT OR IGNORE INTO trees VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?,?)", row)
            if done.rowcount:
                self._db.executemany("INSERT INTO nodes VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?)", nodes)

    def trees(self, config: str | None = None) -> Iterator[StoredTree]:
        """All trees (of one config) in the order of their ids, one at a time."""
        query = "SELECT tree_id FROM trees WHERE config = coalesce(?, config) ORDER BY tree_id"
        with self._guard():
            ids = self._db.execute(query, (config,))
        for (tree_id,) in ids:
            yield self.tree(tree_id)

    def tree(self, tree_id: str) -> StoredTree:
        """One tree by its id."""
        with self._guard():
            found = self._db.execute("SELECT * FROM trees WHERE tree_id = ?", (tree_id,))
            row = found.fetchone()
            if row is None:
                raise UsageError(f"{self.path} has no tree {tree_id}")
            nodes = self._db.execute("SELECT * FROM nodes WHERE tree_id = ? ORDER BY node_id", (tree_id,)).fetchall()
        known = dict(zip((column[0] for column in found.description), row, strict=True))
        known["messages"] = json.loads(known["messages"])
        return StoredTree(**known, nodes=[StoredNode(*node[1:]) for node in nodes])
