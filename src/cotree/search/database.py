"""Base class of the tree store and the journal: a SQLite file with schema version, checksums and recovery.

Invariant: commits survive a kill -9 at any moment; a foreign file or a later schema version is refused and left
unchanged; of a damaged file all readable items are recovered and the lost ones counted.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any, ClassVar, Self

from cotree.base.atomic import explain_write_errors
from cotree.base.disk import sqlite_journal_mode
from cotree.base.errors import CotreeError, UsageError
from cotree.search.rescue import Value, commits_are_lost, readable_rows

# A larger file is not checked whole when it is opened; each item is checked when it is read.
LARGE = 2**25  # bytes
_TYPES = {"TEXT": str, "INTEGER": int, "REAL": int | float, "BLOB": bytes}


class Database(ABC):
    """An open SQLite file; use as a context manager. One process writes at a time.

    kind, items: words for the file and its items in messages. key: the column that identifies an item in `main_table`
    and the other `tables_of_items`. upgrade: SQL statements that upgrade the previous schema version.

    `rescued` reports what was recovered from a damaged file, "" if it was intact; `lost` counts items known to be lost;
    `is_new`: the file was just created.
    """

    kind: ClassVar[str]
    items: ClassVar[str]
    main_table: ClassVar[str]
    tables_of_items: ClassVar[tuple[str, ...]]
    key: ClassVar[str]
    schema: ClassVar[tuple[str, ...]]
    schema_version: ClassVar[int]
    upgrade: ClassVar[tuple[str, ...]]

    def __init__(self, path: Path, *, reading: bool = False) -> None:
        """reading: do not create, repair or upgrade; UsageError if the file is missing or damaged."""
        self.path, self.reading, self.rescued, self.lost, self.is_new = path, reading, "", 0, False
        self._copy = ExitStack()
        with self._guard():
            if not reading:
                if (draft := Path(f"{path}.rescued")).exists() and not path.exists():
                    draft.replace(path)  # finish a recovery that was killed
                try:
                    self._open()
                    return
                except sqlite3.DatabaseError as error:
                    if not _is_damage(error):
                        raise
                    self._rescue(error)
            self._open()

    @abstractmethod
    def damaged_items(self) -> dict[Any, str]:
        """{key: question name, or "" if unknown} of items whose content does not match their checksum."""

    @abstractmethod
    def _write_checksums(self, keys: Iterable[Any] | None = None) -> None:
        """Write the checksums of these items, by default of all without one."""

    def _open(self) -> None:
        mode, path = "rwc", self.path
        if self.path.is_file() and commits_are_lost(self.path):
            raise sqlite3.DatabaseError("its -wal lacks commits")
        if self.reading:
            if not self.path.is_file():
                raise UsageError(f"{self.path} is missing; `cotree run` on its run makes it again")
            # Open a write-protected file as immutable, unless a `-wal` with commits is beside it.
            writable = os.access(self.path, os.W_OK) and os.access(self.path.parent, os.W_OK)
            log, index = (os.path.exists(f"{self.path}{end}") for end in ("-wal", "-shm"))
            mode = "rw" if writable else "ro" if log else "ro&immutable=1"
            if log and not index and not writable:  # SQLite must write a `-shm` index to read a `-wal`
                path, mode = self._copied(), "rw"
        self._db = sqlite3.connect(f"{path.absolute().as_uri()}?mode={mode}", uri=True, isolation_level=None)
        try:
            self._check_schema()
            if not self.reading and (not self._is_large() or self._suspected.exists()):
                (fault,) = self._db.execute("PRAGMA integrity_check(1)").fetchone()
                if fault != "ok" or self.damaged_items():
                    raise sqlite3.DatabaseError("some of it is not as it was stored")
                self._suspected.unlink(missing_ok=True)
        except Exception as error:
            self.__exit__()
            if isinstance(error, ValueError):  # undecodable text in SQLite's message, or a non-numeric version
                raise sqlite3.DatabaseError("its schema cannot be read") from None
            raise

    def _is_large(self) -> bool:
        return self.path.is_file() and self.path.stat().st_size > LARGE

    @property
    def _suspected(self) -> Path:
        """A marker file beside a large file in which a reader found damage: the next writer checks the whole file."""
        return self.path.with_name(f"{self.path.name}.suspected")

    def _copied(self) -> Path:
        """Copy the file and its `-wal` to a temporary folder that exists while this is open."""
        with explain_write_errors(Path(gettempdir()), "set TMPDIR to another folder"), ExitStack() as kept:
            folder = kept.enter_context(TemporaryDirectory(prefix="cotree-"))
            for end in ("", "-wal"):
                shutil.copyfile(f"{self.path}{end}", Path(folder) / f"{self.path.name}{end}")
            self._copy = kept.pop_all()
        return Path(folder) / self.path.name

    def _check_schema(self) -> None:
        """Create the tables of a new file, upgrade an older one, refuse a later version or a foreign file."""
        tables = self._tables()
        if tables and not {"meta", self.main_table} <= tables:
            raise UsageError(self._not_ours("it is another program's database"))
        if not tables and self.reading:
            raise sqlite3.DatabaseError("it is empty")
        if not self.reading:
            mode = sqlite_journal_mode(self.path)
            (found_mode,) = self._db.execute(f"PRAGMA journal_mode={mode}").fetchone()
            if found_mode != mode.lower():
                raise CotreeError(f"{self.path}: {_NO_LOCKS}")
            if mode == "WAL":  # with NORMAL its commits survive a killed process, at 40 microseconds a commit
                self._db.execute("PRAGMA synchronous=NORMAL")
        if not tables:
            with self._transaction():
                if not self._tables():  # another process may have created them meanwhile
                    self.is_new = True
                    for statement in self.schema:
                        self._db.execute(statement)
                    self._db.execute("CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID")
                    self._db.execute("INSERT INTO meta VALUES ('schema_version', ?)", (str(self.schema_version),))
        found = self.version()
        if found not in (self.schema_version - 1, self.schema_version):
            fix = "choose another name= (what is there is kept), or use the cotree that wrote it"
            raise UsageError(f"{self.path} has schema version {found}, this cotree writes {self.schema_version}; {fix}")
        if found != self.schema_version and not self.reading:
            with self._transaction():
                for statement in self.upgrade if self.version() == found else ():  # unless another process did
                    self._db.execute(statement)
                self._db.execute("UPDATE meta SET value = ?", (str(self.schema_version),))
                self._write_checksums()

    def version(self) -> int:
        """The schema version recorded in the file."""
        for (value,) in self._db.execute("SELECT value FROM meta WHERE key = 'schema_version'"):
            return int(value)
        raise sqlite3.DatabaseError("its version is lost")

    def _tables(self) -> set[str]:
        return {name for (name,) in self._db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}

    def _rescue(self, damage: sqlite3.DatabaseError) -> None:
        """Move the damaged file aside and replace it by one with all items that are intact."""
        draft, ends = f"{self.path}.rescued", ("", "-wal", "-shm")
        for end in ends:
            Path(draft + end).unlink(missing_ok=True)
        with type(self)(Path(draft)) as new:
            there = new._insert_all(readable_rows(self.path))
            lost = new.damaged_items()
            kept = new._count_without(lost)
        if not kept and not lost:
            Path(draft).unlink()
            if getattr(damage, "sqlite_errorname", "") == "SQLITE_NOTADB":
                raise damage
            fault = f"{self.path} is damaged ({damage}), and nothing in it can be read"
            raise UsageError(f"{fault}; move it away, so that it is made anew")
        aside = next(name for n in count(1) if not os.path.lexists(name := f"{self.path}.damaged-{n}"))
        for end in ends[::-1]:
            with suppress(FileNotFoundError):
                Path(f"{self.path}{end}").rename(aside + end)
        Path(draft).replace(self.path)
        self._suspected.unlink(missing_ok=True)
        self.lost = len(lost)
        names = list(filter(None, dict.fromkeys(lost.values())))
        of = f", not those of {', '.join(names[:5])}{', ...' * (len(names) > 5)}" if names else ""
        self.rescued = (
            f"{self.path} was damaged ({damage}): {kept} of at least {max(there, kept + len(lost))} {self.items} are "
            f"kept{of}; the rest is made again where it is needed, and the damaged file is now {aside}"
        )

    def _insert_all(self, rows: Iterable[list[Value]]) -> int:
        """Insert recovered rows into the tables whose columns they fit; returns the highest rowid seen."""
        most = 0
        tables = {table: self._db.execute(f"PRAGMA table_info({table})").fetchall() for table in self._tables()}
        del tables["meta"]
        with self._transaction():
            for row in rows:
                if len(row) == 2 and isinstance(row[0], bytes) and isinstance(row[1], int):  # primary key index
                    most = max(most, row[1])
                for table, columns in tables.items():
                    if _fits(row, columns):
                        names, places = ", ".join(column[1] for column in columns[: len(row)]), ", ?" * len(row)
                        self._db.execute(f"INSERT OR IGNORE INTO {table} ({names}) VALUES ({places[2:]})", row)  # noqa: S608
            self._write_checksums()
        return most

    def _count_without(self, lost: Iterable[Any]) -> int:
        """Delete these items; returns how many remain."""
        with self._transaction():
            for table in self.tables_of_items:
                query = f"DELETE FROM {table} WHERE {self.key} = ?"  # noqa: S608
                self._db.executemany(query, [(key,) for key in lost])
            return int(self._db.execute(f"SELECT count(*) FROM {self.main_table}").fetchone()[0])  # noqa: S608

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._db.close()
        self._copy.close()

    def _not_ours(self, why: object) -> str:
        return f"{self.path} is not a {self.kind} ({why}); move it away or name another run"

    @contextmanager
    def _guard(self) -> Iterator[None]:
        """Convert SQLite errors to one-line errors: CotreeError if a retry can help, UsageError for a bad file."""
        try:
            yield
        except sqlite3.DatabaseError as error:
            code = getattr(error, "sqlite_errorname", "")
            if _is_damage(error) and code != "SQLITE_NOTADB":
                if self._is_large():
                    with suppress(OSError):  # read-only folder
                        self._suspected.touch()
                fix = "`cotree run` on its run moves it aside and keeps all that can be read"
                raise UsageError(f"{self.path} is damaged ({error}); {fix}") from None
            if not isinstance(error, sqlite3.OperationalError):
                raise UsageError(self._not_ours(error)) from None
            fix = next((fix for part, fix in _FIXES.items() if part in code), "close other users of it")
            raise CotreeError(f"{self.path}: {error}; {fix}, then re-run the same command to resume") from None

    def execute(self, query: str, values: Sequence[Any] = ()) -> Iterator[tuple[Any, ...]]:
        """Iterate over the rows of a query."""
        with self._guard():
            yield from self._db.execute(query, values)

    def rows_of(self, table: str, keys: Sequence[Any]) -> list[tuple[Any, ...]]:
        """The rows of these items in a table."""
        places = ", ".join("?" * len(keys))
        return list(self.execute(f"SELECT * FROM {table} WHERE {self.key} IN ({places})", keys))  # noqa: S608

    def insert(self, rows: Mapping[str, Sequence[tuple[Any, ...]]]) -> None:
        """Insert {table: rows} in one transaction; rows with an existing key are skipped."""
        with self._transaction():
            for table, new in rows.items():
                if new:
                    self._db.executemany(f"INSERT OR IGNORE INTO {table} VALUES ({', '.join('?' * len(new[0]))})", new)  # noqa: S608

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """Commit all writes of the block, or roll them back if it raises."""
        with self._guard(), self._db:
            self._db.execute("BEGIN IMMEDIATE")
            yield


_NO_LOCKS = "its file system has no file locks or no shared memory, which SQLite needs; use a folder on a local disk"

# {part of SQLite's error name: advice}
_FIXES = dict.fromkeys(("FULL", "WRITE"), "free some space") | dict.fromkeys(("LOCK", "SHM", "PROTOCOL"), _NO_LOCKS)
_FIXES |= {"IOERR": "look after the disk"} | dict.fromkeys(("CANTOPEN", "READONLY"), "make it and its folder writable")


def checksum(*values: Any) -> int:
    """CRC-32 of a row's values as SQLite returns them."""
    return zlib.crc32(repr(values).encode())


def _is_damage(error: sqlite3.DatabaseError) -> bool:
    """Whether an error means that the file is corrupt."""
    broken_schema = getattr(error, "sqlite_errorname", "") == "SQLITE_ERROR"
    return type(error) is sqlite3.DatabaseError or broken_schema or "Could not decode" in str(error)


def _fits(row: list[Value], columns: list[tuple[Any, ...]]) -> bool:
    """Whether a row's values fit these columns; a row of an older version may have fewer."""
    if len(row) > len(columns) or any(required and default is None for *_, required, default, _ in columns[len(row) :]):
        return False
    return all(
        isinstance(value, _TYPES[kind]) or (value is None and not required)
        for value, (_, _, kind, required, _, _) in zip(row, columns, strict=False)
    )
