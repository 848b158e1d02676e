"""`trees.db`: the trees of one node of a recipe, each with all its thoughts.

Invariant: a tree is inserted whole in one transaction or not at all, under a hash of its question and of the settings
that it was grown with; other settings or a changed question make other trees, and none is ever overwritten.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import Field, dataclass, fields
from pathlib import Path
from typing import Any

from cotree.base.errors import UsageError
from cotree.search.database import Database, checksum
from cotree.tasks.extract import ANSWER_TAG


@dataclass(slots=True)
class StoredNode:
    """A thought: a row of `nodes`, without its tree's id; the fields are its columns in their order.

    `search.mcts.Node` is one that still grows.
    """

    node_id: int  # 0 is the root; parents come before children
    parent_id: int | None
    type: str | None  # thought type; None for the root
    text: str  # with its prefix
    prefix: str = ""
    model: str = ""
    depth: int = 0
    visits: int = 0  # judged leaves at or below, undecided ones left out
    value: float = 0.0  # the sum of their rewards
    verdict: str | None = None  # correct, wrong, no_answer or undecided; None if not a leaf that the verifier judged
    reward: float | None = None  # of a judged leaf, in [0, 1]; None where the chain goes on
    answer: str | None = None
    tokens: int = 0
    finish_reason: str = "stop"
    seed: int = 0
    seconds: float = 0.0  # of the request that wrote it
    detail: str = ""  # why the verdict, for people

    @property
    def is_open(self) -> bool:
        """Whether its line goes on: a mini-step that ended by its token count and not by itself."""
        return self.finish_reason == "length" and self.reward is None

    @property
    def is_forced(self) -> bool:
        """Whether it is an answer whose first words the search wrote, not the model."""
        return self.type == "answer" and self.prefix.endswith(("\\boxed{", f"{ANSWER_TAG}\n"))

    @property
    def is_cut(self) -> bool:
        """Whether max_tokens ended it, and its chain with it, before there was an answer."""
        return self.verdict == "no_answer" and self.type != "answer" and self.finish_reason == "length"


@dataclass(frozen=True, slots=True)
class StoredTree:
    """A tree: a row of `trees`, the fields its columns in their order, with its nodes in id order.

    No undecided leaf is in the visits and value of a node; an older cotree's trees, which have them, are counted anew.

    A tree of `method: sampling` has the pattern `sampling`, and below its root one `answer` node for each whole chain;
    equal chains are separate nodes, because a majority vote counts them all.
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
    completion_tokens: int  # all that was generated, duplicates dropped from the tree included
    nodes: list[StoredNode]
    verdict_version: int | None = None  # the VERDICT_VERSION of its verdicts; None: an older cotree's, which kept none

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
        """The name of the tree's question, as `search.thoughts.question_name` gives it."""
        return f"{self.task}/{self.question_id}/{self.turn}"

    def chain(self, leaf_id: int) -> list[StoredNode]:
        """The thoughts from the first below the root down to a leaf."""
        nodes: list[StoredNode] = []
        step: int | None = leaf_id
        while step:
            nodes.append(self.nodes[step])
            step = self.nodes[step].parent_id
        return nodes[::-1]


_NODE_COLUMNS = fields(StoredNode)
_TREE_COLUMNS = [field for field in fields(StoredTree) if field.name != "nodes"]
_SQL_TYPES = {"str": "TEXT", "int": "INTEGER", "float": "REAL", "list[dict[str, str]]": "TEXT"}  # messages: JSON


def _columns(columns: Sequence[Field[Any]]) -> str:
    """Columns as SQL declares them, from the fields' annotations."""
    kinds = [(field.name, str(field.type).partition(" | None")) for field in columns]
    return ", ".join(f"{name} {_SQL_TYPES[kind]}{'' if none else ' NOT NULL'}" for name, (kind, none, _) in kinds)


class TreeStore(Database):
    """The store of one `trees` node."""

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
        """The ids of all trees (of one config), with the rollouts that each took."""
        with self._guard():
            query = "SELECT tree_id, rollouts FROM trees WHERE config = coalesce(?, config)"
            return dict(self._db.execute(query, (config,)))

    def checksums(self, tree_id: str | None = None) -> Iterator[tuple[str, int | None]]:
        """The ids of all trees (or one), each with the checksum of its content; None in a store of an older cotree."""
        column = "NULL" if self.version() < self.schema_version else "checksum"
        with self._guard():
            where = "" if tree_id is None else "WHERE tree_id = :tree_id"
            yield from self._db.execute(f"SELECT tree_id, {column} FROM trees {where}", {"tree_id": tree_id})  # noqa: S608

    def changes(self) -> int:
        """A number that is another one after another process has changed the store."""
        with self._guard():
            return int(self._db.execute("PRAGMA data_version").fetchone()[0])

    def put(self, tree: StoredTree) -> None:
        """Insert a tree with all its nodes, or nothing; a tree that is there already stays as it is."""
        row = [getattr(tree, column.name) for column in _TREE_COLUMNS]
        row = [json.dumps(value) if isinstance(value, list) else value for value in row]
        nodes = [[tree.tree_id, *(getattr(node, column.name) for column in _NODE_COLUMNS)] for node in tree.nodes]
        with self._transaction():
            done = self._db.execute("INSERT OR IGNORE INTO trees VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,NULL)", row)
            if done.rowcount:
                self._db.executemany("INSERT INTO nodes VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?)", nodes)
                self._seal([tree.tree_id])

    def trees(self, config: str | None = None) -> Iterator[StoredTree]:
        """All trees (of one config) in the order of their ids, read one at a time."""
        query = "SELECT tree_id FROM trees WHERE config = coalesce(?, config) ORDER BY tree_id"
        with self._guard():
            ids = self._db.execute(query, (config,)).fetchall()
        for (tree_id,) in ids:
            yield self.tree(tree_id)

    def tree(self, tree_id: str) -> StoredTree:
        """One tree by its id."""
        with self._guard():
            row, nodes = self._rows(tree_id)
            if row is None:
                raise UsageError(f"{self.path} has no tree {tree_id}")
            if not _is_whole(row, nodes):
                raise sqlite3.DatabaseError(f"the tree of {row[1]}/{row[2]} is not as it was stored")
        values = dict(zip((column.name for column in _TREE_COLUMNS), row, strict=False))
        values["messages"] = json.loads(values["messages"])
        return StoredTree(**values, nodes=[StoredNode(*node[1:]) for node in nodes])

    def damaged_items(self) -> dict[str, str]:
        """The ids of trees that are not as they were stored, each with its question ("": not known)."""
        damaged = {}
        self._db.execute("BEGIN")
        try:
            for (tree_id,) in self._db.execute("SELECT tree_id FROM trees UNION SELECT tree_id FROM nodes"):
                row, nodes = self._rows(tree_id)
                if row is None or not _is_whole(row, nodes):
                    damaged[tree_id] = f"{row[1]}/{row[2]}" if row else ""
        finally:
            self._db.execute("ROLLBACK")
        return damaged

    def check_items(self, keys: Sequence[str]) -> None:
        """Raise UsageError where one of these trees is not as it was stored."""
        for tree_id in keys:
            self.tree(tree_id)

    def _rows(self, tree_id: str) -> tuple[tuple[Any, ...] | None, list[tuple[Any, ...]]]:
        row = self._db.execute("SELECT * FROM trees WHERE tree_id = ?", (tree_id,)).fetchone()
        return row, self._db.execute("SELECT * FROM nodes WHERE tree_id = ? ORDER BY node_id", (tree_id,)).fetchall()

    def _seal(self, keys: Iterable[str] | None = None) -> None:
        """Write the checksums of these trees, as their rows are in the file; by default of all that have none yet."""
        unsealed = "SELECT tree_id FROM trees WHERE checksum IS NULL"
        for tree_id in [tree_id for (tree_id,) in self._db.execute(unsealed)] if keys is None else keys:
            row, nodes = self._rows(tree_id)
            assert row is not None
            kept = (checksum(row[:-1], nodes), tree_id)
            self._db.execute("UPDATE trees SET checksum = ? WHERE tree_id = ?", kept)


def _is_whole(row: tuple[Any, ...], nodes: list[tuple[Any, ...]]) -> bool:
    """Whether a tree is what was stored; of an older store, which has no checksums, whether it lacks no node."""
    if [node[1] for node in nodes] != list(range(len(nodes))) or not nodes:
        return False
    kept = row[len(_TREE_COLUMNS) :]
    return kept in ((), (None,)) or kept == (checksum(row[:-1], nodes),)


def count_trees(path: Path, config: str | None = None) -> int:
    """How many trees (of one config) the store at `path` has, 0 where there is none; changes nothing there.

    Raises:
        UsageError: it is another file, or damaged.
    """
    if not path.is_file():
        return 0
    # Without `immutable` even a reader makes files beside a store; with it the commits in a left `-wal` are not seen.
    mode = "mode=ro" if path.with_name(f"{path.name}-wal").exists() else "immutable=1"
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?{mode}", uri=True)) as db:
            query = "SELECT count(*) FROM trees WHERE config = coalesce(?, config)"
            return int(db.execute(query, (config,)).fetchone()[0])
    except sqlite3.Error as error:
        fix = "move it away, or let `cotree run` on its run mend it, if it is damaged"
        raise UsageError(f"{path} is not a tree store ({error}); {fix}") from None
