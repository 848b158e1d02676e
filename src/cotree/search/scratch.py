"""Databases that are worked on in a folder of a local disk, and copied to their places from time to time.

For places on file systems of several machines (NFS, Lustre, GPFS, SMB), where SQLite's WAL is not safe. A copy is made
by SQLite's backup while work goes on, and takes its place whole or not at all. What a killed process had not copied
yet is still in the folder, and comes along when the work goes on at that machine; elsewhere it is made again.
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

_SECONDS = 60.0  # between two copies,
_TREES = 50  # or fewer once so many trees are new,
_SHARE = 20  # but never less than so many times what a copy takes


class Scratch:
    """The journal and the store of a run or a shard, at their places or in a folder for scratch; a context manager.

    Everything that is opened at the paths given here is to be closed before the block ends; then the last copy is made.
    """

    def __init__(self, run: Path, folder: Path | None) -> None:
        """run: the folder that has both. folder: on a local disk; None to work at their places."""
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
        """Where a database whose place is this is to be opened; what is at its place is there too."""
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
        """Note that a tree was stored. Raises what copying raised, so that no work goes on that cannot be kept."""
        self._new += 1
        if self._new >= _TREES:
            self._due.set()
        if self._failure is not None:
            raise self._failure

    def copy(self) -> None:
        """Copy all databases to their places, the journal first."""
        self._new = 0
        for local, place in sorted(self._copies.items(), key=lambda copy: copy[0].name != "journal.db"):
            if local.is_file():
                with atomic_draft(place, "set --runs-dir") as draft:
                    _back_up(local, draft)
                    for end in ("-wal", "-shm"):  # all that was in them is in the copy
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
    """Copy a database that others may write to, with all commits so far, to one without a WAL."""
    with closing(sqlite3.connect(source)) as reading, closing(sqlite3.connect(target)) as writing:
        try:
            reading.backup(writing)
            writing.execute("PRAGMA journal_mode=DELETE")  # to be read where there is no shared memory
        except sqlite3.OperationalError as error:
            raise CotreeError(f"cannot copy {source} to {target.parent}: {error}; free some space there") from None
