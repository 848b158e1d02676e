"""The counts of a search say what its trees hold; methods are compared by what they found and what it cost."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from tests.support.fake_server import FakeServerThread
from tests.support.search import config_of, grow, letters, reply, settings
from tests.support.trees import node, random_tree, tree_of

from cotree.base.statistics import wilson_interval
from cotree.search.journal import Journal
from cotree.search.store import StoredTree, TreeStore
from cotree.search.summary import compare_methods, summarize


def test_a_summary_counts_the_trees_of_the_questions_and_nothing_else(tmp_path: Path) -> None:
    search = settings(rollouts=10, roles={"thinker": "one", "reflector": ["one", "two"]})
    with FakeServerThread(reply=reply) as server:
        asyncio.run(grow(server.url, tmp_path / "t.db", search, letters(12)))
    with TreeStore(tmp_path / "t.db") as store, Journal(tmp_path / "t.journal") as journal:
        summary = summarize(store, journal, letters(9), config_of(search))
        wanted = {question.id for _, question in letters(9)}
        trees = [tree for tree in store.trees() if tree.question_id in wanted]
        empty = summarize(store, journal, letters(9), "other settings")
    thoughts = [node for tree in trees for node in tree.nodes[1:]]
    answers = [thought for thought in thoughts if thought.type == "answer"]
    assert summary["trees"] == 9
    assert (summary["thoughts"], summary["answers"]) == (len(thoughts), len(answers))
    assert summary["rollouts"] == sum(tree.rollouts for tree in trees)
    for kind in ("correct", "wrong", "no_answer"):
        assert summary[kind] == sum(answer.verdict == kind for answer in answers)
    assert summary["questions_with_both"] == pytest.approx(
        sum({"correct", "wrong"} <= {n.verdict for n in tree.nodes} for tree in trees) / 9
    )
    assert summary["stopped"] == Counter(tree.stopped for tree in trees)
    assert summary["tokens"]["completion"] == sum(tree.completion_tokens for tree in trees)
    assert summary["tokens"]["prompt"] + summary["tokens"]["cached"] == sum(tree.prompt_tokens for tree in trees)
    reflections = [thought.model for thought in thoughts if thought.type == "reflection"]
    assert summary["reflections"] == len(reflections) > 0
    assert {m: own["reflections"] for m, own in summary["by_model"].items()} == {
        m: reflections.count(m) for m in ("one", "two")
    }
    assert sum(own["thoughts"] for own in summary["by_model"].values()) == len(thoughts)
    assert sum(own["answers"] for own in summary["by_pattern"].values()) == summary["answers"] > 0
    assert sum(own["correct"] for own in summary["by_pattern"].values()) == summary["correct"]
    assert sum(own["repaired"] for own in summary["by_model"].values()) == summary["repaired"]
    assert (summary["unused"]["completions"], summary["unused"]["tokens"]) == (0, 0)
    assert summary["by_task"]["letters"] == {key: summary[key] for key in summary["by_task"]["letters"]}
    assert (empty["questions_with_both"], empty["by_task"], empty["stopped"]) == (0.0, {}, {})


def answered(name: str, answers: list[tuple[str, str]], tokens: int = 30) -> StoredTree:
    """A sampled tree: (text, verdict) of each chain; the text ends with its answer."""
    nodes = [node(0, None, None)]
    nodes += [node(i, 0, "answer", text, verdict) for i, (text, verdict) in enumerate(answers, 1)]
    tree = tree_of(name, [replace(n, answer=n.text[-1:] or None) for n in nodes], pattern="sampling")
    return replace(tree, completion_tokens=tokens, prompt_tokens=9, cached_tokens=4)


def test_equal_chains_are_one_chain_with_as_many_votes() -> None:
    right, wrong = ("so 3", "correct"), ("so 4", "wrong")
    trees = [
        answered("q1", [right, right, wrong, ("or 4", "wrong")]),
        answered("q2", [right, wrong, wrong]),
        answered("q3", [wrong, ("", "no_answer"), ("5", "undecided")]),
    ]
    (found,) = compare_methods({"sampling": trees})
    assert found.method == "sampling"
    assert found.questions == 3
    assert found.pairs_per_question == pytest.approx(2 / 3)
    assert found.correct == (2 / 3, *wilson_interval(2, 3))
    assert found.both == found.correct
    assert found.vote == (1 / 3, *wilson_interval(1, 3)), "a tie goes to the first answer: q1"
    assert (found.tokens, found.uncached_prompt_tokens, found.tokens_per_pair) == (90, 15, 45.0)
    assert (found.chains, found.accuracy[0]) == (9, 3 / 9)
    assert found.pairs_per_1000_tokens[0] == pytest.approx(2000 / 90)
    assert found.shared == 0.0, "whole chains share nothing"
    (none,) = compare_methods({"none": [answered("q", [wrong])]})
    assert (none.tokens_per_pair, none.shared) == (None, None)


def test_the_pairs_of_a_tree_share_the_tokens_of_their_common_thoughts() -> None:
    nodes = [node(0, None, None), node(1, 0, "thinking", "first"), node(2, 1, "answer", "a", "correct")]
    nodes += [node(3, 1, "answer", "b", "wrong"), node(4, 0, "thinking", "other"), node(5, 4, "answer", "c", "wrong")]
    sizes = {1: 30, 2: 10, 3: 20, 4: 5, 5: 5}
    tree = tree_of("q", [replace(n, tokens=sizes.get(n.node_id, 0)) for n in nodes])
    (found,) = compare_methods({"mcts": [tree]})
    assert found.shared == pytest.approx(60 / 90), "of the two wrong ones it is paired with its sibling"


def test_a_method_is_counted_the_same_whatever_the_order_of_its_trees() -> None:
    trees = [random_tree(seed) for seed in range(30)]
    assert compare_methods({"m": trees}) == compare_methods({"m": trees[::-1]})
