"""`journal.db`: every completion that was paid for in a run, and which trees use it; and the models behind it.

A completion is kept under the hash of its request (`Request.key`), committed before anybody uses it. So a search that
was killed, or that is repeated with other settings, asks a model only what was never answered. The journal belongs to
the run: trees of all settings share it, and it outlives them.
"""

from __future__ import annotations

import asyncio
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
from cotree.search.database import Database, checksum


class Journal(Database):
    """The journal of one run."""

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
        """The keys of completions that are not as they were added, each with the question that asked first."""
        return _damaged(self._db.execute("SELECT key, question, tokens, completion, checksum FROM completions"))

    def check_items(self, keys: Sequence[bytes]) -> None:
        """Raise UsageError where one of these completions is not as it was added."""
        with self._guard():
            if damaged := _damaged(self.rows_of("completions", keys)):
                raise sqlite3.DatabaseError(f"a completion of {next(iter(damaged.values()))} is not as it was stored")

    def _seal(self, keys: Iterable[bytes] | None = None) -> None:
        """Write the checksums of all completions that have none yet."""
        self._db.create_function("checksum", 4, checksum, deterministic=True)
        self._db.execute(
            "UPDATE completions SET checksum = checksum(key, question, tokens, completion) WHERE checksum IS NULL"
        )

    def lacking(self, keys: Iterable[bytes]) -> Iterator[bytes]:
        """Those of some keys that it has no completion of."""
        for key in keys:
            if next(self.execute("SELECT 1 FROM completions WHERE key = ?", (key,)), None) is None:
                yield key

    @property
    def questions(self) -> set[str]:
        """The names of the questions that it has completions of."""
        return {name for (name,) in self.execute("SELECT DISTINCT question FROM completions")}

    def recall(self, key: bytes) -> Completion | None:
        """The completion of a request, None where it was never answered."""
        with self._guard():
            row = self._db.execute("SELECT * FROM completions WHERE key = ?", (key,)).fetchone()
            if row is not None and _damaged([row]):
                raise sqlite3.DatabaseError(f"a completion of {row[1]} is not as it was stored")
        return None if row is None else Completion.from_json(row[3])

    def add(self, completions: Iterable[tuple[bytes, str, Completion]]) -> None:
        """Keep completions; all are committed when this returns, or none is. The first one under a key stays.

        Args:
            completions: each with the key of its request and the model's identity (`Request.key`), and the question
                whose tree asked first (`question_name`).
        """
        rows = [(key, question, said.completion_tokens, said.to_json()) for key, question, said in completions]
        sealed = [(*row, checksum(*row)) for row in rows]
        with self._transaction():
            self._db.executemany("INSERT OR IGNORE INTO completions VALUES (?, ?, ?, ?, ?)", sealed)

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
            # Most stand there already after a resume, and writing is dearer than looking.
            self._db.executemany(
                """INSERT INTO current VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET tree_id = excluded.tree_id
                WHERE tree_id != excluded.tree_id""",
                rows,
            )

    def unused(self, questions: Collection[str]) -> dict[bytes, int]:
        """The completions of these questions (`question_name`) that no current tree of any store uses: the tokens of
        each by its key."""
        query = """
SELECT key, tokens FROM completions WHERE question = ? AND NOT EXISTS (
  SELECT 1 FROM uses JOIN current USING (tree_id) WHERE uses.key = completions.key
)"""
        with self._guard():
            return dict(row for question in questions for row in self._db.execute(query, (question,)))

    def extra_rollouts(self, name: str, computed: int) -> int:
        """How many extra rollouts each tree gets that shares under this name: what was `computed` the first time.

        It is kept before it is spent, so that a resumed search, which finds other trees finished, spends as much.
        """
        with self._transaction():
            self._db.execute("INSERT OR IGNORE INTO shares VALUES (?, ?)", (name, computed))
            (kept,) = self._db.execute("SELECT rollouts FROM shares WHERE name = ?", (name,)).fetchone()
        return int(kept)


def _damaged(rows: Iterable[tuple[Any, ...]]) -> dict[bytes, str]:
    return {row[0]: row[1] for *row, kept in rows if kept is not None and kept != checksum(*row)}


@dataclass
class Progress:
    """The counts of a running search, for its progress line.

    trees_wanted: later turns of conversations included. trees: finished; trees_before of them were there when this
    process began. thoughts, verdicts: of the trees that this process finished. calls: requests that a model answered;
    recalled: that the journal answered. tokens: generated in this process. cost: in the currency of the models' prices.
    repeats: requests that were sent again after a failure. misreported: replies with token counts that could not be
    true, so that they were counted here. lost: servers in whose place others are asked, and why.
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
        """Since the search began in this process."""
        return time.monotonic() - self.started


class SearchModels:
    """The open models of a search; with a journal, a request that was answered before is not sent again.

    `progress` is up to date in its costs, repeats and lost servers when `note_servers` was called.
    """

    def __init__(self, endpoints: Mapping[str, Endpoint], journal: Journal | None = None) -> None:
        self.endpoints, self.journal, self.progress = endpoints, journal, Progress()
        self._arrived: list[tuple[tuple[bytes, str, Completion], asyncio.Future[None]]] = []

    async def complete(self, model: str, request: Request, question: str) -> tuple[bytes, Completion]:
        """The completion of a request and its key, from the journal or from the model and then into the journal.

        Args:
            question: whose it is (`question_name`): its requests go to one server, where its prompts are warm.
        """
        endpoint, progress = self.endpoints[model], self.progress
        key = request.key(endpoint.identity)
        recalled = None if self.journal is None else self.journal.recall(key)
        if recalled is not None:
            progress.recalled += 1
            return key, recalled
        completion = await endpoint.complete(request, question)
        if self.journal is not None:
            await self._keep(key, question, completion)
        progress.calls += 1
        progress.tokens += completion.completion_tokens
        return key, completion

    async def _keep(self, key: bytes, question: str, completion: Completion) -> None:
        """Wait until a completion is in the journal. What arrives at the same moment is committed together, because a
        commit costs as much as several completions."""
        loop = asyncio.get_running_loop()
        if not self._arrived:
            loop.call_soon(self._commit)
        kept = loop.create_future()
        self._arrived.append(((key, question, completion), kept))
        await kept

    def _commit(self) -> None:
        arrived, self._arrived = self._arrived, []
        error: Exception | None = None
        try:
            assert self.journal is not None
            self.journal.add([completion for completion, _ in arrived])
        except Exception as fault:  # noqa: BLE001 - whoever waits raises it
            error = fault
        for kept in [kept for _, kept in arrived if not kept.done()]:  # a cancelled task waits no more
            if error is None:
                kept.set_result(None)
            else:
                kept.set_exception(error)

    def note_servers(self) -> None:
        """Bring into `progress` what the requests cost, how many were repeated, and which servers are lost."""
        progress, endpoints = self.progress, self.endpoints.values()
        counters = [client.counters for endpoint in endpoints for client in endpoint.clients]
        progress.cost = sum(endpoint.cost or 0.0 for endpoint in endpoints)
        progress.repeats = sum(each.repeats for each in counters)
        progress.misreported = sum(each.misreported for each in counters)
        progress.lost = [server for endpoint in endpoints for server in endpoint.lost]
