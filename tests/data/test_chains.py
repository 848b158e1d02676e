"""Selection: chosen is correct, rejected wrong, lengths relative, nothing twice; forms of a text, cut reflections."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.tiny_student import tiny_tokenizer
from tests.support.trees import node, random_tree, tree_of
from transformers import PreTrainedTokenizerFast

from cotree.data.chains import Chain, Judge, Reading, chains_of, cut_reflections, form, mean_value
from cotree.data.select import by_length, draw_chains, select_dpo, select_sft, select_step_pairs
from cotree.experiment.recipe import Build, BuildDPO, BuildSFT, BuildStepPairs, Length
from cotree.models.encode import encode_chains, prefix_tokens
from cotree.search.store import StoredTree
from cotree.search.thoughts import PATTERNS
from cotree.tasks import Verdict
from cotree.tasks.extract import extract_answer

tokenizer = cache(tiny_tokenizer)
tokens = st.lists(st.integers(0, 3), min_size=1, max_size=8).map(lambda ids: (*ids, 9))  # 9 ends the turn
chain_lists = st.lists(
    st.tuples(st.sampled_from(["correct", "wrong"]), tokens), max_size=12, unique_by=lambda c: c[1]
).map(lambda drawn: [Chain("t", i, str(ids), verdict, 1.0, "plain", ids, 5) for i, (verdict, ids) in enumerate(drawn)])
lengths = st.sampled_from(["longest", "medium", "shortest"])
trees = st.integers(0, 10_000).map(random_tree)


def chains(tree: StoredTree, judge: Judge | None = None) -> list[Chain]:
    """With a judge, reflections are cut."""
    settings = Build(reflections="keep" if judge is None else "cut")
    return chains_of(tree, tokenizer(), settings, Reading(judge=judge))[0]


@given(chain_lists, lengths, st.integers(1, 4), st.integers())
def test_sft(found: list[Chain], length: Length, k: int, seed: int) -> None:
    picked = select_sft(found, BuildSFT(length=length, chains_per_tree=k), seed)
    correct = sorted(len(c.tokens) for c in found if c.verdict == "correct")
    assert len(picked) == min(k, len(correct)) == len({c.leaf_id for c in picked})
    assert all(c.verdict == "correct" for c in picked)
    if length == "longest":
        assert [len(c.tokens) for c in picked] == correct[::-1][:k]
    if length == "shortest":
        assert [len(c.tokens) for c in picked] == correct[:k]
    if length == "medium" and correct:
        assert len(picked[0].tokens) == correct[len(correct) // 2]


@given(trees, st.integers(1, 4), st.integers())
@settings(max_examples=30, deadline=None)
def test_sft_by_value_takes_the_surest_chains(tree: StoredTree, k: int, seed: int) -> None:
    found = chains(tree)
    picked = select_sft(found, BuildSFT(select="value", chains_per_tree=k), seed)
    left = [c for c in found if c.verdict == "correct" and c not in picked]
    assert all(c.verdict == "correct" for c in picked)
    assert [c.value for c in picked] == sorted((c.value for c in picked), reverse=True)
    assert all(c.value >= other.value for c in picked for other in left)
    for chain in picked:
        path = tree.chain(chain.leaf_id)
        assert chain.value == pytest.approx(sum(n.value / n.visits for n in path) / len(path))


@given(chain_lists, lengths, st.integers(1, 4), st.integers())
def test_dpo(found: list[Chain], length: Length, k: int, seed: int) -> None:
    pairs = select_dpo(found, BuildDPO(length=length, pairs_per_tree=k), seed)
    wrong = [c for c in found if c.verdict == "wrong"]
    assert len(pairs) == min(k, sum(c.verdict == "correct" for c in found), len(wrong))
    used = [c.leaf_id for pair in pairs for c in (pair.chosen, pair.rejected)]
    assert len(set(used)) == len(used)
    for pair in pairs:
        assert (pair.chosen.verdict, pair.rejected.verdict) == ("correct", "wrong")
        assert pair.prefix_tokens == prefix_tokens(pair.chosen.tokens, pair.rejected.tokens)
    if pairs:
        first = pairs[0]
        assert first.prefix_tokens == min(prefix_tokens(first.chosen.tokens, c.tokens) for c in wrong)


def test_a_right_chain_that_no_other_fits_takes_no_pair_away() -> None:
    given = [("correct", (1, 2, 9)), ("correct", (3, 2, 1, 9)), ("no_answer", (1, 2))]
    found = [Chain("t", i, str(ids), verdict, 1.0, "plain", ids, 5) for i, (verdict, ids) in enumerate(given)]
    (pair,) = select_dpo(found, BuildDPO(length="shortest", pairs_per_tree=1), 0)
    assert (pair.chosen.leaf_id, pair.rejected.leaf_id) == (1, 2)


@given(trees, lengths, lengths, st.integers(1, 3), st.integers())
@settings(max_examples=30, deadline=None)
def test_all_four_combinations_from_one_tree(tree: StoredTree, sft: Length, dpo: Length, k: int, seed: int) -> None:
    found = chains(tree)
    verdicts = {n.node_id: n.verdict for n in tree.nodes}
    assert len({c.text for c in found}) == len(found)
    for chain in found:
        ids = encode_chains(tokenizer(), [(tree.messages, [{"role": "assistant", "content": chain.text}])])[0]
        assert (tuple(ids.completion), len(ids.prompt)) == (chain.tokens, chain.prompt_tokens)
    for chain in select_sft(found, BuildSFT(length=sft, chains_per_tree=k), seed):
        assert verdicts[chain.leaf_id] == "correct"
    for pair in select_dpo(found, BuildDPO(length=dpo, pairs_per_tree=k), seed):
        assert (verdicts[pair.chosen.leaf_id], verdicts[pair.rejected.leaf_id]) == ("correct", "wrong")
        shared = pair.prefix_tokens
        assert pair.chosen.tokens[:shared] == pair.rejected.tokens[:shared]
        assert pair.chosen.tokens[shared : shared + 1] != pair.rejected.tokens[shared : shared + 1]


@given(trees, st.floats(0.1, 1.0), st.integers(1, 3), st.integers(1, 3), st.integers())
@settings(max_examples=60, deadline=None)
def test_step_pairs_part_at_siblings_of_clearly_different_value(
    tree: StoredTree, gap: float, visits: int, k: int, seed: int
) -> None:
    rules = BuildStepPairs(min_gap=gap, min_visits=visits, pairs_per_tree=k)
    pairs = select_step_pairs(tree, chains(tree), rules, seed)
    assert len(pairs) <= k
    assert len({p.chosen.leaf_id for p in pairs}) == len({p.rejected.leaf_id for p in pairs}) == len(pairs)
    for pair in pairs:
        better, worse = pair.better, pair.worse
        assert better is not None and worse is not None
        assert (better.parent_id, better.type) == (worse.parent_id, worse.type)
        assert mean_value(better) - mean_value(worse) >= gap
        assert min(better.visits, worse.visits) >= visits
        assert better.node_id in pair.chosen.nodes and worse.node_id in pair.rejected.nodes
        assert (pair.chosen.verdict, pair.rejected.verdict) == ("correct", "wrong")


def test_a_step_pair_is_found() -> None:
    nodes = [node(0, None, None), node(1, 0, "thinking", "I add."), node(2, 0, "thinking", "I guess.")]
    nodes += [node(3 + i, 1, "answer", f"It is 3{'.' * i}", "correct") for i in range(2)]
    nodes += [node(5 + i, 2, "answer", f"It is {'0' * (i + 1)}", "wrong") for i in range(2)]
    tree = tree_of("x", nodes)
    (pair,) = select_step_pairs(tree, chains(tree), BuildStepPairs(), 0)
    assert (pair.chosen.text, pair.rejected.text) == ("I add.\nIt is 3", "I guess.\nIt is 0")
    assert select_step_pairs(tree, chains(tree), BuildStepPairs(min_visits=3), 0) == []
    nodes[2] = node(2, 0, "thinking", "I add.")
    twice = tree_of("x", nodes)
    assert select_step_pairs(twice, chains(twice), BuildStepPairs(), 0) == [], "a step is not better than itself"


@given(chain_lists, lengths, st.integers())
def test_order_does_not_depend_on_the_order_of_the_input(found: list[Chain], length: Length, seed: int) -> None:
    assert by_length(found, length, seed) == by_length(found[::-1], length, seed)


@given(chain_lists, st.integers(0, 20), st.integers())
def test_drawn_chains_are_right_and_wrong_alike(found: list[Chain], limit: int, seed: int) -> None:
    drawn = draw_chains(found, limit, seed)
    assert len(drawn) == min(limit, len(found)) == len({c.leaf_id for c in drawn})
    assert drawn == draw_chains(found[::-1], limit, seed)


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


def test_the_three_forms_of_a_text() -> None:
    thoughts = tree_of("x", REFLECTED).chain(3)
    assert form(thoughts, "plain") == "First, I split it.\n1 + 1 = 3.\nThe answer is: \\boxed{3}"
    assert form(thoughts, "tags") == (
        "<sub-task>First, I split it.</sub-task>\n<thinking>1 + 1 = 3.</thinking>\n"
        "<answer>The answer is: \\boxed{3}</answer>"
    )
    assert form(thoughts, "think") == ("<think>\nFirst, I split it.\n1 + 1 = 3.\n</think>\n\nThe answer is: \\boxed{3}")
    for text in ("plain", "tags", "think"):
        assert extract_answer(form(thoughts, text)) == "3"
    # Mini-steps that continue a line are one thought.
    mini = [replace(node(1, 0, "thinking", "1 + "), finish_reason="length"), node(2, 1, "thinking", "1 = 2.")]
    assert form(mini, "tags") == "<thinking>1 + 1 = 2.</thinking>"


def test_the_template_is_applied_once() -> None:
    tree = tree_of("x", REFLECTED)
    student: PreTrainedTokenizerFast = tokenizer()
    (chain, *_) = chains(tree)
    whole = student.apply_chat_template(
        [*tree.messages, {"role": "assistant", "content": chain.text}], tokenize=False
    ).rstrip("\n")
    prompt = student.apply_chat_template(tree.messages, tokenize=False, add_generation_prompt=True)
    assert prompt + student.decode(chain.tokens) == whole
