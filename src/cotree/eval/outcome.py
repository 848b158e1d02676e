"""The numbers of an evaluation, out of its samples: a row for each task, and for each later turn of a conversation.

Invariants: a row has the same number of samples for every question, all greedy or all sampled; its interval is over
questions, never over samples; and nothing here asks a model.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from statistics import fmean
from typing import Any

from cotree.eval.asking import Asked
from cotree.eval.journal import EvalSample
from cotree.eval.metrics import (
    FEWEST_TREES,
    Metrics,
    TreeAnswers,
    clustered_interval,
    constant_baseline,
    minimum_detectable_difference,
    pass_at_k,
    summarize,
    tree_test_at_k,
    wilson,
)
from cotree.tasks import Task
from cotree.tasks.agreement import groups
from cotree.tasks.blocksworld import Blocksworld

# The paper's Test@1, Test@8, Test@32.
_TEST_AT = (1, 8, 32)
Share = list[float]  # a share of questions, and the low and high of its 95% interval


class Outcome(Metrics):
    """A row: `Metrics`, with `n` questions of `samples` samples each, so `accuracy` is avg@n.

    decoding: the search that chose the answers, "" for plain sampling. lenient: the accuracy under lenient extraction.
    test_at: the paper's Test@k for each k up to `samples`, of sampled answers only; of trees for each k up to the
    chains of the largest one, if there are enough trees. majority: how often the answer that most samples give is right
    (None: nothing to vote on). tokens_p50, ...: percentiles of generated tokens. detectable: the least difference that
    two such rows can show. families: accuracy, no-answer ratio and `optimal` by family; `optimal` is the share of
    shortest plans among the correct ones (Blocksworld; None where there is none).
    """

    task: str
    samples: int
    temperature: float
    top_p: float
    decoding: str
    max_tokens: int
    lenient: float
    test_at: dict[str, Share]
    majority: Share | None
    tokens_p50: int
    tokens_p90: int
    tokens_p99: int
    detectable: float | None
    families: dict[str, dict[str, Any]]


def outcomes(questions: Sequence[Asked], samples: Sequence[EvalSample]) -> list[Outcome]:
    """The rows, in the order of the samples. May wait for the math workers, where answers vote."""
    asked = {(question.task, question.id): (task, question) for task, question in questions}
    parts: dict[str, dict[str, list[EvalSample]]] = {}
    for sample in samples:
        parts.setdefault(sample.part, {}).setdefault(sample.id, []).append(sample)
    return [_outcome(part, by_question, asked) for part, by_question in parts.items()]


def _outcome(
    part: str, by_question: Mapping[str, Sequence[EvalSample]], asked: Mapping[tuple[str, str], Asked]
) -> Outcome:
    samples = [sample for found in by_question.values() for sample in found]
    first, n = samples[0], len(samples) // len(by_question)
    task, _ = asked[first.task, first.id]
    metrics = summarize([sample.judged() for sample in samples])
    right = {name: sum(sample.kind == "correct" for sample in found) for name, found in by_question.items()}
    if n > 1:
        metrics["low"], metrics["high"] = clustered_interval([count / n for count in right.values()])
    metrics["n"] = len(by_question)
    lengths = sorted(sample.tokens for sample in samples)
    votes = n > 1 and task.comparable
    return Outcome(
        **metrics,
        task=part,
        samples=n,
        temperature=first.temperature,
        top_p=first.top_p,
        decoding=first.decoding,
        max_tokens=first.max_tokens,
        lenient=fmean((sample.lenient or sample.kind) == "correct" for sample in samples),
        test_at=_test_at(by_question.values()),
        majority=_share([_vote(*asked[s[0].task, s[0].id], s) for s in by_question.values()]) if votes else None,
        tokens_p50=_percentile(lengths, 50),
        tokens_p90=_percentile(lengths, 90),
        tokens_p99=_percentile(lengths, 99),
        detectable=minimum_detectable_difference(len(by_question), metrics["accuracy"]),
        families=_families(task, samples),
    )


def _test_at(questions: Collection[Sequence[EvalSample]]) -> dict[str, Share]:
    """Test@k over questions: of independent samples by the formula, of trees by their first k chains."""
    trees = [[TreeAnswers(sample.tree) for sample in found if sample.tree is not None] for found in questions]
    first = next(iter(questions))
    if any(trees):
        most = max(len(tree.correct) for of_question in trees for tree in of_question)
        of_trees = [k for k in _TEST_AT if k <= most and len(first) >= FEWEST_TREES]
        return {str(k): _share([tree_test_at_k(of_question, k) for of_question in trees]) for k in of_trees}
    counts = [(len(found), sum(sample.kind == "correct" for sample in found)) for found in questions]
    sampled = [k for k in _TEST_AT if k <= len(first) and first[0].temperature > 0]
    return {str(k): _share([pass_at_k(n, right, k) for n, right in counts]) for k in sampled}


def _share(values: Sequence[float]) -> Share:
    whole = all(value in (0, 1) for value in values)
    low, high = wilson(sum(values), len(values)) if whole else clustered_interval(values)
    return [fmean(values), low, high]


def _vote(task: Task, question: Any, samples: Sequence[EvalSample]) -> float:
    """1.0 if the answer that most samples give is right; of two that are as frequent, the one that came first."""
    found = groups(task, question, [sample.answer for sample in samples])
    counts = Counter(group for group in found if group is not None)
    if not counts:
        return 0.0
    # A counter lists equal counts in the order of their first answers.
    return float(samples[found.index(counts.most_common(1)[0][0])].kind == "correct")


def _percentile(ordered: Sequence[int], percent: int) -> int:
    """The least value that so many percent are not above (nearest rank)."""
    return ordered[math.ceil(len(ordered) * percent / 100) - 1]


def _families(task: Task, samples: Sequence[EvalSample]) -> dict[str, dict[str, Any]]:
    found: dict[str, list[EvalSample]] = {}
    for sample in samples:
        found.setdefault(sample.family, []).append(sample)
    plans = isinstance(task, Blocksworld)
    rows: dict[str, dict[str, Any]] = {}
    for family, members in sorted(found.items()) if plans or len(found) > 1 else ():
        correct = [sample for sample in members if sample.kind == "correct"]
        rows[family] = {
            "n": len({sample.id for sample in members}),
            "accuracy": len(correct) / len(members),
            "no_answer": fmean(sample.kind == "no_answer" for sample in members),
        }
        if plans:
            best = [sample.detail.startswith("optimal") for sample in correct]
            rows[family]["optimal"] = fmean(best) if best else None
    return rows


def constant_baselines(questions: Sequence[Asked]) -> list[dict[str, Any]]:
    """For each task what the best constant answer scores on the first turns; a free text has no such answer."""
    golds: dict[str, list[str]] = {}
    for task, question in questions:
        if task.answer_form != "text":
            golds.setdefault(task.name, []).append(question.gold)
    best = {name: constant_baseline(found) for name, found in golds.items()}
    return [{"task": name, "answer": answer, "accuracy": accuracy} for name, (answer, accuracy) in best.items()]
