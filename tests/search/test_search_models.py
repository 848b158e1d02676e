"""Completions are in the journal before anybody has them."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from tests.support.asking import client, request
from tests.support.fake_server import FakeServer

from cotree.models.client import Client, Completion, Request
from cotree.models.endpoints import Endpoint
from cotree.search.journal import Journal, SearchModels


class Refusing(Journal):
    """Keeps nothing."""

    def add(self, key: bytes, question: str, completion: Completion) -> None:
        raise MemoryError


def models_of(journal: Journal, c: Client) -> SearchModels:
    return SearchModels({"m": Endpoint("m", (c,), None, "m")}, journal)


async def complete(models: SearchModels, asked: Request) -> Completion:
    return (await models.complete("m", asked, "t"))[1]


async def test_nobody_gets_a_completion_that_the_journal_could_not_keep(tmp_path: Path) -> None:
    with Refusing(tmp_path / "j.db") as journal:
        async with FakeServer() as server, client(server.url) as c:
            asked = [complete(models_of(journal, c), request(f"q{i}")) for i in range(3)]
            got: list[Any] = await asyncio.wait_for(asyncio.gather(*asked, return_exceptions=True), 5)
    assert [type(error) for error in got] == [MemoryError] * 3


async def test_a_request_is_sent_once_in_the_life_of_a_journal_and_never_without_one(tmp_path: Path) -> None:
    async with FakeServer() as server, client(server.url) as c:
        for _ in range(2):
            with Journal(tmp_path / "j.db") as journal:
                await complete(models_of(journal, c), request())
        assert server.calls == 1
        other = SearchModels({"m": Endpoint("m", (c,), None, "other weights")})
        (key, _), (same, _) = [await other.complete("m", request(), "t") for _ in range(2)]
        with Journal(tmp_path / "j.db") as journal:
            kept, _ = await models_of(journal, c).complete("m", request(), "t")
        assert key == same != kept, "the key holds the model's identity"
        assert server.calls == 3
