"""The numbers of an evaluation, out of its samples: a row for each task, and for each later turn of a conversation.

Invariants: a row has the same number of samples for every question, all greedy or all sampled; its interval is over
questions, never over samples; and nothing here asks a model.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any

from cotree.base.statistics import (
    FEWEST_TREES,
    clustered_interval,
    constant_baseline,
    minimum_detectable_difference,
    pass_at_k,
    tree_test_at_k,
    wilson,
)
from cotree.eval.asking import Asked, turns_of
from cotree.eval.journal import EvalSample, by_part
from cotree.tasks import Question, Task
from cotree.tasks.agreement import groups
from cotree.tasks.blocksworld import Blocksworld
from cotree.tasks.diagnosis import diagnose
from cotree.tasks.instructions import if_scores, instruction_results

# The paper's Test@1, Test@8, Test@32.
_TEST_AT = (1, 8, 32)
Share = list[float]  # a share of questions, and the low and high of its 95% interval


def outcomes(questions: Sequence[Asked], samples: Sequence[EvalSample]) -> list[dict[str, Any]]:
    """The rows, in the order of the samples: fractions of all samples, None where nothing defines one.

    task: `EvalSample.part`. n, samples: questions, and samples of each.
    temperature, top_p, decoding, max_tokens: as in `EvalSample`.
    accuracy: avg@n, with its 95% interval `low` to `high`; `lenient` is that under lenient extraction, and
        `accuracy_answered` that of the samples with an answer.
    no_answer: `loop` (the text repeats itself) plus `truncated` (no loop, cut by max_tokens) plus
        `finished_without_answer`.
    commonest: the answer given most often, with its share of the samples with an answer: near 1, a model has learnt a
        constant.
    test_at: the paper's Test@k as [share, low, high] for each k up to `samples`, of sampled answers only; of trees for
        each k up to the chains of the largest one, if there are enough trees.
    majority: how often the answer that most samples give is right, as [share, low, high]; None where answers do not
        vote.
    mean_tokens, tokens_p50, ...: mean and percentiles of generated tokens.
    detectable: the least difference that two such rows can show.
    families: n, accuracy, no_answer and `optimal` by family; `optimal` is the share of shortest plans among the
        correct ones (Blocksworld).

    May wait for the math workers, where answers vote.
    """
    asked = {(question.task, question.id): (task, question) for task, question in questions}
    return [_outcome(part, by_question, asked) for part, by_question in by_part(samples).items()]


def _outcome(
    part: str, by_question: Mapping[str, Sequence[EvalSample]], asked: Mapping[tuple[str, str], Asked]
) -> dict[str, Any]:
    samples = [sample for found in by_question.values() for sample in found]
    first, n = samples[0], len(samples) // len(by_question)
    task, _ = asked[first.task, first.id]
    ended = Counter(map(_ended, samples))
    accuracy = ended["correct"] / len(samples)
    _, low, high = _share([fmean(s.kind == "correct" for s in found) for found in by_question.values()])
    answers = [sample.answer for sample in samples if sample.answer is not None]
    commonest, commonest_share = constant_baseline(answers) if answers else (None, None)
    answered = ended["correct"] + ended["wrong"]
    tokens = sorted(sample.tokens for sample in samples)
    votes = n > 1 and task.comparable
    return {
        "task": part,
        "n": len(by_question),
        "samples": n,
        "temperature": first.temperature,
        "top_p": first.top_p,
        "decoding": first.decoding,
        "max_tokens": first.max_tokens,
        "accuracy": accuracy,
        "low": low,
        "high": high,
        "lenient": fmean((sample.lenient or sample.kind) == "correct" for sample in samples),
        "no_answer": (len(samples) - answered) / len(samples),
        "loop": ended["loop"] / len(samples),
        "truncated": ended["truncated"] / len(samples),
        "finished_without_answer": ended["finished"] / len(samples),
        "accuracy_answered": ended["correct"] / answered if answered else None,
        "commonest": commonest,
        "commonest_share": commonest_share,
        "test_at": _test_at(by_question.values()),
        "majority": _share([_vote(*asked[s[0].task, s[0].id], s) for s in by_question.values()]) if votes else None,
        "mean_tokens": fmean(tokens),
        "tokens_p50": _percentile(tokens, 50),
        "tokens_p90": _percentile(tokens, 90),
        "tokens_p99": _percentile(tokens, 99),
        "detectable": minimum_detectable_difference(len(by_question), accuracy),
        "families": _families(task, samples),
    }


def _ended(sample: EvalSample) -> str:
    """Correct, wrong, or why there is no answer."""
    if sample.kind != "no_answer":
        return sample.kind
    if diagnose(sample.response, finish_reason=sample.finish_reason, answered=False).loop:
        return "loop"
    return "truncated" if sample.finish_reason == "length" else "finished"


def _test_at(questions: Collection[Sequence[EvalSample]]) -> dict[str, Share]:
    """Test@k over questions: of independent samples by the formula, of trees by their first k chains."""
    first = next(iter(questions))
    if first[0].tree is not None:
        trees = [[sample.tree or [] for sample in found] for found in questions]
        most = max(len(tree) for of_question in trees for tree in of_question)
        of_trees = [k for k in _TEST_AT if k <= most and len(first) >= FEWEST_TREES]
        return {str(k): _share([tree_test_at_k(of_question, k) for of_question in trees]) for k in of_trees}
    counts = [(len(found), sum(sample.kind == "correct" for sample in found)) for found in questions]
    sampled = [k for k in _TEST_AT if k <= len(first) and first[0].temperature > 0]
    return {str(k): _share([pass_at_k(n, right, k) for n, right in counts]) for k in sampled}


def _share(values: Sequence[float]) -> Share:
    """The mean over questions; Wilson's interval where each is all or nothing, as one sample a question is."""
    whole = all(value in (0, 1) for value in values)
    low, high = wilson(sum(values), len(values)) if whole else clustered_interval(values)
    return [fmean(values), low, high]


def _vote(task: Task, question: Question, samples: Sequence[EvalSample]) -> float:
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


def instruction_scores(questions: Sequence[Asked], samples: Sequence[EvalSample]) -> list[dict[str, Any]]:
    """The paper's IF(Zh), IF(En) and IF(Other), by turn: the rows of `instructions.if_scores` for each task that has
    instructions, with the task's name and the ratio of no-answer outputs. Out of the stored responses alone."""
    # What was replied between two turns decides no instruction.
    asked = {(turn.task, turn.id, turn.turn): turn for _, first in questions for turn in turns_of(first)}
    rows: list[dict[str, Any]] = []
    for name in dict.fromkeys(sample.task for sample in samples):
        found = [
            (instruction_results(asked[name, s.id, s.turn], s.response, s.finish_reason), s.kind == "no_answer")
            for s in samples
            if s.task == name and "instructions" in asked[name, s.id, s.turn].spec
        ]
        for score in if_scores(result for result, _ in found):
            none = [none for r, none in found if r.group == score.group and score.turn in (None, r.turn)]
            rows.append({"task": name, **asdict(score), "no_answer": fmean(none)})
    return rows
