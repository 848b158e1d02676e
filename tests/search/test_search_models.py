"""Completions are in the journal before anybody has them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from tests.support.asking import client, request
from tests.support.fake_server import FakeServer

from cotree.models.client import Choice, Client, Completion, Request
from cotree.models.endpoints import Endpoint
from cotree.search.commits import CommitsTogether
from cotree.search.journal import Journal, SearchModels


class Counting(Journal):
    """Counts its commits."""

    commits = 0

    def add(self, completions: Iterable[tuple[bytes, str, Completion]]) -> None:
        super().add(completions)
        self.commits += 1


class Refusing(Journal):
    """Keeps nothing."""

    def add(self, completions: Iterable[tuple[bytes, str, Completion]]) -> None:
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


async def test_of_a_new_question_the_journal_is_asked_for_repeated_requests_only(tmp_path: Path) -> None:
    class Asked(Journal):
        recalls = 0

        def recall(self, key: bytes) -> Completion | None:
            self.recalls += 1
            return super().recall(key)

    async with FakeServer() as server, client(server.url) as c:
        with Asked(tmp_path / "j.db") as journal:
            models = models_of(journal, c)
            for prompt in ("a", "b"):
                await complete(models, request(prompt))
            assert (journal.recalls, server.calls) == (0, 2)
            await complete(models, request("a"))
            assert (journal.recalls, server.calls) == (1, 2), "the same request again is not paid again"
            models.forget("t")
            for prompt in ("a", "b", "c"):
                await complete(models, request(prompt))
            assert (journal.recalls, server.calls) == (4, 3), "the question is known now"


async def test_what_arrives_at_one_moment_is_committed_together_before_anybody_has_it(tmp_path: Path) -> None:
    with Counting(tmp_path / "j.db") as journal:
        together = CommitsTogether(journal.add)

        def arriving(count: int) -> list[asyncio.Task[None]]:
            said = Completion((Choice("text", "stop", 1),), 1, 0, 1)
            return [asyncio.create_task(together.add((bytes([i]), "t", said))) for i in range(count)]

        tasks = arriving(8)
        await asyncio.sleep(0)
        tasks[3].cancel()
        assert journal.commits == 0 and not any(task.done() for task in tasks)
        got = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(each) for each in got] == [type(None)] * 3 + [asyncio.CancelledError] + [type(None)] * 4
        assert journal.commits == 1
        assert all(journal.recall(bytes([i])) for i in range(8)), "what a cancelled task had paid for is kept, too"
        await asyncio.gather(*arriving(2))
        assert journal.commits == 2


async def test_what_was_added_before_another_task_failed_is_committed() -> None:
    committed: list[str] = []
    together = CommitsTogether[str](committed.extend)

    async def fails() -> None:
        raise MemoryError

    async def both() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(together.add("a tree"))
            group.create_task(fails())

    with pytest.raises(ExceptionGroup):
        await both()
    assert committed == ["a tree"]
