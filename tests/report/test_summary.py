"""summary.json is what the node.json files say: rows, seconds and tokens by node, and faults that name their file."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import yaml
from tests.report.conftest import ANSWERED, RECIPE, SIZES, STUDENTS, edit, record_of

from cotree.base.errors import UsageError
from cotree.base.run_folder import RunFolder
from cotree.report.summary import split_seed, summarize_run, write_summary
from cotree.report.table import make_table


def test_every_cell_has_its_rows_and_names_its_student_and_seed(run: RunFolder) -> None:
    summary = summarize_run(run)
    rows = {(row.evaluation, row.model, row.task): row for row in summary.eval}
    assert len(rows) == len(summary.eval) == 2 * (len(ANSWERED) + 1)
    for model, answered in ANSWERED.items():
        for (task, n), (correct, cut, finished, _) in zip(SIZES.items(), answered, strict=True):
            row = rows["test", model, task]
            assert (row.accuracy, row.cut_off, row.no_answer) == (correct / n, cut / n, (cut + finished) / n)
            assert (row.student, row.seed) == split_seed(model)
    assert rows["test", "seeded@seed=2", "letters"].student == "seeded"
    assert rows["shots", "small", "letters"].accuracy == 49 / 200
    assert [(b.evaluation, b.task, b.answer) for b in summary.baselines] == [
        (evaluation, task, answer)
        for evaluation in ("test", "shots")
        for task, answer in (("arithmetic", "12"), ("letters", "2"))
    ]


@pytest.mark.parametrize(
    ("name", "student", "seed"),
    [
        ("sft", "sft", None),
        ("sft@seed=1", "sft", 1),
        ("alpha@alpha=0.5,seed=-2", "alpha@alpha=0.5", -2),
        ("alpha@alpha=0.5", "alpha@alpha=0.5", None),
    ],
)
def test_a_students_name_without_its_seed(name: str, student: str, seed: int | None) -> None:
    assert split_seed(name) == (student, seed)


def test_seconds_tokens_and_states_are_those_of_the_nodes(run: RunFolder) -> None:
    summary = summarize_run(run)
    assert summary.seconds["trees/train"] == 251.3
    assert summary.seconds["evaluations/test"] == pytest.approx(9.52 * len(ANSWERED), abs=0.06)
    assert summary.tokens["trees/train"] == {"prompt": 120345, "cached": 884120, "completion": 61240}
    assert summary.tokens["students/dpo"] == {"trained": 34730}
    assert summary.tokens["evaluations/test"] == {"prompt": 21040 * len(ANSWERED), "completion": 9712 * len(ANSWERED)}
    assert all(node.done for node in summary.nodes)
    names = [node.name for node in summary.nodes]
    written = [f"{kind}/{entry}" for kind in ("trees", "datasets") for entry in RECIPE[kind]]
    assert names[: len(written)] == written, "in the order of the recipe"
    assert names[-2:] == ["evaluations/test", "evaluations/shots"]
    students = [name for name in names if name.startswith("students/")]
    assert students == [f"students/{name}" for name in STUDENTS]


def test_only_the_given_nodes_are_in_it_in_the_given_order(run: RunFolder) -> None:
    nodes = [
        ("students/sft", ("datasets/sft",)),
        ("students/later", ()),
        ("evaluations/test", ("models/small", "students/sft")),
    ]
    summary = summarize_run(run, nodes)
    assert [(node.name, node.done) for node in summary.nodes] == [
        ("students/sft", True), ("students/later", False), ("evaluations/test", True),
    ]  # fmt: skip
    assert {row.model for row in summary.eval} == {"small", "sft"}, "an arm that is no longer asked is in no table"
    assert summary.search == {}


def test_content_of_an_entry_that_the_recipe_no_longer_has_is_left_out(run: RunFolder) -> None:
    record_of(run.node("students/gone"), "s-gone", result={"train": {}})
    record_of(run.node("evaluations/test", "gone"), "e-gone", ("students/gone",))
    assert not [node.name for node in summarize_run(run).nodes if "gone" in node.name]


def test_an_evaluation_is_done_when_all_its_cells_are(run: RunFolder) -> None:
    cell = run.node("evaluations/test", "dpo")
    record = cell.record()
    assert record is not None
    cell.write(replace(record, done=False, result={}))
    states = {node.name: node.done for node in summarize_run(run).nodes}
    assert (states["evaluations/test"], states["evaluations/shots"]) == (False, True)


def test_the_file_holds_every_number_and_fits_the_contract(run: RunFolder) -> None:
    summary = summarize_run(run)
    content = json.loads(write_summary(run, summary).read_text())
    assert content.keys() >= {"name", "seed", "created", "machine", "nodes", "eval", "baselines", "instructions",
                              "search", "compared", "data", "train", "seconds", "tokens"}  # fmt: skip
    for row in content["eval"]:
        assert row.keys() >= {"evaluation", "model", "student", "seed", "task", "n", "accuracy", "low", "high",
                              "no_answer", "loop", "truncated", "cut_off", "finished_without_answer",
                              "accuracy_answered", "mean_tokens", "max_tokens"}  # fmt: skip
        assert row["cut_off"] == row["truncated"]
    for node in content["nodes"]:
        assert node.keys() == {"name", "reads", "done", "seconds"}
    assert content["train"]["plain_dpo"]["differs"]["keys"]["alpha"] == [1.0, 0]
    assert content["search"]["train"]["correct"] == 873
    assert type(summary).model_validate(content) == summary


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": [{"task": "t"}]}, r"evaluations/test/sft/node\.json: eval\.0\.n: Field required"),
        (
            {"baselines": [{"task": "t", "answer": "2", "accuracy": 25}]},
            r"node\.json: baselines\.0\.accuracy: .* less than or equal",
        ),
    ],
)
def test_a_wrong_number_is_an_error_that_names_file_and_key(
    run: RunFolder, change: dict[str, Any], message: str
) -> None:
    edit(run.node("evaluations/test", "sft"), **change)
    with pytest.raises(UsageError, match=message):
        summarize_run(run)


def test_a_torn_node_is_left_out_and_named(run: RunFolder) -> None:
    for node in (run.node("students/sft"), run.node("evaluations/test", "sft")):
        path = node.path / "node.json"
        path.write_text(path.read_text()[:-3])
    summary = summarize_run(run)
    assert summary.damaged == ["students/sft", "evaluations/test/sft"]
    assert "sft" not in summary.train and "sft" not in {row.model for row in summary.eval}
    notes = make_table([("laptop", summary)]).notes
    assert notes[:2] == tuple(f"left out: {name}, whose node.json is damaged" for name in summary.damaged)


@pytest.mark.parametrize("text", ["[1]", "a: [", "\x00"])
def test_a_recipe_that_cannot_be_read_is_one_line(run: RunFolder, text: str) -> None:
    (run.path / "recipe.yaml").write_text(text)
    with pytest.raises(UsageError, match=r"recipe\.yaml"):
        summarize_run(run)


def test_a_run_that_has_only_begun_has_an_empty_summary(run: RunFolder) -> None:
    empty = RunFolder(run.path.with_name("empty"))
    empty.path.mkdir()
    (empty.path / "recipe.yaml").write_text(yaml.safe_dump({"name": "early", "seed": 1}))
    summary = summarize_run(empty)
    assert (summary.name, summary.seed, summary.nodes, summary.eval) == ("early", 1, [], [])
