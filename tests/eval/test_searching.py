"""Evaluation by search: what a strategy answers is judged as any sample, resumes, and counts all that it generated."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tests.decode.test_strategies import poem, talk
from tests.support.fake_server import FakeServerThread

from cotree.base.errors import UsageError
from cotree.base.progress import Output
from cotree.eval import asking as asking_module
from cotree.eval.evaluate import evaluate, evaluate_model
from cotree.eval.journal import JOURNAL, EvalSample, read_samples
from cotree.eval.settings import AskSettings
from cotree.models.settings import Model
from cotree.report.table import table_of
from cotree.tasks import Question, Task, Verdict, task
from cotree.tasks.base import VERDICT_VERSION
from cotree.tasks.generated import Letters

QUIET = Output(quiet=True)
HOW: dict[str, Any] = {
    "chat": True,
    "served": "fake",
    "limit": 3,
    "temperature": 0.8,
    "budget_tokens": 150,
    "output": QUIET,
}


@pytest.mark.parametrize("strategy", ["mcts", "vote", "best_of_n", "beam"])
def test_a_strategy_is_evaluated_as_any_model_and_resumes(strategy: str, tmp_path: Path) -> None:
    with FakeServerThread(reply=talk, usage="vllm") as server:
        how = HOW | {"strategy": strategy, "samples": 2, "out": tmp_path}
        found = evaluate_model(server.url, ["letters"], **how)
        calls, samples = server.calls, read_samples(tmp_path / JOURNAL)
        # The worked examples of the search are in every prompt.
        assert all(len(request["messages"]) > 4 for request in server.requests)
        again = evaluate_model(server.url, ["letters"], **how)
        assert (again.rows, server.calls) == (found.rows, calls)
    assert len(samples) == 6
    assert {sample.decoding for sample in samples} == {
        f"{strategy} by {'vote' if strategy in ('mcts', 'vote') else 'likelihood'}, 150 tokens"
    }
    assert all((sample.tree_correct is not None) == (strategy == "mcts") for sample in samples)
    assert (found.rows[0].test_at == {}) == (strategy == "mcts"), "two trees are too few"
    assert all(75 < sample.tokens < 300 for sample in samples), "all that was generated is counted"
    assert {sample.verdict for sample in samples} <= {"correct", "wrong"}
    took = sorted(sample.seconds or 0.0 for sample in samples)
    row = found.rows[0]
    assert took[0] > 0
    assert (row.seconds_p50, row.seconds_p95) == (took[2], took[5])
    table = str(table_of([str(tmp_path)]).render("markdown"))
    assert "seconds p50 | seconds p95" in table.splitlines()[0]
    assert f" s (p95 {took[5]:.1f})" in table
    by_question = [{s.response for s in samples if s.id == one.id} for one in samples]
    assert any(len(responses) == 2 for responses in by_question), "each sample has a seed of its own"


def test_test_at_k_of_trees_is_about_the_first_chains_of_each(tmp_path: Path) -> None:
    with FakeServerThread(reply=talk, usage="vllm") as server:
        how = HOW | {"strategy": "mcts", "samples": 4, "out": tmp_path, "budget_tokens": 300}
        found = evaluate_model(server.url, ["letters"], **how)
    samples = read_samples(tmp_path / JOURNAL)
    trees = [sample.tree_correct for sample in samples if sample.tree_correct is not None]
    assert len(trees) == len(samples) == 12
    assert max(map(len, trees)) >= 8
    (row,) = found.rows
    assert row.test_at.keys() - {"32"} == {"1", "8"}
    for k, (share, *_) in row.test_at.items():
        assert share == pytest.approx(sum(any(tree[: int(k)]) for tree in trees) / 12)
    assert row.test_at["1"][0] < row.test_at["8"][0], "some trees are right, and not at once"
    shown = str(table_of([str(tmp_path)]).render("markdown"))
    assert "4 samples each at temperature 0.8, mcts by vote, 300 tokens; " in shown
    assert "Test@8 of a tree" in shown


def test_verdicts_on_the_chains_of_a_tree_are_those_of_todays_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FakeServerThread(reply=talk, usage="vllm") as server:
        how = HOW | {"strategy": "mcts", "out": tmp_path}
        first = evaluate_model(server.url, ["letters"], **how)
        calls, before = server.calls, read_samples(tmp_path / JOURNAL)
        monkeypatch.setattr(asking_module, "VERDICT_VERSION", VERDICT_VERSION + 1)
        monkeypatch.setattr(Letters, "verify", lambda self, answer, question: Verdict("wrong", 0.0, answer))
        again = evaluate_model(server.url, ["letters"], **how)
        assert server.calls == calls
    assert any(any(sample.tree_correct or ()) for sample in before)
    after = read_samples(tmp_path / JOURNAL)
    assert [sample.tree_answers for sample in after] == [sample.tree_answers for sample in before]
    assert not any(any(sample.tree_correct or ()) for sample in after)
    assert first.rows[0].accuracy >= again.rows[0].accuracy == 0


def test_chains_of_a_tree_that_could_not_be_judged_are_neither_right_nor_wrong_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    verify, unsure = Letters.verify, True

    def stopped(self: Letters, answer: str, question: Question) -> Verdict:
        found = verify(self, answer, question)
        return Verdict.of(None, answer) if unsure and found.kind == "correct" else found

    monkeypatch.setattr(Letters, "verify", stopped)
    monkeypatch.setattr(asking_module, "_judge", partial(judged_wrong, asking_module._judge))
    with FakeServerThread(reply=talk, usage="vllm") as server:
        how = HOW | {"strategy": "mcts", "out": tmp_path}
        evaluate_model(server.url, ["letters"], **how)
        before, journal = read_samples(tmp_path / JOURNAL), (tmp_path / JOURNAL).read_bytes()
        evaluate_model(server.url, ["letters"], **how)
        assert (tmp_path / JOURNAL).read_bytes() == journal, "nothing new is known"
        unsure = False
        evaluate_model(server.url, ["letters"], **how)
    told = {correct for sample in before for correct in sample.tree_correct or ()}
    assert told == {None, False}
    for old, new in zip(before, read_samples(tmp_path / JOURNAL), strict=True):
        assert new.tree_correct == [correct is None for correct in old.tree_correct or ()]


async def judged_wrong(judge: Callable[[Task, Question, EvalSample], Awaitable[EvalSample]], *asked: Any) -> EvalSample:
    """As `judge` finds, but that the reply itself was judged: an undecided one is judged again in any case."""
    return replace(await judge(*asked), verdict="wrong", lenient_verdict="wrong")


def test_a_budget_for_each_question_is_what_another_evaluation_took(tmp_path: Path) -> None:
    letters = task("letters")
    asked = [(letters, question) for question in letters.questions("test", 3)]
    with FakeServerThread(reply=talk, usage="vllm") as server:
        model = Model(url=server.url, model="fake", mode="chat")
        asking = AskSettings(max_tokens=64, temperature=0.8, strategy="vote")
        budgets = {("letters", question.id): 100 * (n + 1) for n, (_, question) in enumerate(asked)}
        some = {key: tokens for key, tokens in budgets.items() if tokens < 300}
        with pytest.raises(UsageError, match=f"`{asked[2][1].id}` of task `letters` has no tokens in the evaluation"):
            evaluate(model, asked, asking, tmp_path, name="m", budgets=some, output=QUIET)
        with pytest.raises(UsageError, match="a strategy needs `budget_tokens`"):
            evaluate(model, asked, asking, tmp_path, name="m", output=QUIET)
        assert server.calls == 0
        evaluate(model, asked, asking, tmp_path, name="m", budgets=budgets, output=QUIET)
    for sample in read_samples(tmp_path / JOURNAL):
        assert abs(sample.tokens - budgets[sample.task, sample.id]) < 30
        assert sample.decoding == "vote by vote, tokens of another evaluation"


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"strategy": "mcts", "budget_tokens": None}, r"needs `budget_tokens` \(--budget-tokens\)"),
        ({"strategy": "mcts", "temperature": 0.0}, "a temperature to draw with"),
        ({"strategy": "mcts", "value": "verifier"}, "`value`: must be 'vote' or 'likelihood'"),
        ({"strategy": "trees"}, "`strategy`: must be 'mcts'"),
        ({"strategy": "beam", "value": "vote"}, "chooses a chain by its own value"),
        ({}, "go with a `strategy`"),
    ],
)
def test_what_does_not_go_together_is_one_line(how: dict[str, Any], message: str, tmp_path: Path) -> None:
    with FakeServerThread(reply=poem) as server:
        with pytest.raises(UsageError, match=message):
            evaluate_model(server.url, ["letters"], **(HOW | how | {"out": tmp_path}))
        assert server.calls == 0
