"""Completions that are made once: from the journal, or from the model and then into the journal.

Invariant: a completion is committed under its request's key before anybody uses it, so a resumed search repeats no
completed call.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from cotree.models.client import Completion, Request
from cotree.models.endpoints import Endpoint
from cotree.search.store import Call, TreeStore


@dataclass
class Progress:
    """What a search has done so far in this process, for whoever shows it. `trees_before` were there at its start."""

    trees_wanted: int = 0
    trees: int = 0
    trees_before: int = 0
    thoughts: int = 0
    calls: int = 0
    recalled: int = 0
    tokens: int = 0
    cost: float = 0.0
    verdicts: dict[str, int] = field(default_factory=lambda: {"correct": 0, "wrong": 0, "no_answer": 0})
    started: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        """Since the search began in this process."""
        return time.monotonic() - self.started


class Calls:
    """The models of a search behind its journal. Without a store nothing is kept."""

    def __init__(self, store: TreeStore | None, endpoints: Mapping[str, Endpoint], progress: Progress) -> None:
        self.store, self.endpoints, self.progress = store, endpoints, progress
        self._arrived: list[Call] = []
        self._committing: asyncio.Task[None] | None = None

    async def complete(self, model: str, request: Request, tree_id: str) -> Completion:
        """The completion of a request. Requests of one tree go to one server, where its prompts are warm."""
        endpoint = self.endpoints[model]
        key = request.key(endpoint.identity)
        recalled = None if self.store is None else self.store.recall(key)
        if recalled is not None:
            self.progress.recalled += 1
            return Completion.from_json(recalled)
        completion = await endpoint.client(tree_id).complete(request)
        await self._commit(Call(key, tree_id, model, completion.to_json()))
        self.progress.calls += 1
        self.progress.tokens += completion.completion_tokens
        self.progress.cost = sum(endpoint.cost or 0.0 for endpoint in self.endpoints.values())
        return completion

    async def _commit(self, call: Call) -> None:
        """Return when the call is in the journal. What arrives in one turn of the event loop is one transaction."""
        if self.store is None:
            return
        self._arrived.append(call)
        if self._committing is None:
            self._committing = asyncio.create_task(self._commit_arrived(self.store))
        # Who is cancelled meanwhile takes nobody's call along.
        await asyncio.shield(self._committing)

    async def _commit_arrived(self, store: TreeStore) -> None:
        arrived, self._arrived, self._committing = self._arrived, [], None
        store.journal(arrived)
