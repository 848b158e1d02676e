"""Mathematical verdicts: right on every gold of MATH500, wrong on changed ones, and never held up by an answer."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.benchmark_data import benchmark_rows

from cotree.base.errors import UsageError
from cotree.tasks import TASKS, Question, math_worker, task
from cotree.tasks import math_verdicts as verdicts
from cotree.tasks.extract import ExtractionMode, extract_answer
from cotree.tasks.math_text import normalize_answer
from cotree.tasks.math_verdicts import check_math_answer
from cotree.tasks.math_worker import CPU_SECONDS
from cotree.tasks.mathematics import INSTRUCTION, Mathematics

MATHEMATICS = [name for name, kind in TASKS.items() if issubclass(kind, Mathematics)]
# What is accepted with its last digit changed, and why.
ACCEPTED = {
    "test/geometry/473.json": "the digit is the exponent of a unit, and units are dropped",
    "test/prealgebra/1114.json": "the digit is the exponent of a unit, and units are dropped",
}
SHOWN = Question("shown", "math500", (), "x")


def ask(gold: str) -> Question:
    return Question("q", "math500", (), gold)


def changed(gold: str, match: re.Match[str]) -> str:
    return f"{gold[: match.start()]}{(int(match[0]) + 1) % 10}{gold[match.end() :]}"


def test_every_gold_of_math500_is_right_by_itself_and_by_its_solution() -> None:
    math500 = task("math500")
    rows, questions = benchmark_rows("math500.jsonl"), math500.questions()
    assert len(rows) == len(questions) == 433
    for row, question in zip(rows, questions, strict=True):
        assert math500.judge(question, row["solution"]).kind == "correct"
        assert math500.judge(question, f"The answer is ${row['answer']}$.").kind == "correct"


def test_the_library_agrees_with_what_is_decided_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    golds = sorted({row["answer"] for row in benchmark_rows("math500.jsonl")})
    numbers = [gold for gold in golds if re.fullmatch(r"-?(\d+|\\frac\{\d+\}\{\d+\})", gold)]
    words = [gold for gold in golds if gold not in numbers]
    bare = [re.sub(r"\\left|\\right", "", gold) for gold in words]
    looks = [gold.replace("(", "\\left( ").replace(")", " \\right)").replace("\\frac", "\\dfrac") for gold in bare]
    near = [(a, b) for i, a in enumerate(numbers) for b in numbers[i : i + 2]]
    close = [("\\frac{1}{3}", "333333/1000000"), ("-\\frac{1}{2}", "-2/4"), ("1/1000000", "1/1000001"), ("-0", "0")]
    close += [("1204", "1,204"), ("1,204", "1,205"), ("204", "0204"), ("204", "204.0"), ("18.90", "18.9"), ("5", "+5")]
    close += [("-0.5", "-\\frac{1}{2}"), ("1,234,567", "1234567.0"), ("1" * 20, "1" * 19 + "2"), ("6/3", "2")]
    pairs = [*zip(words, looks, strict=True), *near, *close]
    assert len(words) > 90 and len(near) > 250

    def not_here(gold: str, answer: str) -> bool | None:
        raise AssertionError((gold, answer))

    with ThreadPoolExecutor() as pool:
        library = list(pool.map(lambda pair: math_worker.compare(*map(normalize_answer, pair)), pairs))
    monkeypatch.setattr(verdicts, "compare", not_here)
    assert [verdicts.compare_cached.__wrapped__(*pair)[0] for pair in pairs] == library


@pytest.mark.parametrize("last", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_changed_digits_are_wrong(last: bool) -> None:
    golds = {row["id"]: row["answer"] for row in benchmark_rows("math500.jsonl")}
    pairs = [
        (name, gold, changed(gold, match))
        for name, gold in golds.items()
        for match in list(re.finditer(r"\d", gold))[-1 if last else 0 :]
    ]
    assert len(pairs) > 300
    with ThreadPoolExecutor() as pool:
        accepted = pool.map(lambda pair: check_math_answer(*pair[1:])[0], pairs)
    assert {name for (name, *_), right in zip(pairs, accepted, strict=True) if right} == set(ACCEPTED)


@pytest.mark.parametrize(
    ("gold", "right", "wrong"),
    [
        (
            "204",
            ["204.", "$204$", "204.0", "0204", "\\mathbf{204}", "204\\text{ minutes}", "204~"],
            ["205", "20", "-204"],
        ),
        ("\\frac{1}{2}", ["\\frac12", "\\dfrac{1}{2}", "1/2", "0.5", "50\\%"], ["\\frac{1}{3}", "2", "0.51"]),
        ("1000", ["1,000", "1{,}000", "1,\\!000", "1\\,000", "10^3", "१०००", "１０００"], ["1,0000", "100", "१००"]),
        ("90^\\circ", ["90", "90^{\\circ}", "90\\text{ degrees}"], ["91", "9^\\circ"]),
        ("\\$18.90", ["18.90", "18.9", "\\$18.90"], ["18.09", "189"]),
        ("(-\\infty,2]", ["(-\\infty, 2]", "(- \\infty,2]"], ["(-\\infty,2)", "(-\\infty,3]", "2"]),
        ("[-2,7]", ["x \\in [-2,7]", "[-2, 7]"], ["(-2,7)", "[-2,8]", "[7,-2]"]),
        ("(3, 5)", ["(3,5)", "\\left(3, 5\\right)"], ["(5,3)", "(3,5,0)"]),
        ("1 \\pm \\sqrt{19}", ["1 + \\sqrt{19}, 1 - \\sqrt{19}"], ["1 + \\sqrt{19}"]),
        ("p - q", ["-q + p"], ["q - p", "p + q"]),
        ("x^2 + 2x + 1", ["(x+1)^2", "1 + 2x + x^2"], ["(x-1)^2"]),
        ("\\text{(B)}", ["B", "(B)", "\\text{B}"], ["C", "\\text{(C)}"]),
        ("\\text{Eve}", ["Eve", "\\text{eve}"], ["\\text{Ann}", "E"]),
        ("\\begin{pmatrix} 1 \\\\ -2 \\end{pmatrix}", ["\\begin{pmatrix}1\\\\-2\\end{pmatrix}"], ["(1,-2,0)"]),
        (
            "18",
            ["18 eggs", "\\$18 dollars", "18 miles per hour", "18 years old.", "€18", "18.0 cups"],
            ["19 eggs", "18 thousand", "18 million dollars", "18 pi", "18x", "18 and 20 cups"],
        ),
        ("43_6", ["43_{6}", "43"], ["43_7", "44_6"]),
        ("", [], ["5"]),
        ("(", ["("], ["\\frac{", "5"]),
        ("5", ["x = 5", "\\frac{10}{2}", "5\\text{ cm}"], ["5!", "-5", "5x", ""]),
    ],
)
def test_forms_of_an_answer(gold: str, right: list[str], wrong: list[str]) -> None:
    for answer in right:
        assert check_math_answer(gold, answer)[0], answer
    for answer in wrong:
        assert not check_math_answer(gold, answer)[0], answer


HOSTILE = {
    "tower": "9^{9^{9^9}}",
    "nested": "(" * 450 + "1" + ")" * 450,
    "factorial": "(10^{10})!",
    "braces": "{" * 400 + "1" + "}" * 400,
    "binomial": r"\binom{10^9}{5 \cdot 10^8}",
    "integral": r"\int_0^1 x^{x^{x^x}} dx",
    "sum": r"\sum_{n=1}^{10^{12}} \frac{1}{n^3}",
    "product": "(x+y+z+w+1)^{60}",
    "subscripts": "x_{1}^" * 100,
}


@pytest.mark.parametrize(
    "names", [("tower", "nested"), pytest.param(tuple(HOSTILE), marks=pytest.mark.slow)], ids=["two", "all"]
)
def test_a_hostile_answer_costs_its_limit_and_no_more(names: tuple[str, ...]) -> None:
    check_math_answer("x", "x+0")

    def judged(name: str) -> tuple[str, str, float]:
        started = time.perf_counter()
        verdict = task("math500").judge(ask("x^2"), f"\\boxed{{{HOSTILE[name]}}}")
        return verdict.kind, verdict.detail, time.perf_counter() - started

    with ThreadPoolExecutor(2) as pool:
        for kind, detail, seconds in pool.map(judged, names):
            assert (kind, detail) == ("undecided", "not checked: stopped at 3 s of CPU time or 2 GiB")
            # Twice the limit of CPU time; on a busy machine that is several times as much of the clock's.
            assert seconds < 20 * CPU_SECONDS
    assert check_math_answer("x^2", "x \\cdot x") == (True, "")


@pytest.mark.parametrize(
    "inside",
    ["\\frac{1}{" * 10_000 + "}" * 10_000, "1" + " " * 50_000 + "or", "1 or " * 10_000, "1\\text{ a }" * 5_000],
    ids=["fractions", "spaces", "words", "units"],
)
def test_a_box_of_garbage_costs_nothing(inside: str) -> None:
    started = time.perf_counter()
    verdict = task("math500").judge(ask("4"), f"\\boxed{{{inside}}}")
    assert verdict.kind == "wrong"
    assert verdict.detail == ("not checked: longer than 1000 characters" if "frac" in inside else "")
    assert time.perf_counter() - started < 1


def running_server() -> tuple[math_worker._Server, list[int]]:
    """The server of this process and the ids of its workers."""
    assert math_worker.compare("a+b", "b+a")
    server = math_worker._running_server()
    pid = server.process.pid
    return server, [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_a_server_that_is_killed_is_replaced_and_says_nothing_about_the_answer() -> None:
    first, _ = running_server()
    os.kill(first.process.pid, signal.SIGKILL)
    first.process.wait()
    assert check_math_answer("a+b", "b+2a-a") == (True, "")
    assert math_worker._server is not first


def test_a_worker_that_was_killed_between_questions_is_replaced() -> None:
    first, workers = running_server()
    for worker in workers:
        os.kill(worker, signal.SIGKILL)
    time.sleep(0.2)
    assert check_math_answer("a+b", "b+5a-4a") == (True, "")
    assert math_worker._server is first


def test_a_comparison_that_loses_its_processes_is_asked_again() -> None:
    first, workers = running_server()
    for worker in workers:
        os.kill(worker, signal.SIGSTOP)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(check_math_answer, "a+b", "b+3a-2a")
        time.sleep(0.3)
        for killed in (*workers, first.process.pid):
            os.kill(killed, signal.SIGKILL)
        assert asked.result(60) == (True, "")
    assert math_worker._server is not first


def test_a_verdict_does_not_depend_on_the_load_of_the_machine() -> None:
    _, workers = running_server()
    with ThreadPoolExecutor(1) as pool:
        for worker in workers:
            os.kill(worker, signal.SIGSTOP)
        asked = pool.submit(check_math_answer, "p+q", "q+3p-2p")
        time.sleep(CPU_SECONDS + 0.5)  # time passes, and none of it is the worker's
        for worker in workers:
            os.kill(worker, signal.SIGCONT)
        assert asked.result(60) == (True, "")


def test_right_answers_stay_right_at_a_tenth_of_the_cpu() -> None:
    _, workers = running_server()
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(check_math_answer, "[0,2)", "0 \\le x < 2")
        while not asked.done():
            for signals, seconds in ((signal.SIGSTOP, 0.045), (signal.SIGCONT, 0.005)):
                for worker in workers:
                    os.kill(worker, signals)
                time.sleep(seconds)
    assert asked.result() == (True, "")


def test_right_answers_stay_right_beside_a_busy_job_of_higher_priority() -> None:
    _, workers = running_server()
    core = min(os.sched_getaffinity(0))
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        os.sched_setaffinity(busy.pid, {core})
        for worker in workers:
            os.sched_setaffinity(worker, {core})
            os.setpriority(os.PRIO_PROCESS, worker, 10)
        assert check_math_answer("[0,3)", "0 \\le x < 3") == (True, "")
    finally:
        busy.kill()
        busy.wait()
        for worker in workers:  # the next ones have the usual priority
            os.kill(worker, signal.SIGKILL)
        time.sleep(0.2)


def test_a_comparison_that_was_stopped_is_tried_again_and_never_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    replies = iter([None, True, None, None, True])
    monkeypatch.setattr(verdicts, "compare", lambda gold, answer: next(replies))
    assert check_math_answer("a+b", "b+7a-6a") == (True, "")
    right, why = check_math_answer("a+b", "b+8a-7a")
    assert right is None and why.startswith("not checked: stopped at ")
    assert check_math_answer("a+b", "b+8a-7a") == (True, "")


SCRIPT = """
import asyncio, os, threading, cotree
task = cotree.task("math500")
question = cotree.Question("q", "math500", (), "x^2 - 1")
async def inside():
    return await asyncio.gather(*(task.judge_async(question, "\\\\boxed{(x-1)(x+%d)}" % i) for i in range(4)))
print([verdict.kind for verdict in asyncio.run(inside())])
seen = []
def judge(): seen.append(task.judge(question, "\\\\boxed{(x+1)(x-1)}").kind)
threads = [threading.Thread(target=judge) for _ in range(4)]
[thread.start() for thread in threads]; [thread.join() for thread in threads]
print(seen)
from cotree.tasks import math_worker
first = math_worker._server.process.pid
if os.fork() == 0:
    print(task.judge(question, "\\\\boxed{x^2 - 2}").kind, math_worker._server.process.pid != first, flush=True)
    os._exit(0)
os.wait()
print(task.judge(question, "\\\\boxed{-1 + x^2}").kind, math_worker._server.process.pid == first)
"""


def test_judging_works_from_stdin_in_threads_in_a_loop_and_after_a_fork(tmp_path: Path) -> None:
    # Of the user's files none must be taken for a library.
    (tmp_path / "sympy.py").write_text("raise ValueError")
    run = [sys.executable, "-"]
    found = subprocess.run(run, input=SCRIPT, capture_output=True, text=True, check=True, cwd=tmp_path, timeout=120)
    lines = found.stdout.split("\n")
    assert lines[0] == "['wrong', 'correct', 'wrong', 'wrong']"
    assert lines[1:4] == [str(["correct"] * 4), "wrong True", "correct True"]
    assert found.stderr == ""


async def test_a_slow_verdict_does_not_hold_up_the_loop() -> None:
    slow = asyncio.create_task(task("math500").judge_async(ask("x^2"), f"\\boxed{{{HOSTILE['tower']}}}"))
    longest, last = 0.0, time.perf_counter()
    while not slow.done():
        await asyncio.sleep(0.02)
        longest, last = max(longest, time.perf_counter() - last), time.perf_counter()
    assert (await slow).kind == "undecided"
    assert longest < CPU_SECONDS / 2


@pytest.mark.parametrize("name", MATHEMATICS)
def test_prompts_ids_and_examples(name: str) -> None:
    benchmark = task(name)
    assert benchmark.source is not None
    benchmark_rows(benchmark.source.file)
    questions = benchmark.questions()
    assert len({question.id for question in questions}) == len(questions) <= benchmark.source.size
    for question in questions:
        assert question.gold
        assert question.messages[0]["content"].endswith(f"\n{INSTRUCTION}")
    assert benchmark.prompt_version.startswith(f"{name}/")
    assert benchmark.prompt_version in str(type(benchmark).__doc__) or "those of" in str(type(benchmark).__doc__)
    examples = benchmark.worked_examples(questions[0])
    assert len(examples) == 3
    for example in examples:
        assert set(example.steps) == {"sub_task", "thinking", "double_check", "solution"}
        assert example.steps["solution"].count("\n\n") in (1, 2)
        assert example.answer in example.steps["solution"] or "0 < x < 4" in example.steps["solution"]
        assert example.answer in example.steps["thinking"] or "0 < x < 4" in example.steps["thinking"]
        assert example.question not in {question.messages[0]["content"] for question in questions}


def test_splits() -> None:
    gsm8k = task("gsm8k")
    benchmark_rows("gsm8k_test.jsonl")
    assert gsm8k.questions() == gsm8k.questions("test")
    train, dev = ({q.id for q in gsm8k.questions(split)} for split in ("train", "dev"))
    assert len(train | dev) == 500 and not train & dev and 30 < len(dev) < 70
    with pytest.raises(UsageError, match="math500 has a test set only, no `train` split; train on"):
        task("math500").questions("train")
    with pytest.raises(UsageError, match="math is for training and has no `test` split; evaluate on"):
        task("math").questions("test")
    with pytest.raises(UsageError, match="aime24 has 30 questions in all, not 31; lower the number"):
        task("aime24").questions(limit=31)
    with pytest.raises(UsageError, match="letters is generated and takes no data"):
        task("letters", data="x.jsonl")


def test_the_hub_has_the_same_rows_under_other_names(tmp_path: Path) -> None:
    def on_hub(name: str, rows: list[dict[str, str]]) -> list[tuple[str, str, str]]:
        folder = tmp_path / name
        folder.mkdir()
        Dataset.from_list(rows).to_parquet(folder / "test.parquet")
        return [(q.id, q.messages[0]["content"].split("\n")[0], q.gold) for q in task(name, data=folder).questions()]

    solution = "It is 40 * 30 = <<40*30=1200>>1200.\n#### 1,200"
    assert on_hub("gsm8k", [{"question": "a?", "answer": solution}]) == [("gsm8k-test-0", "a?", "1200")]
    row = {"problem": "b?", "solution": "c", "answer": "\\pi", "subject": "Algebra", "unique_id": "test/1.json"}
    assert on_hub("math500", [row]) == [("test/1.json", "b?", "\\pi")]
    row = {"problem": "d?", "level": "Level 5", "type": "Algebra", "solution": "so \\boxed{\\frac{1}{2}}."}
    assert on_hub("math", [row]) == [("math-train-0", "d?", "\\frac{1}{2}")]
    assert on_hub("aime25", [{"problem": "e?", "answer": "70", "id": "0"}]) == [("0", "e?", "70")]


# Where our verdict is not the label of Qwen2.5-Math's grader, which takes the last number of any text for its answer,
# and strips golds, so that some are empty or lose a letter or the rows of a matrix.
NO_CLOSED_FORM = {55, 97, 107, 163, 193, 268, 273, 311, 329, 330, 348, 368, 387, 427, 433, 438, 441, 452, 474, 493}
BROKEN_GOLD = {97, 102, 205, 298}
THINKING_UNCLOSED = {163}
LAST_NUMBER_WAS_CUT = {28, 393, 444}  # the grader took 7 of -2+7i, 4 of 3/4, 2 of 1/2
NUMBER_WITHOUT_PI = {313}  # the grader took 12 of 12π


@pytest.mark.parametrize(
    ("mode", "differing"),
    [
        ("strict", NO_CLOSED_FORM | BROKEN_GOLD | NUMBER_WITHOUT_PI | {28}),
        ("lenient", BROKEN_GOLD | THINKING_UNCLOSED | NUMBER_WITHOUT_PI | LAST_NUMBER_WAS_CUT),
    ],
)
def test_real_long_outputs_are_judged_as_labelled(mode: ExtractionMode, differing: set[int]) -> None:
    rows = benchmark_rows("sky_t1_long_cot.jsonl.gz")
    assert len(rows) == 240 and max(len(row["response"]) for row in rows) > 150_000
    found = set()
    for row in rows:
        verdict = task("math500").judge(
            ask(row["gold"]), row["response"], "stop", "strict" if mode == "strict" else "lenient"
        )
        if (verdict.kind == "correct") != row["correct"]:
            found.add(int(row["id"].rpartition("/")[2]))
            assert "math500" in row["id"]
    assert found == differing
    assert len(found) == (25 if mode == "strict" else 9)


PARTS = st.sampled_from(
    [
        *"}{^_()[]109x,.$|!% \n",
        *("\\boxed{", "\\frac", "\\sqrt", "\\text", "\\left", "\\right", "\\\\", "answer is", "####"),
        *("<think>", "</think>"),
    ]
)


@given(st.one_of(st.text(), st.lists(PARTS, max_size=40).map("".join), st.lists(PARTS, max_size=40).map(" ".join)))
@settings(max_examples=300, deadline=None)
def test_no_text_raises(text: str) -> None:
    modes: tuple[ExtractionMode, ...] = ("strict", "lenient")
    for mode, finish in product(modes, ("stop", "length")):
        answer = extract_answer(text, finish, mode)
        assert answer is None or (answer and answer in text)


@given(st.lists(PARTS, min_size=1, max_size=12).map("".join))
@settings(max_examples=60, deadline=None)
def test_no_answer_raises(answer: str) -> None:
    for gold in ("4", "\\frac{1}{2}"):
        assert task("math500").judge(ask(gold), f"\\boxed{{{answer}}}").kind in ("correct", "wrong", "no_answer")
