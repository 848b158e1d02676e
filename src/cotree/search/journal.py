"""`journal.db`: a cache of all completions of a run's searches, and the models whose requests go through it.

A completion is stored under the hash of its request (`Request.key`) and committed before it is used. So a search that
was killed, or repeats with other settings, sends only requests that were never answered. The trees of all settings
share the run's journal, and it outlives them.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cotree.models.client import Completion, Request
from cotree.models.endpoints import Endpoint
from cotree.search.commits import CommitsTogether
from cotree.search.database import Database, checksum


class Journal(Database):
    """The completions of one run, which trees use each, and each store's current trees."""

    kind = "journal"
    items = "completions"
    main_table = "completions"
    tables_of_items = ("completions",)
    key = "key"
    schema_version = 2
    upgrade = ("ALTER TABLE completions ADD COLUMN checksum INTEGER",)
    schema = (
        """CREATE TABLE completions (key BLOB PRIMARY KEY, question TEXT NOT NULL, tokens INTEGER NOT NULL,
            completion TEXT NOT NULL, checksum INTEGER)""",
        "CREATE INDEX completions_by_question ON completions (question)",
        "CREATE TABLE uses (key BLOB NOT NULL, tree_id TEXT NOT NULL, PRIMARY KEY (key, tree_id)) WITHOUT ROWID",
        """CREATE TABLE current (place TEXT NOT NULL, question TEXT NOT NULL, tree_id TEXT NOT NULL,
            PRIMARY KEY (place, question)) WITHOUT ROWID""",
        "CREATE INDEX current_by_tree ON current (tree_id)",
        "CREATE TABLE shares (name TEXT PRIMARY KEY, rollouts INTEGER NOT NULL) WITHOUT ROWID",
    )

    def damaged_items(self) -> dict[bytes, str]:
        """{key: name of the question that asked first} of completions whose checksum does not match."""
        return _damaged(self._db.execute("SELECT key, question, tokens, completion, checksum FROM completions"))

    def check_items(self, keys: Sequence[bytes]) -> None:
        """Raise UsageError if the checksum of one of these completions does not match."""
        with self._guard():
            if damaged := _damaged(self.rows_of("completions", keys)):
                raise sqlite3.DatabaseError(f"a completion of {next(iter(damaged.values()))} is not as it was stored")

    def _write_checksums(self, keys: Iterable[bytes] | None = None) -> None:
        """Write checksums for all completions without one."""
        self._db.create_function("checksum", 4, checksum, deterministic=True)
        self._db.execute(
            "UPDATE completions SET checksum = checksum(key, question, tokens, completion) WHERE checksum IS NULL"
        )

    def missing_keys(self, keys: Iterable[bytes]) -> Iterator[bytes]:
        """Yield those of `keys` that have no completion here."""
        for key in keys:
            if next(self.execute("SELECT 1 FROM completions WHERE key = ?", (key,)), None) is None:
                yield key

    @property
    def questions(self) -> set[str]:
        """The names of all questions with completions."""
        return {name for (name,) in self.execute("SELECT DISTINCT question FROM completions")}

    def has_question(self, question: str) -> bool:
        """Whether any completion of a question is here."""
        return next(self.execute("SELECT 1 FROM completions WHERE question = ? LIMIT 1", (question,)), None) is not None

    def recall(self, key: bytes) -> Completion | None:
        """The stored completion of a request key, or None."""
        try:
            row = self._db.execute("SELECT * FROM completions WHERE key = ?", (key,)).fetchone()
            if row is not None and _damaged([row]):
                raise sqlite3.DatabaseError(f"a completion of {row[1]} is not as it was stored")
        except sqlite3.DatabaseError:
            with self._guard():  # not around all: every request passes here
                raise
        return None if row is None else Completion.from_json(row[3])

    def add(self, completions: Iterable[tuple[bytes, str, Completion]]) -> None:
        """Commit completions in one transaction; an existing key keeps its first completion.

        Args:
            completions: (`Request.key`, `question_name` of the tree that asked first, completion).
        """
        rows = [(key, question, said.completion_tokens, said.to_json()) for key, question, said in completions]
        sealed = [(*row, checksum(*row)) for row in rows]
        with self._transaction():
            self._db.executemany("INSERT OR IGNORE INTO completions VALUES (?, ?, ?, ?, ?)", sealed)

    def add_uses(self, uses: Mapping[str, Iterable[bytes]]) -> None:
        """Record which completions finished trees use, in one transaction: {tree id: request keys}."""
        rows = [(key, tree_id) for tree_id, keys in uses.items() for key in keys]
        with self._transaction():
            self._db.executemany("INSERT OR IGNORE INTO uses VALUES (?, ?)", rows)

    def set_current(self, store: Path, trees: Mapping[str, str]) -> None:
        """Record the current tree of each question ({question name: tree id}) in a store.

        Replaces the questions' trees of other settings. The store's path is kept relative, so a run folder may move.
        """
        place = os.path.relpath(store, self.path.parent)
        with self._transaction():
            rows = [(place, question, tree_id) for question, tree_id in trees.items()]
            # After a resume most rows are there already, and a write costs more than a comparison.
            self._db.executemany(
                """INSERT INTO current VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET tree_id = excluded.tree_id
                WHERE tree_id != excluded.tree_id""",
                rows,
            )

    def unused(self, questions: Collection[str]) -> dict[bytes, int]:
        """{key: tokens} of these questions' completions that no current tree of any store uses."""
        query = """
SELECT key, tokens FROM completions WHERE question = ? AND NOT EXISTS (
  SELECT 1 FROM uses JOIN current USING (tree_id) WHERE uses.key = completions.key
)"""
        with self._guard():
            return dict(row for question in questions for row in self._db.execute(query, (question,)))

    def extra_rollouts(self, name: str, computed: int) -> int:
        """Store the extra rollouts per tree under `name` on the first call; later calls return the stored number.

        So a resumed search, which finds more trees finished than the first run did, spends the same.
        """
        with self._transaction():
            self._db.execute("INSERT OR IGNORE INTO shares VALUES (?, ?)", (name, computed))
            (kept,) = self._db.execute("SELECT rollouts FROM shares WHERE name = ?", (name,)).fetchone()
        return int(kept)


def _damaged(rows: Iterable[tuple[Any, ...]]) -> dict[bytes, str]:
    return {row[0]: row[1] for *row, kept in rows if kept is not None and kept != checksum(*row)}


@dataclass
class Progress:
    """Counts for the progress line of a running search.

    trees_wanted: including later turns of conversations. trees: finished; trees_before: those finished before this
    process started. thoughts, verdicts: in trees that this process finished. calls: requests answered by a model;
    recalled: by the journal. tokens: generated in this process. cost: in the currency of the models' prices.
    repeats: retries after a failure. misreported: replies with impossible token counts, which were counted locally
    instead. lost: servers that failed for good, and why; others take their requests.
    """

    trees_wanted: int = 0
    trees: int = 0
    trees_before: int = 0
    thoughts: int = 0
    calls: int = 0
    recalled: int = 0
    tokens: int = 0
    cost: float = 0.0
    repeats: int = 0
    misreported: int = 0
    lost: Sequence[str] = ()
    verdicts: Counter[str] = field(default_factory=lambda: Counter(correct=0, wrong=0, no_answer=0))
    started: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        """Seconds since the search started in this process."""
        return time.monotonic() - self.started


class SearchModels:
    """Sends the requests of a search to its models; answers them from the journal where it can.

    `note_servers` updates the costs, repeats and lost servers in `progress`.
    """

    def __init__(self, endpoints: Mapping[str, Endpoint], journal: Journal | None = None) -> None:
        self.endpoints, self.journal, self.progress = endpoints, journal, Progress()
        self._arrived = None if journal is None else CommitsTogether(journal.add)
        # {question: keys added by this search; None if the journal had completions of it before}
        self._added: dict[str, set[bytes] | None] = {}

    async def complete(self, model: str, request: Request, question: str) -> tuple[bytes, Completion]:
        """Recall a completion from the journal, or request and journal it; returns (`Request.key`, completion).

        Args:
            question: `question_name`; all requests of a question go to one server, for its prefix cache.
        """
        endpoint, progress = self.endpoints[model], self.progress
        key = request.key(endpoint.identity)
        recalled = self._recall(key, question)
        if recalled is not None:
            progress.recalled += 1
            return key, recalled
        completion = await endpoint.complete(request, question)
        if self._arrived is not None:
            await self._arrived.add((key, question, completion))
            if (added := self._added.get(question)) is not None:
                added.add(key)
        progress.calls += 1
        progress.tokens += completion.completion_tokens
        return key, completion

    def _recall(self, key: bytes, question: str) -> Completion | None:
        """Look a key up in the journal, without a query per request for a question that it had nothing of."""
        if self.journal is None:
            return None
        if question not in self._added:
            self._added[question] = None if self.journal.has_question(question) else set()
        added = self._added[question]
        return self.journal.recall(key) if added is None or key in added else None

    def forget(self, question: str) -> None:
        """Free what is remembered of a question whose tree is stored."""
        self._added.pop(question, None)

    def note_servers(self) -> None:
        """Update the cost, retries, miscounts and lost servers in `progress`."""
        progress, endpoints = self.progress, self.endpoints.values()
        counters = [client.counters for endpoint in endpoints for client in endpoint.clients]
        progress.cost = sum(endpoint.cost or 0.0 for endpoint in endpoints)
        progress.repeats = sum(each.repeats for each in counters)
        progress.misreported = sum(each.misreported for each in counters)
        progress.lost = [server for endpoint in endpoints for server in endpoint.lost]
