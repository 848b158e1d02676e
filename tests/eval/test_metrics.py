"""The numbers of a row, by hand and against enumeration."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from statistics import fmean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cotree.base.errors import CotreeError
from cotree.base.statistics import clustered_interval, constant_baseline, wilson_interval
from cotree.eval.journal import EvalSample
from cotree.eval.metrics import score_samples, score_tasks
from cotree.eval.scores import FamilyScores
from cotree.tasks import task
from cotree.tasks.base import Asked, VerdictKind

LETTERS = task("letters")
ASKED: list[Asked] = [(LETTERS, question) for question in LETTERS.questions("test", 6)]
LOOP = "I count the apples once more. " * 100


def sample(i: int, kind: VerdictKind, n: int = 0, answer: str | None = "2", **more: object) -> EvalSample:
    question = ASKED[i][1]
    one = EvalSample(
        "letters", question.id, "x", "stop", 3, 10, kind, answer, question.gold, sample=n, lenient_verdict=kind
    )
    return replace(one, **more)  # type: ignore[arg-type]


def test_no_answer_is_loop_or_cut_off_or_finished() -> None:
    said = [
        sample(0, "correct", response=LOOP),
        sample(1, "wrong", finish_reason="length"),
        sample(2, "no_answer", response=LOOP, finish_reason="length"),
        sample(3, "no_answer", response=LOOP),
        sample(4, "no_answer", finish_reason="length", lenient_verdict="correct"),
        sample(5, "no_answer"),
    ]
    (row,) = score_tasks(ASKED, said)
    assert (row.loop, row.truncated, row.finished_without_answer) == (2 / 6, 1 / 6, 1 / 6)
    assert row.no_answer == 4 / 6
    assert (row.accuracy, row.lenient) == (1 / 6, 2 / 6)
    assert (row.low, row.high) == wilson_interval(1, 6)
    assert (row.accuracy_answered, row.mean_tokens) == (1 / 2, 3)
    (row,) = score_tasks(ASKED, [sample(i, "wrong", answer=answer) for i, answer in enumerate("3252")])
    assert (row.commonest, row.commonest_share) == ("2", 0.5)
    assert (row.test_at, row.majority, row.samples) == ({}, None, 1), "a greedy answer is no sample"


def test_over_reflection_and_instruction_failure_are_those_of_a_diagnosis() -> None:
    said = [
        sample(0, "correct", response="<think>Wait, wait"),  # thinking that is never closed
        sample(1, "wrong", response="Wait, no. " * 9),
        sample(2, "no_answer", response="Wait, no. " * 9),
        sample(3, "no_answer"),
    ]
    (row,) = score_tasks(ASKED, said)
    assert (row.over_reflection, row.instruction_failure, row.no_answer) == (1 / 4, 3 / 4, 2 / 4)


def test_what_could_not_be_judged_is_in_no_number_and_counted() -> None:
    samples = [sample(0, "correct"), sample(1, "wrong"), sample(2, "undecided")]
    (row,), (without,) = score_tasks(ASKED, samples), score_tasks(ASKED, samples[:2])
    assert row.undecided == 1 and row.n == 2
    assert row.model_copy(update={"undecided": 0}) == without
    with pytest.raises(CotreeError, match="letters: no reply could be judged"):
        score_tasks(ASKED, samples[2:])
    golds = [ASKED[i][1].gold for i in (0, 1)]
    (baseline,) = score_samples("m", ASKED[:3], samples, Path()).baselines
    assert (baseline.answer, baseline.accuracy) == constant_baseline(golds)


def test_a_lenient_answer_that_could_not_be_judged_is_in_no_lenient_number() -> None:
    unsure = sample(2, "no_answer", answer=None, lenient_verdict="undecided")
    (row,) = score_tasks(ASKED, [sample(0, "correct"), sample(1, "wrong"), unsure])
    assert (row.n, row.no_answer, row.lenient) == (3, 1 / 3, 1 / 2)
    (row,) = score_tasks(ASKED, [unsure])
    assert (row.accuracy, row.lenient) == (0, None)


def test_an_answer_of_a_tree_that_could_not_be_judged_is_not_among_its_first() -> None:
    said = [sample(0, "correct", n, temperature=1.0, tree_correct=[None, n < 2, *[True] * 6]) for n in range(4)]
    (row,) = score_tasks(ASKED, said)
    assert {k: share for k, (share, *_) in row.test_at.items()} == {"1": 0.5}, "none has 8 that were judged"


KINDS: tuple[VerdictKind, ...] = ("correct", "wrong", "no_answer")
drawn = st.tuples(st.sampled_from(KINDS), st.sampled_from(["stop", "length", "content_filter"]),
                  st.sampled_from(["x", LOOP]), st.integers(0, 4096))  # fmt: skip


@settings(max_examples=30, deadline=None)
@given(st.lists(drawn, min_size=1, max_size=6))
def test_a_row_adds_up(given: list[tuple[VerdictKind, str, str, int]]) -> None:
    said = [
        sample(i, kind, answer=None if kind == "no_answer" else "2", finish_reason=why, response=text, tokens=tokens)
        for i, (kind, why, text, tokens) in enumerate(given)
    ]
    (row,) = score_tasks(ASKED, said)
    wrong = sum(kind == "wrong" for kind, *_ in given) / len(given)
    assert row.accuracy + wrong + row.no_answer == pytest.approx(1)
    parts = [part for part in (row.loop, row.truncated, row.finished_without_answer) if part is not None]
    assert len(parts) == 3 and sum(parts) == pytest.approx(row.no_answer)
    assert row.low <= row.accuracy <= row.high
    assert row.mean_tokens == pytest.approx(fmean(tokens for *_, tokens in given))
    if row.accuracy_answered is None:
        assert row.no_answer == 1 and row.commonest is None and row.commonest_share is None
    else:
        assert row.accuracy_answered * (1 - row.no_answer) == pytest.approx(row.accuracy)
        assert (row.commonest, row.commonest_share) == ("2", 1.0)


@settings(max_examples=15, deadline=None)  # a bootstrap for each number
@given(st.lists(st.lists(st.booleans(), min_size=9, max_size=9), min_size=1, max_size=6))
def test_test_at_k_is_what_all_subsets_of_samples_give(right: list[list[bool]]) -> None:
    said = [
        sample(i, "correct" if ok else "wrong", n, temperature=0.7)
        for i, answers in enumerate(right)
        for n, ok in enumerate(answers)
    ]
    (row,) = score_tasks(ASKED, said)
    assert row.test_at.keys() == {"1", "8"}, "32 are more than there are"
    for k, (value, low, high) in row.test_at.items():
        subsets = [any(chosen) for answers in right for chosen in combinations(answers, int(k))]
        assert value == pytest.approx(fmean(subsets))
        assert 0 <= low <= value + 1e-12 and value - 1e-12 <= high <= 1
    assert row.accuracy == pytest.approx(row.test_at["1"][0])
    assert (row.n, row.samples) == (len(right), 9)
    least, most = wilson_interval(sum(map(sum, right)) / 9, len(right))
    assert row.low <= least + 1e-12 and most - 1e-12 <= row.high, "never narrower than Wilson's on questions"


@pytest.mark.parametrize(
    ("answers", "right"),
    [
        (("gold", "7", "8", "gold.0"), True),
        (("7", "gold", "gold", "7"), False),
        (("gold", "7", "7", "gold"), True),
        ((None, None, None, None), False),
        ((None, "gold", None, None), True),
    ],
)
def test_a_vote_counts_equal_answers_and_ties_go_to_the_first(answers: tuple[str | None, ...], right: bool) -> None:
    said = []
    for n, told in enumerate(answers):
        answer = told and told.replace("gold", ASKED[0][1].gold)
        kind: VerdictKind = "no_answer" if told is None else "correct" if "gold" in told else "wrong"
        said.append(sample(0, kind, n, answer, temperature=1.0))
    (row,) = score_tasks(ASKED, said)
    assert row.majority == (float(right), *wilson_interval(right, 1))


def test_the_share_of_shortest_plans_is_of_the_correct_ones() -> None:
    blocks = task("blocksworld")
    question = ASKED[0][1]
    asked: list[Asked] = [(blocks, replace(question, task="blocksworld", id=str(i))) for i in range(4)]
    kinds: list[tuple[VerdictKind, str, str]] = [
        ("correct", "optimal, 2 steps", "3 blocks"),
        ("correct", "4 steps, 2 would do", "3 blocks"),
        ("wrong", "", "3 blocks"),
        ("no_answer", "", "4 blocks"),
    ]
    said = [
        EvalSample("blocksworld", str(i), "x", "stop", 3, 9, kind, "p", "p", detail=detail, family=family)
        for i, (kind, detail, family) in enumerate(kinds)
    ]
    (row,) = score_tasks(asked, said)
    assert row.families["3 blocks"] == FamilyScores(n=3, accuracy=2 / 3, no_answer=0, optimal=0.5)
    assert row.families["4 blocks"] == FamilyScores(n=1, accuracy=0, no_answer=1, optimal=None)


def test_percentiles_are_tokens_that_were_generated() -> None:
    (row,) = score_tasks(ASKED, [sample(i, "wrong", tokens=10 * (i + 1), max_tokens=64) for i in range(6)])
    assert (row.tokens_p50, row.tokens_p90, row.tokens_p99, row.max_tokens) == (30, 60, 60, 64)


def test_the_clustered_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    """Questions differ in difficulty, so their samples resemble each other."""
    rng, truth, covered = random.Random(0), 0.5, 0
    for _ in range(200):
        chances = [rng.choice((0.1, 0.9)) for _ in range(60)]
        shares = [fmean(rng.random() < p for _ in range(8)) for p in chances]
        low, high = clustered_interval(shares)
        covered += low <= truth <= high
    assert 0.92 <= covered / 200 <= 1.0
    assert clustered_interval([0.0] * 20) == wilson_interval(0, 20)
