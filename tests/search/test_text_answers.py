"""Answers that are free text: several lines after a tag, ended by the model alone, and judged without the tag."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.fake_server import FakeServerThread
from tests.support.search import grow, settings, stored

from cotree.search.thoughts import chain_text, read_box
from cotree.tasks import Question, Task, Verdict
from cotree.tasks.base import AnswerForm, Turn, WorkedExample
from cotree.tasks.extract import free_text_answer, last_boxed, visible_text


class Rhymes(Task):
    """Write so many lines; the second turn asks for one more."""

    name = "rhymes"
    description = "generated: a number of lines"
    prompt_version = "1"
    answer_form: AnswerForm = "text"

    def questions(self, split: object = None, limit: int | None = None) -> list[Question]:
        def ask(n: int) -> str:
            return f"Write {n} lines."

        return [
            Question(
                f"q{n}", self.name, ({"role": "user", "content": ask(n)},), str(n), later=(Turn("One more.", "3"),)
            )
            for n in (1, 2, 3, 4)
        ]

    def worked_examples(self, question: Question) -> Sequence[WorkedExample]:
        steps = {"sub_task": "I count lines.", "thinking": "Two are wanted."}
        return [WorkedExample("Write 2 lines.", steps, "one line\n\nanother {line}")]

    def verify(self, answer: str, question: Question) -> Verdict:
        correct = len(answer.splitlines()) == int(question.gold)
        return Verdict("correct" if correct else "wrong", float(correct), answer)


def poem(prompt: str, seed: int, index: int) -> str:
    """One to three lines with braces and words that would stop a thought; a thought is a line."""
    lines = ["a {b}", "The answer is c", "d"][: 1 + (seed + index) % 3]
    if prompt.endswith("The answer is:\n"):
        return "\n".join(lines)
    return f" step {(seed + 7 * index) % 11}\nThe answer is:\n" + "\n".join(lines)


class Halves(Rhymes):
    """Half of a number, in LaTeX."""

    name = "halves"
    answer_form = "boxed"

    def verify(self, answer: str, question: Question) -> Verdict:
        correct = answer == rf"\frac{{{question.gold}}}{{2}}"
        return Verdict("correct" if correct else "wrong", float(correct), answer)


@given(st.text(alphabet="{}\\\\x. ", max_size=30))
def test_a_box_ends_in_search_where_extraction_ends_it(written: str) -> None:
    kept, closed = read_box(written)
    if closed:
        assert last_boxed(f"\\boxed{{{kept}}} more") == kept
    else:
        assert last_boxed(f"\\boxed{{{written}") is None


@pytest.mark.parametrize("after", ["", "}", "}. So it is.", "} and {more}\nThe end.", "} " + "on " * 80])
def test_a_boxed_answer_may_have_braces_of_its_own(tmp_path: Path, after: str) -> None:
    def fraction(prompt: str, seed: int, index: int) -> str:
        if prompt.endswith("{"):
            return rf"\frac{{{1 + (seed + index) % 4}}}{{2}}{after}"
        return f" step {(seed + 7 * index) % 11}"

    asked = [(Halves(), q) for q in Halves().questions()]
    with FakeServerThread(reply=fraction) as server:
        trees, _ = asyncio.run(grow(server.url, tmp_path / "t.db", settings(rollouts=8), asked))
    answers = [n for tree in trees for n in tree.nodes if n.type == "answer"]
    assert {n.verdict for n in answers} == {"correct", "wrong"}
    assert all(n.text == f"The answer is: \\boxed{{{n.answer}}}" and (n.answer or "").endswith("{2}") for n in answers)


def test_a_boxed_answer_that_is_cut_before_its_brace_is_no_answer(tmp_path: Path) -> None:
    def endless(prompt: str, seed: int, index: int) -> str:
        return r"\frac{1 + " + "1 + " * 200 if prompt.endswith("{") else f" step {(seed + 7 * index) % 11}"

    asked = [(Halves(), q) for q in Halves().questions()]
    with FakeServerThread(reply=endless) as server:
        trees, _ = asyncio.run(grow(server.url, tmp_path / "t.db", settings(rollouts=8), asked))
    assert {n.verdict for tree in trees for n in tree.nodes if n.type == "answer"} == {"no_answer"}


def test_a_text_answer_keeps_its_lines_and_is_judged_without_its_tag(tmp_path: Path) -> None:
    asked = [(Rhymes(), q) for q in Rhymes().questions()]
    with FakeServerThread(reply=poem) as server:
        trees, _ = asyncio.run(grow(server.url, tmp_path / "t.db", settings(rollouts=8), asked))
        answering = [r for r in server.requests if r["prompt"].endswith("The answer is:\n")]
        thinking = [r for r in server.requests if not r["prompt"].endswith("The answer is:\n")]
        before, calls = stored(tmp_path / "t.db"), server.calls
        asyncio.run(grow(server.url, tmp_path / "t.db", settings(rollouts=8), asked))
        assert (stored(tmp_path / "t.db"), server.calls) == (before, calls)
    assert answering and thinking
    assert not any(r.get("stop") for r in answering)
    assert all(r["stop"] for r in thinking)
    assert all("The answer is:\none line\n\nanother {line}\n" in r["prompt"] for r in server.requests)
    answers = [(tree, n) for tree in trees for n in tree.nodes if n.type == "answer"]
    assert {n.verdict for _, n in answers} == {"correct", "wrong"}
    for tree, node in answers:
        assert node.text == f"The answer is:\n{node.answer}"
        assert (node.verdict == "correct") == (len((node.answer or "").splitlines()) == int(tree.gold))
        chain = chain_text(tree.chain(node.node_id))
        assert chain.endswith(f"\n{node.text}")
        assert visible_text(chain) == node.answer
        assert Rhymes().judge(asked[0][1], chain).answer == node.answer
    second = [tree for tree in trees if tree.turn == 1]
    assert len(second) == 4
    assert not any(m["content"].startswith("The answer is") for tree in second for m in tree.messages)
    assert {len(tree.messages) for tree in second} == {3}


def test_a_text_answer_that_is_cut_or_empty_is_no_answer(tmp_path: Path) -> None:
    asked = [(Rhymes(), q) for q in Rhymes().questions()[:2]]

    def rambling(prompt: str, seed: int, index: int) -> str:
        return (
            ("so on\n" * 99 if (seed + index) % 2 else " \n") if prompt.endswith(":\n") else poem(prompt, seed, index)
        )

    with FakeServerThread(reply=rambling) as server:
        trees, _ = asyncio.run(grow(server.url, tmp_path / "t.db", settings(rollouts=8), asked))
    answers = [n for tree in trees for n in tree.nodes if n.type == "answer"]
    assert {(n.verdict, n.answer) for n in answers} == {("no_answer", None)}
    assert {n.finish_reason for n in answers} == {"length", "stop"}


def test_sampling_does_not_stop_in_a_text_answer(tmp_path: Path) -> None:
    asked = [(Rhymes(), q) for q in Rhymes().questions()]
    with FakeServerThread(reply=poem) as server:
        asyncio.run(grow(server.url, tmp_path / "t.db", settings(), asked))
        sampling = settings(method="sampling", tokens_of="t")
        trees, _ = asyncio.run(grow(server.url, tmp_path / "s.db", sampling, asked, others=tmp_path / "t.db"))
        assert any(not r.get("stop") and not r["prompt"].endswith(":\n") for r in server.requests)
    assert len(trees) == 8, "later turns are sampled too"
    assert {"correct", "wrong"} <= {node.verdict for tree in trees for node in tree.nodes}
    for tree in trees:
        if tree.turn:
            replies = [n.text.split("The answer is:\n", 1)[-1] for first in trees for n in first.nodes[1:]]
            assert tree.messages[1]["content"] in replies, "only the answer goes back"


@pytest.mark.parametrize(
    ("completion", "finish", "answer"),
    [
        ("a\n\nb\n", "stop", "a\n\nb"),
        ("First...\nThe answer is:\na\nThe answer is:\nb", "stop", "a\nThe answer is:\nb"),
        ("The answer is: a\nb", "stop", "The answer is: a\nb"),
        ("<think>x\nThe answer is:\ny</think>\n\nz", "stop", "z"),
        ("<think>x\nThe answer is:\ny", "stop", None),
        ("The answer is:\n \n", "stop", None),
        ("a", "length", None),
        ("", "stop", None),
    ],
)
def test_the_text_that_is_judged(completion: str, finish: str, answer: str | None) -> None:
    assert free_text_answer(completion, finish) == answer
