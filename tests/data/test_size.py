"""`size_of`: as many rows, or as near as many tokens, as another dataset; drawn by seed, every tree alike."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.datasets import dataset_of, rows_in
from tests.support.trees import random_tree

from cotree.base.errors import UsageError
from cotree.data.build import Candidates
from cotree.data.settings import Gates

TREES = [random_tree(seed) for seed in range(30)]


def row(tree: int, rank: int, tokens: int) -> dict[str, Any]:
    return {"tree_id": f"t{tree}", "task": "t", "question_id": f"q{tree}", "prompt": f"{tree}", "length_tokens": tokens,
            "completion": f"{tree} {rank}"}  # fmt: skip


def add_rows(candidates: Candidates, sizes: list[list[int]]) -> int:
    """Rows of trees with these tokens each; returns how many."""
    for tree, tokens in enumerate(sizes):
        for rank, length in enumerate(tokens):
            assert candidates.add(rank, row(tree, rank, length))
    return sum(map(len, sizes))


sizes_of_trees = st.lists(st.lists(st.integers(1, 50), min_size=1, max_size=4), min_size=1, max_size=9)


@given(sizes_of_trees, st.integers(0, 30), st.integers())
@settings(deadline=None)
def test_a_cut_to_rows_leaves_no_tree_out_before_a_second_row_of_another(
    sizes: list[list[int]], limit: int, seed: int
) -> None:
    with Candidates(Gates(), seed) as candidates:
        number = add_rows(candidates, sizes)
        assert candidates.limit(limit) == max(number - limit, 0)
        kept = [found for _, found in candidates.rows()]
    assert len(kept) == min(limit, number)
    rows = Counter(found["tree_id"] for found in kept)
    most = max(rows.values(), default=0)
    for tree, tokens in enumerate(sizes):
        assert rows[f"t{tree}"] >= min(most - 1, len(tokens))
    order = [(int(found["tree_id"][1:]), int(found["completion"].split()[1])) for found in kept]
    assert order == sorted(order), "rows stay in the order of their trees"


@given(sizes_of_trees, st.integers(0, 600), st.integers())
@settings(deadline=None)
def test_a_cut_to_tokens_comes_as_near_as_whole_rows_can(sizes: list[list[int]], wanted: int, seed: int) -> None:
    def kept(limit: int) -> list[int]:
        """The tokens of the rows that stay when it is cut to so many rows."""
        with Candidates(Gates(), seed) as candidates:
            add_rows(candidates, sizes)
            candidates.limit(limit)
            return [found["length_tokens"] for _, found in candidates.rows()]

    with Candidates(Gates(), seed) as candidates:
        number = add_rows(candidates, sizes)
        candidates.limit_tokens(wanted)
        found = [row["length_tokens"] for _, row in candidates.rows()]
    best = min(abs(sum(kept(limit)) - wanted) for limit in range(1, number + 1))
    assert abs(sum(found) - wanted) == best
    assert found == kept(len(found)), "the same draw as by rows"


def test_every_tree_has_the_same_chance_however_many_rows_it_has() -> None:
    sizes = [[5] * (1 + tree % 4) for tree in range(8)]
    drawn: Counter[str] = Counter()
    for seed in range(400):
        with Candidates(Gates(), seed) as candidates:
            add_rows(candidates, sizes)
            candidates.limit(4)
            drawn.update(found["tree_id"] for _, found in candidates.rows())
    assert set(drawn) == {f"t{tree}" for tree in range(8)}
    # A half of 400; the standard deviation is 10.
    assert all(150 <= number <= 250 for number in drawn.values()), drawn


def test_a_control_is_as_large_as_what_it_is_compared_with(tmp_path: Path) -> None:
    verified = dataset_of(TREES, tmp_path / "sft")
    passed = {"size_of": tmp_path / "sft" / "train.parquet"}
    control: dict[str, Any] = {"verified": False, "size_of": "sft"}
    everything = dataset_of(TREES, tmp_path / "all", verified=False)
    by_rows = dataset_of(TREES, tmp_path / "rows", passed=passed, **control)
    assert by_rows.rows == verified.rows < everything.rows
    assert by_rows.rows_left_out["size_of"] == everything.rows - verified.rows
    by_tokens = dataset_of(TREES, tmp_path / "tokens", passed=passed, size_in="tokens", **control)
    longest = max(row["length_tokens"] for row in rows_in(tmp_path / "all"))
    assert abs(by_tokens.completion_tokens - verified.completion_tokens) <= longest / 2
    for name in ("rows", "tokens"):
        ids = [row["tree_id"] for row in rows_in(tmp_path / name)]
        assert ids == sorted(set(ids))
        assert not all(row["reward"] for row in rows_in(tmp_path / name))
    dataset_of(TREES, tmp_path / "other", seed=1, passed=passed, **control)
    assert {row["tree_id"] for row in rows_in(tmp_path / "other")} != {
        row["tree_id"] for row in rows_in(tmp_path / "rows")
    }


def test_a_dataset_that_counts_no_tokens_cannot_be_matched_by_them(tmp_path: Path) -> None:
    dataset_of(TREES, tmp_path / "steps", "stepwise")
    passed = {"size_of": tmp_path / "steps" / "train.parquet"}
    with pytest.raises(UsageError, match="does not count the tokens of its rows; use `size_in: rows`"):
        dataset_of(TREES, tmp_path / "it", passed=passed, size_of="steps", size_in="tokens")
