"""`trees.db`: the trees of one node of a recipe, each with all its thoughts.

Invariant: a tree is inserted whole in one transaction or not at all, under a hash of its question and of the settings
that it was grown with; other settings or a changed question make other trees, and none is ever overwritten.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import Field, dataclass, fields
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

from cotree.base.errors import UsageError
from cotree.search.database import Database


class Cost(NamedTuple):
    """What a stored tree took: rollouts, and generated tokens."""

    rollouts: int
    tokens: int


@dataclass(frozen=True, slots=True)
class StoredNode:
    """A thought: a row of `nodes`, without its tree's id; the fields are its columns in their order."""

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
    """A tree: a row of `trees`, the fields its columns in their order, with its nodes in id order.

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


class TreeStore(Database):
    """The store of one `trees` node."""

    kind = "tree store"
    main_table = "trees"
    schema_version = 4
    schema = (
        f"CREATE TABLE trees ({_columns(_TREE)}, PRIMARY KEY (tree_id)) WITHOUT ROWID",
        f"""CREATE TABLE nodes (tree_id TEXT NOT NULL REFERENCES trees, {_columns(_NODE)},
            PRIMARY KEY (tree_id, node_id)) WITHOUT ROWID""",
    )

    def finished(self, config: str | None = None) -> dict[str, Cost]:
        """The ids of all trees (of one config), and what each cost."""
        with self._guard():
            query = "SELECT tree_id, rollouts, completion_tokens FROM trees WHERE config = coalesce(?, config)"
            rows = self._db.execute(query, (config,))
            return {str(tree_id): Cost(rollouts, tokens) for tree_id, rollouts, tokens in rows}

    def configs(self) -> list[str]:
        """The configs under which the store has trees; one, unless it was put together by hand."""
        with self._guard():
            return [str(config) for (config,) in self._db.execute("SELECT DISTINCT config FROM trees ORDER BY config")]

    def put(self, tree: StoredTree) -> None:
        """Insert a tree with all its nodes, or nothing; a tree that is there already stays as it is."""
        row = [json.dumps(value) if isinstance(value, list) else value for value in _tree_values(tree)]
        nodes = [(tree.tree_id, *_node_values(node)) for node in tree.nodes]
        with self._transaction():
            done = self._db.execute("INSERT OR IGNORE INTO trees VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?,?)", row)
            if done.rowcount:
                self._db.executemany("INSERT INTO nodes VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?)", nodes)

    def trees(self, config: str | None = None) -> Iterator[StoredTree]:
        """All trees (of one config) in the order of their ids, read one at a time."""
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


def count_trees(path: Path) -> int:
    """How many trees the store at `path` has, 0 where there is none; changes nothing there.

    Raises:
        UsageError: it is another file.
    """
    if not path.is_file():
        return 0
    # Without `immutable` even a reader makes files beside a store; with it the commits in a left `-wal` are not seen.
    left = path.with_name(f"{path.name}-wal").exists()
    try:
        with closing(
            sqlite3.connect(f"{path.absolute().as_uri()}?{'mode=ro' if left else 'immutable=1'}", uri=True)
        ) as db:
            return int(db.execute("SELECT count(*) FROM trees").fetchone()[0])
    except sqlite3.Error as error:
        raise UsageError(f"{path} is not a tree store ({error}); move it away") from None
