"""Whole chains sampled at the tokens of other trees: stored as trees, counted like trees, replayed like trees."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from tests.support.asking import raw_server
from tests.support.fake_server import FakeServerThread
from tests.support.search import content, endpoints_at, grow, letters, run, settings, stored, whole_reply

from cotree.base.errors import UsageError
from cotree.search.growth import Growth
from cotree.search.journal import SearchModels
from cotree.search.sampling import sample_chains
from cotree.search.settings import Search, Writer
from cotree.search.store import TreeStore
from cotree.search.summary import compare_methods
from cotree.tasks import task

WHOLE = {"reply": whole_reply, "usage": "vllm"}
PLAIN: dict[str, Any] = {"patterns": {"plain": None}}
SAMPLING: dict[str, Any] = {"method": "sampling", "tokens_of": "train"} | PLAIN


def test_sampling_spends_what_the_other_tree_spent_to_the_nearest_chain(tmp_path: Path) -> None:
    asked = letters(6)
    with FakeServerThread(**WHOLE) as server:
        grown, _ = asyncio.run(grow(server.url, tmp_path / "t.db", settings(), asked))
        start = server.calls
        others = tmp_path / "t.db"
        sampled, first = asyncio.run(grow(server.url, tmp_path / "s.db", settings(**SAMPLING), asked, others=others))
        assert server.calls - start == first.calls > 0
        before, calls = stored(tmp_path / "s.db"), server.calls
        (tmp_path / "s.db").unlink()
        _, second = asyncio.run(grow(server.url, tmp_path / "s.db", settings(**SAMPLING), asked, others=others))
        assert (second.calls, second.recalled, server.calls) == (0, first.calls, calls)
        assert stored(tmp_path / "s.db") == before
    for tree, other in zip(sampled, grown, strict=True):
        assert (tree.question_id, tree.task) == (other.question_id, other.task)
        chain = max(node.tokens for node in tree.nodes)
        assert abs(tree.completion_tokens - other.completion_tokens) <= chain, "to the nearest chain"
    search, sampling = compare_methods({"search": grown, "sampling": sampled})
    assert (search.method, sampling.method) == ("search", "sampling")
    assert abs(sampling.tokens - search.tokens) < 0.2 * search.tokens
    assert search.questions == sampling.questions == 6
    share, low, high = sampling.correct
    assert low <= share <= high


def test_a_sampled_tree_is_a_root_and_a_leaf_for_each_whole_chain(tmp_path: Path) -> None:
    trees, progress = run(tmp_path / "t.db", settings(method="sampling", rollouts=9, **PLAIN), server=WHOLE)
    assert sum(progress.verdicts.values()) == progress.thoughts == 9 * 16
    for tree in trees:
        assert (tree.pattern, tree.rollouts, tree.stopped) == ("sampling", 9, "rollouts")
        root, *leaves = tree.nodes
        assert len(leaves) == 9, "equal chains too: each has a vote"
        assert (root.visits, root.value) == (9, sum(leaf.reward or 0.0 for leaf in leaves))
        assert tree.completion_tokens == sum(leaf.tokens for leaf in leaves)
        for leaf in leaves:
            assert (leaf.type, leaf.parent_id, leaf.depth, leaf.visits, leaf.model) == ("answer", 0, 1, 1, "one")
            assert leaf.text.endswith(f"\nThe answer is: \\boxed{{{leaf.answer}}}")
            assert leaf.verdict == ("correct" if leaf.answer == tree.gold else "wrong")
    assert any(len({leaf.text for leaf in tree.nodes}) < 10 for tree in trees)


def test_sampling_ends_at_its_stop_conditions_unless_it_spends_what_others_spent(tmp_path: Path) -> None:
    stop = {"correct": 1, "wrong": 1}
    stopped, _ = run(tmp_path / "a.db", settings(method="sampling", rollouts=40, stop=stop, **PLAIN), server=WHOLE)
    assert {tree.stopped for tree in stopped} == {"enough"}
    assert all({"correct", "wrong"} <= {node.verdict for node in tree.nodes} for tree in stopped)
    budget, _ = run(
        tmp_path / "b.db", settings(method="sampling", rollouts=40, stop={"tokens": 50}, **PLAIN), server=WHOLE
    )
    assert {tree.stopped for tree in budget} == {"tokens"}
    assert all(abs(tree.completion_tokens - 50) <= 10 for tree in budget)
    run(tmp_path / "t.db", settings(), server=WHOLE)
    equal, _ = run(tmp_path / "c.db", settings(**SAMPLING, stop=stop), others=tmp_path / "t.db", server=WHOLE)
    assert {tree.stopped for tree in equal} == {"tokens"}


def test_sampling_is_the_same_for_any_concurrency(tmp_path: Path) -> None:
    for in_flight in (1, 8):
        search = settings(method="sampling", rollouts=7, trees_in_flight=in_flight)
        run(tmp_path / f"{in_flight}.db", search, server=WHOLE | {"latency": (0.0, 0.02)})
    assert stored(tmp_path / "1.db") == stored(tmp_path / "8.db")


def test_sampling_begins_as_the_trees_of_the_same_settings_do(tmp_path: Path) -> None:
    with FakeServerThread(**WHOLE) as server:
        trees, _ = asyncio.run(grow(server.url, tmp_path / "t.db", settings(patterns={"plain": None})))
        start = server.calls
        chains, _ = asyncio.run(
            grow(server.url, tmp_path / "s.db", settings(patterns={"plain": None}, method="sampling"))
        )
        grown, sampled = server.requests[:start], server.requests[start:]
    prefixes = {node.prefix for tree in trees for node in tree.nodes if node.type == "sub_task"}
    assert {node.prefix for tree in chains for node in tree.nodes[1:]} <= prefixes
    first = {request["prompt"] for request in grown if request["prompt"].endswith(tuple(prefixes))}
    heads = {prompt.partition("[assistant]")[0] for prompt in first}
    assert {request["prompt"].partition("[assistant]")[0] for request in sampled} <= heads, "the same worked examples"
    assert {request["temperature"] for request in sampled} == {0.8}


def test_sampling_begins_with_a_first_thought_of_fixed_words(tmp_path: Path) -> None:
    pattern = {"root": {"plan": 1}, "plan": {"thinking": 2}, "thinking": {"answer": 1}, "reflection": {"thinking": 1}}
    fixed = settings(method="sampling", patterns={"own": pattern}, thoughts={"plan": {"text": "I count."}})
    with FakeServerThread(**WHOLE) as server:
        trees, _ = asyncio.run(grow(server.url, tmp_path / "t.db", fixed, letters(2)))
        assert all(request["prompt"].endswith("[assistant] I count.\n") for request in server.requests)
    assert all(node.text.startswith("I count.\n ") for tree in trees for node in tree.nodes[1:])


def test_a_question_without_a_tree_to_spend_as_much_as_is_named(tmp_path: Path) -> None:
    run(tmp_path / "t.db", settings(), asked=letters(2), server=WHOLE)
    with pytest.raises(UsageError, match=r"no tree for question letters/.*; grow it first"):
        run(tmp_path / "s.db", settings(**SAMPLING), asked=letters(3), others=tmp_path / "t.db", server=WHOLE)
    with TreeStore(tmp_path / "s.db") as store:
        assert store.finished() == {}


def test_more_chains_replay_all_full_requests(tmp_path: Path) -> None:
    few, many = (settings(method="sampling", rollouts=n, patterns={"plain": None}) for n in (9, 21))
    with FakeServerThread(**WHOLE) as server:
        asyncio.run(grow(server.url, tmp_path / "few.db", few, journal=tmp_path / "j.db"))
        trees, progress = asyncio.run(grow(server.url, tmp_path / "many.db", many, journal=tmp_path / "j.db"))
    # 1 and then 4 a request: 1 + 4 + 4, and 1 + 4 + 4 + 4 + 4 + 4.
    assert (progress.recalled, progress.calls) == (3 * 16, 3 * 16)
    alone, _ = run(tmp_path / "alone.db", many, server=WHOLE)
    assert content(trees) == content(alone)


async def test_sampling_ends_where_a_server_withholds_every_text() -> None:
    async def withheld(_: web.Request) -> web.Response:
        choices = [{"text": "", "finish_reason": "content_filter"}] * 8
        return web.json_response({"choices": choices, "usage": {"completion_tokens": 0}})

    letter = task("letters")
    roles = {"thinker": (Writer(model="one"),)}
    async with raw_server(withheld) as url, endpoints_at(url, ["one"]) as endpoints:
        growth = Growth(
            letter, letter.questions("train", 1)[0], SearchModels(endpoints), Search(), roles=roles, seed="s"
        )

        async def spend() -> list[Any]:
            return [leaf async for leaves in sample_chains(growth, budget=60) for leaf in leaves]

        found = await asyncio.wait_for(spend(), 5)
    assert {leaf.verdict for leaf in found} == {"no_answer"}
    assert growth.used, "without a journal the keys are still known"
