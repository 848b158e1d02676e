"""Completions are in the journal before anybody has them, in as few transactions as there were turns of the loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.support.asking import client, request, until
from tests.support.fake_server import FakeServer

from cotree.models.client import Client, Completion, Request
from cotree.models.endpoints import Endpoint
from cotree.search.completer import Completer
from cotree.search.journal import Entry, Journal


class Watched(Journal):
    """Says what is about to be committed, and may refuse it."""

    def __init__(self, path: Path, watch: Callable[[Sequence[Entry]], None]) -> None:
        super().__init__(path)
        self.watch = watch

    def add(self, entries: Sequence[Entry]) -> None:
        self.watch(entries)
        super().add(entries)


def completer_of(journal: Journal, c: Client) -> Completer:
    return Completer({"m": Endpoint("m", (c,), None, "m")}, journal)


async def complete(completer: Completer, asked: Request) -> Completion:
    return await completer.complete("m", asked, completer.key("m", asked), "t")


async def test_who_waits_is_told_whatever_befalls_the_journal(tmp_path: Path) -> None:
    def refuse(entries: Sequence[Entry]) -> None:
        raise MemoryError

    with Watched(tmp_path / "j.db", refuse) as journal:
        async with FakeServer() as server, client(server.url) as c:
            asked = [complete(completer_of(journal, c), request(f"q{i}")) for i in range(3)]
            told: list[Any] = await asyncio.wait_for(asyncio.gather(*asked, return_exceptions=True), 5)
    assert [type(error) for error in told] == [MemoryError] * 3


async def test_a_call_that_was_cancelled_while_it_was_committed_is_not_lost(tmp_path: Path) -> None:
    batches: list[int] = []
    with Watched(tmp_path / "j.db", lambda entries: batches.append(len(entries))) as journal:
        async with FakeServer() as server, client(server.url) as c:
            completer = completer_of(journal, c)
            waiting = asyncio.create_task(complete(completer, request()))
            while not completer._arrived:  # noqa: ASYNC110 - the very turn of the loop matters
                await asyncio.sleep(0)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            await until(lambda: bool(batches))
            await complete(completer, request())
        assert (server.calls, completer.progress.recalled) == (1, 1)


async def test_a_request_is_sent_once_in_the_life_of_a_journal_and_never_without_one(tmp_path: Path) -> None:
    async with FakeServer() as server, client(server.url) as c:
        for _ in range(2):
            with Journal(tmp_path / "j.db") as journal:
                await complete(completer_of(journal, c), request())
        assert server.calls == 1
        other = Completer({"m": Endpoint("m", (c,), None, "other weights")}, None)
        assert other.key("m", request()) != completer_of(journal, c).key("m", request())
        await complete(other, request())
        await complete(other, request())
        assert server.calls == 3
