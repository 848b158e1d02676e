"""What a recipe can change about a tree, each against a real server on loopback: and it changes what it says."""

from __future__ import annotations

import asyncio
import math
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from tests.search.test_driver import PlainTemplate, content, reply
from tests.support.asking import raw_server
from tests.support.fake_server import FakeServerThread, count_tokens, draw

from cotree.base.errors import CotreeError, UsageError
from cotree.experiment.recipe import Reward, Role, Search, Stop, Thought, Writer
from cotree.models.client import Client
from cotree.models.endpoints import Endpoint
from cotree.search.baselines import best_of_n, compare, of_tree
from cotree.search.calls import Progress
from cotree.search.driver import Grower
from cotree.search.prompts import chain_text
from cotree.search.reward import load_function, steps_messages
from cotree.search.store import StoredTree, TreeStore
from cotree.search.summary import summarize
from cotree.tasks import Question, Task, Verdict, task
from cotree.tasks.base import Turn, WorkedExample

ONE = {"thinker": (Writer(model="one"),)}
SHORT = {"root": {"thinking": 2}, "thinking": {"answer": 1}, "reflection": {"thinking": 1}}


def settings(**changes: Any) -> Search:
    """A small search with a pattern of its own."""
    base = {"rollouts": 6, "leaves_per_round": 2, "patterns": ["short"], "own_patterns": {"short": SHORT}}
    return Search.model_validate(base | {"max_reflections": 1, "trees_in_flight": 4, "baselines": False} | changes)


async def grow(
    url: str,
    path: Path,
    search: Search,
    asked: Sequence[tuple[Task, Question]] | None = None,
    roles: Mapping[str, Role] = ONE,
) -> tuple[list[StoredTree], Progress]:
    asked = asked or [(task("letters"), q) for q in task("letters").questions("train", 16)]
    names = {writer.model for role in roles.values() for writer in role} | {"judge"}
    async with asyncio.TaskGroup():
        clients = {
            name: Client(name, url, name, max_in_flight=64, count_tokens=count_tokens, backoff=0.01) for name in names
        }
        for client in clients.values():
            await client.__aenter__()
        try:
            endpoints = {n: Endpoint(n, (client,), PlainTemplate(), n) for n, client in clients.items()}
            with TreeStore(path) as store:
                grower = Grower(store, endpoints, roles, search, seed=3)
                progress = await grower.grow_all(asked)
                return list(store.trees(grower.config)), progress
        finally:
            for client in clients.values():
                await client.__aexit__(None, None, None)


def run(tmp_path: Path, search: Search, name: str = "t", **more: Any) -> tuple[list[StoredTree], Progress]:
    server = more.pop("server", {"reply": reply})
    with FakeServerThread(**server) as fake:
        return asyncio.run(grow(fake.url, tmp_path / f"{name}.db", search, **more))


def test_a_pattern_of_ones_own_decides_what_follows(tmp_path: Path) -> None:
    trees, _ = run(tmp_path, settings())
    assert {tree.pattern for tree in trees} == {"short"}
    for tree in trees:
        for node in tree.nodes[1:]:
            above = tree.nodes[node.parent_id or 0].type or "root"
            assert node.type in SHORT[above] or node.type == "reflection"


def test_a_fixed_thought_is_no_call_and_its_words_are_in_the_prompt(tmp_path: Path) -> None:
    pattern = {"root": {"sub_task": 1}, "sub_task": {"answer": 3}, "reflection": {"answer": 1}}
    fixed = settings(own_patterns={"short": pattern}, thoughts={"sub_task": Thought(text="I count the letters.")})
    with FakeServerThread(reply=reply) as server:
        trees, _ = asyncio.run(grow(server.url, tmp_path / "t.db", fixed))
        assert all("I count the letters.\n" in request["prompt"] for request in server.requests)
    fixed_nodes = [node for tree in trees for node in tree.nodes if node.type == "sub_task"]
    assert {(n.text, n.tokens, n.model) for n in fixed_nodes} == {("I count the letters.", 0, "")}
    assert sum(tree.calls for tree in trees) == server.calls


def test_own_prefixes_and_tokens_of_a_type(tmp_path: Path) -> None:
    thought = Thought(prefixes=("Hm,", "So,"), max_tokens=7)
    with FakeServerThread(reply=reply) as server:
        trees, _ = asyncio.run(grow(server.url, tmp_path / "t.db", settings(thoughts={"thinking": thought})))
        limits = {r["max_tokens"] for r in server.requests if r["prompt"].endswith((" Hm,", "\nHm,", "So,"))}
    assert limits == {7}
    assert {n.prefix for tree in trees for n in tree.nodes if n.type == "thinking"} == {"Hm,", "So,"}


STORY = "First we look at the word and then we count the letter in it one by one"


def story(prompt: str, seed: int, index: int) -> str:
    """A model with one story: it continues the very words where the prompt breaks off."""
    if prompt.endswith("{"):
        return str(1 + (seed + index) % 3)
    said = prompt.split("[assistant] ")[-1]
    return STORY[len(said) :] if STORY.startswith(said) else f" aside {(seed + 7 * index) % 11}"


def test_mini_steps_continue_the_very_words(tmp_path: Path) -> None:
    pattern = {"root": {"thinking": 1}, "thinking": {"thinking": 1, "answer": 1}, "reflection": {"thinking": 1}}
    search = settings(
        own_patterns={"short": pattern},
        thoughts={"thinking": Thought(max_tokens=4, ends="tokens")},
        rollouts=12,
        max_reflections=0,
    )
    trees, _ = run(tmp_path, search, server={"reply": story})
    longest = 0
    for tree in trees:
        for node in tree.nodes[1:]:
            chain = [n for n in tree.chain(node.node_id) if n.type == "thinking"]
            assert STORY.startswith(chain_text(chain).split("\n")[0])
            longest = max(longest, len(chain))
            if node.type == "answer":
                assert chain_text(tree.chain(node.node_id)).split("\n")[-1] == node.text
        assert not any(n.verdict == "no_answer" for n in tree.nodes), "a mini-step is no dead end"
    assert longest >= 4


@pytest.mark.parametrize(
    ("stop", "reason"),
    [
        ({"correct": 1, "wrong": 1}, "enough"),
        ({"hopeless": 2}, "hopeless"),
        ({"easy": 1}, "easy"),
        ({"tokens": 5}, "tokens"),
        ({"seconds": 1e-9}, "deadline"),
    ],
)
def test_stop_conditions_end_a_tree_early(tmp_path: Path, stop: dict[str, Any], reason: str) -> None:
    wide = {"root": {"thinking": 4}, "thinking": {"answer": 1}, "reflection": {"thinking": 1}}
    whole, _ = run(tmp_path, settings(rollouts=16, own_patterns={"short": wide}), "whole")
    stopped, _ = run(tmp_path, settings(rollouts=16, own_patterns={"short": wide}, stop=stop), "stopped")
    assert reason in {tree.stopped for tree in stopped}
    assert {tree.stopped for tree in whole} <= {"rollouts", "exhausted"}
    assert sum(tree.rollouts for tree in stopped) < sum(tree.rollouts for tree in whole)
    for tree in stopped:
        kinds = [n.verdict for n in tree.nodes if n.verdict]
        held = {
            "enough": {"correct", "wrong"} <= set(kinds),
            "hopeless": "correct" not in kinds and len(kinds) >= 2,
            "easy": set(kinds) == {"correct"},
            "tokens": tree.completion_tokens >= 5,
        }
        assert held.get(tree.stopped, True)


ADAPTIVE = settings(
    rollouts=4,
    adaptive=True,
    stop=Stop(hopeless=2),
    own_patterns={"short": {"root": {"thinking": 3}, "thinking": {"answer": 3}, "reflection": {"thinking": 2}}},
    max_reflections=3,
)


def test_rollouts_that_hopeless_trees_leave_go_to_those_with_both_kinds(tmp_path: Path) -> None:
    def some_hopeless(prompt: str, seed: int, index: int) -> str:
        hopeless = draw(prompt.split("[user] ")[-1].split("\n")[0]) % 2
        return "9" if prompt.endswith("{") and hopeless else reply(prompt, seed, index)

    asked = [(task("letters"), q) for q in task("letters").questions("train", 12)]
    trees, _ = run(tmp_path, ADAPTIVE, asked=asked, server={"reply": some_hopeless})
    equal, _ = run(
        tmp_path, ADAPTIVE.model_copy(update={"adaptive": False}), "e", asked=asked, server={"reply": some_hopeless}
    )
    assert any(tree.rollouts > 4 for tree in trees)
    assert sum(tree.rollouts for tree in trees) <= 4 * len(trees)
    for tree in trees:
        kinds = {n.verdict for n in tree.nodes}
        assert tree.rollouts <= (8 if {"correct", "wrong"} <= kinds else 4)
    pairs = [sum(of_tree(tree).pairs for tree in grown) for grown in (trees, equal)]
    assert pairs[0] >= pairs[1]


@pytest.mark.parametrize("in_flight", [1, 8, 64])
def test_adaptive_spending_is_the_same_for_any_concurrency(tmp_path: Path, in_flight: int) -> None:
    run(tmp_path, ADAPTIVE.model_copy(update={"trees_in_flight": 2}), "a")
    other = ADAPTIVE.model_copy(update={"trees_in_flight": in_flight})
    run(tmp_path, other, "b", server={"reply": reply, "latency": (0.0, 0.02)})
    assert content(tmp_path / "a.db") == content(tmp_path / "b.db")


def test_adaptive_spending_survives_a_stop_in_the_middle_of_the_second_pass(tmp_path: Path) -> None:
    run(tmp_path, ADAPTIVE, "whole")
    run(tmp_path, ADAPTIVE, "cut")
    with sqlite3.connect(tmp_path / "cut.db") as db:
        extended = [row[0] for row in db.execute("SELECT tree_id FROM trees WHERE rollouts >= 4 ORDER BY tree_id")]
        for tree in extended[::2]:
            db.execute("DELETE FROM nodes WHERE tree_id = ?", (tree,))
            db.execute("DELETE FROM trees WHERE tree_id = ?", (tree,))
    _, progress = run(tmp_path, ADAPTIVE, "cut")
    assert progress.calls == 0
    assert content(tmp_path / "cut.db") == content(tmp_path / "whole.db")


class TwoTurns(Task):
    """A generated conversation: say a number, then say the next one."""

    name = "two_turns"
    description = "generated: a number, then its successor"

    def questions(self, split: object = None, limit: int | None = None) -> list[Question]:
        return [
            Question(
                f"q{i}",
                self.name,
                ({"role": "user", "content": f"Say {i}."},),
                str(i),
                later=(Turn("And the next number?", str(i + 1)),),
            )
            for i in range(1, 1 + (limit or 4))
        ]

    def worked_examples(self, question: Question) -> Sequence[WorkedExample]:
        return []


def test_a_conversation_is_a_tree_a_turn_and_the_reply_goes_back_without_its_thinking(tmp_path: Path) -> None:
    asked = [(TwoTurns(), q) for q in TwoTurns().questions()]
    with FakeServerThread(reply=reply) as server:
        trees, progress = asyncio.run(grow(server.url, tmp_path / "t.db", settings(), asked))
        before, calls = content(tmp_path / "t.db"), server.calls
        asyncio.run(grow(server.url, tmp_path / "t.db", settings(), asked))
        assert (content(tmp_path / "t.db"), server.calls) == (before, calls)
    by_turn = {turn: {t.question_id: t for t in trees if t.turn == turn} for turn in (0, 1)}
    assert by_turn[0].keys() == by_turn[1].keys() == {"q1", "q2", "q3", "q4"}
    assert progress.trees == 8
    for name, second in by_turn[1].items():
        first = by_turn[0][name]
        user, assistant, following = second.messages
        assert user == first.messages[0]
        assert following == {"role": "user", "content": "And the next number?"}
        answers = {node.text: node.verdict for node in first.nodes if node.type == "answer"}
        assert assistant["role"] == "assistant"
        assert assistant["content"] in answers, "only the answer thought goes back"
        if "correct" in answers.values():
            assert answers[assistant["content"]] == "correct"
        assert second.gold == str(int(first.gold) + 1)


def long_chains_are_good(question: Question, text: str, verdict: Verdict) -> float:
    assert question.gold
    assert verdict.answer is not None
    return 0.25 if len(text) % 2 else 0.75


def no_reward(question: Question, text: str, verdict: Verdict) -> float:
    return 7.0


def test_a_reward_function_moves_values_and_never_verdicts(tmp_path: Path) -> None:
    plain, _ = run(tmp_path, settings(), "plain")
    reward = Reward(function=f"{__name__}:long_chains_are_good")
    trees, _ = run(tmp_path, settings(reward=reward), "own")
    for tree in trees:
        for node in tree.nodes:
            if node.type == "answer":
                text = chain_text(tree.chain(node.node_id))
                assert node.reward == (0.25 if len(text) % 2 else 0.75)
                assert node.verdict in ("correct", "wrong")
        assert tree.nodes[0].value == pytest.approx(sum(n.reward or 0.0 for n in tree.nodes))
    assert {n.reward for tree in plain for n in tree.nodes if n.verdict} == {0.0, 1.0}
    as_file = load_function(f"{__file__}:long_chains_are_good")
    assert as_file(Question("q", "t", (), "1"), "ab", Verdict("wrong", 0.0, "3")) == 0.75


def test_a_reward_function_that_breaks_its_contract_is_one_line(tmp_path: Path) -> None:
    with pytest.raises((CotreeError, ExceptionGroup)) as caught:
        run(tmp_path, settings(reward=Reward(function=f"{__name__}:no_reward")))
    error: BaseException = caught.value
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    assert "7.0 for question" in str(error)
    assert callable(load_function("cotree:diagnose")), "a module may give its names lazily"
    for name, words in (("nowhere:f", "cannot load nowhere"), (f"{__name__}:nothing", "has no function `nothing`")):
        with pytest.raises(UsageError, match=words):
            load_function(name)


def test_a_judge_is_asked_about_every_answer_and_its_share_of_yes_is_the_reward(tmp_path: Path) -> None:
    def judging(prompt: str, seed: int, index: int) -> str:
        return (" yes" if index < 3 else " no") if "Reply with yes or no" in prompt else reply(prompt, seed, index)

    search = settings(reward=Reward(judge="judge", samples=4))
    trees, _ = run(tmp_path, search, server={"reply": judging})
    answers = [n for tree in trees for n in tree.nodes if n.type == "answer"]
    assert {n.reward for n in answers} == {0.75}
    assert {n.verdict for n in answers} == {"correct", "wrong"}
    assert sum(tree.calls for tree in trees) > len(answers), "the judge's calls are counted"


@pytest.mark.parametrize("combine", ["least", "product", "last"])
def test_a_process_reward_model_scores_every_thought_of_a_chain(tmp_path: Path, combine: str) -> None:
    search = settings(reward=Reward.model_validate({"process": "judge", "combine": combine}))
    trees, _ = run(tmp_path, search)
    seen = set()
    for tree in trees:
        for leaf in (n for n in tree.nodes if n.type == "answer"):
            scores = [0.875 if count_tokens(n.text) > 2 else 0.25 for n in tree.chain(leaf.node_id)]
            least, product = min(scores), math.prod(scores)
            assert leaf.reward == {"least": least, "product": product, "last": scores[-1]}[combine]
            seen.add((leaf.reward, leaf.verdict))
    assert len({reward for reward, _ in seen}) > (combine == "product"), "rewards differ with the text"
    assert {verdict for _, verdict in seen} == {"correct", "wrong"}, "verdicts stay the task's"


def test_a_process_reward_model_that_scores_other_than_each_thought_is_one_line(tmp_path: Path) -> None:
    search = settings(reward=Reward(process="judge", separator="<step>"))
    with pytest.raises(ExceptionGroup) as caught:
        run(tmp_path, search)
    assert caught.group_contains(CotreeError, match="1 scores came for 2 thoughts; set `separator`")


def test_of_several_writers_one_is_drawn_by_seed_and_the_summary_says_who_wrote(tmp_path: Path) -> None:
    roles = {"thinker": ONE["thinker"], "reflector": (Writer(model="one"), Writer(model="two", temperature=0.3))}
    with FakeServerThread(reply=reply) as server:
        trees, _ = asyncio.run(grow(server.url, tmp_path / "t.db", settings(rollouts=10), roles=roles))
        temperatures = {r["model"]: r["temperature"] for r in server.requests}
    assert temperatures == {"one": 0.8, "two": 0.3}
    by_model = summarize(trees)["counts"]["by_model"]
    reflections = [n.model for tree in trees for n in tree.nodes if n.type == "reflection"]
    assert {"one", "two"} == set(reflections)
    assert {m: own["reflections"] for m, own in by_model.items()} == {m: reflections.count(m) for m in ("one", "two")}
    assert sum(own["thoughts"] for own in by_model.values()) == sum(len(tree.nodes) - 1 for tree in trees)


def test_best_of_n_spends_what_the_trees_spent_and_is_journalled(tmp_path: Path) -> None:
    def whole(prompt: str, seed: int, index: int) -> str:
        if prompt.endswith(("{", "[assistant] ")) or "\n" in prompt[-40:]:
            return reply(prompt, seed, index)
        return f" I count.\nThe answer is: \\boxed{{{1 + (seed + index) % 3}}}\nmore"

    async def both(url: str) -> tuple[list[dict[str, Any]], int]:
        asked = [(task("letters"), q) for q in task("letters").questions("train", 6)]
        async with Client("one", url, "one", max_in_flight=64, count_tokens=count_tokens) as client:
            with TreeStore(tmp_path / "t.db") as store:
                grower = Grower(store, {"one": Endpoint("one", (client,), PlainTemplate(), "one")}, ONE, settings(), 3)
                await grower.grow_all(asked)
                grown = grower.grown(asked)
                found = await best_of_n(grower, grown)
                chain = 2 * max(n.tokens for _, _, tree in grown for n in tree.nodes) + 12
                for f, (_, _, tree) in zip(found, grown, strict=True):
                    assert abs(f.tokens - tree.completion_tokens) <= chain, "to the nearest chain"
                rows = await compare(grower, asked, lambda *_: None)
        return rows, grower.progress.calls

    with FakeServerThread(reply=whole, usage="vllm") as server:
        rows, calls = asyncio.run(both(server.url))
        assert calls > 0
        assert asyncio.run(both(server.url)) == (rows, 0)
    mcts, other = rows
    assert (mcts["method"], other["method"]) == ("mcts", "best_of_n")
    assert abs(other["tokens"] - mcts["tokens"]) < 0.2 * mcts["tokens"]
    assert mcts["questions"] == other["questions"] == 6
    share, low, high = other["correct"]
    assert low <= share <= high


def test_best_of_n_ends_where_a_server_withholds_every_text(tmp_path: Path) -> None:
    async def withheld(_: web.Request) -> web.Response:
        choices = [{"text": "", "finish_reason": "content_filter"}] * 8
        return web.json_response({"choices": choices, "usage": {"completion_tokens": 0}})

    async def both(url: str) -> int:
        async with (
            raw_server(withheld) as other,
            Client("one", url, "one", max_in_flight=8, count_tokens=len) as first,
            Client("one", other, "one", max_in_flight=8, count_tokens=len) as second,
        ):
            with TreeStore(tmp_path / "t.db") as store:
                one = Endpoint("one", (first,), PlainTemplate(), "one")
                asked = [(task("letters"), q) for q in task("letters").questions("train", 1)]
                grower = Grower(store, {"one": one}, ONE, settings(), 3)
                await grower.grow_all(asked)
                grower.calls.endpoints = {"one": Endpoint("one", (second,), PlainTemplate(), "one")}
                best = best_of_n(grower, grower.grown(asked))
                found = await asyncio.wait_for(best, 5)
        return found[0].correct + found[0].wrong

    with FakeServerThread(reply=reply) as server:
        assert asyncio.run(both(server.url)) == 0


def test_a_changed_question_is_not_passed_off_as_the_one_that_a_tree_was_grown_for(tmp_path: Path) -> None:
    letters = task("letters")
    questions = letters.questions("train", 3)
    changed = replace(questions[1], messages=({"role": "user", "content": "Another question."},))
    with FakeServerThread(reply=reply) as server:
        asyncio.run(grow(server.url, tmp_path / "t.db", settings(), [(letters, q) for q in questions]))
        before = server.calls
        asked = [(letters, q) for q in (questions[0], changed, questions[2])]
        with pytest.raises(ExceptionGroup) as raised:
            asyncio.run(grow(server.url, tmp_path / "t.db", settings(), asked))
        assert raised.group_contains(UsageError, match=f"question `{changed.id}` of task `letters` has changed")
        assert server.calls == before


def test_a_separator_in_a_thought_makes_no_step_of_its_own() -> None:
    question = Question("q", "t", ({"role": "user", "content": "Why?"},), "1")
    said = steps_messages(question, ["one\n\ntwo", "three"], "\n\n")[-1][1]
    assert said == "one two\n\nthree\n\n"
