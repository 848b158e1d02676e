"""Every form of a table has the same cells, and no name is markup in any of them."""

from __future__ import annotations

import io
import re
from html.parser import HTMLParser
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from cotree.base.errors import UsageError
from cotree.base.numbers import paper_form
from cotree.report.summary import Summary
from cotree.report.table import Table, make_table

FORMS = ("terminal", "markdown", "latex", "html")


def table(*rows: tuple[str, dict[str, Any]]) -> Table:
    content = []
    for name, changes in rows:
        content.append({
            "evaluation": "", "model": name, "student": name,
            "task": "gsm8k", "n": 100, "samples": 1, "temperature": 0.0, "top_p": 1.0, "decoding": "", "max_tokens": 64,
            "accuracy": 0.874, "low": 0.79, "high": 0.93, "lenient": 0.874, "no_answer": 0.0023, "loop": 0.001,
            "truncated": 0.0013, "finished_without_answer": 0.0, "test_at": {}, "majority": None, "mean_tokens": 9.5,
            "tokens_p50": 9, "tokens_p90": 12, "tokens_p99": 20, "detectable": None, "families": {}, **changes,
        })  # fmt: skip
    return make_table([("x", Summary.model_validate({"name": "x", "eval": content}))])


def text_of(found: Table, form: str) -> str:
    out = io.StringIO()
    Console(file=out, width=1000).print(found.render(form))
    return out.getvalue() if form == "terminal" else str(found.render(form))


class Text(HTMLParser):
    """The tags and the texts of cells, table after table."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.tables: list[list[str]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.add(tag)
        if tag == "table":
            self.tables.append([])
        if tag in ("td", "th"):
            self.tables[-1].append("")

    def handle_data(self, data: str) -> None:
        if self.tables and self.tables[-1]:
            self.tables[-1][-1] += data.replace("\n", "")


@settings(deadline=None)
@given(st.text(st.sampled_from("ab\\{}$&#_%~^<>|`*[]\n\x1b\"'é"), min_size=1).filter(lambda name: "a" in name))
def test_no_name_is_markup(name: str) -> None:
    shown = " ".join("".join(c if c.isprintable() else " " for c in name).split())
    found = table((name, {}), ("other", {"task": "math500", "accuracy": 0.51}))
    page = Text(str(found.render("html")))
    assert page.tags == {"table", "thead", "tr", "td", "th", "p", "ul", "li"}
    assert page.tables[1][:6] == ["model", "GSM8K", "MATH", shown, "87.4 (0.23%)", "–"]
    latex = next(line for line in str(found.render("latex")).split("\n") if "87.4 (0.23" in line)
    bare = re.sub(r"\\(text\w+\{\}|[{}$&#_%])", "", latex.removesuffix(r" \\"))
    assert not latex.startswith(("[", "*"))
    assert bare.count("&") == 2 and not re.search(r"[\\{}$#_%~^<>]", bare)
    line = next(line for line in str(found.render("markdown")).split("\n") if "87.4 (0.23" in line)
    cell, _, _ = line.removeprefix("| ").rpartition(" | 87.4 (0.23%)")
    assert re.fullmatch(r"(\\.|[^`*_\[\]<|$\\])*", cell)
    assert re.sub(r"\\(.)", r"\1", cell) == shown
    assert all("\x1b" not in text_of(found, form) for form in FORMS)


def test_every_form_has_the_papers_cells_and_what_stands_behind_them() -> None:
    several = {
        "samples": 8, "temperature": 0.8, "lenient": 0.9, "test_at": {"8": [0.95, 0.9, 0.98]}, "detectable": 0.12,
        "majority": [0.9, 0.8, 0.95], "decoding": "mcts by vote",
        "families": {"3 blocks": {"n": 20, "accuracy": 0.5, "no_answer": 0.1, "optimal": 0.25}},
    }  # fmt: skip
    for form in FORMS:
        text = text_of(table(("base", {}), ("dpo", several)), form)
        text = text.replace("\\", "").replace("--", "–")
        assert text.count("87.4 (0.23%)") == 2
        for words in (
            "of 100, greedy", "79.0–93.0", "8 samples each at temperature 0.8, mcts by vote",
            "Test@8 of a tree 95.0 [90.0–98.0]", "maj@8 90.0", "lenient 90.0", "max_tokens 64",
            "loop 0.1 + cut off 0.1 + finished 0.0", "smallest detectable difference 12.0 points",
            "9.5 tokens (p50/p90/p99 9/12/20)", "3 blocks 50.0 (10%) of 20, 25.0% of the correct plans optimal",
        ):  # fmt: skip
            assert words in text
    with pytest.raises(UsageError, match="unknown format `pdf`; known: terminal, markdown"):
        table(("base", {})).render("pdf")
    assert paper_form(0.874, 0.0023) == "87.4 (0.23%)"
