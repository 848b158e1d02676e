"""The numbers of an evaluation, out of its samples: a row for each task, and for each later turn of a conversation.

A row has the same number of samples for every question, all greedy or all sampled, and its interval is over questions,
never over samples. Nothing here asks a model. Shares are fractions in [0, 1]; None where nothing defines a number.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any, NamedTuple

from cotree.base import statistics
from cotree.eval.asking import turns_of
from cotree.eval.journal import EvalSample, by_task_turn
from cotree.eval.settings import SAMPLING
from cotree.tasks.agreement import group_answers
from cotree.tasks.base import Asked, Question, Task
from cotree.tasks.blocksworld import Blocksworld
from cotree.tasks.diagnosis import diagnose
from cotree.tasks.instructions import IFScore, if_scores, instruction_results

# The paper's Test@1, Test@8, Test@32.
_TEST_AT = (1, 8, 32)


class Accuracy(NamedTuple):
    """A mean over questions with its 95% interval; a list of three in JSON."""

    accuracy: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class FamilyOutcome:
    """The questions of one family of a task. optimal: the share of shortest plans among the correct ones, of plans."""

    n: int
    accuracy: float
    no_answer: float
    optimal: float | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """A row of the table: one model on the questions of one task, or of one later turn of its conversations.

    task: `EvalSample.task_turn`. n, samples: questions, and samples of each.
    temperature, top_p, decoding, max_tokens: as in `EvalSample`.
    accuracy: the share of correct samples (avg@n), with its 95% interval `low` to `high`; `lenient` is that under
        lenient extraction, `accuracy_answered` that of the samples with an answer.
    no_answer: `loop` (the text repeats itself) plus `truncated` (no loop, cut off by max_tokens) plus
        `finished_without_answer`.
    commonest: the answer given most often, with its share of the samples with an answer: near 1, a model has learnt a
        constant.
    test_at: the paper's Test@k for each k up to `samples`, of sampled answers only; of trees for each k up to the
        chains of the largest one, if there are enough trees.
    majority: how often the answer that most samples give is right; None where answers do not vote.
    mean_tokens, tokens_p50, ...: mean and percentiles of generated tokens.
    detectable: the least difference that two such rows can show.
    """

    task: str
    n: int
    samples: int
    temperature: float
    top_p: float
    decoding: str
    max_tokens: int
    accuracy: float
    low: float
    high: float
    lenient: float
    no_answer: float
    loop: float
    truncated: float
    finished_without_answer: float
    accuracy_answered: float | None
    commonest: str | None
    commonest_share: float | None
    test_at: Mapping[str, Accuracy]
    majority: Accuracy | None
    mean_tokens: float
    tokens_p50: int
    tokens_p90: int
    tokens_p99: int
    detectable: float | None
    families: Mapping[str, FamilyOutcome]


@dataclass(frozen=True, slots=True)
class InstructionOutcome(IFScore):
    """What one language group's answers to one turn of a task follow, with the ratio of no-answer outputs."""

    task: str
    no_answer: float


@dataclass(frozen=True, slots=True)
class ConstantBaseline:
    """The best constant answer to a task's questions and its accuracy: what a model gets that ignores the question."""

    task: str
    answer: str
    accuracy: float


@dataclass(frozen=True, slots=True)
class TokensUsed:
    """Tokens of all samples of an evaluation: read as prompts, and generated."""

    prompt: int
    completion: int


@dataclass(frozen=True)
class Evaluated:
    """One model's numbers."""

    model: str
    rows: tuple[Outcome, ...]
    instructions: tuple[InstructionOutcome, ...]
    baselines: tuple[ConstantBaseline, ...]
    tokens: TokensUsed


def compute_metrics(model: str, questions: Sequence[Asked], samples: Sequence[EvalSample]) -> Evaluated:
    """All numbers of a model's samples; may wait for the math workers, where answers vote."""
    return Evaluated(
        model=model,
        rows=tuple(outcomes(questions, samples)),
        instructions=tuple(instruction_scores(questions, samples)),
        baselines=tuple(constant_baselines(questions)),
        tokens=TokensUsed(sum(s.prompt_tokens for s in samples), sum(s.tokens for s in samples)),
    )


def outcomes(questions: Sequence[Asked], samples: Sequence[EvalSample]) -> list[Outcome]:
    """The rows of the table, in the order of the samples."""
    asked = {(question.task, question.id): (task, question) for task, question in questions}
    return [_outcome(row, by_question, asked) for row, by_question in by_task_turn(samples).items()]


def _outcome(
    row: str, by_question: Mapping[str, Sequence[EvalSample]], asked: Mapping[tuple[str, str], Asked]
) -> Outcome:
    samples = [sample for found in by_question.values() for sample in found]
    first, n = samples[0], len(samples) // len(by_question)
    task, _ = asked[first.task, first.id]
    ends = Counter(map(_end, samples))
    answered = ends["correct"] + ends["wrong"]
    answers = [sample.answer for sample in samples if sample.answer is not None]
    commonest, commonest_share = statistics.constant_baseline(answers) if answers else (None, None)
    tokens = sorted(sample.tokens for sample in samples)
    # Percentiles: the least number of tokens that so many percent of the samples do not exceed.
    numbers: dict[str, Any] = {f"tokens_p{p}": tokens[math.ceil(len(tokens) * p / 100) - 1] for p in (50, 90, 99)}
    numbers |= {reason: ends[reason] / len(samples) for reason in ("loop", "truncated", "finished_without_answer")}
    numbers |= {name: getattr(first, name) for name in ("decoding", *SAMPLING)}
    accuracy = _accuracy([fmean(s.verdict == "correct" for s in found) for found in by_question.values()])
    majority = None
    if n > 1 and task.comparable:
        majority = _accuracy([_vote(*asked[found[0].task, found[0].id], found) for found in by_question.values()])
    return Outcome(
        task=row,
        n=len(by_question),
        samples=n,
        **numbers,
        **accuracy._asdict(),
        lenient=fmean((sample.lenient_verdict or sample.verdict) == "correct" for sample in samples),
        no_answer=(len(samples) - answered) / len(samples),
        accuracy_answered=ends["correct"] / answered if answered else None,
        commonest=commonest,
        commonest_share=commonest_share,
        test_at=_test_at(by_question.values()),
        majority=majority,
        mean_tokens=fmean(tokens),
        detectable=statistics.minimum_detectable_difference(len(by_question), accuracy.accuracy),
        families=_families(task, samples),
    )


def _end(sample: EvalSample) -> str:
    """Correct, wrong, or why there is no answer."""
    if sample.verdict != "no_answer":
        return sample.verdict
    if diagnose(sample.response, finish_reason=sample.finish_reason, answered=False).loop:
        return "loop"
    return "truncated" if sample.finish_reason == "length" else "finished_without_answer"


def _test_at(questions: Collection[Sequence[EvalSample]]) -> dict[str, Accuracy]:
    """Test@k over questions: of independent samples by the formula, of trees by their first k chains."""
    first = next(iter(questions))
    if first[0].tree_correct is not None:
        trees = [[sample.tree_correct or [] for sample in found] for found in questions]
        most = max(len(tree) for of_question in trees for tree in of_question)
        of_trees = [k for k in _TEST_AT if k <= most and len(first) >= statistics.MIN_TREES]
        return {str(k): _accuracy([statistics.tree_test_at_k(each, k) for each in trees]) for k in of_trees}
    counts = [(len(found), sum(sample.verdict == "correct" for sample in found)) for found in questions]
    sampled = [k for k in _TEST_AT if k <= len(first) and first[0].temperature > 0]
    return {str(k): _accuracy([statistics.pass_at_k(n, correct, k) for n, correct in counts]) for k in sampled}


def _accuracy(values: Sequence[float]) -> Accuracy:
    """The mean over questions; Wilson's interval where each is all or nothing, as one sample a question is."""
    if all(value in (0, 1) for value in values):
        return Accuracy(fmean(values), *statistics.wilson_interval(sum(values), len(values)))
    return Accuracy(fmean(values), *statistics.clustered_interval(values))


def _vote(task: Task, question: Question, samples: Sequence[EvalSample]) -> float:
    """1.0 if the answer that most samples give is right; of two that are as frequent, the one that came first."""
    found = group_answers(task, question, [sample.answer for sample in samples])
    # A counter lists equal counts in the order of their first answers.
    most = Counter(group for group in found if group is not None).most_common(1)
    return float(samples[found.index(most[0][0])].verdict == "correct") if most else 0.0


def _families(task: Task, samples: Sequence[EvalSample]) -> dict[str, FamilyOutcome]:
    """By family where there are several, and always of plans."""
    names, plans = sorted({sample.family for sample in samples}), isinstance(task, Blocksworld)
    rows: dict[str, FamilyOutcome] = {}
    for family in names if plans or len(names) > 1 else ():
        members = [sample for sample in samples if sample.family == family]
        correct = [sample for sample in members if sample.verdict == "correct"]
        rows[family] = FamilyOutcome(
            n=len({sample.id for sample in members}),
            accuracy=len(correct) / len(members),
            no_answer=fmean(sample.verdict == "no_answer" for sample in members),
            optimal=fmean(s.detail.startswith("optimal") for s in correct) if plans and correct else None,
        )
    return rows


def constant_baselines(questions: Sequence[Asked]) -> list[ConstantBaseline]:
    """For each task what the best constant answer scores on the first turns; a free text has no such answer."""
    golds: dict[str, list[str]] = {}
    for task, question in questions:
        if task.answer_form != "text":
            golds.setdefault(task.name, []).append(question.gold)
    return [ConstantBaseline(name, *statistics.constant_baseline(found)) for name, found in golds.items()]


def instruction_scores(questions: Sequence[Asked], samples: Sequence[EvalSample]) -> list[InstructionOutcome]:
    """The paper's IF(Zh), IF(En) and IF(Other) by turn, for each task that has instructions; from the replies alone."""
    # What was replied between two turns decides no instruction.
    asked = {(turn.task, turn.id, turn.turn): turn for _, first in questions for turn in turns_of(first)}
    rows: list[InstructionOutcome] = []
    for name in dict.fromkeys(sample.task for sample in samples):
        found = [
            (instruction_results(asked[name, s.id, s.turn], s.response, s.finish_reason), s.verdict == "no_answer")
            for s in samples
            if s.task == name and "instructions" in asked[name, s.id, s.turn].spec
        ]
        for score in if_scores(result for result, _ in found):
            none = [none for r, none in found if r.group == score.group and score.turn in (None, r.turn)]
            rows.append(InstructionOutcome(**asdict(score), task=name, no_answer=fmean(none)))
    return rows
