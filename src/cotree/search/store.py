"""`trees.db`: the SQLite store of one `trees` node: all trees with all their thoughts.

Invariant: a tree is inserted in one transaction, keyed by a hash of its question and search settings; changed settings
or questions make new trees, and none is ever overwritten.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import Field, dataclass, fields
from operator import attrgetter
from pathlib import Path
from typing import Any

from cotree.base.errors import NotFoundError, UsageError
from cotree.search.database import Database, checksum
from cotree.tasks.extract import ANSWER_TAG


@dataclass(slots=True)
class StoredNode:
    """A thought: a row of `nodes` without the tree id; fields are the columns in order.

    `search.mcts.Node` extends it with the state of a running search.
    """

    node_id: int  # 0 is the root; parents come before children
    parent_id: int | None
    type: str | None  # thought type; None for the root
    text: str  # with its prefix
    prefix: str = ""
    model: str = ""
    depth: int = 0
    visits: int = 0  # judged leaves at or below, without undecided ones
    value: float = 0.0  # the sum of their rewards
    verdict: str | None = None  # correct, wrong, no_answer or undecided; None if not a leaf that the verifier judged
    reward: float | None = None  # of a judged leaf, in [0, 1]; None for inner nodes
    answer: str | None = None
    tokens: int = 0
    finish_reason: str = "stop"
    seed: int = 0
    seconds: float = 0.0  # of the request that wrote it
    detail: str = ""  # human-readable reason for the verdict

    @property
    def is_open(self) -> bool:
        """Whether it is a mini-step cut by its token count, so the next thought continues its line."""
        return self.finish_reason == "length" and self.reward is None

    @property
    def is_forced(self) -> bool:
        """Whether it is an answer forced by a prefix (`\\boxed{` or the answer tag), not one the model began."""
        return self.type == "answer" and self.prefix.endswith(("\\boxed{", f"{ANSWER_TAG}\n"))

    @property
    def is_cut(self) -> bool:
        """Whether max_tokens cut its chain before an answer."""
        return self.verdict == "no_answer" and self.type != "answer" and self.finish_reason == "length"


@dataclass(frozen=True, slots=True)
class StoredTree:
    """A tree: a row of `trees`, fields being the columns in order, plus its nodes ordered by id.

    Visits and values exclude undecided leaves; they are recomputed for trees of older versions, which included them.

    With `method: sampling` the pattern is `sampling` and each whole chain is an `answer` node below the root; equal
    chains stay separate nodes, because a majority vote counts them all.
    """

    tree_id: str  # sha256 of the question's content and the config, 16 hex digits
    task: str
    question_id: str
    turn: int  # 0; more for the later turns of a conversation
    config: str  # hash of everything else that decides the tree: settings, writers, seed
    family: str
    messages: list[dict[str, str]]  # the plain prompt
    gold: str
    pattern: str
    rollouts: int  # descents to a judged leaf
    stopped: str  # why: rollouts, exhausted, enough, easy, hopeless, tokens, deadline
    calls: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int  # all generated tokens, including those of dropped duplicates
    nodes: list[StoredNode]
    verdict_version: int | None = None  # VERDICT_VERSION of its verdicts; None: written by an older cotree

    def __post_init__(self) -> None:
        if all(node.verdict != "undecided" for node in self.nodes):
            return
        for node in self.nodes:
            is_judged = node.reward is not None and node.verdict != "undecided"
            node.visits, node.value = int(is_judged), (node.reward or 0.0) if is_judged else 0.0
        for node in reversed(self.nodes[1:]):  # parents come before their children
            above = self.nodes[node.parent_id or 0]
            above.visits, above.value = above.visits + node.visits, above.value + node.value

    @property
    def question_name(self) -> str:
        """The question's key "task/id/turn", equal to `search.thoughts.question_name`."""
        return f"{self.task}/{self.question_id}/{self.turn}"

    def chain(self, leaf_id: int) -> list[StoredNode]:
        """The path from below the root to a leaf."""
        nodes: list[StoredNode] = []
        step: int | None = leaf_id
        while step:
            nodes.append(self.nodes[step])
            step = self.nodes[step].parent_id
        return nodes[::-1]


_NODE_COLUMNS = fields(StoredNode)
_TREE_COLUMNS = [field for field in fields(StoredTree) if field.name != "nodes"]
# Quicker than a generator of getattr: a tree has many nodes.
_node_values = attrgetter(*(column.name for column in _NODE_COLUMNS))
_tree_values = attrgetter(*(column.name for column in _TREE_COLUMNS))
_SQL_TYPES = {"str": "TEXT", "int": "INTEGER", "float": "REAL", "list[dict[str, str]]": "TEXT"}  # messages: JSON


def _columns(columns: Sequence[Field[Any]]) -> str:
    """SQL column declarations from dataclass field annotations."""
    kinds = [(field.name, str(field.type).partition(" | None")) for field in columns]
    return ", ".join(f"{name} {_SQL_TYPES[kind]}{'' if none else ' NOT NULL'}" for name, (kind, none, _) in kinds)


class TreeStore(Database):
    """The trees of one `trees` node, in SQLite."""

    kind = "tree store"
    items = "trees"
    main_table = "trees"
    tables_of_items = ("trees", "nodes")
    key = "tree_id"
    schema_version = 5
    schema = (
        f"CREATE TABLE trees ({_columns(_TREE_COLUMNS)}, checksum INTEGER, PRIMARY KEY (tree_id)) WITHOUT ROWID",
        f"""CREATE TABLE nodes (tree_id TEXT NOT NULL REFERENCES trees, {_columns(_NODE_COLUMNS)} DEFAULT '',
            PRIMARY KEY (tree_id, node_id)) WITHOUT ROWID""",
    )
    upgrade = (
        "ALTER TABLE trees ADD COLUMN verdict_version INTEGER",
        "ALTER TABLE trees ADD COLUMN checksum INTEGER",
        "ALTER TABLE nodes ADD COLUMN detail TEXT NOT NULL DEFAULT ''",
    )

    def finished(self, config: str | None = None) -> dict[str, int]:
        """{tree id: rollouts} of all trees (of one config)."""
        with self._guard():
            query = "SELECT tree_id, rollouts FROM trees WHERE config = coalesce(?, config)"
            return dict(self._db.execute(query, (config,)))

    def checksums(self, tree_id: str | None = None) -> Iterator[tuple[str, int | None]]:
        """(id, checksum) of all trees or of one; the checksum is None in stores of older versions."""
        column = "NULL" if self.version() < self.schema_version else "checksum"
        with self._guard():
            where = "" if tree_id is None else "WHERE tree_id = :tree_id"
            yield from self._db.execute(f"SELECT tree_id, {column} FROM trees {where}", {"tree_id": tree_id})  # noqa: S608

    def changes(self) -> int:
        """A number that differs after another process changed the store."""
        with self._guard():
            return int(self._db.execute("PRAGMA data_version").fetchone()[0])

    def put(self, *trees: StoredTree) -> None:
        """Insert trees with all their nodes in one transaction; existing trees are kept."""
        with self._transaction():
            for tree in trees:
                row = [json.dumps(value) if isinstance(value, list) else value for value in _tree_values(tree)]
                done = self._db.execute(
                    "INSERT OR IGNORE INTO trees VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,NULL)", row
                )
                if done.rowcount:
                    nodes = [(tree.tree_id, *_node_values(node)) for node in tree.nodes]
                    self._db.executemany("INSERT INTO nodes VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?)", nodes)
                    self._write_checksums([tree.tree_id])

    def trees(self, config: str | None = None) -> Iterator[StoredTree]:
        """Iterate over all trees (of one config), ordered by id."""
        query = "SELECT tree_id FROM trees WHERE config = coalesce(?, config) ORDER BY tree_id"
        with self._guard():
            ids = self._db.execute(query, (config,)).fetchall()
        for (tree_id,) in ids:
            yield self.tree(tree_id)

    def tree(self, tree_id: str) -> StoredTree:
        """One tree by its id; UsageError if it is missing or damaged."""
        with self._guard():
            row, nodes = self._rows(tree_id)
            if row is None:
                raise NotFoundError(f"{self.path} has no tree {tree_id}")
            if not _is_intact(row, nodes):
                raise sqlite3.DatabaseError(f"the tree of {row[1]}/{row[2]} is not as it was stored")
        values = dict(zip((column.name for column in _TREE_COLUMNS), row, strict=False))
        values["messages"] = json.loads(values["messages"])
        return StoredTree(**values, nodes=[StoredNode(*node[1:]) for node in nodes])

    def damaged_items(self) -> dict[str, str]:
        """{tree id: "task/id", or "" if unknown} of trees whose checksum or node count does not match."""
        damaged = {}
        self._db.execute("BEGIN")
        try:
            for (tree_id,) in self._db.execute("SELECT tree_id FROM trees UNION SELECT tree_id FROM nodes"):
                row, nodes = self._rows(tree_id)
                if row is None or not _is_intact(row, nodes):
                    damaged[tree_id] = f"{row[1]}/{row[2]}" if row else ""
        finally:
            self._db.execute("ROLLBACK")
        return damaged

    def check_items(self, keys: Sequence[str]) -> None:
        """Raise UsageError if one of these trees is damaged."""
        for tree_id in keys:
            self.tree(tree_id)

    def _rows(self, tree_id: str) -> tuple[tuple[Any, ...] | None, list[tuple[Any, ...]]]:
        row = self._db.execute("SELECT * FROM trees WHERE tree_id = ?", (tree_id,)).fetchone()
        return row, self._db.execute("SELECT * FROM nodes WHERE tree_id = ? ORDER BY node_id", (tree_id,)).fetchall()

    def _write_checksums(self, keys: Iterable[str] | None = None) -> None:
        """Write the checksums of these trees from their stored rows; by default of all without one."""
        unsealed = "SELECT tree_id FROM trees WHERE checksum IS NULL"
        for tree_id in [tree_id for (tree_id,) in self._db.execute(unsealed)] if keys is None else keys:
            row, nodes = self._rows(tree_id)
            assert row is not None
            kept = (checksum(row[:-1], nodes), tree_id)
            self._db.execute("UPDATE trees SET checksum = ? WHERE tree_id = ?", kept)


def _is_intact(row: tuple[Any, ...], nodes: list[tuple[Any, ...]]) -> bool:
    """Whether a tree's node ids are complete and its checksum, if it has one, matches."""
    if [node[1] for node in nodes] != list(range(len(nodes))) or not nodes:
        return False
    kept = row[len(_TREE_COLUMNS) :]
    return kept in ((), (None,)) or kept == (checksum(row[:-1], nodes),)


def count_trees(path: Path, config: str | None = None) -> int:
    """The number of trees (of one config) in the store at `path`, 0 if the file is missing; strictly read-only.

    Raises:
        UsageError: the file is damaged or not a tree store.
    """
    if not path.is_file():
        return 0
    # Without `immutable` even a reader creates files beside the store; with it, commits in a `-wal` are ignored.
    mode = "mode=ro" if path.with_name(f"{path.name}-wal").exists() else "immutable=1"
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?{mode}", uri=True)) as db:
            query = "SELECT count(*) FROM trees WHERE config = coalesce(?, config)"
            return int(db.execute(query, (config,)).fetchone()[0])
    except sqlite3.Error as error:
        fix = "move it away, or let `cotree run` on its run mend it, if it is damaged"
        raise UsageError(f"{path} is not a tree store ({error}); {fix}") from None
