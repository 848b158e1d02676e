"""What a recipe can change about a tree, each against a real server on loopback: and it changes what it says."""

from __future__ import annotations

import asyncio
import math
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.support.fake_server import FakeServerThread, count_tokens, draw
from tests.support.search import SHORT, grow, letters, reply, run, settings, stored

from cotree.base.errors import CotreeError, UsageError
from cotree.search.reward import load_reward_function, step_score_messages
from cotree.search.settings import Reward, Stop, Thought
from cotree.search.summary import compare_methods
from cotree.search.thoughts import chain_text
from cotree.tasks import Question, Task, Verdict
from cotree.tasks.base import Turn, WorkedExample
from cotree.tasks.generated import Letters


def test_a_pattern_of_ones_own_decides_what_follows(tmp_path: Path) -> None:
    trees, _ = run(tmp_path / "t.db", settings())
    assert {tree.pattern for tree in trees} == {"short"}
    for tree in trees:
        for node in tree.nodes[1:]:
            above = tree.nodes[node.parent_id or 0].type or "root"
            assert node.type in SHORT[above] or node.type == "reflection"


def test_a_fixed_thought_is_no_call_and_its_words_are_in_the_prompt(tmp_path: Path) -> None:
    pattern = {"root": {"sub_task": 1}, "sub_task": {"answer": 3}, "reflection": {"answer": 1}}
    fixed = settings(patterns={"own": pattern}, thoughts={"sub_task": Thought(text="I count the letters.")})
    with FakeServerThread(reply=reply) as server:
        trees, _ = asyncio.run(grow(server.url, tmp_path / "t.db", fixed))
        assert all("I count the letters.\n" in request["prompt"] for request in server.requests)
    fixed_nodes = [node for tree in trees for node in tree.nodes if node.type == "sub_task"]
    assert {(n.text, n.tokens, n.model) for n in fixed_nodes} == {("I count the letters.", 0, "")}
    assert sum(tree.calls for tree in trees) == server.calls


def test_an_own_type_of_fixed_words_needs_no_prefixes(tmp_path: Path) -> None:
    pattern = {"root": {"plan": 1}, "plan": {"answer": 3}, "reflection": {"answer": 1}}
    trees, _ = run(tmp_path / "t.db", settings(patterns={"own": pattern}, thoughts={"plan": {"text": "I count."}}))
    assert {(n.text, n.prefix) for tree in trees for n in tree.nodes if n.type == "plan"} == {("I count.", "")}


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
        patterns={"own": pattern},
        thoughts={"thinking": Thought(thought_tokens=4, ends="tokens")},
        rollouts=12,
        max_reflections=0,
    )
    trees, _ = run(tmp_path / "t.db", search, server={"reply": story})
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
    whole, _ = run(tmp_path / "whole.db", settings(rollouts=16, patterns={"own": wide}))
    stopped, _ = run(tmp_path / "stopped.db", settings(rollouts=16, patterns={"own": wide}, stop=stop))
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


@pytest.mark.parametrize(("stop", "right"), [({"hopeless": 1}, False), ({"easy": 3}, True)])
def test_undecided_chains_make_no_tree_hopeless_nor_less_easy(
    tmp_path: Path, stop: dict[str, Any], right: bool
) -> None:
    class Unsure(Letters):
        def verify(self, answer: str, question: Question) -> Verdict:
            return Verdict.of((right and answer == question.gold) or None, answer)

    wide = {"root": {"thinking": 4}, "thinking": {"answer": 3}, "reflection": {"thinking": 1}}
    asked = [(Unsure(), question) for _, question in letters(4)]
    trees, _ = run(tmp_path / "t.db", settings(rollouts=16, patterns={"own": wide}, stop=stop), asked=asked)
    kinds = [{node.verdict for node in tree.nodes} for tree in trees]
    assert all("undecided" in found for found in kinds)
    assert ("easy" in {tree.stopped for tree in trees}) == right
    assert "hopeless" not in {tree.stopped for tree in trees}


ADAPTIVE = settings(
    rollouts=4,
    adaptive=True,
    stop=Stop(hopeless=2),
    patterns={"own": {"root": {"thinking": 3}, "thinking": {"answer": 3}, "reflection": {"thinking": 2}}},
    max_reflections=3,
)


def test_rollouts_that_hopeless_trees_leave_go_to_those_with_both_kinds(tmp_path: Path) -> None:
    def some_hopeless(prompt: str, seed: int, index: int) -> str:
        hopeless = draw(prompt.split("[user] ")[-1].split("\n")[0]) % 2
        return "9" if prompt.endswith("{") and hopeless else reply(prompt, seed, index)

    asked = letters(12)
    trees, _ = run(tmp_path / "t.db", ADAPTIVE, asked=asked, server={"reply": some_hopeless})
    plain = ADAPTIVE.model_copy(update={"adaptive": False})
    equal, _ = run(tmp_path / "e.db", plain, asked=asked, server={"reply": some_hopeless})
    assert any(tree.rollouts > 4 for tree in trees)
    assert sum(tree.rollouts for tree in trees) <= 4 * len(trees)
    for tree in trees:
        kinds = {n.verdict for n in tree.nodes}
        assert tree.rollouts <= (8 if {"correct", "wrong"} <= kinds else 4)
    adaptive, even = compare_methods({"adaptive": trees, "even": equal})
    assert adaptive.pairs_per_question >= even.pairs_per_question


@pytest.mark.parametrize("in_flight", [1, 8, 64])
def test_adaptive_spending_is_the_same_for_any_concurrency(tmp_path: Path, in_flight: int) -> None:
    run(tmp_path / "a.db", ADAPTIVE.model_copy(update={"trees_in_flight": 2}))
    other = ADAPTIVE.model_copy(update={"trees_in_flight": in_flight})
    run(tmp_path / "b.db", other, server={"latency": (0.0, 0.02)})
    assert stored(tmp_path / "a.db") == stored(tmp_path / "b.db")


def test_adaptive_spending_survives_a_stop_in_the_middle_of_the_second_pass(tmp_path: Path) -> None:
    run(tmp_path / "whole.db", ADAPTIVE)
    run(tmp_path / "cut.db", ADAPTIVE)
    with sqlite3.connect(tmp_path / "cut.db") as db:
        extended = [row[0] for row in db.execute("SELECT tree_id FROM trees WHERE rollouts >= 4 ORDER BY tree_id")]
        for tree in extended[::2]:
            db.execute("DELETE FROM nodes WHERE tree_id = ?", (tree,))
            db.execute("DELETE FROM trees WHERE tree_id = ?", (tree,))
    _, progress = run(tmp_path / "cut.db", ADAPTIVE)
    assert progress.calls == 0
    assert stored(tmp_path / "cut.db") == stored(tmp_path / "whole.db")


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
        before, calls = stored(tmp_path / "t.db"), server.calls
        asyncio.run(grow(server.url, tmp_path / "t.db", settings(), asked))
        assert (stored(tmp_path / "t.db"), server.calls) == (before, calls)
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
    plain, _ = run(tmp_path / "plain.db", settings())
    reward = Reward(function=f"{__name__}:long_chains_are_good")
    trees, _ = run(tmp_path / "own.db", settings(reward=reward))
    for tree in trees:
        for node in tree.nodes:
            if node.type == "answer":
                text = chain_text(tree.chain(node.node_id))
                assert node.reward == (0.25 if len(text) % 2 else 0.75)
                assert node.verdict in ("correct", "wrong")
        assert tree.nodes[0].value == pytest.approx(sum(n.reward or 0.0 for n in tree.nodes))
    assert {n.reward for tree in plain for n in tree.nodes if n.verdict} == {0.0, 1.0}
    as_file = load_reward_function(f"{__file__}:long_chains_are_good")
    assert as_file(Question("q", "t", (), "1"), "ab", Verdict("wrong", 0.0, "3")) == 0.75


def test_a_reward_function_that_breaks_its_contract_is_one_line(tmp_path: Path) -> None:
    with pytest.raises((CotreeError, ExceptionGroup)) as caught:
        run(tmp_path / "t.db", settings(reward=Reward(function=f"{__name__}:no_reward")))
    error: BaseException = caught.value
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    assert "7.0 for question" in str(error)
    assert callable(load_reward_function("cotree:diagnose")), "a module may give its names lazily"
    for name, words in (("nowhere:f", "cannot load nowhere"), (f"{__name__}:nothing", "has no function `nothing`")):
        with pytest.raises(UsageError, match=words):
            load_reward_function(name)


def test_a_judge_is_asked_about_every_answer_and_its_share_of_yes_is_the_reward(tmp_path: Path) -> None:
    def judging(prompt: str, seed: int, index: int) -> str:
        return (" yes" if index < 3 else " no") if "Reply with yes or no" in prompt else reply(prompt, seed, index)

    search = settings(reward=Reward(judge="judge", samples=4))
    trees, _ = run(tmp_path / "t.db", search, server={"reply": judging})
    answers = [n for tree in trees for n in tree.nodes if n.type == "answer"]
    assert {n.reward for n in answers} == {0.75}
    assert {n.verdict for n in answers} == {"correct", "wrong"}
    assert sum(tree.calls for tree in trees) > len(answers), "the judge's calls are counted"


@pytest.mark.parametrize("combine", ["least", "product", "last"])
def test_a_process_reward_model_scores_every_thought_of_a_chain(tmp_path: Path, combine: str) -> None:
    search = settings(reward=Reward.model_validate({"process": "judge", "combine": combine}))
    trees, _ = run(tmp_path / "t.db", search)
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
        run(tmp_path / "t.db", search)
    assert caught.group_contains(CotreeError, match="1 scores came for 2 thoughts; set `separator`")


def test_of_several_writers_one_is_drawn_by_seed(tmp_path: Path) -> None:
    roles = {"thinker": "one", "reflector": ["one", {"model": "two", "temperature": 0.3}]}
    with FakeServerThread(reply=reply) as server:
        trees, _ = asyncio.run(grow(server.url, tmp_path / "t.db", settings(rollouts=10, roles=roles)))
        temperatures = {r["model"]: r["temperature"] for r in server.requests}
    assert temperatures == {"one": 0.8, "two": 0.3}
    assert {"one", "two"} == {n.model for tree in trees for n in tree.nodes if n.type == "reflection"}


def test_an_own_type_is_written_with_its_prefixes_by_the_role_that_it_names(tmp_path: Path) -> None:
    pattern = {"root": {"plan": 2}, "plan": {"answer": 1}, "reflection": {"plan": 1}}
    thoughts = {"plan": {"prefixes": ["My plan:", "Plan:"], "role": "planner", "max_tokens": 9}}
    roles = {"thinker": "one", "planner": "two"}
    search = settings(patterns={"planned": pattern, "plain": None}, thoughts=thoughts, roles=roles)
    with FakeServerThread(reply=reply) as server:
        trees, _ = asyncio.run(grow(server.url, tmp_path / "t.db", search))
        limits = {r["max_tokens"] for r in server.requests if r["model"] == "two"}
    assert {tree.pattern for tree in trees} == {"planned", "plain"}, "one is drawn for each tree"
    plans = [n for tree in trees for n in tree.nodes if n.type == "plan"]
    assert {(n.model, n.prefix) for n in plans} == {("two", "My plan:"), ("two", "Plan:")}
    assert all(n.text.startswith(n.prefix) for n in plans)
    assert limits == {9}
    assert {n.model for tree in trees for n in tree.nodes if n.type not in ("plan", None)} == {"one"}


def test_a_separator_in_a_thought_makes_no_step_of_its_own() -> None:
    question = Question("q", "t", ({"role": "user", "content": "Why?"},), "1")
    said = step_score_messages(question, ["one\n\ntwo", "three"], "\n\n")[-1][1]
    assert said == "one two\n\nthree\n\n"
