"""Selection: chosen is correct, rejected is wrong, lengths are relative, nothing comes twice."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cotree.config import BuildDPO, BuildSFT, Length
from cotree.data.chains import Chain, by_length, select_control, select_dpo, select_sft
from cotree.train.encode import prefix_tokens

tokens = st.lists(st.integers(0, 3), min_size=1, max_size=8).map(tuple)
chain_lists = st.lists(
    st.tuples(st.sampled_from(["correct", "wrong"]), tokens), max_size=12, unique_by=lambda c: c[1]
).map(lambda drawn: [Chain("t", i, str(ids), verdict, 1.0, "plain", ids, 5) for i, (verdict, ids) in enumerate(drawn)])
lengths = st.sampled_from(["longest", "medium", "shortest"])


@given(chain_lists, lengths, st.integers(1, 4), st.integers())
def test_sft(chains: list[Chain], length: Length, k: int, seed: int) -> None:
    picked = select_sft(chains, BuildSFT(length=length, chains_per_tree=k), seed)
    correct = sorted(len(c.tokens) for c in chains if c.verdict == "correct")
    assert len(picked) == min(k, len(correct)) == len({c.leaf_id for c in picked})
    assert all(c.verdict == "correct" for c in picked)
    if length == "longest":
        assert [len(c.tokens) for c in picked] == correct[::-1][:k]
    if length == "shortest":
        assert [len(c.tokens) for c in picked] == correct[:k]
    if length == "medium" and correct:
        assert len(picked[0].tokens) == correct[len(correct) // 2]


@given(chain_lists, lengths, st.integers(1, 4), st.integers())
def test_dpo(chains: list[Chain], length: Length, k: int, seed: int) -> None:
    pairs = select_dpo(chains, BuildDPO(length=length, pairs_per_tree=k), seed)
    wrong = [c for c in chains if c.verdict == "wrong"]
    assert len(pairs) == min(k, sum(c.verdict == "correct" for c in chains), len(wrong))
    used = [c.leaf_id for pair in pairs for c in (pair.chosen, pair.rejected)]
    assert len(set(used)) == len(used)
    for pair in pairs:
        assert (pair.chosen.verdict, pair.rejected.verdict) == ("correct", "wrong")
        assert pair.prefix_tokens == prefix_tokens(pair.chosen.tokens, pair.rejected.tokens)
    if pairs:
        first = pairs[0]
        assert first.prefix_tokens == min(prefix_tokens(first.chosen.tokens, c.tokens) for c in wrong)


@given(chain_lists, lengths, st.integers())
def test_order_does_not_depend_on_the_order_of_the_input(chains: list[Chain], length: Length, seed: int) -> None:
    assert by_length(chains, length, seed) == by_length(chains[::-1], length, seed)


@given(st.lists(chain_lists, max_size=4), st.integers(0, 20), st.integers())
def test_control_draws_right_and_wrong_alike(trees: list[list[Chain]], rows: int, seed: int) -> None:
    trees = [
        [Chain(str(t), *tuple(getattr(c, f) for f in Chain.__slots__[1:])) for c in cs] for t, cs in enumerate(trees)
    ]
    drawn = select_control(trees, rows, seed)
    assert len(drawn) == min(rows, sum(map(len, trees))) == len({(c.tree_id, c.leaf_id) for c in drawn})
