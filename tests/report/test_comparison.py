"""`cotree report RUN RUN`: the rows of both runs, paired differences where both asked alike, and both graphs."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from tests.report.conftest import RECIPE, edit, make_run
from tests.report.test_html import HOSTILE, Page

from cotree.base.errors import UsageError
from cotree.base.run_folder import RunFolder
from cotree.cli import main
from cotree.eval.compare import compare_evaluations
from cotree.eval.journal import JOURNAL, EvalSample, append_line
from cotree.report.html import write_comparison
from cotree.tasks.base import VerdictKind


def ask(run: RunFolder, model: str, right: Sequence[bool], task: str = "letters", prompt: str = "p") -> Path:
    """Leave the journal of a model's evaluation; returns its folder."""
    folder = run.node("evaluations/test", model).path
    for place, correct in enumerate(right):
        verdict: VerdictKind = "correct" if correct else "wrong"
        sample = EvalSample(task, f"q{place}", "x", "stop", 3, 9, verdict, "2", "2", prompt_hash=prompt, max_tokens=128)
        append_line(folder / JOURNAL, asdict(sample))
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> tuple[RunFolder, RunFolder]:
    return make_run(tmp_path / "first"), make_run(tmp_path / "second")


def test_the_difference_is_that_of_compare_and_rows_of_one_run_have_none(
    runs: tuple[RunFolder, RunFolder], tmp_path: Path
) -> None:
    first, second = runs
    for run in runs:
        ask(run, "dpo", [True], task="arithmetic")
    before = ask(first, "dpo", [True, False, False, False, True])
    after = ask(second, "dpo", [True, True, True, True, False])
    (first.node("evaluations/test", "control").path / "node.json").unlink()
    page = Page(write_comparison([first.path, second.path], tmp_path / "out.html").read_text())
    _, expected = compare_evaluations(before, after)
    low, high = (f"{100 * end:+.1f}".replace("-", "−") for end in (expected.low, expected.high))
    row = next(cells for cells in page.rows if cells[:2] == ["letters", "dpo (test)"])
    assert row[2:] == ["39.0 (32.5–45.9)", "39.0 (32.5–45.9)", "+40.0", f"{low} to {high}", "0.625", "3", "1", "5"]
    head = ["task", "model", "first, %", "second, %", "difference", "95% interval", "p", "gained", "lost", "n"]
    assert page.rows[0] == head
    assert "  gained 3: q1, q2, q3" in page.text and "  lost 1: q4" in page.text
    alone = next(cells for cells in page.rows if cells[:2] == ["letters", "control (test)"])
    assert alone[2] == "–" and alone[3] != "–" and alone[4:] == [""] * 6
    assert sum(cells[1].startswith("seeded@seed=") for cells in page.rows) == 6, "each seed is compared with itself"
    assert len([tag for tag, attributes in page.tags if tag == "svg" and ("class", "graph") in attributes]) == 2


def test_the_settings_that_differ_are_named(runs: tuple[RunFolder, RunFolder], tmp_path: Path) -> None:
    paths = [run.path for run in runs]
    page = Page(write_comparison(paths, tmp_path / "same.html").read_text())
    assert "Nothing: the recipes are the same." in page.text
    changed = json.loads(json.dumps(RECIPE)) | {"seed": 8}
    changed["students"]["dpo"]["beta"] = 0.3
    del changed["students"]["plain_dpo"]["alpha"]
    (runs[1].path / "recipe.yaml").write_text(yaml.safe_dump(changed))
    page = Page(write_comparison(paths, tmp_path / "out.html").read_text())
    assert page.rows[:4] == [
        ["setting", "first", "second"],
        ["seed", "7", "8"],
        ["students.plain_dpo.alpha", "0", "–"],
        ["students.dpo.beta", "–", "0.3"],
    ]


def test_what_was_asked_otherwise_says_why_it_is_not_compared(
    runs: tuple[RunFolder, RunFolder], tmp_path: Path
) -> None:
    for run, prompt in zip(runs, ("p", "other"), strict=True):
        ask(run, "sft", [True], prompt=prompt)
        ask(run, "sft", [True, False], task="arithmetic")
    text = "".join(Page(write_comparison([run.path for run in runs], tmp_path / "out.html").read_text()).text)
    why = "letters: question `q0` was asked with different prompts in first and second"
    assert f"sft (test) on letters is not compared: {why}" in text
    assert "sft (test) on arithmetic is not compared" not in text, "one task may be compared where another may not"
    assert "dpo (test) on letters is not compared: no samples at" in text


def test_runs_of_one_name_are_called_by_their_paths(tmp_path: Path) -> None:
    paths = [make_run(tmp_path / folder / "laptop").path for folder in ("a", "b")]
    page = write_comparison(paths, tmp_path / "out.html").read_text()
    assert f"<h1>{paths[0]} and {paths[1]}</h1>" in page


def test_the_page_loads_nothing_and_hostile_text_stays_text(tmp_path: Path) -> None:
    pages = []
    for text in ("harmless", HOSTILE.replace("/", "")):
        paths = [make_run(tmp_path / text[:4] / f"{name}{text}").path for name in "ab"]
        result = RunFolder(paths[0]).cells()["test", "sft"].result
        edit(RunFolder(paths[0]).node("evaluations/test", "sft"), rows=[row | {"task": text} for row in result["rows"]])
        pages.append(write_comparison(paths, tmp_path / f"{text[:4]}.html").read_text())
    assert Page(pages[0]).shape() == Page(pages[1]).shape()
    assert "<script" not in pages[1] and "default-src 'none'" in pages[1]
    assert not re.search(r"https?://|@import|url\(", pages[1])


def test_numbers_of_another_version_are_one_line(runs: tuple[RunFolder, RunFolder], tmp_path: Path) -> None:
    edit(runs[1].node("datasets/sft"), counts={"rows": "many"})
    with pytest.raises(UsageError, match="second: its files are not those of this version of cotree"):
        write_comparison([run.path for run in runs], tmp_path / "out.html")
    assert not (tmp_path / "out.html").exists()


def test_the_verb(runs: tuple[RunFolder, RunFolder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for words, written in (((), "comparison.html"), (("-o", "sub/mine.html"), "sub/mine.html")):
        monkeypatch.setattr(sys, "argv", ["cotree", "report", "first", "second", *words])
        with pytest.raises(SystemExit) as left:
            main()
        assert left.value.code == 0 and "first and second" in (tmp_path / written).read_text()
    with pytest.raises(UsageError, match="name two runs to compare, not 3"):
        write_comparison([runs[0].path] * 3, tmp_path / "x.html")
