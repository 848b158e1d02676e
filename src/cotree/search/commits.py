"""Commit what many tasks write at one moment in one transaction; a commit each costs more CPU than an HTTP reply."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

T = TypeVar("T")


class CommitsTogether(Generic[T]):
    """Collects the items that tasks add in one iteration of the event loop, and commits them by one call.

    journal = CommitsTogether(write_rows)
    await journal.add(row)      # returns when the row is committed
    """

    def __init__(self, commit: Callable[[Sequence[T]], None]) -> None:
        self._commit_items = commit
        self._waiting: list[tuple[T, asyncio.Future[None]]] = []

    async def add(self, item: T) -> None:
        """Wait until the item is committed; raises what `commit` raises. A cancelled task's item is committed too."""
        loop = asyncio.get_running_loop()
        if not self._waiting:
            loop.call_soon(self._commit)  # not later: a search that fails meanwhile closes what it writes to
        committed = loop.create_future()
        self._waiting.append((item, committed))
        await committed

    def _commit(self) -> None:
        waiting, self._waiting = self._waiting, []
        error: Exception | None = None
        try:
            self._commit_items([item for item, _ in waiting])
        except Exception as fault:  # noqa: BLE001 - raised in the waiting tasks
            error = fault
        for committed in [future for _, future in waiting if not future.done()]:  # skip those of cancelled tasks
            if error is None:
                committed.set_result(None)
            else:
                committed.set_exception(error)
