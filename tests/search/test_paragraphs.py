"""Thoughts that end where the model ends them: at blank lines or with its turn, against a real server on loopback."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tests.support.fake_server import FakeServerThread, draw
from tests.support.search import BaseTemplate, ThinkingTemplate, content, grow, letters, run, settings

from cotree.base.errors import UsageError
from cotree.base.settings import parse_section
from cotree.search.mcts import TreeSearch
from cotree.search.settings import Search, Thought
from cotree.search.store import StoredTree
from cotree.search.thoughts import PATTERNS, chain_text, split_paragraphs
from cotree.tasks import Question, Task, Verdict, task
from cotree.tasks.base import AnswerForm, Asked, Turn, WorkedExample

PARAGRAPHS = {"ends": "paragraph", "patterns": ["solution"], "max_reflections": 0, "max_chain_tokens": 60}
STEPS = ("First I spell the word.", "Then I look:\n\nat each letter.", "One by one I count.", "That is all of them.")


def essay(prompt: str, seed: int, index: int) -> str:
    """A model that writes solutions of a few paragraphs, right, wrong or without an answer, and ends its turn."""
    said = prompt.rpartition("[assistant] ")[2]
    number = draw(seed, index)
    if prompt.endswith("\\boxed{"):
        return f"{1 + number % 3}}}"
    begins = sum(step in said for step in STEPS)
    steps = STEPS[begins : begins + 1 + number % 3]
    last = {
        0: "I give up.",
        1: f"So it is \\boxed{{{1 + number % 3}}}.",
        2: f"The answer is {1 + number % 3}.\n\nIt is.",
    }
    return "\n\n".join([*steps, last[min(2, number // 7 % 4)]])


def chains(trees: list[StoredTree]) -> list[str]:
    return [chain_text(tree.chain(n.node_id)) for tree in trees for n in tree.nodes if n.verdict is not None]


TEXT = st.lists(
    st.sampled_from(["a", "b.", ":", "\n", "\n\n", " \n \n", "```", "# head", "**x:**", "\t"]), max_size=30
).map("".join)


@given(TEXT, st.integers(1, 6))
@example("one:\n\nstill one\n\n\n two\n\n```\nx\n\ny\n```\n\nlast", 9)
def test_paragraphs_are_cut_without_loss(text: str, most: int) -> None:
    parts = split_paragraphs(text, most)
    assert "".join(parts) == text
    assert 1 <= len(parts) <= most
    for before, after in pairwise(parts):
        assert re.match(r"[ \t]*\n[ \t]*\n", after), "a blank line begins the next part"
        assert not before.rstrip().endswith(":")
        assert not before.splitlines()[-1].startswith("#")


def test_a_heading_a_colon_and_code_go_on_behind_a_blank_line() -> None:
    text = "## Step 1\n\nwe get:\n\n1 + 1\n\n```\na\n\nb\n```\n\n**Then:**\n\nend"
    assert split_paragraphs(text, 9) == [
        "## Step 1\n\nwe get:\n\n1 + 1",
        "\n\n```\na\n\nb\n```",
        "\n\n**Then:**\n\nend",
    ]


def test_every_chain_is_word_for_word_what_the_model_continued_and_wrote(tmp_path: Path) -> None:
    with FakeServerThread(reply=essay) as server:
        trees, _ = asyncio.run(grow(server.url, tmp_path / "t.db", settings(**PARAGRAPHS)))
        said = {
            body["prompt"].rpartition("[assistant] ")[2] + essay(body["prompt"], body["seed"], index)
            for body in server.requests
            for index in range(body["n"])
        }
    found = chains(trees)
    # A turn that ended without an answer went on to one that the search began.
    assert set(found) == {text for text in said if not text.endswith("I give up.")}
    assert len(found) > 5 * len(trees)
    for tree in trees:
        for node in tree.nodes[1:]:
            above = tree.chain(node.node_id)[:-1]
            assert node.text.startswith("\n\n") == bool(above)
            assert all(thought.verdict is None for thought in above), "nothing follows an answer"
        # Tokens are shared out among the thoughts that one sample wrote, none lost, none twice.
        assert sum(node.tokens for node in tree.nodes) <= tree.completion_tokens


def test_an_answer_that_the_model_gives_ends_the_chain_and_is_judged_as_a_reply(tmp_path: Path) -> None:
    trees, _ = run(tmp_path / "t.db", settings(**PARAGRAPHS), server={"reply": essay})
    kind, asked = task("letters"), {question.id: question for _, question in letters(16)}
    kinds = set()
    for tree in trees:
        for node in tree.nodes[1:]:
            chain = chain_text(tree.chain(node.node_id))
            if node.verdict is not None:
                assert node.verdict == kind.judge(asked[tree.question_id], chain).kind
                assert node.type == "answer"
                kinds.add((node.verdict, node.is_forced))
            # Where the model ended its turn without an answer, one is asked for, and nothing else.
            above = tree.nodes[node.parent_id or 0].text
            assert node.is_forced == above.endswith("I give up.")
    assert kinds == {("correct", False), ("wrong", False), ("correct", True), ("wrong", True)}


def test_branches_leave_where_the_first_sample_went_on(tmp_path: Path) -> None:
    """`thinking: 3` is three children of a node: the one that its own request wrote, and two more of one request."""

    def varied(prompt: str, seed: int, index: int) -> str:
        return re.sub(r"\.", f" ({draw(seed, index)}).", essay(prompt, seed, index))

    trees, _ = run(tmp_path / "t.db", settings(**PARAGRAPHS, rollouts=12), server={"reply": varied})
    numbers = set()
    for tree in trees:
        for node in tree.nodes[1:]:
            siblings = [n for n in tree.nodes if n.parent_id == node.parent_id]
            numbers |= {len(siblings)} if node.parent_id else set()
    assert numbers == {1, 3}


def test_equal_thoughts_at_one_place_are_one_and_equal_leaves_of_two_requests_are_two_votes(tmp_path: Path) -> None:
    trees, _ = run(tmp_path / "t.db", settings(**PARAGRAPHS, rollouts=12), server={"reply": essay})
    repeated = 0
    for tree in trees:
        inner = [(n.parent_id, n.text) for n in tree.nodes if n.verdict is None]
        assert len(inner) == len(set(inner))
        leaves = [(n.parent_id, n.text) for n in tree.nodes if n.verdict is not None]
        repeated += len(leaves) - len(set(leaves))
        assert tree.nodes[0].visits == len(leaves)
    assert repeated


@pytest.mark.parametrize("change", [{"trees_in_flight": 1}, {"trees_in_flight": 16}])
def test_the_same_trees_whatever_the_latency(tmp_path: Path, change: dict[str, Any]) -> None:
    search = settings(**PARAGRAPHS, rollouts=8)
    trees, _ = run(tmp_path / "a.db", search, server={"reply": essay})
    slow, _ = run(tmp_path / "b.db", search.model_copy(update=change), server={"reply": essay, "latency": (0.0, 0.01)})
    assert content(trees) == content(slow)


def test_more_rollouts_pay_for_the_new_ones_only(tmp_path: Path) -> None:
    few, many = (settings(**PARAGRAPHS, rollouts=n) for n in (4, 8))
    with FakeServerThread(reply=essay) as server:
        asyncio.run(grow(server.url, tmp_path / "few.db", few, journal=tmp_path / "j.db"))
        before = server.calls
        trees, progress = asyncio.run(grow(server.url, tmp_path / "many.db", many, journal=tmp_path / "j.db"))
        bodies = [str(sorted(body.items())) for body in server.requests]
    assert len(bodies) == len(set(bodies))
    assert progress.recalled == before
    alone, _ = run(tmp_path / "alone.db", many, server={"reply": essay})
    assert content(trees) == content(alone)


def test_a_chain_that_is_too_long_is_cut_and_no_answer(tmp_path: Path) -> None:
    trees, _ = run(tmp_path / "t.db", settings(**PARAGRAPHS | {"max_chain_tokens": 8}), server={"reply": essay})
    cut = [n for tree in trees for n in tree.nodes if n.is_cut]
    assert cut
    assert {(n.verdict, n.reward, n.finish_reason) for n in cut} == {("no_answer", 0.0, "length")}
    for tree in trees:
        assert max(sum(n.tokens for n in tree.chain(node.node_id)) for node in tree.nodes) in (8, 9)


def test_an_open_thought_is_all_that_comes_before_the_answer(tmp_path: Path) -> None:
    pattern = {"root": {"sub_task": 1}, "sub_task": {"thinking": 3}, "thinking": {"answer": 1}}
    search = settings(
        patterns={"own": pattern}, thoughts={"thinking": Thought(ends="open")}, max_reflections=0, max_chain_tokens=60
    )

    def reply(prompt: str, seed: int, index: int) -> str:
        return "7}" if prompt.endswith("\\boxed{") else essay(prompt, seed, index)

    trees, _ = run(tmp_path / "t.db", search, server={"reply": reply})
    types = {
        tuple(str(n.type) for n in tree.chain(leaf.node_id)) for tree in trees for leaf in tree.nodes if leaf.verdict
    }
    assert types == {("sub_task", "thinking", "answer")}
    leaves = [n for tree in trees for n in tree.nodes if n.verdict]
    # It is forced where the pattern says so and the model has not answered by itself.
    assert {n.is_forced for n in leaves} == {True, False}
    for n in leaves:
        assert n.is_forced == (n.text == "The answer is: \\boxed{7}") or "\\boxed" in n.text or "answer is" in n.text
    for tree in trees:
        for leaf in tree.nodes:
            if leaf.is_forced:
                assert chain_text(tree.chain(leaf.node_id)[:-1]).endswith("I give up.")


def test_after_an_open_thought_that_ended_its_turn_the_pattern_goes_on(tmp_path: Path) -> None:
    pattern = {"root": {"thinking": 4}, "thinking": {"double_check": 1}, "double_check": {"answer": 1}}
    search = settings(
        patterns={"own": pattern}, thoughts={"thinking": Thought(ends="open")}, max_reflections=0, max_chain_tokens=60
    )
    trees, _ = run(tmp_path / "t.db", search, server={"reply": essay})
    found = [tree.chain(leaf.node_id) for tree in trees for leaf in tree.nodes if leaf.verdict]
    gave_up = [chain for chain in found if chain[0].text.endswith("I give up.")]
    assert {tuple(str(n.type) for n in chain) for chain in gave_up} == {("thinking", "double_check", "answer")}
    assert {len(chain) for chain in found if chain not in gave_up} == {2}


def test_a_line_that_answers_is_not_answered_again(tmp_path: Path) -> None:
    def hasty(prompt: str, seed: int, index: int) -> str:
        return "2}" if prompt.endswith("{") else f" I see \\boxed{{{1 + index}}} of them."

    with FakeServerThread(reply=hasty) as server:
        trees, _ = asyncio.run(grow(server.url, tmp_path / "t.db", settings(max_reflections=0)))
        assert not any(body["prompt"].endswith("{") for body in server.requests)
    assert {n.answer for tree in trees for n in tree.nodes if n.type == "answer"} == {"1", "2"}


def test_a_single_paragraph_with_a_prefix_ends_at_its_blank_line(tmp_path: Path) -> None:
    pattern = {"root": {"sub_task": 1}, "sub_task": {"hypothesis": 2}, "hypothesis": {"answer": 1}}
    search = settings(ends="paragraph", patterns={"own": pattern}, max_reflections=0)

    def reply(prompt: str, seed: int, index: int) -> str:
        return "2}" if prompt.endswith("{") else f" words {draw(seed, index) % 5}\n\nmore"

    with FakeServerThread(reply=reply) as server:
        trees, _ = asyncio.run(grow(server.url, tmp_path / "t.db", search))
        assert {tuple(body["stop"]) for body in server.requests} == {("\n\n",), ("}", "\n")}
    for text in chains(trees):
        first, second, answer = text.split("\n\n")
        assert "break down this task. words" in first
        assert "ypothesis: words" in second
        assert answer == "The answer is: \\boxed{2}"


def test_a_wrong_answer_earns_a_reflection_that_goes_on_to_a_new_one(tmp_path: Path) -> None:
    trees, _ = run(tmp_path / "t.db", settings(**PARAGRAPHS | {"max_reflections": 2}), server={"reply": essay})
    found = [(tree, n) for tree in trees for n in tree.nodes if n.type == "reflection"]
    assert found
    for tree, n in found:
        assert n.parent_id, "there is a thought to reflect on"
        assert n.text.startswith("\n\n")
        assert "omething is wrong" in n.text
        siblings = [m for m in tree.nodes if m.parent_id == n.parent_id]
        assert any(m.type == "answer" and m.verdict == "wrong" for m in siblings)
        assert any(m.verdict for m in tree.nodes if n in tree.chain(m.node_id)), "it leads to a judged end"
    counted = [m for tree, n in found for m in tree.nodes if n in tree.chain(m.node_id) and m.type == "answer"]
    assert counted


POEM = "one\n\ntwo\n\nthree"


class Lines(Task):
    """Free texts of a number of lines; the next turn asks for more."""

    name = "lines"
    description = "generated: a number of lines"
    prompt_version = "1"
    answer_form: AnswerForm = "text"

    def questions(self, split: object = None, limit: int | None = None) -> list[Question]:
        more = (Turn("One more.", "3"),)
        return [
            Question(f"q{n}", self.name, ({"role": "user", "content": f"{n}!"},), str(n), later=more) for n in (1, 5)
        ]

    def worked_examples(self, question: Question) -> Sequence[WorkedExample]:
        return []

    def verify(self, answer: str, question: Question) -> Verdict:
        return Verdict.of(len(answer.splitlines()) == int(question.gold), answer)


def test_the_reply_of_an_instruction_task_is_the_whole_turn_or_what_follows_the_tag(tmp_path: Path) -> None:
    def poem(prompt: str, seed: int, index: int) -> str:
        said = prompt.rpartition("[assistant] ")[2]
        tagged = said.startswith("I think") if said else draw(seed, index) % 2
        return (f"I think.\n\nThe answer is:\n{POEM}" if tagged else POEM)[len(said) :]

    asked: list[Asked] = [(Lines(), question) for question in Lines().questions()]
    search = settings(**PARAGRAPHS, questions={"lines": 2})
    with FakeServerThread(reply=poem) as server:
        trees, _ = asyncio.run(grow(server.url, tmp_path / "t.db", search, asked))
    leaves = [(tree, n) for tree in trees for n in tree.nodes if n.verdict is not None]
    assert {n.answer for _, n in leaves} == {POEM}
    assert {(n.verdict, tree.gold) for tree, n in leaves} == {("wrong", "1"), ("correct", "5"), ("wrong", "3")}
    assert {tree.messages[1]["content"] for tree in trees if tree.turn == 1} == {POEM}


REASONING = ("I see \\boxed{9}?", "No, I look again.", "Hm, one more.")


def reason(prompt: str, seed: int, index: int) -> str:
    """A reasoning model: paragraphs of thinking, of which one has a box, and an answer behind them, or no end."""
    if prompt.endswith("{"):
        return "2}"
    assert "[assistant] <think>\n" in prompt
    number = draw(seed, index)
    if "</think>" in prompt.rpartition("[assistant] ")[2]:
        return f"It is \\boxed{{{1 + number % 3}}}."
    if number % 5 == 0:
        return "\n\n".join(REASONING * 30)
    return "\n\n".join([*REASONING[: 1 + number % 3], "So.\n</think>", f"The answer is \\boxed{{{1 + number % 3}}}."])


def test_a_reasoning_model_is_searched_inside_its_thinking_and_answers_behind_it(tmp_path: Path) -> None:
    with FakeServerThread(reply=reason) as server:
        reasoner = ThinkingTemplate()
        trees, _ = asyncio.run(grow(server.url, tmp_path / "t.db", settings(**PARAGRAPHS), template=reasoner))
        assert {body["prompt"].count("<think>") for body in server.requests} == {1}, "the template's tag, once"
        assert {body["prompt"].count("[user]") for body in server.requests} == {1}, "no worked examples"
    leaves = [(tree, n) for tree in trees for n in tree.nodes if n.verdict is not None]
    assert {n.verdict for _, n in leaves} == {"correct", "wrong", "no_answer"}
    for tree, n in leaves:
        chain = chain_text(tree.chain(n.node_id))
        assert chain.startswith("<think>\n"), "a chain can be judged by its own text"
        assert n.answer != "9", "a box in the thinking is no answer"
        assert (n.type == "answer") == ("</think>" in chain)
        assert n.is_cut == ("</think>" not in chain)
    assert len({tuple(str(m.type) for m in tree.chain(n.node_id)) for tree, n in leaves}) > 2


def test_a_forced_answer_closes_the_thinking_first(tmp_path: Path) -> None:
    pattern = {"root": {"sub_task": 1}, "sub_task": {"answer": 2}}
    search = settings(ends="paragraph", patterns={"own": pattern}, max_reflections=0)
    with FakeServerThread(reply=reason) as server:
        trees, _ = asyncio.run(grow(server.url, tmp_path / "t.db", search, template=ThinkingTemplate()))
    forced = [(tree, n) for tree in trees for n in tree.nodes if n.is_forced]
    assert forced
    for tree, n in forced:
        assert chain_text(tree.chain(n.node_id)).endswith("\n</think>\n\nThe answer is: \\boxed{2}")
        assert n.answer == "2"


def test_a_judge_whose_template_opens_its_thinking_is_asked_with_it(tmp_path: Path) -> None:
    search = settings(**PARAGRAPHS, reward={"judge": "one", "samples": 2}, questions={"letters": 2})
    with FakeServerThread(reply=lambda p, s, i: " yes" if "Reply with yes" in p else reason(p, s, i)) as server:
        asyncio.run(grow(server.url, tmp_path / "t.db", search, letters(2), template=ThinkingTemplate()))
    asked = [body["prompt"] for body in server.requests if "Reply with yes" in body["prompt"]]
    assert asked
    assert all(prompt.endswith("[assistant] <think>\nThe final answer is right:") for prompt in asked)


def test_a_base_model_stops_before_it_asks_itself_another_question(tmp_path: Path) -> None:
    def babbling(prompt: str, seed: int, index: int) -> str:
        return f"{essay(prompt, seed, index)}\nQuestion: What is 1 + 1?\nAnswer:\n\\boxed{{2}}"

    with FakeServerThread(reply=babbling) as server:
        trees, _ = asyncio.run(grow(server.url, tmp_path / "t.db", settings(**PARAGRAPHS), template=BaseTemplate()))
        asked = [body for body in server.requests if not body["prompt"].endswith("{")]
        assert {tuple(body["stop"]) for body in asked} == {("\nQuestion:",)}
        assert {body["prompt"].count("Question: ") for body in server.requests} == {4}
    assert not any("Question" in text for text in chains(trees))


@pytest.mark.parametrize(("shown", "turns"), [(0, 1), (1, 3), (3, 7)])
def test_so_many_examples_are_shown(tmp_path: Path, shown: int, turns: int) -> None:
    with FakeServerThread(reply=essay) as server:
        asyncio.run(grow(server.url, tmp_path / "t.db", settings(**PARAGRAPHS, examples=shown), letters(2)))
        assert {
            body["prompt"].count("[user]") + body["prompt"].count("[assistant]") - 1 for body in server.requests
        } == {turns}


def test_the_default_patterns_are_those_of_where_thoughts_end() -> None:
    assert list(Search(ends="line").patterns) == ["plain", "hypothesis", "double_check", "reclarify"]
    assert Search().patterns == {"solution": PATTERNS["solution"]}


@pytest.mark.parametrize(
    ("thoughts", "fault"),
    [
        ({"thinking": {"ends": "tokens"}}, "thought_tokens"),
        ({"thinking": {"thought_tokens": 4}}, "ends: tokens"),
        ({"thinking": {"ends": "open", "max_tokens": 4}}, "max_chain_tokens"),
        ({"thinking": {"ends": "tokens", "thought_tokens": 4, "max_tokens": 4}}, "use thought_tokens"),
        ({"answer": {"ends": "open"}}, "it ends by itself"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(thoughts: dict[str, Any], fault: str) -> None:
    with pytest.raises(UsageError, match=fault):
        parse_section(Search, {"thoughts": thoughts}, "trees.train")


def test_a_pattern_whose_lines_never_answer_is_refused_and_one_of_paragraphs_is_not() -> None:
    pattern = {"own": {"root": {"thinking": 2}, "thinking": {"thinking": 1}}}
    with pytest.raises(UsageError, match="no answer can be reached"):
        parse_section(Search, {"patterns": pattern, "max_reflections": 0, "ends": "line"}, "")
    found = parse_section(Search, {"patterns": pattern, "max_reflections": 0, "ends": "paragraph"}, "")
    assert not TreeSearch(found.patterns["own"], "s", found).exhausted
    with pytest.raises(UsageError, match="no answer can be reached"):
        parse_section(Search, {"patterns": {"own": {"root": {"thinking": 2}}}, "ends": "paragraph"}, "")


def test_sampling_writes_to_the_end_of_the_turn(tmp_path: Path) -> None:
    sampling = settings(**PARAGRAPHS, method="sampling")
    with FakeServerThread(reply=essay) as server:
        trees, _ = asyncio.run(grow(server.url, tmp_path / "s.db", sampling))
        assert {(body["stop"], body["max_tokens"]) for body in server.requests} == {(None, 60)}
    assert {n.prefix for tree in trees for n in tree.nodes} == {""}
    assert any(text.endswith("\n\nIt is.") for text in chains(trees))
