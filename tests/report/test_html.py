from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.report.conftest import RECIPE, edit, make_run, record_of

from cotree.base.errors import UsageError
from cotree.base.run_folder import NodeFolder, RunFolder
from cotree.report.html import PAPER, built, write_report
from cotree.report.summary import summarize_run
from cotree.report.table import summary_lines

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
        self.in_cell = self.in_script = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, tuple(attrs)))
        self.in_script = tag == "script"
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.in_cell = True

    def handle_endtag(self, tag: str) -> None:
        self.in_script = False
        if tag in ("td", "th"):
            self.in_cell = False

    def handle_data(self, data: str) -> None:
        if self.in_script:
            return
        self.text.append(data)
        if self.in_cell:
            self.rows[-1][-1] += data.strip()

    def shape(self) -> list[tuple[str, tuple[str, ...]]]:
        return [(tag, tuple(name for name, _ in attrs)) for tag, attrs in self.tags]


def test_the_page_is_one_file_that_loads_nothing(run: RunFolder) -> None:
    html = write_report(run).read_text()
    page = Page(html)
    assert {tag for tag, _ in page.tags}.isdisjoint({"link", "img", "iframe", "object", "base", "form", "image"})
    attributes = [(name, value or "") for _, attrs in page.tags for name, value in attrs]
    assert not [name for name, _ in attributes if name.startswith("on") or name in ("src", "srcset", "action", "data")]
    links = {value for name, value in attributes if name.endswith("href") and not value.startswith("#")}
    assert links == {PAPER}
    shown = html[: html.index('<script type="application/json"')]
    assert set(re.findall(r"https?://[^\"<\s]*", shown)) == {PAPER}
    assert not re.search(r"@import|url\((?!#)|javascript:", shown)
    assert len(html.encode()) < 2_000_000


def test_the_one_script_is_that_which_the_policy_names(run: RunFolder) -> None:
    html = write_report(run).read_text()
    data, script = re.findall(r"<script[^>]*>(.*?)</script>", html, re.DOTALL)
    assert script == built("report.js") and "</script" not in script.lower()
    named = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{named}'" in html
    assert [tree["question"] for tree in json.loads(data)] == re.findall(r"<h3>(.*)</h3>\n<div class=\"tree-view", html)


def test_drawings_refer_only_to_ids_that_are_there_once(run: RunFolder) -> None:
    html = write_report(run).read_text().partition('<script type="application/json"')[0]
    ids = re.findall(r'\bid="([^"]*)"', html)
    assert len(ids) == len(set(ids)) > 0
    assert set(re.findall(r'url\(#([^)]*)\)|href="#([^"]*)"', html))
    assert {a or b for a, b in re.findall(r'url\(#([^)]*)\)|href="#([^"]*)"', html)} <= set(ids)
    drawings = html[html.index("</style>") :]
    assert not re.search(r"(?:fill|stroke): ?#", drawings), "a colour that dark mode cannot change"
    assert not re.search(r"font(?:-family)?: '?[A-Z]", drawings)


def hostile_run(path: Path, text: str) -> RunFolder:
    """A run in which everything that a model, a recipe or a question can say says `text`."""
    run = make_run(path, hostile=text)

    def change(folder: NodeFolder, **parts: Any) -> None:
        record = folder.record()
        assert record is not None
        folder.write(replace(record, versions={text: text}, machine={"cpu": text}, created=text, **parts))

    for (evaluation, model), record in run.cells().items():
        result = json.loads(json.dumps(record.result))
        for row in [*result["rows"], *result["baselines"]]:
            row["task"] += f"#{text}"
        for best in result["baselines"]:
            best["answer"] = text
        change(run.node(f"evaluations/{evaluation}", model), result=result)
    trees = run.node("trees/train")
    counts = json.loads(json.dumps(trees.record().result["counts"]))  # type: ignore[union-attr]
    counts["by_task"] = {text: counts["by_task"]["letters"], "b": {}}
    counts["by_model"] = {text: counts["by_model"]["small"], "b": counts["by_model"]["small"]}
    change(trees, result={"counts": counts})
    edit(run.node("students/plain_dpo"), parent=text, data=text, differs={"from": text, "keys": {text: [text, text]}})
    data = run.node("datasets/sft")
    counts = data.record().result["counts"]  # type: ignore[union-attr]
    edit(data, counts={**counts, "kind": text, "chains_left_out": {text: 3}})
    with (run.node("students/dpo").path / "log.jsonl").open("a") as file:
        file.write(json.dumps({"step": 57, "loss": 0.4, "warning": text}) + "\n")
    recipe = RECIPE | {"name": text, "description": text}
    (run.path / "recipe.yaml").write_text(yaml.safe_dump(recipe, allow_unicode=True, width=1000))
    return run


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    """Whatever a model, a recipe or a question says, the page has the same tags as with harmless text."""
    harmless = Page(write_report(hostile_run(tmp_path / "harmless", "harmless")).read_text())
    html = write_report(hostile_run(tmp_path / "hostile", HOSTILE)).read_text()
    hostile = Page(html)
    assert hostile.shape() == harmless.shape()
    assert html.count("<script") == 2
    assert "".join(hostile.text).count(HOSTILE) == "".join(harmless.text).count("harmless") > 20


def test_what_cannot_be_seen_or_has_no_utf8_is_shown(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    log = run.node("students/dpo").path / "log.jsonl"
    with log.open("a") as file:
        file.write('{"step": 57, "warning": "half \\ud83d pair \\u202egnp.exe"}\n')
    assert "half ⟨U+D83D⟩ pair ⟨U+202E⟩gnp.exe" in write_report(run).read_text(encoding="utf-8")


def test_the_evaluation_table_shows_the_summarys_numbers(run: RunFolder) -> None:
    summary = summarize_run(run)
    page = Page(write_report(run).read_text())
    shown = {}
    for cells in page.rows:
        if len(cells) == 12 and cells[0] != "model":
            shown[cells[0], cells[11].partition("× ")[2] or cells[11]] = cells
    assert len(shown) == 18
    for row in summary.eval:
        if row.seed is not None:
            continue
        label = row.model + " (shots)" * (row.evaluation == "shots")
        _, accuracy, interval, plot, none, loop, cut, finished, answered, tokens, limit, n = shown[label, str(row.n)]
        assert (plot, limit, n) == ("", str(row.max_tokens), str(row.n))
        low, high = interval.split("–")
        for cell, value in (
            (accuracy, row.accuracy),
            (low, row.low),
            (high, row.high),
            (none, row.no_answer),
            (loop, row.loop),
            (cut, row.truncated),
            (finished, row.finished_without_answer),
            (answered, row.accuracy_answered),
        ):
            assert re.fullmatch(r"\d+\.\d", cell)
            assert float(cell) == pytest.approx(100 * (value or 0.0), abs=0.0501)
        assert float(tokens) == pytest.approx(row.mean_tokens, abs=0.0501)
    assert shown["seeded", "240"][1:3] == ["52.5", "±2.5"]
    assert ["dpo", "58.8 (0.42%)", "39.0 (0%)"] in page.rows
    assert ["always “2”", "25.0", ""] in page.rows


def test_the_other_tables_show_the_summarys_numbers(run: RunFolder) -> None:
    rows = Page(write_report(run).read_text()).rows
    assert ["correct", "873 (35.3%)", "611 (41.0%)", "262 (26.7%)"] in rows
    assert ["questions with a correct and a wrong chain, %", "57.5", "55.4", "60.6"] in rows
    assert ["reflections that led to a correct answer", "98 (13.6%)", "41 (10.2%)", "57 (17.9%)"] in rows
    assert [
        "pairs",
        "dpo",
        "221",
        "–",
        "48.7",
        "55.9",
        "−7.2",
        "19.4",
        "1,547 wrong, 3 contaminated, 2 duplicate",
    ] in rows
    assert ["trees/train", "4 min 11 s", "120,345", "884,120", "61,240", "–", "243.7"] in rows
    assert ["students/sft", "2 min 52 s", "–", "–", "–", "34,730", "202.2"] in rows
    assert ["plain_dpo", "dpo", "sft", "pairs_long", "35", "274", "34,730", "0.400"] in rows


def test_a_search_says_what_it_cost_and_how_its_patterns_did(run: RunFolder) -> None:
    text = "".join(Page(write_report(run).read_text()).text)
    assert "Cost: 61,240 generated tokens, 153 a question, 70 a correct chain; 120,345 prompt tokens" in text
    assert "Pattern reclarify: 100 trees, 173 of 470 answers correct: 36.8% (32.6–41.3)." in text


def test_an_interval_is_drawn_where_its_numbers_are(run: RunFolder) -> None:
    """Positions in the plot are an affine map of the numbers in its label; of seeds each is a dot."""
    html = write_report(run).read_text()
    drawn = re.findall(
        r'aria-label="([\d.]+)%, interval ([\d.]+) to ([\d.]+)(?: over 3 seeds)?">'
        r'.*?<line x1="([\d.]+)" x2="([\d.]+)" y1="14.0".*?cx="([\d.]+)" cy="14.0" r="3.5"',
        html,
        re.DOTALL,
    )
    assert len(drawn) == 18
    for accuracy, low, high, x_low, x_high, x in drawn:
        for value, place in ((accuracy, x), (low, x_low), (high, x_high)):
            assert float(place) == pytest.approx(6 + 1.68 * float(value), abs=0.15)
    assert len(re.findall(r'r="2" fill', html)) == 6


def test_the_page_shows_real_trees_with_what_became_of_their_chains(run: RunFolder) -> None:
    page = Page(write_report(run).read_text())
    text = " ".join("".join(page.text).split())
    assert text.count("thoughts ·") == 3
    assert "bags-12 · arithmetic · 9 thoughts · 2 correct, 1 wrong, 1 no answer" in text, "the one that datasets took"
    for words in (
        "answer ✓ The answer is: \\boxed{32} small 1.00 of 1 chosen in pairs: shortest correct of 2, 41 tokens",
        "rejected in pairs: shares 12 tokens with the chosen one, the only wrong one, 30 tokens",
        "SFT row in sft: longest correct of 2, 51 tokens, length rank 3",
        "SFT row in control: drawn, right or wrong",
        "thinking ∅ 6 6 6 6 6 6 6 (cut by max_tokens)",
        "reflection Wait! something is wrong... the bags have 6 each. reflector 1.00 of 1",
    ):
        assert words in text


def test_the_same_run_gives_the_same_page(run: RunFolder) -> None:
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first
    assert sorted(path.name for path in run.path.glob("report*")) == ["report.html"]


def test_a_run_that_has_only_begun_has_a_page(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("name: early\nseed: 1\n")
    page = Page(write_report(RunFolder(tmp_path)).read_text())
    text = " ".join("".join(page.text).split())
    assert "Nothing has been evaluated." in text
    assert "No versions are recorded." in text
    assert {tag for tag, _ in page.tags}.isdisjoint({"table", "svg"})


def test_trees_alone_have_a_page(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    page = Page(write_report(run, summarize_run(run, [("trees/train", ())])).read_text())
    text = " ".join("".join(page.text).split())
    assert "Nothing has been evaluated." in text and "3 trees" in text
    assert ["trees/train", "4 min 11 s", "120,345", "884,120", "61,240", "–", "243.7"] in page.rows


def test_a_run_whose_nodes_are_all_unfinished_has_a_page_a_list_and_lines(run: RunFolder) -> None:
    for folder in [
        *(run.node(name) for name in run.nodes()),
        *(run.node(f"evaluations/{name}", model) for name, model in run.cells()),
    ]:
        record = folder.record()
        assert record is not None
        folder.write(replace(record, done=False, result={}))
    summary = summarize_run(run)
    assert not any(node.done for node in summary.nodes)
    text = " ".join("".join(Page(write_report(run, summary).read_text()).text).split())
    assert "Nothing has been evaluated." in text and "DPO loss" in text and "3 trees" in text
    assert [str(line).split()[0] for line in summary_lines(summary)][-1] == "total"


def test_absent_numbers_are_dashes(run: RunFolder) -> None:
    row = {"task": "t", "n": 4, "accuracy": 0, "low": 0, "high": 0.49, "no_answer": 1, "mean_tokens": 9}
    edit(run.node("evaluations/test", "sft"), rows=[{**row, "max_tokens": 16, "accuracy_answered": None}])
    page = Page(write_report(run).read_text())
    assert ["sft", "0.0", "0.0–49.0", "", "100.0", "–", "–", "–", "–", "9.0", "16", "4"] in page.rows


@pytest.mark.parametrize(
    ("node", "result"),
    [
        ("trees/train", {"counts": {"trees": 3}}),
        ("datasets/sft", {"counts": {"rows": 3}}),
        ("students/sft", {"train": {"steps": "many", "final": {"loss": "x"}}}),
    ],
)
def test_numbers_of_another_version_are_one_line(run: RunFolder, node: str, result: dict[str, Any]) -> None:
    edit(run.node(node), **result)
    with pytest.raises(UsageError, match="its files are not those of this version of cotree"):
        write_report(run)
    assert not (run.path / "report.html").exists()


@pytest.mark.parametrize("line", ['{"loss": 1}', "[1]", "{", '{"step": "x"}'])
def test_a_damaged_line_of_a_log_is_counted_in_the_page(run: RunFolder, line: str) -> None:
    log = run.node("students/sft").path / "log.jsonl"
    log.write_text(f"{line}\n{log.read_text()}")
    page = "".join(Page(write_report(run).read_text()).text)
    assert "Warning at step 0 of sft: 1 damaged line of log.jsonl left out" in page


def test_a_warning_of_the_training_stands_in_the_page(run: RunFolder) -> None:
    assert "Warning at step" not in write_report(run).read_text()
    log = run.node("students/dpo").path / "log.jsonl"
    with log.open("a") as file:
        file.write(json.dumps({"step": 57, "loss": 0.4, "warning": "chosen_falls: <b>raise</b> alpha"}) + "\n")
    page = Page(write_report(run).read_text())
    assert "Warning at step 57 of dpo: chosen_falls: <b>raise</b> alpha" in "".join(page.text)


def test_a_node_of_any_name_is_drawn_in_the_graph(run: RunFolder) -> None:
    record_of(run.node("students/alpha@alpha=1"), "x", ("students/sft",))
    html = write_report(run).read_text()
    graph = html[html.index('<svg class="graph"') :]
    graph = graph[: graph.index("</svg>")]
    names = re.findall(r'class="name">([^<]*)<', graph)
    assert {"train", "pairs_long", "seeded × 3 seeds", "alpha@alpha=0.5", "alpha@alpha=1", "shots"} <= set(names)
