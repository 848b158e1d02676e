from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from cotree.base.errors import UsageError
from cotree.report.html import PAPER, write_report

HOSTILE = (
    "</p></div></pre></td><script>alert(1)</script><img src=x onerror=alert(1)>\"' {{ 7 * 7 }} ${7} &amp; \\boxed{1}"
)


class Page(HTMLParser):
    """Tags with their attributes, and the text of each table row."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, tuple[tuple[str, str | None], ...]]] = []
        self.text: list[str] = []
        self.rows: list[list[str]] = []
        self.in_cell = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, tuple(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.in_cell = True

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self.in_cell = False

    def handle_data(self, data: str) -> None:
        self.text.append(data)
        if self.in_cell:
            self.rows[-1][-1] += data.strip()

    def shape(self) -> list[tuple[str, tuple[str, ...]]]:
        return [(tag, tuple(name for name, _ in attrs)) for tag, attrs in self.tags]


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_the_page_is_one_file_that_loads_nothing(run: Path) -> None:
    html = write_report(run).read_text()
    page = Page(html)
    assert {tag for tag, _ in page.tags}.isdisjoint(
        {"script", "link", "img", "iframe", "object", "base", "form", "image"}
    )
    attributes = [(name, value or "") for _, attrs in page.tags for name, value in attrs]
    assert not [name for name, _ in attributes if name.startswith("on") or name in ("src", "srcset", "action", "data")]
    links = {value for name, value in attributes if name.endswith("href") and not value.startswith("#")}
    assert links == {PAPER}
    assert set(re.findall(r"https?://[^\"<\s]*", html)) == {PAPER}
    assert not re.search(r"@import|url\((?!#)|javascript:", html)
    assert "default-src 'none'" in html


def test_drawings_refer_only_to_ids_that_are_there_once(run: Path) -> None:
    html = write_report(run).read_text()
    ids = re.findall(r'\bid="([^"]*)"', html)
    assert len(ids) == len(set(ids)) > 0
    assert set(re.findall(r'url\(#([^)]*)\)|href="#([^"]*)"', html))
    assert {a or b for a, b in re.findall(r'url\(#([^)]*)\)|href="#([^"]*)"', html)} <= set(ids)
    drawings = html[html.index("</style>") :]
    assert not re.search(r"(?:fill|stroke): ?#", drawings), "a colour that dark mode cannot change"
    assert not re.search(r"font(?:-family)?: '?[A-Z]", drawings)


def test_hostile_text_stays_text(run: Path) -> None:
    """Whatever a model, a recipe or a question says, the page has the same tags as with harmless text."""

    def fill(text: str) -> None:
        summary = json.loads((run / "summary.json").read_text())
        summary |= {"name": text, "created": text, "machine": {"cpu": text}, "student": text}
        for row in summary["eval"]:
            row["task"] = row["task"].split("#")[0] + "#" + text
        summary["eval"][0]["model"] = text
        for baseline in summary["baselines"]:
            baseline["task"] = baseline["task"].split("#")[0] + "#" + text
            baseline["answer"] = text
        summary["search"]["by_task"] = {text: next(iter(summary["search"]["by_task"].values()))} | {"b": {}}
        summary["seconds"] = {text: 1.0}
        (run / "summary.json").write_text(json.dumps(summary))
        chain = {"text": text, "verdict": text, "kind": text}
        (run / "samples.json").write_text(json.dumps([{"title": text, "prompt": text, "chains": [chain]}]))
        edit(run / "manifest.json", versions={text: text}, git=text)
        recipe = f"train: {{student: small}}\nmodels:\n  small:\n    embedded: |-\n      {text}\n"
        (run / "recipe.yaml").write_text(recipe)

    fill("harmless")
    harmless = Page(write_report(run).read_text())
    fill(HOSTILE)
    html = write_report(run).read_text()
    hostile = Page(html)
    assert hostile.shape() == harmless.shape()
    assert "<script" not in html
    assert "".join(hostile.text).count(HOSTILE) == "".join(harmless.text).count("harmless") > 20


def test_text_that_has_no_utf8_is_replaced(run: Path) -> None:
    (run / "samples.json").write_text('[{"title": "t", "prompt": "half \\ud83d pair", "chains": []}]')
    assert "half ? pair" in write_report(run).read_text(encoding="utf-8")


def test_the_evaluation_table_shows_the_summarys_numbers(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    page = Page(write_report(run).read_text())
    shown = iter([row for row in page.rows if len(row) == 12 and row[0] != "model"])
    for row in summary["eval"]:
        model, accuracy, interval, plot, none, loop, cut, finished, answered, tokens, limit, n = next(shown)
        assert (model, plot, limit, n) == (row["model"], "", str(row["max_tokens"]), str(row["n"]))
        low, high = interval.split("–")
        for cell, value in (
            (accuracy, row["accuracy"]),
            (low, row["low"]),
            (high, row["high"]),
            (none, row["no_answer"]),
            (loop, row["loop"]),
            (cut, row["truncated"]),
            (finished, row["finished_without_answer"]),
            (answered, row["accuracy_answered"]),
        ):
            assert re.fullmatch(r"\d+\.\d", cell)
            assert float(cell) == pytest.approx(100 * value, abs=0.0501)
        assert float(tokens) == pytest.approx(row["mean_tokens"], abs=0.0501)
    assert next(shown, None) is None
    assert ["dpo", "58.8 (0.42%)", "39.0 (0%)"] in page.rows
    assert ["always “2”", "25.0", ""] in page.rows


def test_the_other_tables_show_the_summarys_numbers(run: Path) -> None:
    rows = Page(write_report(run).read_text()).rows
    assert ["correct", "873 (35.3%)", "611 (41.0%)", "262 (26.7%)"] in rows
    assert ["questions with a correct and a wrong chain, %", "57.5", "55.4", "60.6"] in rows
    assert ["reflections that led to a correct answer", "98 (13.6%)", "41 (10.2%)", "57 (17.9%)"] in rows
    assert ["chosen − rejected", "", "−7.2"] in rows
    assert ["search", "4 min 11 s", "120,345", "884,120", "61,240", "–", "243.7"] in rows
    assert ["train_sft", "2 min 52 s", "–", "–", "–", "34,730", "202.2"] in rows
    assert ["total", "12 min 06 s", ""] in rows


def test_an_interval_is_drawn_where_its_numbers_are(run: Path) -> None:
    """Positions in the plot are an affine map of the numbers in its label."""
    html = write_report(run).read_text()
    drawn = re.findall(
        r'aria-label="([\d.]+)%, interval ([\d.]+) to ([\d.]+)">'
        r'.*?<line x1="([\d.]+)" x2="([\d.]+)" y1="14.0".*?cx="([\d.]+)"',
        html,
        re.DOTALL,
    )
    assert len(drawn) == 10
    for accuracy, low, high, x_low, x_high, x in drawn:
        for value, place in ((accuracy, x), (low, x_low), (high, x_high)):
            assert float(place) == pytest.approx(6 + 1.68 * float(value), abs=0.15)


def test_the_same_run_gives_the_same_page(run: Path) -> None:
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first
    assert sorted(path.name for path in run.glob("report*")) == ["report.html"]


def test_a_run_that_has_only_begun_has_a_page(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text('{"name": "early", "seed": 1, "created": "2026-01-01", "later": 1}')
    page = Page(write_report(tmp_path).read_text())
    text = " ".join("".join(page.text).split())
    assert "Nothing has been evaluated." in text
    assert "No versions are recorded." in text
    assert {tag for tag, _ in page.tags}.isdisjoint({"table", "svg", "details"})


def test_absent_numbers_are_dashes(run: Path) -> None:
    row = {
        "model": "base",
        "task": "t",
        "n": 4,
        "accuracy": 0,
        "low": 0,
        "high": 0.49,
        "no_answer": 1,
        "mean_tokens": 9,
    }
    edit(run / "summary.json", eval=[{**row, "max_tokens": 16, "accuracy_answered": None}], baselines=[])
    page = Page(write_report(run).read_text())
    assert ["base", "0.0", "0.0–49.0", "", "100.0", "–", "–", "–", "–", "9.0", "16", "4"] in page.rows


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eval": [{"model": "base"}]}, r"summary\.json: eval\.0\.task: Field required"),
        ({"seed": "7"}, r"summary\.json: seed: Input should be a valid integer"),
        (
            {"baselines": [{"task": "t", "answer": "2", "accuracy": 25}]},
            r"baselines\.0\.accuracy: .* less than or equal",
        ),
        ({"seconds": {"search": "4 min"}}, r"seconds\.search: Input should be a valid number"),
    ],
)
def test_a_wrong_summary_is_an_error_that_names_the_key(run: Path, change: dict[str, Any], message: str) -> None:
    edit(run / "summary.json", **change)
    with pytest.raises(UsageError, match=message):
        write_report(run)
    assert not (run / "report.html").exists()


@pytest.mark.parametrize(
    "change", [{"search": {"trees": 3}}, {"data": {"sft_rows": 3}}, {"machine": {"memory_gb": "x"}}]
)
def test_numbers_of_another_version_are_one_line(run: Path, change: dict[str, Any]) -> None:
    edit(run / "summary.json", **change)
    with pytest.raises(UsageError, match="its files are not those of this version of cotree"):
        write_report(run)


@pytest.mark.parametrize("line", ['{"loss": 1}', "[1]"])
def test_a_line_of_a_log_without_its_step_is_one_line(run: Path, line: str) -> None:
    (run / "checkpoints" / "sft" / "log.jsonl").write_text(line + "\n")
    with pytest.raises(UsageError, match=r"log\.jsonl: a line has no `step`"):
        write_report(run)


@pytest.mark.parametrize("name", ["summary.json", "manifest.json", "samples.json"])
def test_a_torn_file_is_an_error_that_names_it(run: Path, name: str) -> None:
    (run / name).write_text((run / name).read_text()[:-3])
    with pytest.raises(UsageError, match=rf"{name} is damaged"):
        write_report(run)


def test_a_folder_that_is_no_run_is_an_error_with_the_fix(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"summary\.json does not exist: finish the run first"):
        write_report(tmp_path)


def test_a_warning_of_the_training_stands_in_the_page(run: Path) -> None:
    assert "Warning at step" not in write_report(run).read_text()
    log = run / "checkpoints" / "dpo" / "log.jsonl"
    with log.open("a") as file:
        file.write(json.dumps({"step": 57, "loss": 0.4, "warning": "chosen_falls: <b>raise</b> alpha"}) + "\n")
    page = Page(write_report(run).read_text())
    assert "Warning at step 57 of dpo: chosen_falls: <b>raise</b> alpha" in "".join(page.text)
