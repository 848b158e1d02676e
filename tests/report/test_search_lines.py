"""What is said about the search: who wrote what, and nobody is called ahead whose interval overlaps."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from cotree.report.html import write_report
from cotree.report.table import comparison_lines, model_lines, summary_lines, verdict
from cotree.search.baselines import Found, worth


def row(method: str, correct: int, n: int = 100) -> dict[str, Any]:
    found = [Found(1, int(i % 2 == 0), True, 30, 5) for i in range(correct)]
    return dict(worth(method, found + [Found(0, 1, False, 30, 5)] * (n - correct)))


def test_a_row_counts_what_its_name_says() -> None:
    counted = row("mcts", 40)
    assert counted["correct"][0] == 0.4
    assert counted["both"][0] == 0.2
    assert counted["vote"][0] == 0.4
    assert (counted["tokens"], counted["uncached_prompt_tokens"]) == (3000, 500)
    assert counted["pairs_per_question"] == 0.2
    assert counted["tokens_per_pair"] == 150.0
    assert worth("none", [Found(0, 3, False, 10, 0)])["tokens_per_pair"] is None
    assert asdict(Found(2, 3, True, 1, 0))["correct"] == 2
    assert Found(2, 3, True, 1, 0).pairs == 2


@pytest.mark.parametrize(
    ("ours", "theirs", "words"),
    [
        (80, 40, "mcts is ahead in questions with a correct chain"),
        (40, 80, "best_of_n is ahead in questions with a correct chain"),
        (50, 52, "no interval tells the two apart"),
    ],
)
def test_the_verdict_follows_the_intervals(ours: int, theirs: int, words: str) -> None:
    compared = [row("mcts", ours), row("best_of_n", theirs)]
    assert words in verdict(compared)
    assert words in comparison_lines(compared)[-1]


def test_models_are_named_only_where_there_are_several(run: Path) -> None:
    own = {"thoughts": 10, "tokens": 90, "reflections": 4, "repaired": 1}
    assert model_lines({"a": own}) == []
    two = model_lines({"a": own, "b": own | {"reflections": 0, "repaired": 0}})
    assert two[0].startswith(
        "a wrote 10 thoughts (90 tokens); a correct answer followed 1 of its 4 reflections: 25.0% (4.6–69.9)"
    )
    assert two[1].endswith("followed 0 of its 0 reflections")


def test_the_page_and_the_terminal_show_the_comparison(run: Path) -> None:
    import json

    summary = json.loads((run / "summary.json").read_text())
    assert not any("best_of_n" in line for line in summary_lines(summary))
    summary["search"]["compared"] = [row("mcts", 80), row("best_of_n", 40)]
    (run / "summary.json").write_text(json.dumps(summary))
    assert any("mcts is ahead" in line for line in summary_lines(summary))
    page = write_report(run).read_text()
    assert "mcts is ahead in questions with a correct chain" in page
    assert "best_of_n" in page
