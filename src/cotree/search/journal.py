"""`journal.db`: every completion that was paid for in a run, and which trees use it.

A completion is kept under the hash of its request (`Request.key`), committed before anybody uses it. So a search that
was killed, or that is repeated with other settings, asks a model only what was never answered. The journal belongs to
the run: trees of all settings share it, and it outlives them.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from cotree.search.database import Database


class Entry(NamedTuple):
    """A completion in the journal.

    key: sha256 of the request and the model's identity. question: whose tree asked first (`question_name`).
    tokens: generated ones. completion: its JSON (choices, token counts, seconds).
    """

    key: bytes
    question: str
    tokens: int
    completion: str


class Unused(NamedTuple):
    """Completions, and their generated tokens, that no current tree uses."""

    completions: int
    tokens: int


class Journal(Database):
    """The journal of one run."""

    kind = "journal"
    main_table = "completions"
    schema_version = 1
    schema = (
        """CREATE TABLE completions (key BLOB PRIMARY KEY, question TEXT NOT NULL, tokens INTEGER NOT NULL,
            completion TEXT NOT NULL)""",
        "CREATE INDEX completions_by_question ON completions (question)",
        "CREATE TABLE uses (key BLOB NOT NULL, tree_id TEXT NOT NULL, PRIMARY KEY (key, tree_id)) WITHOUT ROWID",
        """CREATE TABLE current (place TEXT NOT NULL, question TEXT NOT NULL, tree_id TEXT NOT NULL,
            PRIMARY KEY (place, question)) WITHOUT ROWID""",
        "CREATE INDEX current_by_tree ON current (tree_id)",
        "CREATE TABLE shares (name TEXT PRIMARY KEY, rollouts INTEGER NOT NULL) WITHOUT ROWID",
    )

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        # A new search asks nothing twice, so most look-ups would find nothing: 32 bytes a completion say which do.
        with self._guard():
            self._keys = {key for (key,) in self._db.execute("SELECT key FROM completions")}

    def recall(self, key: bytes) -> str | None:
        """The JSON of the completion of a request, None where it was never answered."""
        if key not in self._keys:
            return None
        with self._guard():
            row = self._db.execute("SELECT completion FROM completions WHERE key = ?", (key,)).fetchone()
        return str(row[0])

    def add(self, entries: Sequence[Entry]) -> None:
        """Keep completions; committed, all or none, when this returns. The first one under a key stays."""
        with self._transaction():
            self._db.executemany("INSERT OR IGNORE INTO completions VALUES (?, ?, ?, ?)", entries)
        self._keys.update(entry.key for entry in entries)

    def add_uses(self, tree_id: str, keys: Iterable[bytes]) -> None:
        """Note which completions a finished tree is made of."""
        with self._transaction():
            self._db.executemany("INSERT OR IGNORE INTO uses VALUES (?, ?)", [(key, tree_id) for key in keys])

    def set_current(self, store: Path, trees: Mapping[str, str]) -> None:
        """Note which tree of each question ({question name: tree id}) is now the one in a store.

        The store is named by its path from here, so a run folder may move. Trees that stood there before, under other
        settings, are no longer current.
        """
        place = os.path.relpath(store, self.path.parent)
        with self._transaction():
            rows = [(place, question, tree_id) for question, tree_id in trees.items()]
            self._db.executemany("INSERT OR REPLACE INTO current VALUES (?, ?, ?)", rows)

    def unused(self, questions: Collection[str]) -> Unused:
        """What was paid for these questions (`question_name`) and is in no current tree of any store."""
        query = """
SELECT count(*), coalesce(sum(tokens), 0) FROM completions WHERE question = ? AND NOT EXISTS (
  SELECT 1 FROM uses JOIN current USING (tree_id) WHERE uses.key = completions.key
)"""
        with self._guard():
            counted = [self._db.execute(query, (question,)).fetchone() for question in questions]
        return Unused(sum(count for count, _ in counted), sum(tokens for _, tokens in counted))

    def share(self, name: str) -> int | None:
        """How many extra rollouts each tree was given under this name; None if they were not yet shared out."""
        with self._guard():
            row = self._db.execute("SELECT rollouts FROM shares WHERE name = ?", (name,)).fetchone()
        return None if row is None else int(row[0])

    def set_share(self, name: str, rollouts: int) -> None:
        """Keep how many extra rollouts each tree is given, so that a resumed search gives as many."""
        with self._transaction():
            self._db.execute("INSERT INTO shares VALUES (?, ?)", (name, rollouts))
