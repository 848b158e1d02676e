"""The models of a search behind its journal: a request that was answered before is not sent again.

Invariant: a completion is committed to the journal before anybody uses it, so a resumed search repeats no answered
request.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from cotree.models.client import Completion, Request
from cotree.models.endpoints import Endpoint
from cotree.search.journal import Entry, Journal


@dataclass
class Progress:
    """The counts of a running search, for its progress line.

    trees_wanted: later turns of conversations included. trees: finished; trees_before of them were there when this
    process began. calls: requests that a model answered; recalled: that the journal answered. tokens: generated in this
    process. cost: in the currency of the models' prices.
    """

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


class Completer:
    """Asks the models of a search; without a journal nothing is kept."""

    def __init__(
        self, endpoints: Mapping[str, Endpoint], journal: Journal | None = None, progress: Progress | None = None
    ) -> None:
        self.endpoints, self.journal, self.progress = endpoints, journal, progress or Progress()
        self._arrived: list[Entry] = []
        self._committing: asyncio.Task[None] | None = None

    def key(self, model: str, request: Request) -> bytes:
        """The name of a completion in the journal: a hash of the request and of the model's identity."""
        return request.key(self.endpoints[model].identity)

    async def complete(self, model: str, request: Request, key: bytes, question: str) -> Completion:
        """The completion of a request, from the journal or from the model and then into the journal.

        Args:
            key: of the request (`key`).
            question: whose it is (`question_name`): its requests go to one server, where its prompts are warm.
        """
        recalled = None if self.journal is None else self.journal.recall(key)
        if recalled is not None:
            self.progress.recalled += 1
            return Completion.from_json(recalled)
        completion = await self.endpoints[model].client_for(question).complete(request)
        if self.journal is not None:
            await self._commit(Entry(key, question, completion.completion_tokens, completion.to_json()), self.journal)
        self.progress.calls += 1
        self.progress.tokens += completion.completion_tokens
        self.progress.cost = sum(endpoint.cost or 0.0 for endpoint in self.endpoints.values())
        return completion

    async def _commit(self, entry: Entry, journal: Journal) -> None:
        """Return when the entry is in the journal. What arrives in one turn of the event loop is one transaction."""
        self._arrived.append(entry)
        if self._committing is None:
            self._committing = asyncio.create_task(self._commit_arrived(journal))
        # A caller that is cancelled meanwhile must not cancel the commit of the others.
        await asyncio.shield(self._committing)

    async def _commit_arrived(self, journal: Journal) -> None:
        arrived, self._arrived, self._committing = self._arrived, [], None
        journal.add(arrived)
