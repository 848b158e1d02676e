"""The table of evaluations: what its cells, labels, notes and claims say of the numbers in the node.json files."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import stdev
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from tests.report.conftest import ANSWERED, edit, make_run

from cotree.base.errors import UsageError
from cotree.base.numbers import duration, paper_form, percent, signed, sparkline
from cotree.base.run_folder import NodeFolder, NodeRecord, RunFolder
from cotree.base.statistics import minimum_detectable_difference, wilson_interval
from cotree.report.summary import Summary, summarize_run
from cotree.report.table import Table, make_table, summary_lines, table_of
from cotree.report.templates import listed


def row(model: str, correct: int, n: int, task: str = "t", **more: Any) -> dict[str, Any]:
    low, high = wilson_interval(correct, n)
    named = {"evaluation": "test", "model": model, "student": model.partition("@seed=")[0]}
    seed = int(model.partition("@seed=")[2]) if "@seed=" in model else None
    return named | {
        "task": task, "n": n, "accuracy": correct / n, "low": low, "high": high, "seed": seed,
        "no_answer": 0.0, "mean_tokens": 12.0, "max_tokens": 64, **more,
    }  # fmt: skip


def table(*rows: dict[str, Any], **more: Any) -> Table:
    return make_table([("x", Summary.model_validate({"name": "x", "eval": list(rows), **more}))])


def rendered(found: Table, width: int = 80) -> str:
    out = io.StringIO()
    Console(file=out, width=width).print(found.render("terminal"))
    return out.getvalue()


def lines_of(text: str) -> list[list[str]]:
    return [re.split(r"\s{2,}", line.strip()) for line in text.splitlines()]


def test_the_terminal_table_fits_80_columns_and_shows_every_number(run: RunFolder) -> None:
    text = rendered(table_of([str(run.path)]))
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80
    lines = lines_of(text)
    for item in summarize_run(run).eval:
        if item.seed is None and item.evaluation == "test":
            number, low, high, none = (percent(x) for x in (item.accuracy, item.low, item.high, item.no_answer))
            assert any(cells[:4] == [item.model, number, f"{low}–{high}", none] for cells in lines)
    assert ["always “12”", "3.8"] in lines
    words = " ".join(text.split())
    assert "test: held-out questions, greedy, max_tokens 128" in words
    assert "shots: held-out questions, greedy, max_tokens 128, the search's worked examples" in words


def test_the_markdown_is_the_readmes_table(run: RunFolder) -> None:
    lines = str(table_of([str(run.path)]).render("markdown")).splitlines()
    assert lines[0] == (
        "| task | model | accuracy % | 95% interval | no answer % | cut off % | if answered % | tokens | n |"
    )
    assert lines[1] == "|---|---|---:|---:|---:|---:|---:|---:|---:|"
    assert lines[2] == "| arithmetic | small | 1.2 | 0.4–3.6 | 89.6 | 12.9 | 12.0 | 78.4 | 240 |"
    assert "| letters | always “2” | 25.0 |  |  |  |  |  |  |" in lines
    assert "| small | 1.2 (89.58%) | 0.5 (91.5%) |" in lines, "the paper's form"


def test_models_are_shown_in_the_order_of_the_experiment(run: RunFolder) -> None:
    tasks = table_of([str(run.path)]).tasks()
    assert list(tasks) == ["arithmetic", "letters"]
    for rows in tasks.values():
        assert [row.label for row in rows] == [
            "small", "small (shots)", "sft", "control", "seeded", "dpo", "plain_dpo", "alpha@alpha=0.5",
            "alpha@alpha=2.0",
        ]  # fmt: skip


@given(st.lists(st.integers(0, 40), min_size=2, max_size=5))
def test_a_row_of_several_seeds_has_their_mean_and_spread(correct: Sequence[int]) -> None:
    rows = [row(f"sft@seed={seed}", count, 40, mean_tokens=float(seed)) for seed, count in enumerate(correct)]
    (only,) = table(*rows).rows
    shares = [count / 40 for count in correct]
    assert only.label == "sft"
    cells = dict(
        zip(("model", "accuracy", "spread", "none", "cut", "answered", "tokens", "n"), only.cells(), strict=True)
    )
    assert float(cells["accuracy"]) == pytest.approx(100 * sum(shares) / len(shares), abs=0.0501)
    assert cells["spread"].startswith("±")
    assert float(cells["spread"][1:]) == pytest.approx(100 * stdev(shares), abs=0.0501)
    assert cells["n"] == f"{len(correct)} × 40"
    assert float(cells["tokens"]) == pytest.approx((len(correct) - 1) / 2, abs=0.051)
    content = only.to_json()
    assert content["seeds"] == list(range(len(correct)))
    assert (content["low"], content["high"]) == (None, None)
    assert content["deviation"] == pytest.approx(stdev(shares))


def test_one_seed_alone_has_its_interval() -> None:
    (only,) = table(row("sft@seed=3", 20, 40)).rows
    low, high = wilson_interval(20, 40)
    assert only.cells()[2] == f"{percent(low)}–{percent(high)}"


def test_json_has_the_numbers_of_the_files(run: RunFolder) -> None:
    content = json.loads(json.dumps(table_of([str(run.path)]).to_json()))
    rows = {(found["model"], found["task"]): found for found in content["rows"]}
    assert rows["dpo", "letters"]["accuracy"] == ANSWERED["dpo"][1][0] / 200
    assert rows["seeded", "letters"]["accuracy"] == pytest.approx((70 + 76 + 64) / 600)
    assert rows["small (shots)", "letters"]["evaluation"] == "shots"
    assert {best["answer"] for best in content["baselines"]} == {"12", "2"}


def test_equal_cells_come_once_and_equal_names_say_their_run(run: RunFolder, tmp_path: Path) -> None:
    """Three runs of one experiment that differ in one student: 9 rows of a task and one more for each other run."""
    others = []
    for place in (1, 2):
        other = RunFolder(tmp_path / f"copy{place}")
        shutil.copytree(run.path, other.path)
        cell = other.node("evaluations/test", "dpo")
        record = cell.record()
        assert record is not None
        cell.write(replace(record, fingerprint=f"other{place}"))
        others.append(str(other.path))
    labels = [row.label for row in table_of([str(run.path), *others]).tasks()["letters"]]
    alike = {"small", "small (shots)", "sft", "control", "seeded", "plain_dpo", "alpha@alpha=0.5", "alpha@alpha=2.0"}
    assert len(labels) == 11
    assert set(labels) == alike | {"laptop: dpo", "copy1: dpo", "copy2: dpo"}


def test_one_student_of_a_run(run: RunFolder) -> None:
    def labels(*words: str) -> list[str]:
        return [row.label for row in table_of([f"{run.path}:{word}" for word in words]).tasks()["letters"]]

    assert labels("dpo") == ["dpo"]
    assert labels("alpha") == ["alpha@alpha=0.5", "alpha@alpha=2.0"], "an entry means all its nodes"
    assert labels("seeded@seed=1") == labels("seeded") == ["seeded"]
    assert labels("sft", "dpo", "sft") == ["sft", "dpo"]
    with pytest.raises(UsageError, match=r"has no evaluated student or model `dbo`; did you mean `dpo`\?"):
        labels("dbo")


def test_a_folder_of_an_evaluation_stands_beside_a_run(run: RunFolder, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    named = {key: value for key, value in row("mine", 30, 200, task="letters").items()
             if key not in ("evaluation", "model", "student", "seed")}  # fmt: skip
    own = {"model": "mine", "rows": [named], "instructions": [], "baselines": []}
    (folder / "results_2026.json").write_text(json.dumps({"cotree": own}))
    assert [row.label for row in table_of([str(folder)]).rows] == ["mine"]
    both = table_of([str(run.path), str(folder)])
    assert both.tasks()["letters"][-1].label == "mine"
    cell = run.node("evaluations/test", "dpo")
    record = cell.record()
    assert record is not None
    NodeFolder(folder, folder / "older").write(NodeRecord(record.fingerprint, record.base))
    assert len(table_of([str(run.path), str(folder)]).rows) == len(both.rows) - 1, "it is the cell that the run has"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name a run folder"),
        (["nowhere"], "no folder at nowhere"),
        (["nowhere:sft"], "no folder at nowhere"),
        (["."], "is no run folder"),
    ],
)
def test_what_is_no_evaluation_is_one_line(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=message):
        table_of(words)


def test_a_run_without_an_evaluation_has_no_table(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("name: early")
    with pytest.raises(UsageError, match="nothing has been evaluated"):
        table_of([str(tmp_path)])


def test_a_student_that_differs_in_few_settings_says_in_which(run: RunFolder) -> None:
    notes = table_of([str(run.path)]).notes
    assert "plain_dpo is dpo with data pairs_long instead of pairs, label_smoothing 0 instead of 0.1 and alpha 0 " \
           "instead of 1" in notes  # fmt: skip
    assert "alpha@alpha=0.5 is dpo with alpha 0.5 instead of 1" in notes
    assert "control was trained on unverified chains, right or wrong (dataset control)" in notes
    many = {"from": "students/dpo", "keys": {f"key{n}": [n, n + 1] for n in range(9)}}
    edit(run.node("students/plain_dpo"), differs=many)
    assert not any(note.startswith("plain_dpo is") for note in table_of([str(run.path)]).notes)


@given(
    st.lists(
        st.tuples(st.sampled_from(["base", "sft", "dpo", "plain", "other"]), st.integers(0, 60)),
        min_size=2,
        max_size=5,
        unique_by=lambda item: item[0],
    ),
    st.integers(60, 100),
    st.booleans(),
)
def test_a_claim_is_made_exactly_where_intervals_do_not_overlap(
    counts: list[tuple[str, int]], n: int, seeded: bool
) -> None:
    """Every related pair is in one of the sentences: above, below, or no claim."""
    names = [name for name, _ in counts]
    train = {name: {"parent": names[place - 1]} for place, name in enumerate(names) if place}
    rows = [row(name, correct, n) for name, correct in counts]
    if seeded:  # a second seed of the last, whose interval counts too
        last = rows.pop()
        rows += [row(f"{names[-1]}@seed={seed}", correct, n) for seed, correct in enumerate((counts[-1][1], 60))]
        train[f"{names[-1]}@seed=0"] = train.pop(last["model"])
    found = table(*rows, train=train)
    text = " ".join(found.claims()["t"])
    claimed = set()
    for group, word, other in re.findall(r"([^:]+?) (?:is|are) (above|below) (\w+) \([^)]*\): the intervals", text):
        claimed |= {(name, word, other) for name in re.findall(r"(\w+) \(", group)}
    unclear = set(re.findall(r"(\w+) and (\w+)(?=[;.])", (re.search(r"overlap: (.*?\.)", text) or [""])[0]))
    by_name = {row.label: row for row in found.rows}
    expected = set()
    for name, parent in zip(names[1:], names, strict=False):
        mine, theirs = by_name[name], by_name[parent]
        if mine.low > theirs.high or mine.high < theirs.low:
            expected.add((name, "above" if mine.low > theirs.high else "below", parent))
        else:
            assert (name, parent) in unclear
    assert claimed == expected
    assert len(unclear) + len(expected) == len(names) - 1


def test_a_row_without_a_relative_is_compared_with_the_first_one() -> None:
    text = " ".join(table(row("a", 1, 100), row("b", 90, 100)).claims()["t"])
    assert "b (90.0%, 82.6–94.5) is above a (1.0%, 0.2–5.4): the intervals do not overlap." in text


def test_claims_state_the_minimum_detectable_difference_of_the_table() -> None:
    found = table(row("base", 1, 100), row("dpo", 55, 100))
    difference = minimum_detectable_difference(100, 0.55)
    assert (
        f"With n = 100, the smallest detectable difference between two rows is {percent(difference)} points"
        in " ".join(found.claims()["t"])
    )
    assert found.limits()[0].startswith(
        f"t: with n = 100, the smallest detectable difference between two rows is {percent(difference)} points"
    )
    assert "too small to detect" in " ".join(table(row("base", 0, 1), row("dpo", 1, 1)).claims()["t"])


@pytest.mark.parametrize(
    ("correct", "verdict"), [(50, "No interval lies above"), (80, "Of the intervals only that of dpo lies above")]
)
def test_claims_compare_with_the_constant_answer(correct: int, verdict: str) -> None:
    baselines = [{"evaluation": "test", "task": "t", "answer": "3", "accuracy": 0.45}]
    text = " ".join(table(row("base", 2, 100), row("dpo", correct, 100), baselines=baselines).claims()["t"])
    assert f"{verdict} the best constant answer, “3” (45.0%)." in text


@pytest.mark.parametrize(("twos", "said"), [(20, "everything"), (19, "95% of all"), (17, "")])
def test_a_row_that_gives_one_answer_to_everything_is_called_that(twos: int, said: str) -> None:
    found = table(row("dpo", twos, 20, commonest="2", commonest_share=twos / 20))
    sentences, note = " ".join(found.claims()["t"]), " ".join(rendered(found).split())
    expected = f"dpo answers “2” to {said} that it answers"
    assert (expected in sentences) == (expected in note) == bool(said)
    assert ("dpo answers" in note) == bool(said)


def test_one_row_alone_is_compared_with_nothing() -> None:
    (sentence,) = table(row("base", 2, 100)).claims()["t"]
    assert sentence == "base at 2.0%, 0.6–7.0 is the only row."


@pytest.mark.parametrize(
    ("split", "words"), [("test", "held-out questions, greedy"), ("dev", "dev questions (for tuning)")]
)
def test_the_table_says_which_questions_were_asked(split: str, words: str) -> None:
    found = table(row("a", 1, 4), evaluations={"test": {"split": split}})
    assert words in " ".join(rendered(found).split())


def test_brackets_in_a_name_are_no_markup() -> None:
    assert "[red]boo[/]" in rendered(table(row("[red]boo[/]", 1, 4)))


def test_the_papers_columns_pool_aime_and_stand_in_its_order() -> None:
    tasks = {"blocksworld": (100, 50), "aime25": (30, 3), "letters": (100, 25), "gsm8k": (100, 80), "aime24": (30, 6),
             "math500": (500, 300)}  # fmt: skip
    grid = table(*(row("dpo", correct, n, task=task) for task, (n, correct) in tasks.items())).paper()
    assert grid.head == ("model", "GSM8K", "MATH", "AIME", "Plan.", "letters")
    assert grid.sections == {"": [("dpo", "80.0 (0%)", "60.0 (0%)", "15.0 (0%)", "50.0 (0%)", "25.0 (0%)")]}


def test_instructions_have_the_papers_groups() -> None:
    def score(group: str, turn: int | None, share: float, task: str = "multi_if") -> dict[str, Any]:
        shares = dict.fromkeys(("prompt_strict", "prompt_loose", "instruction_strict", "instruction_loose"), share)
        named = {"evaluation": "test", "model": "dpo", "student": "dpo"}
        return named | {"task": task, "group": group, "turn": turn, "average": share, "no_answer": 0.1, **shares}

    scores = [score("IF(En)", 1, 0.5), score("IF(En)", 2, 0.25), score("IF(En)", None, 0.375), score("IF(Zh)", 1, 0.6)]
    rows = [row("dpo", 5, 10, task=task) for task in ("multi_if", "multi_if, turn 2")]
    found = table(*rows, instructions=scores)
    assert found.paper().head == ("model", "IF(Zh)", "IF(En)")
    assert found.paper().sections == {"": [("dpo", "60.0 (10%)", "37.5 (10%)")]}
    text = rendered(found)
    assert "multi_if IF(En), turn 2" in text and ["dpo", *["25.0"] * 5] in lines_of(text)
    both = table(*rows, instructions=[*scores, score("IF(En)", 1, 0.9, task="ifeval")])
    assert both.paper().head == ("model", "IF(Zh)", "multi_if IF(En)", "ifeval IF(En)")


def test_summary_lines_say_what_each_node_came_to(run: RunFolder) -> None:
    lines = [line for line in summary_lines(summarize_run(run)) if isinstance(line, str) and line]
    assert lines[0] == (
        "train: 400 trees, 5,413 thoughts, 2,470 answers (873 correct, 1,547 wrong, 50 no answer), "
        "0 of them forced by a prefix, 49 chains cut by max_tokens"
    )
    assert lines[1].endswith(
        "68.5% of questions have a correct chain, 57.5% a correct and a wrong one; 720 reflections, 98 followed by a "
        "correct answer"
    )
    assert lines[2] == "  trees ended: 300 after the last rollout, 100 with nothing left to grow (2,500 rollouts)"
    assert "sft: 274 sft rows (63.2 tokens)" in lines
    assert "pairs: 221 dpo rows; chosen 48.7 tokens, rejected 55.9, difference −7.2, shared prefix 19.4" in lines
    timed = {line.split()[0]: line for line in lines}
    assert "120,345 prompt + 884,120 cached, 61,240 generated tokens (244/s)" in timed["trees/train"]
    assert " ".join(timed["students/dpo"].split()) == "students/dpo 2 min 52 s 34,730 tokens trained (202/s)"
    assert lines[-1].split()[0] == "total"
    assert list(summary_lines(Summary(name="x"))) == []


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


def test_two_runs_of_one_name_are_called_by_their_paths(tmp_path: Path) -> None:
    make_run(tmp_path / "a" / "laptop")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    cell = RunFolder(tmp_path / "b" / "laptop").node("evaluations/test", "dpo")
    record = cell.record()
    assert record is not None
    cell.write(replace(record, fingerprint="other"))
    paths = [str(tmp_path / name / "laptop") for name in "ab"]
    labels = [row.label for row in table_of(paths).tasks()["letters"]]
    assert [label for label in labels if "dpo" in label and "plain" not in label] == [f"{path}: dpo" for path in paths]
