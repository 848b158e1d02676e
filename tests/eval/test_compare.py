"""Paired tests against enumeration and simulation, and what cannot be compared."""

from __future__ import annotations

import math
import random
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cotree.base.errors import UsageError
from cotree.eval.compare import compare_evaluations, mcnemar_p_value, paired_interval, sign_flip_p_value
from cotree.eval.journal import EvalSample, append_line


@settings(deadline=None)
@given(st.integers(0, 7), st.integers(0, 7))
def test_mcnemar_is_what_all_coin_flips_give_and_sign_flips_agree(gained: int, lost: int) -> None:
    n = gained + lost
    uneven = [abs(2 * sum(flips) - n) >= abs(gained - lost) for flips in product((0, 1), repeat=n)]
    assert mcnemar_p_value(gained, lost) == pytest.approx(sum(uneven) / len(uneven))
    changes = [1.0] * gained + [-1.0] * lost + [0.0] * 5
    assert sign_flip_p_value(changes, draws=2**14) == pytest.approx(mcnemar_p_value(gained, lost))


def test_random_sign_flips_come_close_to_all_of_them() -> None:
    rng = random.Random(1)
    changes = [rng.choice((-0.5, -0.25, 0.25, 0.5, 0.75)) for _ in range(14)]
    assert sign_flip_p_value(changes, draws=10_000) == pytest.approx(sign_flip_p_value(changes, draws=2**14), abs=0.02)
    assert 0 < sign_flip_p_value([1.0] * 40) < 0.001


def test_the_paired_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng, n = random.Random(0), 60
    for gain, loss in ((0.02, 0.02), (0.2, 0.1), (0.4, 0.0)):
        covered = 0
        for _ in range(1000):
            draws = [rng.random() for _ in range(n)]
            low, high = paired_interval([1.0 if d < gain else -1.0 if d < gain + loss else 0.0 for d in draws])
            covered += low <= gain - loss <= high
        assert 0.93 <= covered / 1000 <= 1.0
    low, high = paired_interval([0.0] * 30)
    assert low == -high < 0


def journal(path: Path, right: list[list[bool]], **changes: object) -> Path:
    one = EvalSample("letters", "", "x", "stop", 3, 9, "wrong", "2", "3", prompt_hash="abc", max_tokens=16)
    for i, answers in enumerate(right):
        for n, ok in enumerate(answers):
            told = replace(one, id=f"q{i}", sample=n, verdict="correct" if ok else "wrong")
            append_line(path, asdict(replace(told, **changes)))  # type: ignore[arg-type]
    return path


def test_a_question_that_could_not_be_judged_is_left_out(tmp_path: Path) -> None:
    first = journal(tmp_path / "a.jsonl", [[True], [False], [False]])
    second = journal(tmp_path / "b.jsonl", [[True], [True], [False]])
    undecided = EvalSample("letters", "q1", "x", "stop", 3, 9, "undecided", "2", "3", prompt_hash="abc", max_tokens=16)
    append_line(second, asdict(undecided))
    (found,) = compare_evaluations(first, second)
    assert (found.n, found.difference) == (2, 0.0)


def test_who_gained_and_who_lost(tmp_path: Path) -> None:
    first = journal(tmp_path / "a.jsonl", [[True], [False], [False], [True]])
    second = journal(tmp_path / "b" / "journal.jsonl", [[False], [True], [True], [True]]).parent
    (found,) = compare_evaluations(first, second)
    assert (found.first, found.second, found.difference, found.p_value) == (0.5, 0.75, 0.25, 1.0)
    assert found.changed == {"q0": (1, 0), "q1": (0, 1), "q2": (0, 1)}
    assert found.lines()[1:] == ["  gained 2: q1, q2", "  lost 1: q0"]
    assert "+25.0 points" in found.lines()[0] and "p = 1 (exact McNemar)" in found.lines()[0]
    assert found.low < 0.25 < found.high
    (same,) = compare_evaluations(first, first)
    assert len(same.lines()) == 1, "nobody gained or lost"


@pytest.mark.parametrize("changed", [0, 3, 7])
def test_what_can_be_expected_to_show_shows(changed: int, tmp_path: Path) -> None:
    """A change of that size among as many changed questions is significant, and half of it is not."""
    first = journal(tmp_path / "a.jsonl", [[True]] * 60)
    second = journal(tmp_path / "b.jsonl", [[index >= changed] for index in range(60)])
    (found,) = compare_evaluations(first, second)
    assert f"{100 * found.detectable:.1f} points or more can be expected to show" in found.lines()[0]
    lost = math.ceil(60 * found.detectable)
    assert mcnemar_p_value(0, lost) < 0.05 < mcnemar_p_value(0, lost // 2)


def test_several_samples_are_compared_by_question(tmp_path: Path) -> None:
    first = journal(tmp_path / "a.jsonl", [[True, False], [False, False], [True, True]] * 4)
    second = journal(tmp_path / "b.jsonl", [[True, True], [False, True], [True, True]] * 4)
    (found,) = compare_evaluations(first, second)
    assert (found.n, found.test) == (12, "sign-flip permutation")
    assert found.p_value == 2 / 2**8
    assert found.lines()[1].startswith("  gained 8: q0 (0.50 -> 1.00)")


@pytest.mark.parametrize(
    ("changes", "right", "message"),
    [
        ({}, [[True]], "b.jsonl lacks question `q1` of letters"),
        ({}, [[True, True], [True, True]], "with samples 1 in "),
        ({"max_tokens": 32}, [[True], [True]], "with max_tokens 16 in "),
        ({"temperature": 0.7}, [[True], [True]], "with temperature 0.0 in "),
        ({"top_p": 0.9}, [[True], [True]], "with top_p 1.0 in "),
        ({"prompt_hash": "def"}, [[True], [True]], "with different prompts in "),
        ({"task": "arithmetic"}, [[True], [True]], "lacks question `q0` of letters"),
    ],
)
def test_what_was_asked_otherwise_is_refused(
    tmp_path: Path, changes: dict[str, object], right: list[list[bool]], message: str
) -> None:
    first = journal(tmp_path / "a.jsonl", [[True], [False]])
    second = journal(tmp_path / "b.jsonl", right, **changes)
    with pytest.raises(UsageError, match=message):
        compare_evaluations(first, second)


def test_ways_of_decoding_are_compared_and_named(tmp_path: Path) -> None:
    first = journal(tmp_path / "a.jsonl", [[True], [False]], decoding="vote by vote, 400 tokens")
    second = journal(tmp_path / "b.jsonl", [[True], [True]], decoding="mcts by vote, 400 tokens")
    (found,) = compare_evaluations(first, second)
    assert found.lines()[0].startswith("letters, vote by vote, 400 tokens -> mcts by vote, 400 tokens: 50.0% -> 100.0%")


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "x"}\n')
    for path, message in ((tmp_path, "no samples at"), (tmp_path / "rows.jsonl", "holds no samples of an evaluation")):
        with pytest.raises(UsageError, match=message):
            compare_evaluations(path, path)
