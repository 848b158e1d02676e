"""Generated tasks: disjoint splits, right golds, balanced counts; extraction: closed forms only."""

from __future__ import annotations

import inspect
import json
import re
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cotree.base.errors import UsageError
from cotree.base.statistics import constant_baseline
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


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("gsm8k", {"id": "1"}, "row 2: a row has no field `problem` or `question`; its fields: id"),
        ("blocksworld", {"query": "Hi", "ground_truth_plan": ""}, "row 2: not a row of tasksource/planbench .ValueE"),
        ("ifeval", {"prompt": "Sing.", "instruction_id_list": ["a:b"], "kwargs": [3]}, "row 2: not a row of google/"),
    ],
)
def test_a_row_that_is_none_of_the_task_is_named(
    name: str, row: dict[str, object], message: str, tmp_path: Path
) -> None:
    good = {
        "gsm8k": {"id": 1, "question": "1 + 1?", "answer": "2"},
        "blocksworld": {
            "id": 1,
            "query": "[STATEMENT] the red block is on the table. My goal: the red block is on the table.",
            "ground_truth_plan": ["(pick-up a)"],
        },
        "ifeval": {"key": 1, "prompt": "Sing.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [None]},
    }
    (tmp_path / "rows.jsonl").write_text(json.dumps(good[name]))
    assert len(task(name, tmp_path / "rows.jsonl").questions()) == 1
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(good[name])}\n{json.dumps(row)}")
    with pytest.raises(UsageError, match=f"{name}, {message}"):
        task(name, tmp_path / "rows.jsonl").questions()


@pytest.mark.parametrize("name", TASKS)
def test_the_docstring_shows_the_prompt_and_the_rule(name: str) -> None:
    doc = inspect.getdoc(TASKS[name]) or ""
    # Or that of the task whose rule it is.
    docs = [doc, *(inspect.getdoc(TASKS[other]) or "" for other in TASKS if f"`{other}`" in doc)]
    assert "rompt" in doc and any(re.search(r"(is|are) correct|:\s`correct`", text) for text in docs)


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
        ("<think>a</think> <think>\\boxed{2}", "length", None, None),
        ("<think>a</think> <think>b</think> \\boxed{2}", "stop", "2", "2"),
        ("#### **12**", "stop", "12", "12"),
        ("", "stop", None, None),
        ("</think>\n<Output>\\boxed{1}</Output>", "stop", "1", "1"),
        ("<Thought>a<Output>The answer is 4.</Output>", "stop", "4", "4"),
        ("<|begin_of_thought|>\\boxed{1}<|end_of_thought|>#### 2<|end_of_solution|>", "stop", "2", "2"),
        ("\\fbox{7} or \\framebox{8}", "stop", "7, 8", "7, 8"),
        ("\\boxed{\\{1,2\\}}. So \\boxed{\\left\\{3\\right.}", "stop", "\\left\\{3\\right.", "\\left\\{3\\right."),
        ("so $\\boxed 5$", "stop", "5", "5"),
        ("#### Step 2: add\n#### 1. Begin", "stop", None, "1"),
        ("#### Step 2: add\n#### $x = 4$\ndone", "length", "$x = 4$", "$x = 4$"),
        ("The answer is \\frac{1}{2}.", "stop", "\\frac{1}{2}", "\\frac{1}{2}"),
        ("the answer is $x=3$.", "stop", "x=3", "x=3"),
        ("The answer is \\( (a + 5)(b + 2) \\).", "stop", "(a + 5)(b + 2)", "(a + 5)(b + 2)"),
        ("**Answer:** **12**", "stop", "12", "12"),
        ("answer: 5\\sqrt{2} cm", "stop", "5\\sqrt{2}", "5\\sqrt{2}"),
        ("The answer is (3, -4), as", "stop", "(3, -4)", "(3, -4)"),
        ("The answer is 1, -2.", "stop", "1, -2", "1, -2"),
        ("The answer is (B).", "stop", "(B)", "(B)"),
        ("The answer is B because 3", "stop", None, "3"),
        ("The answer is a number.", "stop", None, None),
        ("The answer is not clear.", "stop", None, None),
        ("The answer is 12 + 5 = 17", "stop", "17", "17"),
        ("The answer is 12 × 5 = 60", "stop", "60", "60"),
        ("The answer is €12", "stop", "€12", "€12"),
        ("答案是B。", "stop", "B", "B"),
        ("Answer: $1,250 and then $300", "stop", "$1,250", "$1,250"),
        ("Ответ: 12", "stop", "12", "12"),
        ("Ответ — 12", "length", None, None),
        ("答案是：12。", "length", "12", "12"),
        ("所以答案为 $\\frac{1}{2}$。", "stop", "\\frac{1}{2}", "\\frac{1}{2}"),
        ("La respuesta final es 12.", "stop", "12", "12"),
        ("La réponse est : **12**", "stop", "12", "12"),
        ("सही उत्तर 12 है", "stop", "12", "12"),
        ("अंतिम उत्तर: 12", "stop", "12", "12"),
        ("La risposta corretta è 12", "stop", "12", "12"),
        ("A resposta é: 3/4", "stop", "3/4", "3/4"),
    ],
)
def test_extraction(text: str, finish: str, strict: str | None, lenient: str | None) -> None:
    assert extract_answer(text, finish) == strict
    assert extract_answer(text, finish, "lenient") == lenient


MARKUP = [
    "\\boxed{",
    "{",
    "}",
    "answer is ",
    "####",
    "$",
    "\\[",
    "\\(",
    *"1-*x\n ",
    "1,",
    " or ",
    "5 million",
    "\\)",
    "<think>",
    "answer",
]


@given(st.lists(st.sampled_from(MARKUP), min_size=1, max_size=4))
@settings(max_examples=40, deadline=None)
def test_time_grows_linearly_whatever_is_repeated(parts: list[str]) -> None:
    text = "".join(parts) * (150_000 // len("".join(parts)))
    started = time.perf_counter()
    extract_answer(text, mode="lenient")
    extract_answer("answer is " + text, "length")
    # 0.2 s on an idle machine; what is quadratic takes minutes.
    assert time.perf_counter() - started < 5


@given(st.text(alphabet="ab{}\\ \n", max_size=40), st.recursive(st.just("x"), lambda s: s.map(lambda t: f"{{{t}}}")))
def test_the_last_balanced_box_is_found_after_anything(noise: str, inside: str) -> None:
    assert last_boxed(f"{noise}\\boxed{{{inside}}}") == inside


@pytest.mark.parametrize(
    "written", ["{}.", "${}$", "\\${}", " {} ", "0{}", "{}.0", "{}/1", "€{}", "{} apples", "{} cm"]
)
def test_numbers_are_compared_as_numbers(written: str) -> None:
    (question,) = task("arithmetic").questions("train", 1)
    assert task("arithmetic").judge(question, f"\\boxed{{{written.format(question.gold)}}}").kind == "correct"
    for other in ("{}.5", "-{}", "{}x", "{},000", "{} thousand"):
        assert task("arithmetic").judge(question, f"\\boxed{{{other.format(question.gold)}}}").kind == "wrong"
