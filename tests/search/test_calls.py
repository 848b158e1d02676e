"""Completions are in the journal before anybody has them, in as few transactions as there were turns of the loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.support.asking import client, request, until
from tests.support.fake_server import FakeServer

from cotree.models.client import Client
from cotree.models.endpoints import Endpoint
from cotree.search.calls import Calls, Progress
from cotree.search.store import Call, TreeStore


class Watched(TreeStore):
    """Says what is about to be committed, and may refuse it."""

    def __init__(self, path: Path, watch: Callable[[Sequence[Call]], None]) -> None:
        super().__init__(path)
        self.watch = watch

    def journal(self, calls: Sequence[Call]) -> None:
        self.watch(calls)
        super().journal(calls)


def calls_of(store: TreeStore, c: Client) -> Calls:
    return Calls(store, {"m": Endpoint("m", (c,), None, "m")}, Progress())


async def test_who_waits_is_told_whatever_befalls_the_journal(tmp_path: Path) -> None:
    def refuse(calls: Sequence[Call]) -> None:
        raise MemoryError

    with Watched(tmp_path / "t.db", refuse) as store:
        async with FakeServer() as server, client(server.url) as c:
            asked = [calls_of(store, c).complete("m", request(f"q{i}"), "t") for i in range(3)]
            told: list[Any] = await asyncio.wait_for(asyncio.gather(*asked, return_exceptions=True), 5)
    assert [type(error) for error in told] == [MemoryError] * 3


async def test_a_call_that_was_cancelled_while_it_was_committed_is_not_lost(tmp_path: Path) -> None:
    batches: list[int] = []
    with Watched(tmp_path / "t.db", lambda calls: batches.append(len(calls))) as store:
        async with FakeServer() as server, client(server.url) as c:
            calls = calls_of(store, c)
            waiting = asyncio.create_task(calls.complete("m", request(), "t"))
            while not calls._arrived:  # noqa: ASYNC110 - the very turn of the loop matters
                await asyncio.sleep(0)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            await until(lambda: bool(batches))
            await calls.complete("m", request(), "t")
        assert (server.calls, calls.progress.recalled) == (1, 1)
