"""Datasets from stored trees: TRL's types, the same bytes every time, nothing cut, everything counted."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest
from tests.train.tiny_student import tiny_tokenizer

from cotree.config import Build
from cotree.data.build import build
from cotree.errors import CotreeError
from cotree.store import StoredNode, StoredTree


def tree(name: str, answers: list[tuple[str, str]]) -> StoredTree:
    """A root, one thought, and answers (text, verdict) below it."""

    def node(i: int, parent: int | None, kind: str | None, text: str, verdict: str | None) -> StoredNode:
        reward = None if verdict is None else float(verdict == "correct")
        return StoredNode(i, parent, kind, text, "", "m", 1, 1, 0.0, verdict, reward, None, 1, "stop", 0, 0.0)

    nodes = [node(0, None, None, "", None), node(1, 0, "thinking", f"I add {name}.", None)]
    nodes += [node(i + 2, 1, "answer", text, verdict) for i, (text, verdict) in enumerate(answers)]
    prompt = [{"role": "user", "content": f"What is {name}?"}]
    return StoredTree(name, "arithmetic", name, 0, "c", "sum", prompt, "3", "plain", 4, "rollouts", 1, 1, 0, 1, nodes)


TREES = [
    tree("a", [("The answer is 3", "correct"), ("The answer is three, 3", "correct"), ("It is 4", "wrong")]),
    tree("b", [("The answer is 3", "correct"), ("cut", "no_answer")]),
    tree("c", [("It is 5", "wrong")]),
]


def test_rows_are_trls_types_and_follow_the_verdicts(tmp_path: Path) -> None:
    built = build(TREES, tiny_tokenizer(), Build(), tmp_path, seed=0, control=True)
    sft = pq.read_table(tmp_path / "sft" / "train.parquet").to_pylist()
    assert [row["completion"] for row in sft] == [
        [{"role": "assistant", "content": "I add a.\nThe answer is three, 3"}],
        [{"role": "assistant", "content": "I add b.\nThe answer is 3"}],
    ]
    assert [row["length_rank"] for row in sft] == [3, 1]
    assert all(row["prompt"] == [{"role": "user", "content": f"What is {row['tree_id']}?"}] for row in sft)
    (pair,) = pq.read_table(tmp_path / "dpo" / "train.parquet").to_pylist()
    assert pair["chosen"][0]["content"] == "I add a.\nThe answer is 3"
    assert pair["rejected"][0]["content"] == "I add a.\nIt is 4"
    assert pair["prefix_tokens"] > 0
    assert (built.counts["sft_rows"], built.counts["control_rows"], built.counts["dpo_pairs"]) == (2, 2, 1)
    assert len(pq.read_table(tmp_path / "control" / "train.parquet")) == 2


def test_the_same_store_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        build(TREES, tiny_tokenizer(), Build(), tmp_path / name, seed=0, control=True)
    for part in ("sft", "dpo", "control"):
        files = [(tmp_path / name / part / "train.parquet").read_bytes() for name in ("one", "two")]
        assert files[0] == files[1]


def test_chains_over_the_limit_are_left_out_and_counted(tmp_path: Path) -> None:
    left_out = []
    for limit in range(20, 120, 2):
        try:
            counts = build(TREES, tiny_tokenizer(), Build(max_tokens=limit), tmp_path, seed=0, control=False).counts
        except CotreeError:
            continue
        assert counts["too_long"] + counts["chains"] == 5
        left_out.append(counts["too_long"])
    assert left_out == sorted(left_out, reverse=True)
    assert left_out[0] > 0
    assert left_out[-1] == 0
    with pytest.raises(CotreeError, match="no tree has"):
        build(TREES, tiny_tokenizer(), Build(max_tokens=8), tmp_path / "x", seed=0, control=False)
    assert not (tmp_path / "x").exists()


def test_trees_that_cannot_make_pairs_are_an_error_that_says_so(tmp_path: Path) -> None:
    with pytest.raises(CotreeError, match="no tree has both a correct and a wrong chain"):
        build(TREES[1:2], tiny_tokenizer(), Build(), tmp_path, seed=0, control=False)
    with pytest.raises(CotreeError, match="no tree has a correct chain"):
        build(TREES[2:], tiny_tokenizer(), Build(), tmp_path, seed=0, control=False)
    assert list(tmp_path.iterdir()) == []
