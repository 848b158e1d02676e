"""Selection: chosen is correct, rejected wrong (or longer), lengths relative, nothing twice, draws by seed."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.data.test_chains import chains
from tests.support.trees import node, random_tree, tree_of

from cotree.data.chains import Chain, mean_value
from cotree.data.select import drawn_length, in_order, select_dpo, select_sft, select_step_pairs
from cotree.data.settings import Dataset, Length
from cotree.models.encode import prefix_tokens
from cotree.search.store import StoredTree

tokens = st.lists(st.integers(0, 3), min_size=1, max_size=8).map(lambda ids: (*ids, 9))  # 9 ends the turn
chain_lists = st.lists(
    st.tuples(st.sampled_from(["correct", "wrong"]), tokens), max_size=12, unique_by=lambda c: c[1]
).map(lambda drawn: [Chain("t", i, str(ids), verdict, 1.0, ids, 5) for i, (verdict, ids) in enumerate(drawn)])
lengths = st.sampled_from(["longest", "medium", "shortest"])
trees = st.integers(0, 10_000).map(random_tree)


def wanted(rows: str, **given: Any) -> Dataset:
    return Dataset(trees="t", rows=rows, **given)


@given(chain_lists, lengths, st.integers(1, 4), st.integers())
def test_sft(found: list[Chain], length: Length, k: int, seed: int) -> None:
    picked = select_sft(found, wanted("sft", length=length, per_tree=k), seed)
    correct = sorted(len(c.tokens) for c in found if c.verdict == "correct")
    assert len(picked) == min(k, len(correct)) == len({c.leaf_id for c in picked})
    assert all(c.verdict == "correct" for c in picked)
    if length == "longest":
        assert [len(c.tokens) for c in picked] == correct[::-1][:k]
    if length == "shortest":
        assert [len(c.tokens) for c in picked] == correct[:k]
    if length == "medium" and correct:
        assert len(picked[0].tokens) == correct[len(correct) // 2]


@given(chain_lists, lengths, st.integers(1, 4), st.integers())
def test_unverified_chains_are_chosen_as_verified_ones_whatever_their_verdict(
    found: list[Chain], length: Length, k: int, seed: int
) -> None:
    """The control differs in verification alone: it is what SFT would take if all chains were correct."""
    as_correct = [Chain(c.tree_id, c.leaf_id, c.text, "correct", c.reward, c.tokens, 5) for c in found]
    unverified = select_sft(found, wanted("sft", length=length, per_tree=k, verified=False), seed)
    verified = select_sft(as_correct, wanted("sft", length=length, per_tree=k), seed)
    assert [c.leaf_id for c in unverified] == [c.leaf_id for c in verified]


@given(trees, st.integers(1, 4), st.integers())
@settings(max_examples=30, deadline=None)
def test_sft_by_value_takes_the_surest_chains(tree: StoredTree, k: int, seed: int) -> None:
    found = chains(tree)
    picked = select_sft(found, wanted("sft", select="value", per_tree=k), seed)
    left = [c for c in found if c.verdict == "correct" and c not in picked]
    assert all(c.verdict == "correct" for c in picked)
    assert [c.value for c in picked] == sorted((c.value for c in picked), reverse=True)
    assert all(c.value >= other.value for c in picked for other in left)


@given(chain_lists, lengths, st.integers(1, 4), st.integers())
def test_dpo(found: list[Chain], length: Length, k: int, seed: int) -> None:
    pairs = select_dpo(found, wanted("dpo", length=length, per_tree=k), seed)
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


@given(chain_lists, lengths, st.integers(1, 4), st.integers())
def test_pairs_for_brevity_alone_prefer_a_correct_chain_to_a_longer_correct_one(
    found: list[Chain], length: Length, k: int, seed: int
) -> None:
    pairs = select_dpo(found, wanted("dpo", length=length, per_tree=k, rejected="longer_correct"), seed)
    correct = [c for c in found if c.verdict == "correct"]
    used = [c.leaf_id for pair in pairs for c in (pair.chosen, pair.rejected)]
    assert len(set(used)) == len(used)
    for pair in pairs:
        assert pair.chosen.verdict == pair.rejected.verdict == "correct"
        assert len(pair.chosen.tokens) < len(pair.rejected.tokens)
    assert bool(pairs) == (len({len(c.tokens) for c in correct}) > 1)
    if pairs and length == "shortest":
        first = pairs[0].chosen
        assert len(first.tokens) == min(len(c.tokens) for c in correct)
        longer = [c for c in correct if len(c.tokens) > len(first.tokens)]
        assert pairs[0].prefix_tokens == min(prefix_tokens(first.tokens, c.tokens) for c in longer)


def test_a_right_chain_that_no_other_fits_takes_no_pair_away() -> None:
    given = [("correct", (1, 2, 9)), ("correct", (3, 2, 1, 9)), ("no_answer", (1, 2))]
    found = [Chain("t", i, str(ids), verdict, 1.0, ids, 5) for i, (verdict, ids) in enumerate(given)]
    (pair,) = select_dpo(found, wanted("dpo", length="shortest", unanswered=True), 0)
    assert (pair.chosen.leaf_id, pair.rejected.leaf_id) == (1, 2)


@given(trees, lengths, st.integers(1, 3), st.integers())
@settings(max_examples=30, deadline=None)
def test_pairs_of_a_tree_share_exactly_their_prefix(tree: StoredTree, length: Length, k: int, seed: int) -> None:
    verdicts = {n.node_id: n.verdict for n in tree.nodes}
    for pair in select_dpo(chains(tree), wanted("dpo", length=length, per_tree=k), seed):
        assert (verdicts[pair.chosen.leaf_id], verdicts[pair.rejected.leaf_id]) == ("correct", "wrong")
        shared = pair.prefix_tokens
        assert pair.chosen.tokens[:shared] == pair.rejected.tokens[:shared]
        assert pair.chosen.tokens[shared : shared + 1] != pair.rejected.tokens[shared : shared + 1]


@given(trees, st.floats(0.1, 1.0), st.integers(1, 3), st.integers(1, 3), st.integers())
@settings(max_examples=60, deadline=None)
def test_step_pairs_part_at_siblings_of_clearly_different_value(
    tree: StoredTree, gap: float, visits: int, k: int, seed: int
) -> None:
    rules = wanted("step_pairs", min_gap=gap, min_visits=visits, per_tree=k)
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
    (pair,) = select_step_pairs(tree, chains(tree), wanted("step_pairs"), 0)
    assert (pair.chosen.text, pair.rejected.text) == ("I add.\nIt is 3", "I guess.\nIt is 0")
    assert select_step_pairs(tree, chains(tree), wanted("step_pairs", min_visits=3), 0) == []
    nodes[2] = node(2, 0, "thinking", "I add.")
    twice = tree_of("x", nodes)
    assert select_step_pairs(twice, chains(twice), wanted("step_pairs"), 0) == [], "a step is not better than itself"


@pytest.mark.parametrize("undecided", [0, 5])
def test_leaves_that_could_not_be_judged_turn_no_step_pair_around(undecided: int) -> None:
    nodes = [node(0, None, None), node(1, 0, "thinking", "I add."), node(2, 0, "thinking", "I guess.")]
    below = [(1, kind) for kind in ("correct", "correct", "wrong", *["undecided"] * undecided)]
    for parent, kind in [*below, (2, "correct"), (2, "wrong")]:
        nodes.append(node(len(nodes), parent, "answer", f"It is {len(nodes)}", kind))
    tree = tree_of("x", nodes)
    (pair,) = select_step_pairs(tree, chains(tree), wanted("step_pairs", min_gap=0.15), 0)
    assert pair.better is not None and pair.worse is not None
    assert (pair.better.text, pair.better.visits, pair.worse.text) == ("I add.", 3, "I guess.")
    assert (mean_value(pair.better), mean_value(pair.worse)) == (2 / 3, 1 / 2)


@given(chain_lists, lengths, st.integers())
def test_order_does_not_depend_on_the_order_of_the_input(found: list[Chain], length: Length, seed: int) -> None:
    assert in_order(found, length, seed) == in_order(found[::-1], length, seed)


@given(chain_lists, st.integers(0, 20), st.integers())
def test_drawn_chains_are_right_and_wrong_alike(found: list[Chain], limit: int, seed: int) -> None:
    drawn = in_order(found, "random", seed)[:limit]
    assert len(drawn) == min(limit, len(found)) == len({c.leaf_id for c in drawn})
    assert drawn == in_order(found[::-1], "random", seed)[:limit]
    picked = select_sft(found, wanted("sft", select="random", verified=False, per_tree=max(limit, 1)), seed)
    assert picked[:limit] == drawn


@given(st.dictionaries(lengths, st.integers(1, 5), min_size=1), st.integers(0, 9))
@settings(max_examples=30, deadline=None)
def test_each_tree_draws_its_length_with_the_weights_of_the_mixture(mixture: dict[Length, int], seed: int) -> None:
    drawn = [drawn_length(mixture, f"tree {n}", seed) for n in range(600)]
    backwards = dict(reversed(mixture.items()))
    assert drawn == [drawn_length(backwards, f"tree {n}", seed) for n in range(600)]
    for length, number in Counter(drawn).items():
        share = mixture[length] / sum(mixture.values())
        assert abs(number / 600 - share) <= 5 * (share * (1 - share) / 600) ** 0.5


@given(chain_lists, st.integers(0, 99))
def test_a_mixture_chooses_of_a_tree_what_the_drawn_length_alone_chooses(found: list[Chain], seed: int) -> None:
    mixture: dict[Length, int] = {"longest": 1, "shortest": 4}
    drawn = drawn_length(mixture, "t", seed)
    assert select_dpo(found, wanted("dpo", length=mixture), seed) == select_dpo(
        found, wanted("dpo", length=drawn), seed
    )
    assert select_sft(found, wanted("sft", length=mixture), seed) == select_sft(
        found, wanted("sft", length=drawn), seed
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rows": "sft", "select": "random", "length": "longest"}, "not both"),
        ({"rows": "dpo", "unanswered": True, "rejected": "longer_correct"}, "`unanswered` is for rejected: wrong"),
        ({"rows": "sft", "leave_out": ["answer"]}, "the answer cannot be left out"),
        ({"rows": "stepwise", "size_of": "x", "size_in": "tokens"}, "use size_in: rows"),
        ({"rows": "dpo", "verified": False}, "`verified` is for rows: sft, not dpo"),
        ({"rows": "sft", "solve_rate": [0.5, 0.2]}, "solve_rate"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Dataset(trees="t", **given)
