"""How fast verdicts are: `make bench-tasks` judges real responses of every task there is, extraction included.

Verdicts are asked for as search and evaluation do: from as many threads as there are cores where a task waits for other
processes, in one thread elsewhere. Nothing is judged twice, for cotree remembers mathematical verdicts. The responses
come from the files beside the benchmarks (COTREE_DATA); a task that has none is judged on reference solutions or, last,
on its golds in a box.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean
from typing import Any

from cotree.base.errors import UsageError
from cotree.tasks import TASKS, Question, Task, task
from cotree.tasks.loading import Row, Source, load_rows
from cotree.tasks.math_verdicts import compare_cached
from cotree.tasks.mathematics import Mathematics

OUT = Path(__file__).parent / "out" / "tasks.json"
Judged = tuple[Question, str]
# Responses of models, joined to a task's questions by id.
RESPONSES = {"blocksworld": "blocksworld_responses.jsonl", "ifeval": "ifeval_oracle.jsonl"}
LONG = "sky_t1_long_cot.jsonl"


def file_rows(name: str) -> list[Row]:
    """The rows of a file in the data folder."""
    return load_rows(Source(name, "none/none", "", 0))


def responses(name: str, asked: Task, limit: int | None) -> tuple[list[Judged], str]:
    """What is judged for a task, and what that is."""
    questions = asked.questions(limit=None if asked.source else 200)
    if name in ("math500", "aime24"):
        rows = [row for row in file_rows(LONG) if row["benchmark"] == {"aime24": "aime_2024"}.get(name, name)]
        return [(Question(row["id"], name, (), row["gold"]), row["response"]) for row in rows][:limit], "long thoughts"
    if name in RESPONSES:
        by_id = {question.id: question for question in questions}
        rows = [row for row in file_rows(RESPONSES[name]) if str(row["id"]) in by_id]
        return [(by_id[str(row["id"])], row["response"]) for row in rows][:limit], "model responses"
    solutions = {str(row["id"]): row["solution"] for row in _rows(asked) if "solution" in row}
    if solutions:
        return [(question, solutions[question.id]) for question in questions][:limit], "reference solutions"
    return [(question, f"So it is \\boxed{{{question.gold}}}.") for question in questions][:limit], "golds"


def _rows(asked: Task) -> list[Row]:
    return load_rows(asked.source) if asked.source else []


def rate(asked: Task, judged: Sequence[Judged], repeats: int = 3) -> float:
    """Verdicts a second, the best of some runs; the math workers have started."""
    asked.judge(*judged[0])

    def run(each: Callable[[Judged], object]) -> float:
        compare_cached.cache_clear()
        started = time.perf_counter()
        if isinstance(asked, Mathematics):
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                list(pool.map(each, judged))
        else:
            for pair in judged:
                each(pair)
        return len(judged) / (time.perf_counter() - started)

    return max(run(lambda pair: asked.judge(*pair)) for _ in range(repeats))


def library(rows: Sequence[Row]) -> list[Judged]:
    """Golds of MATH500 that are no plain integers, with the last digit changed: each one costs a full comparison."""
    judged = []
    for row in rows:
        digits = list(re.finditer(r"\d", row["answer"]))
        if digits and not re.fullmatch(r"-?\d+", row["answer"]):
            at, gold = digits[-1].start(), row["answer"]
            answer = f"{gold[:at]}{(int(gold[at]) + 1) % 10}{gold[at + 1 :]}"
            judged.append((Question(row["id"], "math500", (), gold), f"\\boxed{{{answer}}}"))
    return judged


def main() -> None:
    """Measure, print a table, write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="seconds; the numbers mean little")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    limit = 20 if options.tiny else None
    try:
        longest = sorted((row["response"] for row in file_rows(LONG)), key=len)[-10:]
    except UsageError:
        longest = []
    rates: dict[str, float] = {}
    long_ms: dict[str, float] = {}
    print(f"{'task':<20}  {'verdicts/s':>10}  {'ms a long one':>13}  judged")
    for name in TASKS:
        try:
            asked = task(name)
            judged, what = responses(name, asked, limit)
        except UsageError as error:
            print(f"{name:<20}  {'-':>10}  {'-':>13}  {error}")
            continue
        rates[name] = rate(asked, judged)
        if longest:
            long_ms[name] = 1000 / rate(asked, [(judged[0][0], text) for text in longest])
        shown = f"{long_ms[name]:.2f}" if longest else "-"
        print(f"{name:<20}  {rates[name]:>10,.0f}  {shown:>13}  {len(judged)} {what}")
    result: dict[str, Any] = {
        "verdicts_per_second": rates,
        "ms_per_long_verdict": long_ms,
        "long_characters": mean(map(len, longest)) if longest else None,
        "machine": f"{os.cpu_count()} {platform.machine()} cores, Python {platform.python_version()}",
        "date": datetime.now(UTC).date().isoformat(),
    }
    if "math500" in rates:
        hard = library(file_rows("math500.jsonl"))[:limit]
        alone = rate(task("math500"), hard)
        result["library_verdicts_per_second"] = alone
        print(f"math500, {len(hard)} wrong answers that only math-verify can judge: {alone:,.0f} verdicts/s")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"{result['machine']}, {result['date']}: {options.out}")


if __name__ == "__main__":
    main()
