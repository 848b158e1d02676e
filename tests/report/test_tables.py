from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from cotree.base.numbers import duration, listed, paper_form, percent, signed, sparkline
from cotree.base.statistics import minimum_detectable_difference, wilson
from cotree.report.reading import reading
from cotree.report.summary import MODELS, Summary
from cotree.report.table import eval_table, summary_lines


@pytest.fixture
def summary(run: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return content


def row(model: str, correct: int, n: int, task: str = "t", no_answer: float = 0.0) -> dict[str, Any]:
    low, high = wilson(correct, n)
    return {
        "model": model, "task": task, "n": n, "accuracy": correct / n, "low": low, "high": high,
        "no_answer": no_answer, "mean_tokens": 12.0, "max_tokens": 64,
    }  # fmt: skip


def summary_of(*rows: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"name": "x", "seed": 0, "created": "2026-01-01", "eval": list(rows), **more}


def rendered(summary: dict[str, Any], width: int = 80) -> str:
    out = io.StringIO()
    Console(file=out, width=width).print(eval_table(summary))
    return out.getvalue()


@pytest.mark.parametrize(
    ("split", "words"), [("test", "held-out questions, greedy"), ("dev", "dev questions (for tuning)")]
)
def test_the_table_says_which_questions_were_asked(summary: dict[str, Any], split: str, words: str) -> None:
    assert words in " ".join(rendered({**summary, "split": split}).split())


def test_the_terminal_table_fits_80_columns_and_shows_every_number(summary: dict[str, Any]) -> None:
    text = rendered(summary)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80
    lines = [re.split(r"\s{2,}", line.strip()) for line in text.splitlines()]
    for item in summary["eval"]:
        number, low, high, none = (percent(item[key]) for key in ("accuracy", "low", "high", "no_answer"))
        assert any(cells[:4] == [item["model"], number, f"{low}–{high}", none] for cells in lines)
    assert ["always “12”", "3.8"] in lines
    assert "max_tokens 128" in text


def test_brackets_in_a_name_are_no_markup() -> None:
    assert "[red]boo[/]" in rendered(summary_of(row("[red]boo[/]", 1, 4)))


def test_models_are_shown_from_base_to_final_student(summary: dict[str, Any]) -> None:
    summary["eval"].reverse()
    parsed = Summary.model_validate(summary)
    assert parsed.tasks() == ["letters", "arithmetic"]
    assert [item.model for item in parsed.rows("letters")] == list(MODELS)


def test_summary_lines_say_what_each_stage_came_to(summary: dict[str, Any]) -> None:
    lines = summary_lines(summary)
    assert (
        lines[0]
        == "search: 400 trees, 5,413 thoughts, 2,470 answers (873 correct, 1,547 wrong, 50 no answer), 49 thoughts cut"
    )
    assert lines[1].endswith("68.5% of questions have a correct chain, 57.5% both kinds; 720 reflections, 98 repaired")
    assert lines[2] == "        trees ended: 300 rollouts, 100 solved (2,500 rollouts)"
    assert lines[3] == "data:   274 SFT rows (63.2 tokens), 274 control rows, 221 DPO pairs"
    assert lines[4].endswith("chosen 48.7 tokens, rejected 55.9, difference −7.2, shared prefix 19.4")
    assert "120,345 prompt + 884,120 cached, 61,240 generated tokens (244/s)" in lines[5]
    assert lines[7].split() == ["train_sft", "2", "min", "52", "s", "34,730", "tokens", "trained", "(202/s)"]
    assert lines[-1].split() == ["total", "12", "min", "06", "s"]
    assert summary_lines(summary_of()) == []


@given(
    st.lists(
        st.tuples(st.sampled_from(MODELS), st.integers(0, 60)), min_size=2, max_size=5, unique_by=lambda item: item[0]
    ),
    st.integers(60, 100),
)
def test_a_claim_is_made_exactly_where_intervals_do_not_overlap(counts: list[tuple[str, int]], n: int) -> None:
    summary = summary_of(*(row(model, correct, n) for model, correct in counts))
    rows = Summary.model_validate(summary).rows("t")
    student, others = rows[-1], rows[:-1]
    text = " ".join(reading(summary)["t"])
    claimed = {
        word: re.findall(r"([\w+]+) \(", match[1]) if (match := re.search(rf"is {word} (.*?): the", text)) else []
        for word in ("above", "below")
    }
    assert claimed["above"] == [other.model for other in others if student.low > other.high]
    assert claimed["below"] == [other.model for other in others if student.high < other.low]
    unclear = re.search(r"those? of ([^:]*): no claim|that of ([^:]*): no claim", text)
    named = re.split(r", | and ", unclear[1] or unclear[2]) if unclear else []
    assert named == [other.model for other in others if other.low <= student.high and student.low <= other.high]


def test_the_reading_states_the_minimum_detectable_difference_of_the_table() -> None:
    text = " ".join(reading(summary_of(row("base", 1, 100), row("dpo", 55, 100)))["t"])
    difference = minimum_detectable_difference(100, 0.55)
    assert f"With n\u00a0=\u00a0100, two rows have to differ by up to {percent(difference)} points" in text
    assert "too small to tell" in " ".join(reading(summary_of(row("base", 0, 1), row("dpo", 1, 1)))["t"])


@pytest.mark.parametrize(("correct", "verdict"), [(50, "does not lie above"), (80, "lies above")])
def test_the_reading_compares_with_the_constant_answer(correct: int, verdict: str) -> None:
    baselines = [{"task": "t", "answer": "3", "accuracy": 0.45}]
    text = " ".join(reading(summary_of(row("base", 2, 100), row("dpo", correct, 100), baselines=baselines))["t"])
    assert f"Its interval {verdict} the best constant answer, “3” (45.0%)." in text


@pytest.mark.parametrize(("twos", "said"), [(20, "everything"), (19, "95% of all"), (17, "")])
def test_a_row_that_gives_one_answer_to_everything_is_called_that(twos: int, said: str) -> None:
    content = summary_of(row("dpo", twos, 20) | {"commonest": "2", "commonest_share": twos / 20})
    sentences, note = " ".join(reading(content)["t"]), " ".join(rendered(content).split())
    expected = f"dpo answers “2” to {said} that it answers"
    assert (expected in sentences) == (expected in note) == bool(said)
    assert ("dpo answers" in note) == bool(said)


def test_one_row_alone_is_compared_with_nothing() -> None:
    (sentence,) = reading(summary_of(row("base", 2, 100)))["t"]
    assert sentence == "base at 2.0% (0.6–7.0) is the only row."


@pytest.mark.parametrize(
    ("accuracy", "no_answer", "cell"),
    [
        (0.874, 0.0023, "87.4 (0.23%)"),
        (0.15, 0.30, "15.0 (30%)"),
        (0.124, 0.018, "12.4 (1.8%)"),
        (0.5, 0.0, "50.0 (0%)"),
    ],
)
def test_cells_have_the_papers_form(accuracy: float, no_answer: float, cell: str) -> None:
    assert paper_form(accuracy, no_answer) == cell


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0.0 s"),
        (59.94, "59.9 s"),
        (59.96, "1 min 00 s"),
        (3599.6, "1 h 00 min"),
        (7500, "2 h 05 min"),
        (None, "–"),
    ],
)
def test_durations(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


def test_sparklines() -> None:
    assert [sparkline([1.0] * n) for n in (1, 3)] == ["▁", "▁▁▁"]
    assert sparkline(range(8)) == "▁▂▃▄▅▆▇█"
    assert sparkline([-1, 3, 1]) == "▁█▅"
    assert [len(sparkline(range(n))) for n in (12, 13, 24, 1000)] == [12, 7, 12, 12]


def test_signs_and_lists() -> None:
    assert [signed(value) for value in (3.46, -7.21, None)] == ["+3.5", "−7.2", "–"]
    assert [listed(names) for names in (["a"], ["a", "b"], ["a", "b", "c"])] == ["a", "a and b", "a, b and c"]
