"""What the viewer reads of a run that was really made: its index, its replies side by side."""

from __future__ import annotations

import pytest
from tests.experiment.conftest import Done

from cotree.base.errors import UsageError
from cotree.base.run_folder import RunFolder
from cotree.eval.compare import compare_evaluations
from cotree.experiment.recipe import load_recipe
from cotree.experiment.run import nodes_of
from cotree.search.index import TreeIndex, TreeQuery
from cotree.search.store import TreeStore
from cotree.view.results import about_run, replies


def test_a_finished_run_has_its_index_and_its_replies(done: Done) -> None:
    run = RunFolder(done[1] / "steps")
    record = run.node("trees/train").record()
    assert record is not None
    with TreeStore(run.node("trees/train").path / "trees.db", reading=True) as store, TreeIndex(store) as index:
        total, rows = index.list(record.base, TreeQuery())
        assert total == record.result["counts"]["trees"] > 0, "the search wrote it, tree after tree"
        assert sum(row["correct"] for row in rows) == record.result["counts"]["correct"]
        assert index.fill() == 0

    about = about_run(run, nodes_of(load_recipe(run.path)))
    assert {node["state"] for node in about["nodes"]} == {"done"}
    (test,) = about["evaluations"]
    for model in test["models"][1:]:
        beside = next(each["parent"] for each in about["students"] if each["name"] == model)
        page = replies(run, "test", model, limit=1000)
        assert page["beside"] == beside and page["total"] == page["gained"] + page["lost"] + page["same"]
        changed = [
            after - before
            for row in compare_evaluations(
                run.path / "evaluations/test" / beside, run.path / "evaluations/test" / model
            )
            for before, after in row.changed.values()
        ]
        assert (page["gained"], page["lost"]) == (sum(by > 0 for by in changed), sum(by < 0 for by in changed))
        for show in ("gained", "lost", "same"):
            shown = replies(run, "test", model, show=show, offset=0, limit=1000)
            assert shown["total"] == len(shown["rows"]) == page[show]
        assert all(row["text"] and row["gold"] is not None for row in page["rows"])
    assert replies(run, "test", model, limit=1, offset=1)["rows"] == page["rows"][1:2]
    with pytest.raises(UsageError, match="has no model `absent`"):
        replies(run, "test", "absent")
