"""The shards of a run together are what one run makes, tree by tree and reply by reply, and nothing is paid twice."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.experiment import KeptOutput, changed_recipe
from tests.support.fake_server import FakeServer, FakeServerThread
from tests.support.search import content

import cotree
from cotree.base.errors import CotreeError, UsageError
from cotree.base.progress import Output
from cotree.base.rows import read_rows
from cotree.base.run_folder import RunFolder
from cotree.base.shards import Shard, files_in_parts, rank_of
from cotree.experiment.recipe import build_recipe
from cotree.experiment.run import run, search_shard
from cotree.report.show import show_run
from cotree.search.journal import Journal
from cotree.search.store import TreeStore

QUESTIONS = 12


def written(url: str, student: Path) -> dict[str, Any]:
    """Trees, a dataset of them and an evaluation, all of a fake server."""
    return {
        "name": "many",
        "models": {"far": {"url": url, "model": "fake", "mode": "chat"}, "tiny": {"weights": str(student)}},
        "trees": {
            "train": {
                "questions": {"letters": QUESTIONS // 2, "arithmetic": QUESTIONS // 2},
                "roles": {"thinker": "far"},
                "rollouts": 3,
                "patterns": ["plain"],
            }
        },
        "datasets": {"rows": {"trees": "train", "rows": "sft", "tokenizer": "tiny"}},
        "evaluations": {"test": {"models": ["far"], "questions": {"letters": 6}, "max_tokens": 8}},
    }


@pytest.fixture
def server() -> Iterator[FakeServer]:
    from tests.support.knowing import knowing_reply

    with FakeServerThread(reply=knowing_reply) as thread:
        yield thread.server


@pytest.fixture
def recipe(server: FakeServer, student: Path) -> dict[str, Any]:
    return written(server.url, student)


def grow(recipe: dict[str, Any], runs: Path, rank: int, of: int, **options: Any) -> list[str]:
    output = KeptOutput()
    search_shard(build_recipe(recipe), "trees/train", rank, of, runs_dir=runs, output=output, **options)
    return output.lines


def whole(recipe: dict[str, Any], runs: Path, **options: Any) -> RunFolder:
    return run(build_recipe(recipe), runs, output=Output(quiet=True), **options)


def trees_of(runs: Path) -> list[tuple[Any, ...]]:
    trees = sorted(cotree.open_run(runs / "many").trees("train"), key=lambda tree: tree.tree_id)
    return [(tree.tree_id, *row) for tree, row in zip(trees, content(trees), strict=True)]


def rows_of(runs: Path) -> list[dict[str, Any]]:
    return list(read_rows(runs / "many" / "datasets" / "rows" / "train.parquet"))


def asked(server: FakeServer) -> Counter[str]:
    return Counter(json.dumps(body, sort_keys=True) for body in server.answered)


@given(st.integers(1, 2000), st.text())
def test_every_question_is_in_one_shard(of: int, id_: str) -> None:
    assert 0 <= rank_of("gsm8k", id_, of) == rank_of("gsm8k", id_, of) < of


def test_which_shard_a_question_is_in_never_changes() -> None:
    assert [rank_of("gsm8k", f"test-{n}", 8) for n in range(8)] == [7, 6, 3, 4, 4, 2, 0, 3]
    sizes = Counter(rank_of("gsm8k", f"test-{n}", 4) for n in range(4000))
    assert min(sizes.values()) > 900


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("8/8", "there is no shard 8/8; give one of 0/8 to 7/8"),
        ("0/0", "no shard 0/0"),
        ("2", "`2` is no shard; write K/N"),
        ("-1/4", "is no shard"),
    ],
)
def test_a_shard_that_is_none_is_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Shard.parse(text)


def test_shards_are_one_run(recipe: dict[str, Any], server: FakeServer, tmp_path: Path) -> None:
    whole(recipe, tmp_path / "one")
    alone = asked(server)
    server.answered.clear()
    for rank in (2, 0, 1):
        grow(recipe, tmp_path / "many", rank, 3)
        search_shard(
            build_recipe(recipe), ["evaluations/test"], rank, 3, runs_dir=tmp_path / "many", output=Output(quiet=True)
        )
    paid = asked(server)
    assert paid == alone, "the shards asked what one run asks"
    shards = tmp_path / "many" / "many" / "shards"
    sizes = [len(list(TreeStore(shards / f"{rank}-of-3" / "trees/train/trees.db").finished())) for rank in range(3)]
    assert sum(sizes) == QUESTIONS and max(sizes) < QUESTIONS
    shown = show_run(RunFolder(tmp_path / "many" / "many"))
    assert shown is not None

    folder = whole(recipe, tmp_path / "many")  # reads the shards, asks nothing
    assert asked(server) == paid
    assert trees_of(tmp_path / "many") == trees_of(tmp_path / "one")
    assert rows_of(tmp_path / "many") == rows_of(tmp_path / "one")
    results = [json.loads((tmp_path / runs / "many" / "summary.json").read_text()) for runs in ("one", "many")]
    for key in ("search", "data", "tokens"):
        assert results[0][key] == results[1][key], key
    assert [row["accuracy"] for row in results[0]["eval"]] == [row["accuracy"] for row in results[1]["eval"]]
    assert not TreeStore(folder.path / "trees/train/trees.db").finished(), "nothing was copied"
    seconds = [json.loads((shards / f"{n}-of-3" / "trees/train/node.json").read_text())["seconds"] for n in range(3)]
    assert folder.nodes()["trees/train"].seconds >= sum(seconds) - 0.01

    done = whole(recipe, tmp_path / "many").nodes()["trees/train"]
    shutil.rmtree(shards / "1-of-3")
    again = whole(recipe, tmp_path / "many").nodes()["trees/train"]
    assert sum(asked(server).values()) > sum(paid.values()), "a shard that is gone is grown again"
    assert (done.result["counts"] | {"unused": 0}) == (again.result["counts"] | {"unused": 0})


def test_a_shard_that_was_interrupted_goes_on_in_any_part(
    recipe: dict[str, Any], server: FakeServer, tmp_path: Path
) -> None:
    """Requests that were answered are paid once, also where the rest is dealt to other shards or to one run."""
    whole(recipe, tmp_path / "one", only=["trees"])
    alone = asked(server)
    server.answered.clear()
    server.faults = dict.fromkeys(range(server.calls + 40, server.calls + 1000), "400")
    with pytest.raises(CotreeError):
        grow(recipe, tmp_path / "many", 0, 1)
    begun = RunFolder(tmp_path / "many" / "many").nodes()["trees/train"]
    assert not begun.done, "that it has begun is seen in the run"
    server.faults = dict.fromkeys(range(server.calls + 20, server.calls + 1000), "400")
    for rank in range(4):
        with suppress(CotreeError):
            grow(recipe, tmp_path / "many", rank, 4)
    server.faults = {}
    whole(recipe, tmp_path / "many", only=["trees"])
    assert asked(server) == alone
    assert trees_of(tmp_path / "many") == trees_of(tmp_path / "one")
    counts = RunFolder(tmp_path / "many" / "many").nodes()["trees/train"].result["counts"]
    assert counts["unused"] == {"completions": 0, "tokens": 0}


def test_trees_of_one_run_are_not_grown_again_in_shards(
    recipe: dict[str, Any], server: FakeServer, tmp_path: Path
) -> None:
    whole(recipe, tmp_path, only=["trees"])
    calls = server.calls
    more = changed_recipe(recipe, ("trees.train.questions.letters", QUESTIONS))
    for rank in range(2):
        grow(more, tmp_path, rank, 2)
    of_new = server.calls - calls
    assert 0 < of_new < calls
    whole(more, tmp_path, only=["trees"])
    assert server.calls == calls + of_new
    assert len(trees_of(tmp_path)) == QUESTIONS + QUESTIONS // 2


def test_finished_trees_are_not_grown_again_in_silence(
    recipe: dict[str, Any], server: FakeServer, tmp_path: Path
) -> None:
    grow(recipe, tmp_path, 0, 2)
    changed = changed_recipe(recipe, ("trees.train.temperature", 0.5))
    calls = server.calls
    for work in (lambda: grow(changed, tmp_path, 0, 2), lambda: whole(changed, tmp_path, only=["trees"])):
        with pytest.raises(UsageError, match=r"finished trees would be grown again \(changed: temperature\)"):
            work()
    assert server.calls == calls
    for rank in range(2):
        grow(changed, tmp_path, rank, 2, regrow=True)
    after = server.calls
    whole(changed, tmp_path, only=["trees"])  # all are there, so none is grown again
    for rank in range(2):
        grow(recipe, tmp_path, rank, 2, regrow=True)
    assert server.calls > after
    kept = server.calls
    grow(recipe, tmp_path, 0, 2)
    assert server.calls == kept


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"trees.train.adaptive": True}, {}, "`adaptive` shares rollouts over all questions"),
        ({}, {"only": []}, "name them with --only"),
        ({}, {"only": ["datasets/rows"]}, "datasets/rows is made of all questions and is not done"),
        ({}, {"source": "elsewhere"}, "--from takes content over into a whole run"),
        ({}, {"on": "local:2", "shards": 2}, "write --on with --shards N and without --shard"),
        ({}, {"shard": None, "on": "local:2"}, "write --on with --shards N"),
        ({}, {"shard": None, "on": "local:0", "shards": 2}, "--on local:0: write local:PROCESSES"),
        ({}, {"shard": None, "on": "local:2", "shards": 0}, "there is no shard 0/0"),
    ],
)
def test_what_cannot_be_sharded_is_refused(
    recipe: dict[str, Any], server: FakeServer, tmp_path: Path, changes: dict[str, Any], options: Any, message: str
) -> None:
    recipe = changed_recipe(recipe, *changes.items())
    with pytest.raises(UsageError, match=message):
        whole(recipe, tmp_path, **({"only": ["trees"], "shard": Shard(2, 0)} | options))
    assert server.calls == 0


def test_shards_and_one_run_do_not_work_at_the_same_time(recipe: dict[str, Any], tmp_path: Path, hold: Any) -> None:
    grow(recipe, tmp_path, 0, 2)
    release = hold(tmp_path / "many" / "shards" / "1-of-2")
    with pytest.raises(UsageError, match=r"another cotree works in .*1-of-2; wait for it, or leave this shard to it"):
        grow(recipe, tmp_path, 1, 2)
    release()
    release = hold(tmp_path / "many")
    with pytest.raises(UsageError, match=r"another cotree works in .*many; wait"):
        grow(recipe, tmp_path, 1, 2)
    release()
    grow(recipe, tmp_path, 1, 2)


def test_a_damaged_store_of_a_shard_is_mended(recipe: dict[str, Any], server: FakeServer, tmp_path: Path) -> None:
    for rank in range(2):
        grow(recipe, tmp_path, rank, 2)
    whole(recipe, tmp_path, only=["trees"])
    before, calls = trees_of(tmp_path), server.calls
    path = tmp_path / "many" / "shards" / "0-of-2" / "trees" / "train" / "trees.db"
    text = path.read_bytes()
    at = text.rfind(b"The answer is")
    path.write_bytes(text[:at] + b"The Answer is" + text[at + 13 :])
    with pytest.raises(UsageError, match="not as it was stored"):
        trees_of(tmp_path)
    output = KeptOutput()
    run(build_recipe(recipe), tmp_path, only=["trees"], output=output)
    assert any("1 of its trees are gone" in line for line in output.lines), output.lines
    assert trees_of(tmp_path) == before
    assert server.calls == calls, "its requests were in the shard's journal"


def test_another_run_takes_the_trees_of_shards(recipe: dict[str, Any], server: FakeServer, tmp_path: Path) -> None:
    for rank in range(2):
        grow(recipe, tmp_path, rank, 2)
    whole(recipe, tmp_path, only=["trees"])
    trees, calls = trees_of(tmp_path), server.calls
    whole(recipe | {"name": "other"}, tmp_path, only=["trees"], source=tmp_path / "many")
    found = sorted(cotree.open_run(tmp_path / "other").trees("train"), key=lambda tree: tree.tree_id)
    assert content(found) == [row[1:] for row in trees]
    shutil.rmtree(tmp_path / "many")
    more = changed_recipe(recipe | {"name": "other"}, ("trees.train.rollouts", 2))
    whole(more, tmp_path, only=["trees"], regrow=True)
    assert server.calls == calls, "fewer rollouts ask what is in the journals of the shards"


def test_more_shards_than_questions(recipe: dict[str, Any], server: FakeServer, tmp_path: Path) -> None:
    for rank in range(8):
        only = ["trees/train", "evaluations/test"]
        search_shard(build_recipe(recipe), only, rank, 8, runs_dir=tmp_path, output=Output(quiet=True))
    calls = server.calls
    whole(recipe, tmp_path)
    assert server.calls == calls


def test_stores_and_journals_are_merged(recipe: dict[str, Any], server: FakeServer, tmp_path: Path) -> None:
    whole(recipe, tmp_path / "one", only=["trees"])
    for rank in range(3):
        grow(recipe, tmp_path / "many", rank, 3)
    shards = [tmp_path / "many" / "many" / "shards" / f"{rank}-of-3" for rank in range(3)]
    out = tmp_path / "merged.db"
    folders = [shard / "trees" / "train" for shard in shards]
    assert cotree.merge(folders[:2], out).startswith(f"{out}: ")
    assert f"{QUESTIONS} trees" not in cotree.merge(folders, out)
    assert cotree.merge(folders, out) == f"{out}: 0 trees copied from 3 files"
    with TreeStore(out, reading=True) as store:
        merged = [(tree.tree_id, *row) for tree in store.trees() for row in content([tree])]
    assert merged == trees_of(tmp_path / "one")

    cotree.merge([shard / "journal.db" for shard in shards], tmp_path / "journal.db")
    with Journal(tmp_path / "journal.db") as ours, Journal(tmp_path / "one" / "many" / "journal.db") as theirs:
        query = "SELECT key FROM completions ORDER BY key"
        assert list(ours.execute(query)) == list(theirs.execute(query)) != []
        names = sorted(theirs.questions)
        assert ours.unused(names) == theirs.unused(names) == {}


def test_a_merge_refuses_before_it_writes(recipe: dict[str, Any], server: FakeServer, tmp_path: Path) -> None:
    grow(recipe, tmp_path, 0, 2)
    grow(changed_recipe(recipe | {"name": "other"}, ("trees.train.rollouts", 2)), tmp_path, 0, 2)
    first, second = (tmp_path / name / "shards" / "0-of-2" for name in ("many", "other"))
    stores, out = [part / "trees" / "train" for part in (first, second)], tmp_path / "out.db"
    with pytest.raises(UsageError, match=r"grown under other settings than those of .* \(changed: rollouts\)"):
        cotree.merge(stores, out)
    with pytest.raises(UsageError, match=r"is a journal and .* a store of trees"):
        cotree.merge([stores[0], first / "journal.db"], out)
    with pytest.raises(UsageError, match="is missing; name a store of trees"):
        cotree.merge([tmp_path / "none.db"], out)
    with pytest.raises(UsageError, match="is a source too"):
        cotree.merge(stores[:1], stores[0] / "trees.db")
    assert not out.exists()
    cotree.merge(stores[:1], out)
    with pytest.raises(UsageError, match="grown under other settings"):
        cotree.merge(stores[1:], out)
    with pytest.raises(UsageError, match=r"is a store of trees, and .* a journal"):
        cotree.merge([first / "journal.db"], out)


def test_a_run_of_shards_is_exported_as_one(recipe: dict[str, Any], server: FakeServer, tmp_path: Path) -> None:
    from cotree.data.export import export_trees

    for rank in range(2):
        grow(recipe, tmp_path, rank, 2)
    for source in (tmp_path / "many", tmp_path / "many" / "trees" / "train"):
        assert export_trees(source, tmp_path / "trees.parquet") == QUESTIONS
    assert len(files_in_parts(RunFolder(tmp_path / "many"), "trees/train", "trees.db")) == 2


def test_the_viewer_lists_the_trees_of_all_shards(recipe: dict[str, Any], server: FakeServer, tmp_path: Path) -> None:
    from cotree.search.index import TreeQuery
    from cotree.view.trees import TreesOfRun

    grow(recipe, tmp_path, 0, 2)
    with TreesOfRun(RunFolder(tmp_path / "many")) as shown:
        first = shown.page("train", TreeQuery(), 0, 100)["total"]
        grow(recipe, tmp_path, 1, 2)
        page = shown.page("train", TreeQuery(), 0, 100)
        assert 0 < first < page["total"] == QUESTIONS
        for row in page["rows"]:
            assert shown.tree("train", row["tree"])["task"] == row["task"]
