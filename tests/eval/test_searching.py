"""Evaluation by search: what a strategy answers is judged as any sample, resumes, and counts all that it generated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.decode.test_strategies import poem, talk
from tests.support.fake_server import FakeServerThread

import cotree
from cotree.base.errors import UsageError
from cotree.base.progress import Output
from cotree.eval.journal import JOURNAL, read_samples
from cotree.report.paper_table import paper_table

HOW: dict[str, Any] = {
    "chat": True,
    "served": "fake",
    "limit": 3,
    "temperature": 0.8,
    "budget_tokens": 150,
    "output": Output(quiet=True),
}


@pytest.mark.parametrize("strategy", ["mcts", "vote", "best_of_n", "beam"])
def test_a_strategy_is_evaluated_as_any_model_and_resumes(strategy: str, tmp_path: Path) -> None:
    with FakeServerThread(reply=talk, usage="vllm") as server:
        how = HOW | {"strategy": strategy, "samples": 2, "out": tmp_path}
        found = cotree.evaluate(server.url, ["letters"], **how)
        calls, samples = server.calls, read_samples(tmp_path / JOURNAL)
        # The worked examples of the search are in every prompt.
        assert all(len(request["messages"]) > 4 for request in server.requests)
        again = cotree.evaluate(server.url, ["letters"], **how)
        assert (again.rows, server.calls) == (found.rows, calls)
    assert len(samples) == 6
    assert {sample.decoding for sample in samples} == {
        f"{strategy} by {'vote' if strategy in ('mcts', 'vote') else 'likelihood'}, 150 tokens"
    }
    assert all((sample.tree is not None) == (strategy == "mcts") for sample in samples)
    assert (found.rows[0]["test_at"] == {}) == (strategy == "mcts"), "two trees are too few"
    assert all(75 < sample.tokens < 300 for sample in samples), "all that was generated is counted"
    assert {sample.kind for sample in samples} <= {"correct", "wrong"}
    by_question = [{s.response for s in samples if s.id == one.id} for one in samples]
    assert any(len(responses) == 2 for responses in by_question), "each sample has a seed of its own"


def test_test_at_k_of_trees_is_about_the_first_chains_of_each(tmp_path: Path) -> None:
    with FakeServerThread(reply=talk, usage="vllm") as server:
        how = HOW | {"strategy": "mcts", "samples": 4, "out": tmp_path, "budget_tokens": 300}
        found = cotree.evaluate(server.url, ["letters"], **how)
    samples = read_samples(tmp_path / JOURNAL)
    trees = [sample.tree for sample in samples if sample.tree is not None]
    assert len(trees) == len(samples) == 12
    assert max(map(len, trees)) >= 8
    (row,) = found.rows
    assert row["test_at"].keys() - {"32"} == {"1", "8"}
    for k, (share, *_) in row["test_at"].items():
        assert share == pytest.approx(sum(any(tree[: int(k)]) for tree in trees) / 12)
    assert row["test_at"]["1"][0] < row["test_at"]["8"][0], "some trees are right, and not at once"
    told = paper_table([found])
    assert "4 samples each at temperature 0.8, mcts by vote, 300 tokens; " in told
    assert "Test@8 of a tree" in told


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"strategy": "mcts", "budget_tokens": None}, "needs --budget-tokens"),
        ({"strategy": "mcts", "temperature": 0.0}, "a temperature to draw with"),
        ({"strategy": "mcts", "value": "verifier"}, "by vote or likelihood"),
        ({"strategy": "trees"}, "strategies are mcts"),
        ({"strategy": "beam", "value": "vote"}, "chooses one chain by its own value"),
        ({}, "go with a --strategy"),
    ],
)
def test_what_does_not_go_together_is_one_line(how: dict[str, Any], message: str, tmp_path: Path) -> None:
    with FakeServerThread(reply=poem) as server:
        with pytest.raises(UsageError, match=message):
            cotree.evaluate(server.url, ["letters"], **(HOW | how | {"out": tmp_path}))
        assert server.calls == 0
