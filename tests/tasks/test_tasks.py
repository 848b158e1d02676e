"""Generated tasks: disjoint splits, right golds, balanced counts; extraction: closed forms only."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cotree.errors import UsageError
from cotree.eval.metrics import constant_baseline
from cotree.tasks import TASKS, Question, task
from cotree.tasks.extract import extract_answer, last_boxed

GENERATED = [name for name, kind in TASKS.items() if kind.source is None]


def solve(question: Question) -> str:
    """The answer, computed from the text alone."""
    text = question.messages[-1]["content"].removesuffix(" Put the final answer in \\boxed{}.")
    numbers = [int(n) for n in re.findall(r"\d+", text)]
    if question.task == "letters":
        letter, word = re.findall(r"letter (\w) appear in ([\w ]+)\?", text)[0]
        return str(word.split().count(letter))
    if question.family == "largest":
        return str(max(numbers))
    if question.family == "product":
        return str(numbers[0] * numbers[1])
    if question.family == "difference":
        return str(numbers[0] - numbers[1])
    return str(numbers[0] + numbers[1])


@pytest.mark.parametrize("name", GENERATED)
def test_golds_are_right_and_splits_disjoint(name: str) -> None:
    splits = {split: task(name).questions(split) for split in ("train", "dev", "test")}
    texts = [{q.messages[-1]["content"] for q in questions} for questions in splits.values()]
    assert len(set.union(*texts)) == sum(map(len, texts))
    for questions in splits.values():
        assert len({q.id for q in questions}) == len(questions) >= 48
        for q in questions:
            assert solve(q) == q.gold
            assert task(name).judge(q, f"So \\boxed{{{q.gold}}}").kind == "correct"
            assert task(name).judge(q, f"So \\boxed{{{q.gold}7}}").kind == "wrong"
            assert task(name).judge(q, f"I think it is {q.gold}").kind == "no_answer"


def test_letters_are_balanced_and_words_disjoint() -> None:
    for n in (30, 60, 138):
        assert constant_baseline([q.gold for q in task("letters").questions("test", n)])[1] == pytest.approx(1 / 3)
    words = [{q.id.split("-")[0] for q in task("letters").questions(s)} for s in ("train", "dev", "test")]
    assert len(set.union(*words)) == sum(map(len, words))


@pytest.mark.parametrize("name", GENERATED)
def test_worked_examples_are_right_and_never_the_question_itself(name: str) -> None:
    for question in task(name).questions("train"):
        for example in task(name).worked_examples(question):
            shown = Question(
                "x", name, ({"role": "user", "content": example.question},), example.answer, question.family
            )
            assert solve(shown) == example.answer
            assert example.question != question.messages[-1]["content"]


def test_questions_are_the_same_every_time() -> None:
    assert task("arithmetic").questions("test", 8) == task("arithmetic").questions("test", 40)[:8]


def test_bad_names_and_numbers() -> None:
    with pytest.raises(UsageError, match="did you mean `letters`"):
        task("leters")
    with pytest.raises(UsageError, match="questions in split `dev`, not 100000"):
        task("letters").questions("dev", 100000)
    with pytest.raises(UsageError, match="questions in split `dev`, not 100000"):
        task("arithmetic").questions("dev", 100000)


@pytest.mark.parametrize(
    ("text", "finish", "strict", "lenient"),
    [
        (r"so \boxed{\frac{1}{2}} or \boxed{3", "stop", r"\frac{1}{2}", r"\frac{1}{2}"),
        (r"\boxed{4} then \boxed{5}", "stop", "5", "5"),
        (r"\boxed{}", "stop", None, None),
        ("work\n#### 1,204", "stop", "1,204", "1,204"),
        ("The answer is: 12.", "stop", "12", "12"),
        ("The answer is 12", "length", None, None),
        ("The answer is 12, because", "length", "12", "12"),
        ("we get 5 and 7", "stop", None, "7"),
        ("we get 5 and 7", "length", None, None),
        ("<think>\\boxed{1}", "stop", None, None),
        ("<think>\\boxed{1}</think> no", "stop", None, None),
        ("<think>a</think> \\boxed{2}", "length", "2", "2"),
        ("", "stop", None, None),
    ],
)
def test_extraction(text: str, finish: str, strict: str | None, lenient: str | None) -> None:
    assert extract_answer(text, finish) == strict
    assert extract_answer(text, finish, "lenient") == lenient


@given(st.text(alphabet="ab{}\\ \n", max_size=40), st.recursive(st.just("x"), lambda s: s.map(lambda t: f"{{{t}}}")))
def test_the_last_balanced_box_is_found_after_anything(noise: str, inside: str) -> None:
    assert last_boxed(f"{noise}\\boxed{{{inside}}}") == inside


def test_numbers_are_compared_as_numbers() -> None:
    (question,) = task("arithmetic").questions("train", 1)
    for written in ("{}.", "${}$", "\\${}", " {} ", "0{}", "{} apples"):
        assert task("arithmetic").judge(question, f"\\boxed{{{written.format(question.gold)}}}").kind == "correct"
