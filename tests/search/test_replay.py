"""A search that is repeated with other settings pays for new requests only, and ends as if it had begun with them.

The server's replies are fixed: a pure function of prompt, seed and sample.
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from tests.support.fake_server import FakeServerThread, draw
from tests.support.search import SHORT, config_of, content, grow, letters, reply, settings, stored, whole_reply

from cotree.search.journal import Journal
from cotree.search.settings import Trees
from cotree.search.store import StoredTree, TreeStore
from cotree.search.summary import summarize
from cotree.tasks.base import Asked

LONG = {
    "root": {"sub_task": 2},
    "sub_task": {"thinking": 3},
    "thinking": {"double_check": 1, "answer": 1},
    "double_check": {"answer": 2},
    "reflection": {"thinking": 1},
}


@pytest.fixture(scope="module")
def server() -> Iterator[FakeServerThread]:
    with FakeServerThread(reply=whole_reply, usage="vllm") as fake:
        yield fake


def requests_of(server: FakeServerThread, start: int) -> list[str]:
    return [json.dumps(body, sort_keys=True) for body in server.requests[start:]]


def replayed(
    server: FakeServerThread, folder: Path, first: Trees, second: Trees, asked: Sequence[Asked]
) -> tuple[list[StoredTree], int, int]:
    """Grow under one settings, then under the others with the same journal; the trees of the second, and what it asked
    and recalled. Nothing was sent twice, and it all equals the second grown alone."""
    start = server.calls
    journal = folder / "journal.db"
    asyncio.run(grow(server.url, folder / "t.db", first, asked, journal=journal))
    (folder / "t.db").rename(folder / "older.db")  # as a run folder keeps content of other settings
    trees, progress = asyncio.run(grow(server.url, folder / "t.db", second, asked, journal=journal))
    sent = requests_of(server, start)
    assert len(set(sent)) == len(sent), "an answered request was sent again"
    start = server.calls
    alone, whole = asyncio.run(grow(server.url, folder / "alone.db", second, asked))
    needed = requests_of(server, start)
    assert content(trees) == content(alone)
    assert stored(folder / "t.db") == stored(folder / "alone.db"), "ids too: they do not depend on the journal"
    assert progress.calls + progress.recalled == whole.calls
    assert progress.calls == len(set(needed) - set(sent[: len(sent) - progress.calls]))
    unused = set(sent) - set(needed)
    with Journal(journal) as kept, TreeStore(folder / "t.db") as store:
        summary = summarize(store, kept, asked, config_of(second))
    with sqlite3.connect(journal) as db:
        (paid,) = db.execute("SELECT sum(tokens) FROM completions").fetchone()
    assert summary["unused"]["completions"] == len(unused)
    assert summary["unused"]["tokens"] == paid - sum(tree.completion_tokens for tree in trees)
    return trees, progress.calls, progress.recalled


@pytest.mark.parametrize("in_flight", [1, 8])
def test_four_rollouts_and_then_eight_are_eight_from_the_start(
    tmp_path: Path, server: FakeServerThread, in_flight: int
) -> None:
    few, many = (settings(rollouts=n, trees_in_flight=in_flight, patterns={"long": LONG}) for n in (4, 8))
    trees, calls, recalled = replayed(server, tmp_path, few, many, letters(6))
    assert {tree.rollouts for tree in trees} == {8}
    assert recalled > 0 < calls
    with TreeStore(tmp_path / "older.db") as store:
        before = sum(tree.calls for tree in store.trees())
    assert recalled == before, "all of the smaller search is part of the larger"


@pytest.mark.parametrize(
    "change",
    [
        {"exploration": 0.1},
        {"stop": {"correct": 1, "wrong": 1}},
        {"max_reflections": 0},
        {"leaves_per_round": 5},
        {"max_depth": 4},
        {"adaptive": True, "stop": {"hopeless": 2}},
        {"rollouts": 3},
        {"patterns": {"short": SHORT, "long": LONG, "plain": None}},
    ],
)
def test_other_settings_replay_what_is_the_same(
    tmp_path: Path, server: FakeServerThread, change: dict[str, Any]
) -> None:
    base = {"rollouts": 8, "patterns": {"short": SHORT, "long": LONG}}
    _, _, recalled = replayed(server, tmp_path, settings(**base), settings(**base | change), letters(6))
    assert recalled > 0


@pytest.mark.parametrize(
    "change", [{"exploration": 0.0}, {"rollouts": 14}, {"leaves_per_round": 1}, {"stop": {"wrong": 2}}]
)
def test_the_seed_of_a_request_is_that_of_its_place_whatever_else_was_asked(
    tmp_path: Path, server: FakeServerThread, change: dict[str, Any]
) -> None:
    base, start = {"rollouts": 8, "patterns": {"long": LONG}}, server.calls
    for number, search in enumerate((settings(**base), settings(**base | change))):
        asyncio.run(grow(server.url, tmp_path / f"{number}.db", search, letters(4)))
    seeds: dict[str, set[int]] = {}
    for body in server.requests[start:]:
        seeds.setdefault(json.dumps(body | {"seed": 0}, sort_keys=True), set()).add(body["seed"])
    assert {len(found) for found in seeds.values()} == {1}
    assert len(seeds) < server.calls - start, "the two searches have requests in common"


def test_rollouts_are_shared_out_anew_for_other_settings_and_for_more_questions(tmp_path: Path) -> None:
    def often_hopeless(prompt: str, seed: int, index: int) -> str:
        hopeless = draw(prompt.split("[user] ")[-1].split("\n")[0]) % 3
        return "9" if prompt.endswith("{") and hopeless else reply(prompt, seed, index)

    def search(hopeless: int) -> Trees:
        return settings(rollouts=6, adaptive=True, patterns={"long": LONG}, stop={"hopeless": hopeless})

    with FakeServerThread(reply=often_hopeless, usage="vllm") as server:
        soon, _, _ = replayed(server, tmp_path, search(5), search(2), letters(12))
        late, _ = asyncio.run(grow(server.url, tmp_path / "late.db", search(5), letters(12)))
        some, _ = asyncio.run(grow(server.url, tmp_path / "more.db", search(5), letters(4)))
        more, _ = asyncio.run(grow(server.url, tmp_path / "more.db", search(5), letters(12)))
    extra = [max(tree.rollouts for tree in trees) - 6 for trees in (soon, late)]
    assert extra[0] > extra[1] > 0, "those that are given up sooner leave more"
    assert more[:4] == some
    assert max(tree.rollouts for tree in more[4:]) > 6, "the new questions share what they leave over"
    assert sum(tree.rollouts for tree in more) <= 6 * 12, "no more than the budget of all"


some_settings = st.builds(
    settings,
    rollouts=st.integers(1, 10),
    leaves_per_round=st.integers(1, 4),
    exploration=st.sampled_from([0.0, 0.5, 1.0, 3.0]),
    max_reflections=st.integers(0, 3),
    max_depth=st.integers(3, 6),
    patterns=st.sampled_from([{"short": SHORT}, {"long": LONG}, {"long": LONG, "short": SHORT}]),
    stop=st.sampled_from([{}, {"correct": 1, "wrong": 1}, {"hopeless": 2}, {"easy": 2}, {"tokens": 40}]),
    adaptive=st.booleans(),
    trees_in_flight=st.sampled_from([1, 3, 16]),
    method=st.sampled_from(["mcts", "mcts", "sampling"]),
)


@given(first=some_settings, second=some_settings, count=st.integers(1, 4))
@hypothesis_settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_search_after_any_other_is_that_search_alone(
    server: FakeServerThread, first: Trees, second: Trees, count: int
) -> None:
    with TemporaryDirectory() as folder:
        replayed(server, Path(folder), first, second, letters(count))


def test_another_model_or_another_seed_replays_nothing(tmp_path: Path, server: FakeServerThread) -> None:
    asked, journal = letters(3), tmp_path / "journal.db"
    asyncio.run(grow(server.url, tmp_path / "a.db", settings(), asked, journal=journal))
    _, other = asyncio.run(
        grow(server.url, tmp_path / "b.db", settings(roles={"thinker": "two"}), asked, journal=journal)
    )
    assert other.recalled == 0 < other.calls
    _, seeded = asyncio.run(grow(server.url, tmp_path / "c.db", settings(), asked, journal=journal, seed=4))
    assert seeded.recalled == 0 < seeded.calls


def test_going_back_to_former_settings_pays_nothing(tmp_path: Path, server: FakeServerThread) -> None:
    asked = letters(4)
    for search, store in ((settings(), "a"), (settings(exploration=0.0), "b"), (settings(), "again")):
        _, progress = asyncio.run(
            grow(server.url, tmp_path / f"{store}.db", search, asked, journal=tmp_path / "journal.db")
        )
    assert progress.calls == 0
    assert stored(tmp_path / "again.db") == stored(tmp_path / "a.db")


def test_a_kill_in_the_replay_changes_nothing(tmp_path: Path) -> None:
    """The server dies in the middle of the second search; a third one goes on from the journal."""
    asked, few, many = letters(5), settings(rollouts=3, patterns={"long": LONG}), settings(patterns={"long": LONG})
    journal = tmp_path / "journal.db"
    with FakeServerThread(reply=reply) as server:
        asyncio.run(grow(server.url, tmp_path / "few.db", few, asked, journal=journal))
        server.server.faults = dict.fromkeys(range(server.calls + 9, server.calls + 1_000), "500")
        with pytest.raises(ExceptionGroup):
            asyncio.run(grow(server.url, tmp_path / "t.db", many, asked, journal=journal, attempts=2))
        server.server.faults = {}
        asyncio.run(grow(server.url, tmp_path / "t.db", many, asked, journal=journal))
        answered = [json.dumps(body, sort_keys=True) for body in server.server.answered]
        assert len(set(answered)) == len(answered), "an answered request was sent again"
        asyncio.run(grow(server.url, tmp_path / "alone.db", many, asked))
    assert stored(tmp_path / "t.db") == stored(tmp_path / "alone.db")
