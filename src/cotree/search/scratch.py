"""SQLite databases kept on a local scratch disk during a run and copied to the run folder periodically.

For run folders on network file systems (NFS, Lustre, GPFS, SMB), where SQLite's WAL is not safe. SQLite's backup API
makes a copy while work continues, and the copy replaces the old file atomically. Rows that a killed process had not
copied are still on the scratch disk: a resume on that machine finds them, one elsewhere computes them again.
"""

from __future__ import annotations

import hashlib
import sqlite3
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Self

from cotree.base.atomic import atomic_draft, explain_write_errors
from cotree.base.errors import CotreeError
from cotree.search.merge import merge_journals, merge_stores

_SECONDS = 60.0  # between copies,
_TREES = 50  # or sooner after this many new trees,
_SHARE = 20  # but at least this many times the duration of the last copy


class Scratch:
    """Places a run's or shard's journal and tree stores on a scratch disk, or leaves them in the run folder.

    A context manager; close everything opened at its paths before the block ends, when the last copy is made.
    """

    def __init__(self, run: Path, folder: Path | None) -> None:
        """run: the run or shard folder. folder: on a local disk; None: use the run folder itself."""
        self._run, self._folder = run, folder
        if folder is not None:
            name = hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:16]
            self._folder = folder / f"cotree-{run.name}-{name}"
        self._copies: dict[Path, Path] = {}
        self._new = 0
        self._failure: Exception | None = None
        self._due, self._ended = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._copy_periodically, daemon=True)

    def path(self, place: Path) -> Path:
        """The path at which to open the database that belongs at `place`, with the content of `place` merged in."""
        if self._folder is None:
            return place
        local = self._folder / place.relative_to(self._run)
        with explain_write_errors(local, "choose another --scratch"):
            local.parent.mkdir(parents=True, exist_ok=True)
        if place.is_file():
            (merge_journals if place.name == "journal.db" else merge_stores)([place], local)
        self._copies[local] = place
        return local

    def count_tree(self) -> None:
        """Count a stored tree towards the next copy; raises the exception of a failed copy, to stop the run."""
        self._new += 1
        if self._new >= _TREES:
            self._due.set()
        if self._failure is not None:
            raise self._failure

    def copy(self) -> None:
        """Copy all databases to the run folder, the journal first."""
        self._new = 0
        for local, place in sorted(self._copies.items(), key=lambda copy: copy[0].name != "journal.db"):
            if local.is_file():
                with atomic_draft(place, "set --runs-dir") as draft:
                    _back_up(local, draft)
                    for end in ("-wal", "-shm"):  # the copy contains their commits
                        place.with_name(place.name + end).unlink(missing_ok=True)

    def _copy_periodically(self) -> None:
        pause = _SECONDS
        while not self._ended.is_set():
            self._due.wait(pause)
            self._due.clear()
            if self._ended.is_set():
                return
            started = time.monotonic()
            try:
                self.copy()
            except Exception as error:  # noqa: BLE001 (the main thread raises it)
                self._failure = error
                return
            took = time.monotonic() - started
            self._ended.wait(_SHARE * took)
            pause = max(0.0, _SECONDS - _SHARE * took)

    def __enter__(self) -> Self:
        if self._folder is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._folder is not None:
            self._ended.set()
            self._due.set()
            self._thread.join()
            self.copy()


def _back_up(source: Path, target: Path) -> None:
    """Copy a database with all commits so far, while others write to it, to one without a WAL."""
    with closing(sqlite3.connect(source)) as reading, closing(sqlite3.connect(target)) as writing:
        try:
            reading.backup(writing)
            writing.execute("PRAGMA journal_mode=DELETE")  # readable on file systems without shared memory
        except sqlite3.OperationalError as error:
            raise CotreeError(f"cannot copy {source} to {target.parent}: {error}; free some space there") from None
