"""Chains of a tree: verdicts, tokens, the forms of a text, cut reflections; every judged leaf is one or counted."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.tiny_student import tiny_tokenizer
from tests.support.trees import node, random_tree, tree_of
from transformers import PreTrainedTokenizerFast

from cotree.data.chains import Chain, assistant_text, cut_reflections, read_chains
from cotree.data.gates import Rules, TextJudge
from cotree.data.settings import Dataset
from cotree.models.encode import encode_chains
from cotree.search.store import StoredTree
from cotree.search.thoughts import PATTERNS
from cotree.tasks import Verdict
from cotree.tasks.extract import extract_answer

tokenizer = cache(tiny_tokenizer)


def chains(tree: StoredTree, judge: TextJudge | None = None) -> list[Chain]:
    """With a judge, reflections are cut."""
    reads = Dataset(trees="t", rows="sft", reflections="keep" if judge is None else "cut")
    return read_chains(tree, Rules(reads, tokenizer(), judge=judge))


@given(st.integers(0, 10_000).map(random_tree))
@settings(max_examples=30, deadline=None)
def test_chains_are_the_judged_leaves_with_the_tokens_that_are_trained(tree: StoredTree) -> None:
    found = chains(tree)
    verdicts = {n.node_id: n.verdict for n in tree.nodes}
    assert len({c.text for c in found}) == len(found)
    for chain in found:
        ids = encode_chains(tokenizer(), [(tree.messages, [{"role": "assistant", "content": chain.text}])])[0]
        assert (tuple(ids.completion), len(ids.prompt)) == (chain.tokens, chain.prompt_tokens)
        assert chain.verdict == verdicts[chain.leaf_id] in ("correct", "wrong")
        path = tree.chain(chain.leaf_id)
        assert chain.value == pytest.approx(sum(n.value / n.visits for n in path) / len(path))


def test_what_is_no_chain_is_counted_by_its_reason() -> None:
    cut = replace(node(4, 1, "thinking", "and and", "no_answer"), finish_reason="length")
    leaves = [node(2, 1, "answer", "3", "correct"), node(3, 1, "answer", "3", "correct"), cut]
    leaves += [node(5, 1, "answer", "4", "undecided"), node(6, 1, "answer", "\\boxed{", "no_answer")]
    tree = tree_of("x", [node(0, None, None), node(1, 0, "sub_task", "I add."), *leaves])
    rules = Rules(Dataset(trees="t", rows="sft"), tokenizer())
    assert [c.leaf_id for c in read_chains(tree, rules)] == [2]
    assert rules.counts.chains_left_out == {"repeated_in_tree": 1, "thought_cut": 1, "undecided": 1, "no_answer": 1}
    everything = Dataset(trees="t", rows="dpo", unanswered=True, leave_out=("sub_task", "thinking"))
    rules = Rules(everything, tokenizer())
    assert [c.leaf_id for c in read_chains(tree, rules)] == [2], "nothing is left of the path that was cut"
    assert rules.counts.chains_left_out["thought_cut"] == 1


def test_forced_answers_can_be_left_out() -> None:
    own = node(2, 1, "answer", "So it is \\boxed{3}.", "correct")
    forced = replace(node(3, 1, "answer", "The answer is: \\boxed{3}", "correct"), prefix="The answer is: \\boxed{")
    tree = tree_of("x", [node(0, None, None), node(1, 0, "thinking", "I add."), own, forced])
    for keeps, leaves in ((True, [2, 3]), (False, [2])):
        rules = Rules(Dataset(trees="t", rows="sft", forced=keeps), tokenizer())
        assert [c.leaf_id for c in read_chains(tree, rules)] == leaves
        assert rules.counts.chains_left_out == ({} if keeps else {"forced_answer": 1})


def test_paragraphs_read_naturally_in_every_form() -> None:
    first, last = node(1, 0, "thinking", "I add."), node(2, 1, "answer", "\n\nSo it is \\boxed{3}.", "correct")
    assert assistant_text([first, last], "plain") == "I add.\n\nSo it is \\boxed{3}."
    assert assistant_text([first, last], "think") == "<think>\nI add.\n</think>\n\nSo it is \\boxed{3}."
    assert assistant_text([first, last], "tags") == "<thinking>I add.</thinking>\n<answer>So it is \\boxed{3}.</answer>"
    assert assistant_text([last], "plain") == "So it is \\boxed{3}."


REFLECTED = [
    node(0, None, None),
    node(1, 0, "sub_task", "First, I split it."),
    node(2, 1, "thinking", "1 + 1 = 3."),
    node(3, 2, "answer", "The answer is: \\boxed{3}", "wrong"),
    node(4, 2, "reflection", "Wait! something is wrong."),
    node(5, 4, "thinking", "1 + 1 = 2."),
    node(6, 5, "answer", "The answer is: \\boxed{2}", "correct"),
]


def test_a_cut_reflection_takes_the_wrong_thinking_along_and_is_judged_again() -> None:
    tree = tree_of("x", REFLECTED)
    assert [n.node_id for n in cut_reflections(tree.chain(6), PATTERNS["plain"])] == [1, 5, 6]
    # Without a branching point before it, everything before the reflection goes.
    assert [n.node_id for n in cut_reflections(tree.chain(6), {"root": {"sub_task": 1}})] == [5, 6]
    # A reflection on a reflection goes back to the same branching point.
    twice = [*tree.chain(5), replace(REFLECTED[4], node_id=7), replace(REFLECTED[5], node_id=8)]
    assert [n.node_id for n in cut_reflections(twice, PATTERNS["plain"])] == [1, 8]
    asked: list[str] = []

    def judge(_: StoredTree, text: str) -> Verdict:
        asked.append(text)
        return Verdict("wrong", 0.0, "2")

    kept = {c.leaf_id: c for c in chains(tree)}
    cut = {c.leaf_id: c for c in chains(tree, judge)}
    assert "Wait!" in kept[6].text and kept[6].verdict == "correct"
    assert cut[6].text == "First, I split it.\n1 + 1 = 2.\nThe answer is: \\boxed{2}"
    assert (cut[6].verdict, cut[6].reward) == ("wrong", 0.0)
    assert asked == [cut[6].text], "only what was cut is judged again"
    assert cut[3] == kept[3]
    # A sampled chain has no pattern of thoughts, and no reflection to cut.
    sampled = tree_of("s", [node(0, None, None), node(1, 0, "answer", "1 + 1 = 2", "correct")], pattern="sampling")
    assert chains(sampled, judge) == chains(sampled)


def test_the_three_forms_of_a_text() -> None:
    thoughts = tree_of("x", REFLECTED).chain(3)
    assert assistant_text(thoughts, "plain") == "First, I split it.\n1 + 1 = 3.\nThe answer is: \\boxed{3}"
    assert assistant_text(thoughts, "tags") == (
        "<sub-task>First, I split it.</sub-task>\n<thinking>1 + 1 = 3.</thinking>\n"
        "<answer>The answer is: \\boxed{3}</answer>"
    )
    assert assistant_text(thoughts, "think") == (
        "<think>\nFirst, I split it.\n1 + 1 = 3.\n</think>\n\nThe answer is: \\boxed{3}"
    )
    for form in ("plain", "tags", "think"):
        assert extract_answer(assistant_text(thoughts, form)) == "3"
    # Mini-steps that continue a line are one thought.
    mini = [replace(node(1, 0, "thinking", "1 + "), finish_reason="length"), node(2, 1, "thinking", "1 = 2.")]
    assert assistant_text(mini, "tags") == "<thinking>1 + 1 = 2.</thinking>"


def test_the_template_is_applied_once() -> None:
    tree = tree_of("x", REFLECTED)
    student: PreTrainedTokenizerFast = tokenizer()
    (chain, *_) = chains(tree)
    whole = student.apply_chat_template(
        [*tree.messages, {"role": "assistant", "content": chain.text}], tokenize=False
    ).rstrip("\n")
    prompt = student.apply_chat_template(tree.messages, tokenize=False, add_generation_prompt=True)
    assert prompt + student.decode(chain.tokens) == whole
