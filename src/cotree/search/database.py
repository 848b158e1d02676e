"""One SQLite file in WAL mode with a schema version: what the tree store and the journal have in common.

Invariant: what was committed survives a kill -9 at any moment; a file that is not ours, or of another version, is
refused and stays as it is.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar, Self

from cotree.base.errors import CotreeError, UsageError


class Database:
    """An open file; use as a context manager. One process writes at a time."""

    kind: ClassVar[str]
    main_table: ClassVar[str]
    schema: ClassVar[tuple[str, ...]]
    schema_version: ClassVar[int]

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._guard():
            self._db = sqlite3.connect(path, isolation_level=None)
            try:
                self._open()
            except Exception:
                self._db.close()
                raise

    def _open(self) -> None:
        tables = self._tables()
        if tables and not {"meta", self.main_table} <= tables:
            raise sqlite3.DatabaseError("it is another program's database")
        # WAL with NORMAL keeps every commit through a killed process, at 40 microseconds a commit.
        self._db.executescript("PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL; PRAGMA busy_timeout=5000;")
        if not tables:
            with self._transaction():
                if not self._tables():  # nobody else has made them meanwhile
                    for statement in self.schema:
                        self._db.execute(statement)
                    self._db.execute("CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID")
                    self._db.execute("INSERT INTO meta VALUES ('schema_version', ?)", (str(self.schema_version),))
        (found,) = self._db.execute("SELECT value FROM meta WHERE key = 'schema_version'").fetchone()
        if int(found) != self.schema_version:
            fix = "choose another name= (what is there is kept), or use the cotree that wrote it"
            raise UsageError(f"{self.path} has schema version {found}, this cotree writes {self.schema_version}; {fix}")

    def _tables(self) -> set[str]:
        return {name for (name,) in self._db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._db.close()

    @contextmanager
    def _guard(self) -> Iterator[None]:
        """Turn SQLite's errors into one line each: CotreeError where a retry can help, UsageError for a wrong file."""
        try:
            yield
        except sqlite3.OperationalError as error:
            fix = "free some space" if "full" in str(error) or "disk I/O" in str(error) else "close other users of it"
            raise CotreeError(f"{self.path}: {error}; {fix}, then re-run the same command to resume") from None
        except sqlite3.DatabaseError as error:
            raise UsageError(f"{self.path} is not a {self.kind} ({error}); move it away or name another run") from None

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """Commit all that is written in the block, or nothing of it."""
        with self._guard(), self._db:
            self._db.execute("BEGIN IMMEDIATE")
            yield
