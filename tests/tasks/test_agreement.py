"""Answers that say the same vote together, whatever the gold is."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cotree.tasks import Question, task
from cotree.tasks.base import group_answers

QUESTION = Question("q", "math500", ({"role": "user", "content": "?"},), "7")


def test_equal_values_are_one_answer_and_none_is_no_answer() -> None:
    answers = ["1/2", "8", None, "0.5", r"\frac{1}{2}", "8"]
    assert group_answers(task("math500"), QUESTION, answers) == [0, 1, None, 0, 0, 1]


@given(st.lists(st.sampled_from(["4", "4.0", "04", "5", None])), st.sampled_from(["4", "5", "", "6"]))
def test_the_gold_changes_nothing(answers: list[str | None], gold: str) -> None:
    arithmetic = task("arithmetic")
    question = arithmetic.questions("test", 1)[0]
    found = group_answers(arithmetic, replace(question, gold=gold), answers)
    assert found == group_answers(arithmetic, question, answers)
    # Groups are numbered as they appear.
    seen = [g for g in found if g is not None]
    assert [g for i, g in enumerate(seen) if g not in seen[:i]] == list(range(len(set(seen))))


def test_plans_are_one_when_their_actions_are_though_several_are_right() -> None:
    assert group_answers(task("blocksworld"), QUESTION, ["(pick-up a)", "(put-down a)", "(pick-up a)"]) == [0, 1, 0]


def test_free_texts_cannot_vote() -> None:
    with pytest.raises(ValueError, match="free texts"):
        group_answers(task("ifeval"), QUESTION, ["one", "one"])
