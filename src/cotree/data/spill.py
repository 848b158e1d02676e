"""Candidate rows in a temporary SQLite file, until what concerns all of them is decided: duplicates, rows a question,
balance, size. So memory does not grow with their number.

What is drawn here is drawn by a digest of the row's words under the seed: it depends on nothing else.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from typing import Literal

from cotree.base.errors import CotreeError
from cotree.base.rows import Row
from cotree.data.kinds import completion_tokens
from cotree.data.settings import Gates

_WORDS = ("completion", "chosen", "rejected", "completions")


class Spill:
    """Rows in SQLITE_TMPDIR, TMPDIR or /var/tmp; they go when the block ends."""

    def __init__(self, gates: Gates, seed: int) -> None:
        self._gates = gates
        self._key = str(seed).encode()
        self._db = sqlite3.connect("", isolation_level=None)
        self._db.execute("PRAGMA journal_mode=OFF")
        columns = "rank INTEGER, question TEXT, part TEXT, tokens INTEGER, digest BLOB UNIQUE, row TEXT"
        self._db.execute(f"CREATE TABLE rows (number INTEGER PRIMARY KEY, {columns})")
        self._db.execute("BEGIN")

    def __enter__(self) -> Spill:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        self._db.close()
        if isinstance(error, sqlite3.Error):
            raise CotreeError(f"cannot keep candidate rows ({error}); free some space or set SQLITE_TMPDIR") from None

    def add(self, number: int, rank: int, row: Row) -> bool:
        """Keep a row; False where one with the same messages is kept already.

        number: its place among all rows. rank: its place among the rows of its tree.
        """
        rate = row.get("pass_rate")
        group = {"task": row["task"], "difficulty": "unknown" if rate is None else min(int(rate * 3), 2)}
        part = "/".join(str(group[name]) for name in self._gates.balance)
        words = json.dumps([row["prompt"], *(row.get(name) for name in _WORDS)])
        unique = words if self._gates.duplicates else f"{number}/{words}"
        digest = blake2b(unique.encode(), key=self._key, digest_size=16).digest()
        question = f"{row['task']}/{row['question_id']}"
        values = (number, rank, question, part, completion_tokens(row), digest, json.dumps(row))
        return self._db.execute("INSERT OR IGNORE INTO rows VALUES (?,?,?,?,?,?,?)", values).rowcount == 1

    def balance(self) -> int:
        """Drop what a group has over `at_most` times the smallest one, drawn by seed; returns how many rows."""
        smallest = "SELECT min(n) FROM (SELECT count(*) AS n FROM rows GROUP BY part)"
        (least,) = self._db.execute(smallest).fetchone()
        return self.keep(int((least or 0) * self._gates.at_most), of_each="part") if self._gates.balance else 0

    def keep(self, limit: int | None, *, of_each: Literal["question", "part"] | None = None) -> int:
        """Drop what is over `limit` rows (of each question, or of each group that is balanced), drawn by seed; returns
        how many. None is no limit.

        Of all rows, the first of each tree has the same chance, and none goes before every second one.
        """
        return self._db.execute(
            "DELETE FROM rows WHERE number IN (SELECT number FROM (SELECT number, row_number() OVER (PARTITION BY "
            "CASE :group WHEN 'question' THEN question WHEN 'part' THEN part END "
            "ORDER BY iif(:group IS NULL, rank, 0), digest) AS place FROM rows) WHERE place > :limit)",
            {"group": of_each, "limit": limit},
        ).rowcount

    def keep_tokens(self, wanted: int) -> int:
        """Drop rows, as `keep`, until the completion tokens of the others are as near to `wanted` as whole rows come
        (at least one row stays); returns how many."""
        nearest = self._db.execute(
            "SELECT place FROM (SELECT row_number() OVER drawn AS place, sum(tokens) OVER drawn AS total FROM rows "
            "WINDOW drawn AS (ORDER BY rank, digest)) ORDER BY abs(total - ?), place LIMIT 1",
            (wanted,),
        ).fetchone()
        return 0 if nearest is None else self.keep(nearest[0])

    def drop(self, numbers: Iterable[int]) -> int:
        """Drop rows by their numbers; returns how many."""
        return self._db.executemany("DELETE FROM rows WHERE number = ?", ((number,) for number in numbers)).rowcount

    def rows(self) -> Iterator[tuple[int, Row]]:
        """The kept rows with their numbers, in the order in which they were added."""
        for number, row in self._db.execute("SELECT number, row FROM rows ORDER BY number"):
            yield number, json.loads(row)
