"""Compute the scores of an evaluation from its samples: one row per task, and per later turn of a conversation.

A row has equally many samples for every question, all greedy or all sampled, and its intervals are over questions,
never over samples. Shares are fractions in [0, 1]; None if undefined.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from cotree.base import statistics
from cotree.base.errors import CotreeError
from cotree.eval.asking import turns_of
from cotree.eval.journal import EvalSample, by_task_turn
from cotree.eval.scores import (
    ConstantBaseline,
    Estimate,
    FamilyScores,
    InstructionScores,
    ModelScores,
    TaskScores,
    TokensUsed,
)
from cotree.eval.settings import SAMPLING
from cotree.tasks.base import Asked, Question, Task, group_answers
from cotree.tasks.blocksworld import Blocksworld
from cotree.tasks.diagnosis import diagnose
from cotree.tasks.extract import after_thinking
from cotree.tasks.instructions import GROUPS, InstructionResults, instruction_results

# The paper's Test@1, Test@8, Test@32.
_TEST_AT = (1, 8, 32)
# Shares of prompts and of instructions followed, strict and loose, and the mean of these four, as in Multi-IF.
_SHARES = ("prompt_strict", "instruction_strict", "prompt_loose", "instruction_loose", "average")


def score_samples(model: str, questions: Sequence[Asked], samples: Sequence[EvalSample], folder: Path) -> ModelScores:
    """Compute all scores of a model; majority votes may wait for the math workers."""
    undecided = {(sample.task, sample.id) for sample in samples if not sample.turn and sample.verdict == "undecided"}
    judged = [(task, question) for task, question in questions if (question.task, question.id) not in undecided]
    return ModelScores(
        model=model,
        rows=score_tasks(questions, samples),
        instructions=instruction_scores(questions, samples),
        baselines=constant_baselines(judged),
        tokens=TokensUsed(prompt=sum(s.prompt_tokens for s in samples), completion=sum(s.tokens for s in samples)),
        folder=folder,
    )


def score_tasks(questions: Sequence[Asked], samples: Sequence[EvalSample]) -> list[TaskScores]:
    """Compute the scores of each task and later turn, in the order of the samples."""
    asked = {(question.task, question.id): (task, question) for task, question in questions}
    return [_score_task(name, by_question, asked) for name, by_question in by_task_turn(samples).items()]


def _score_task(
    task_turn: str, by_question: Mapping[str, Sequence[EvalSample]], asked: Mapping[tuple[str, str], Asked]
) -> TaskScores:
    undecided = sum(sample.verdict == "undecided" for found in by_question.values() for sample in found)
    by_question = without_undecided(by_question)
    if not by_question:
        raise CotreeError(f"{task_turn}: no reply could be judged; look at the questions' gold answers")
    samples = [sample for found in by_question.values() for sample in found]
    first, n = samples[0], len(samples) // len(by_question)
    task, _ = asked[first.task, first.id]
    kinds = [_KindOfReply.of(sample) for sample in samples]
    counts = Counter(kind.verdict_or_reason for kind in kinds)
    answered = counts["correct"] + counts["wrong"]
    answers = [sample.answer for sample in samples if sample.answer is not None]
    commonest, commonest_share = statistics.constant_baseline(answers) if answers else (None, None)
    tokens = [sample.tokens for sample in samples]
    seconds = [sample.seconds for sample in samples if sample.seconds is not None]
    numbers: dict[str, Any] = {f"tokens_p{p}": _percentile(tokens, p) for p in (50, 90, 99)}
    numbers |= {f"seconds_p{p}": _percentile(seconds, p) for p in (50, 95)}
    numbers |= {reason: counts[reason] / len(samples) for reason in ("loop", "truncated", "finished_without_answer")}
    numbers |= {
        name: fmean(getattr(kind, name) for kind in kinds) for name in ("over_reflection", "instruction_failure")
    }
    numbers |= {name: getattr(first, name) for name in ("decoding", *SAMPLING)}
    accuracy, low, high = _estimate([fmean(s.verdict == "correct" for s in found) for found in by_question.values()])
    # Lenient extraction may find an answer that is undecided where strict finds none.
    lenient = without_undecided({id_: [_leniently(s) for s in found] for id_, found in by_question.items()})
    majority = None
    if n > 1 and task.comparable:
        majority = _estimate([_vote(*asked[found[0].task, found[0].id], found) for found in by_question.values()])
    return TaskScores(
        task=task_turn,
        n=len(by_question),
        samples=n,
        undecided=undecided,
        **numbers,
        accuracy=accuracy,
        low=low,
        high=high,
        lenient=fmean(s.verdict == "correct" for found in lenient.values() for s in found) if lenient else None,
        no_answer=(len(samples) - answered) / len(samples),
        accuracy_answered=counts["correct"] / answered if answered else None,
        commonest=commonest,
        commonest_share=commonest_share,
        test_at=_test_at(list(by_question.values())),
        majority=majority,
        mean_tokens=fmean(tokens),
        detectable=statistics.minimum_detectable_difference(len(by_question), accuracy),
        families=_families(task, samples),
    )


def _percentile(values: Sequence[float], percent: int) -> float | None:
    """The percentile of values (nearest rank); None if empty."""
    return sorted(values)[math.ceil(len(values) * percent / 100) - 1] if values else None


def without_undecided(by_question: Mapping[str, Sequence[EvalSample]]) -> dict[str, Sequence[EvalSample]]:
    """Drop questions with an undecided sample."""
    return {id_: found for id_, found in by_question.items() if all(sample.verdict != "undecided" for sample in found)}


def _leniently(sample: EvalSample) -> EvalSample:
    """A copy of a sample with its lenient verdict as the verdict."""
    return replace(sample, verdict=sample.lenient_verdict or sample.verdict)


class _KindOfReply(NamedTuple):
    """A reply's verdict, or why it has no answer (loop, cut off by max_tokens, or finished), and the two other kinds of
    formalistic thinking (`tasks.diagnosis.Diagnosis`)."""

    verdict_or_reason: str
    over_reflection: bool
    instruction_failure: bool

    @classmethod
    def of(cls, sample: EvalSample) -> _KindOfReply:
        if sample.verdict != "no_answer":
            return cls(sample.verdict, False, after_thinking(sample.response) is None)
        found = diagnose(sample.response, finish_reason=sample.finish_reason, answered=False)
        reason = "truncated" if sample.finish_reason == "length" else "finished_without_answer"
        return cls("loop" if found.loop else reason, found.over_reflection, found.instruction_failure)


def _test_at(questions: Sequence[Sequence[EvalSample]]) -> dict[str, Estimate]:
    """Test@k (pass@k) over questions: the unbiased estimator for samples; for trees, their first k judged chains."""
    first = questions[0]
    if first[0].tree_correct is not None:
        trees = [[[c for c in s.tree_correct or () if c is not None] for s in found] for found in questions]
        most = max(len(tree) for of_question in trees for tree in of_question)
        of_trees = [k for k in _TEST_AT if k <= most and len(first) >= statistics.MIN_TREES]
        return {str(k): _estimate([statistics.tree_test_at_k(each, k) for each in trees]) for k in of_trees}
    counts = [(len(found), sum(sample.verdict == "correct" for sample in found)) for found in questions]
    sampled = [k for k in _TEST_AT if k <= len(first) and first[0].temperature > 0]
    return {str(k): _estimate([statistics.pass_at_k(n, correct, k) for n, correct in counts]) for k in sampled}


def _estimate(values: Sequence[float]) -> Estimate:
    """Mean over questions with interval; Wilson's if all values are 0 or 1 (one sample a question)."""
    if all(value in (0, 1) for value in values):
        return fmean(values), *statistics.wilson_interval(sum(values), len(values))
    return fmean(values), *statistics.clustered_interval(values)


def _vote(task: Task, question: Question, samples: Sequence[EvalSample]) -> float:
    """1.0 if the samples' majority answer is correct; the first of equally frequent ones."""
    found = group_answers(task, question, [sample.answer for sample in samples])
    # A Counter lists equal counts in order of first occurrence.
    most = Counter(group for group in found if group is not None).most_common(1)
    return float(samples[found.index(most[0][0])].verdict == "correct") if most else 0.0


def _families(task: Task, samples: Sequence[EvalSample]) -> dict[str, FamilyScores]:
    """Scores by family, if there are several, and always for planning tasks."""
    names, plans = sorted({sample.family for sample in samples}), isinstance(task, Blocksworld)
    rows: dict[str, FamilyScores] = {}
    for family in names if plans or len(names) > 1 else ():
        members = [sample for sample in samples if sample.family == family]
        correct = [sample for sample in members if sample.verdict == "correct"]
        rows[family] = FamilyScores(
            n=len({sample.id for sample in members}),
            accuracy=len(correct) / len(members),
            no_answer=fmean(sample.verdict == "no_answer" for sample in members),
            optimal=fmean(s.detail.startswith("optimal") for s in correct) if plans and correct else None,
        )
    return rows


def constant_baselines(questions: Sequence[Asked]) -> list[ConstantBaseline]:
    """The accuracy of each task's best constant answer on first turns; none for free-text tasks."""
    golds: dict[str, list[str]] = {}
    for task, question in questions:
        if task.answer_form != "text":
            golds.setdefault(task.name, []).append(question.gold)
    best = {name: statistics.constant_baseline(found) for name, found in golds.items()}
    return [ConstantBaseline(task=name, answer=answer, accuracy=share) for name, (answer, share) in best.items()]


def instruction_scores(questions: Sequence[Asked], samples: Sequence[EvalSample]) -> list[InstructionScores]:
    """The paper's IF(Zh), IF(En) and IF(Other) by turn, for each task with instructions."""
    # Earlier replies do not affect instructions, so turns use empty ones.
    asked = {(turn.task, turn.id, turn.turn): turn for _, first in questions for turn in turns_of(first)}
    rows: list[InstructionScores] = []
    for name in dict.fromkeys(sample.task for sample in samples):
        of_task = [(asked[name, s.id, s.turn], s) for s in samples if s.task == name]
        followed = [instruction_results(q, s.response, s.finish_reason) for q, s in of_task if "instructions" in q.spec]
        rows += scores_by_group(name, followed)
    return rows


def scores_by_group(task: str, results: Sequence[InstructionResults]) -> list[InstructionScores]:
    """A row per group and turn, then the mean of a group's turns; groups in the paper's order."""
    rows: list[InstructionScores] = []
    for group in GROUPS:
        of_group = [result for result in results if result.group == group]
        numbers = sorted({result.turn for result in of_group})
        turns = [_turn_scores(task, [each for each in of_group if each.turn == turn]) for turn in numbers]
        rows += turns
        if len(turns) > 1:
            means = {share: fmean(getattr(row, share) for row in turns) for share in _SHARES}
            rows.append(_turn_scores(task, of_group).model_copy(update={"turn": None, **means}))
    return rows


def _turn_scores(task: str, results: Sequence[InstructionResults]) -> InstructionScores:
    """Shares of prompts and instructions followed in one group and turn, strict and loose."""
    strict, loose = [result.strict for result in results], [result.loose for result in results]
    shares = [share for rows in (strict, loose) for share in (fmean(map(all, rows)), fmean(chain(*rows)))]
    return InstructionScores(
        task=task,
        group=results[0].group,
        turn=results[0].turn,
        prompts=len(results),
        no_answer=fmean(not result.answered for result in results),
        **dict(zip(_SHARES, [*shares, fmean(shares)], strict=True)),
    )
