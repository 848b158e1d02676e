"""What is said about searches: who wrote what, and nobody is called ahead whose interval overlaps."""

from __future__ import annotations

from typing import Any

import pytest
from tests.report.conftest import edit

from cotree.base.run_folder import RunFolder
from cotree.base.statistics import wilson_interval
from cotree.report.html import write_report
from cotree.report.summary import summarize_run
from cotree.report.table import summary_lines
from cotree.report.templates import lines, sentence


def row(method: str, correct: int, n: int = 100) -> dict[str, Any]:
    share = [correct / n, *wilson_interval(correct, n)]
    return {"method": method, "accuracy": share, "correct": share, "both": share, "vote": share, "questions": n,
            "tokens": 3000, "pairs_per_question": 0.2, "uncached_prompt_tokens": 500,
            "tokens_per_pair": 150.0}  # fmt: skip


@pytest.mark.parametrize(
    ("ours", "theirs", "words"),
    [
        (80, 40, "train is ahead in questions with a correct chain"),
        (40, 80, "sampled is ahead in questions with a correct chain"),
        (50, 52, "no difference is shown, as the intervals overlap"),
    ],
)
def test_the_verdict_follows_the_intervals(ours: int, theirs: int, words: str) -> None:
    compared = [row("train", ours), row("sampled", theirs)]
    assert words in sentence("verdict", compared)
    assert words in lines("compared", compared)[-1]


def test_a_search_that_found_no_pair_has_no_price_of_one() -> None:
    (line, _) = lines("compared", [row("train", 0) | {"tokens_per_pair": None}])
    assert "tokens a pair –" in line
    assert "chains correct 0.0" in line
    old = row("train", 0)
    del old["accuracy"]  # a record of an older cotree
    assert "chains correct" not in lines("compared", [old])[0]


def test_models_are_named_only_where_there_are_several() -> None:
    own = {"thoughts": 10, "tokens": 90, "reflections": 4, "repaired": 1}
    assert lines("writers", {"a": own}) == []
    two = lines("writers", {"a": own, "b": own | {"reflections": 0, "repaired": 0}})
    assert two[0].startswith(
        "a wrote 10 thoughts (90 tokens); a correct answer followed 1 of its 4 reflections: 25.0% (4.6–69.9)"
    )
    assert two[1].endswith("followed 0 of its 0 reflections")


def test_the_page_and_the_terminal_show_the_comparison(run: RunFolder) -> None:
    assert not any("is ahead" in str(line) for line in summary_lines(summarize_run(run)))
    edit(run.node("trees/sampled"), compared=[row("train", 80), row("sampled", 40)])
    assert any("train is ahead" in str(line) for line in summary_lines(summarize_run(run)))
    page = write_report(run).read_text()
    assert "train is ahead in questions with a correct chain" in page
