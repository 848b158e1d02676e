"""Growing many trees against a real server on loopback: the same whatever the latency, the concurrency or a kill."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from tests.support.fake_server import FakeServerThread
from tests.support.search import config_of, content, grow, letters, reply, run, settings, stored, unused

from cotree.base.errors import CotreeError
from cotree.base.rows import read_rows
from cotree.data.export import export_trees
from cotree.search.growth import writers_of
from cotree.search.journal import Journal, SearchModels
from cotree.search.settings import Thought, Writer
from cotree.search.store import StoredTree, TreeStore
from cotree.search.trees import tree_key, unfinished_turns
from cotree.tasks import Question, Verdict
from cotree.tasks.base import VERDICT_VERSION

SETTINGS = settings(questions={"letters": 8}, rollouts=6, leaves_per_round=3, max_reflections=2)


@pytest.mark.parametrize("in_flight", [1, 8, 64])
def test_the_store_is_the_same_for_any_concurrency_and_latency(tmp_path: Path, in_flight: int) -> None:
    run(tmp_path / "serial.db", SETTINGS.model_copy(update={"trees_in_flight": 1}))
    stormy = {"latency": (0.0, 0.03), "fault_rate": 0.1, "fault_kinds": ("500", "reset")}
    trees, _ = run(tmp_path / "other.db", SETTINGS.model_copy(update={"trees_in_flight": in_flight}), server=stormy)
    assert stored(tmp_path / "serial.db") == stored(tmp_path / "other.db")
    assert {"correct", "wrong"} <= {node.verdict for tree in trees for node in tree.nodes}


def test_a_second_run_calls_nothing_and_changes_nothing(tmp_path: Path) -> None:
    with FakeServerThread(reply=reply) as server:
        asyncio.run(grow(server.url, tmp_path / "t.db", SETTINGS))
        before = stored(tmp_path / "t.db"), server.calls
        _, progress = asyncio.run(grow(server.url, tmp_path / "t.db", SETTINGS))
        assert (progress.calls, progress.recalled, progress.trees_before) == (0, 0, 8)
        assert (stored(tmp_path / "t.db"), server.calls) == before


def test_other_settings_add_trees_and_keep_the_old(tmp_path: Path) -> None:
    run(tmp_path / "t.db", SETTINGS)
    before = stored(tmp_path / "t.db")
    run(tmp_path / "t.db", SETTINGS.model_copy(update={"exploration": 0.5}))
    after = stored(tmp_path / "t.db")
    assert len(after) == 2 * len(before)
    assert set(before) <= set(after)


def test_more_questions_grow_the_new_ones_only(tmp_path: Path) -> None:
    with FakeServerThread(reply=reply) as server:
        asyncio.run(grow(server.url, tmp_path / "t.db", SETTINGS, letters(5)))
        few, calls = stored(tmp_path / "t.db"), server.calls
        with TreeStore(tmp_path / "t.db") as store:
            config = config_of(SETTINGS)
            assert unfinished_turns(store, letters(5), config) == []
            assert len(unfinished_turns(store, letters(8), config)) == 3
        trees, progress = asyncio.run(grow(server.url, tmp_path / "t.db", SETTINGS, letters(8)))
        assert progress.recalled == 0
        assert set(few) < set(stored(tmp_path / "t.db"))
        asyncio.run(grow(server.url, tmp_path / "fresh.db", SETTINGS, letters(3, start=5)))
        assert server.calls - calls == 2 * progress.calls, "the new questions cost what they cost alone"
    whole, _ = run(tmp_path / "whole.db", SETTINGS, asked=letters(8))
    assert content(trees) == content(whole)


def test_a_question_whose_content_changed_is_another_question(tmp_path: Path) -> None:
    asked = letters(3)
    known, question = asked[1]
    changed = replace(question, messages=({"role": "user", "content": "Another question."},))
    with FakeServerThread(reply=reply) as server:
        before, _ = asyncio.run(grow(server.url, tmp_path / "t.db", SETTINGS, asked))
        calls = server.calls
        after, progress = asyncio.run(
            grow(server.url, tmp_path / "t.db", SETTINGS, [asked[0], (known, changed), asked[2]])
        )
        assert server.calls - calls == progress.calls > 0
        assert (progress.trees, progress.trees_before) == (3, 2)
    assert [after[0], after[2]] == [before[0], before[2]]
    assert after[1].messages == [{"role": "user", "content": "Another question."}]
    with TreeStore(tmp_path / "t.db") as store:
        assert store.tree(before[1].tree_id) == before[1], "the old tree stays"


def test_a_corrected_gold_answer_makes_a_new_tree_out_of_the_same_completions(tmp_path: Path) -> None:
    (known, question), *_ = asked = letters(2)
    changed = replace(question, gold=str(int(question.gold) % 3 + 1))
    assert tree_key(known, changed) != tree_key(known, question)
    few = SETTINGS.model_copy(update={"max_reflections": 0})  # without them the verdicts steer UCB alone
    _, first = run(tmp_path / "t.db", few, asked=asked)
    trees, second = run(tmp_path / "t.db", few, asked=[(known, changed)])
    assert trees[0].gold == changed.gold
    assert second.recalled > 0
    assert second.calls < first.calls / 2


def test_no_more_trees_are_begun_than_may_grow_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks: list[int] = []
    monkeypatch.setattr(SearchModels, "note_servers", lambda _: tasks.append(len(asyncio.all_tasks())))
    few = SETTINGS.model_copy(update={"trees_in_flight": 2, "leaves_per_round": 1})
    run(tmp_path / "t.db", few, asked=letters(40))
    assert len(tasks) == 40
    assert max(tasks) < 10, "one for each place, and few others"


def test_nothing_is_remembered_of_stored_trees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remembered: list[int] = []
    monkeypatch.setattr(SearchModels, "note_servers", lambda self: remembered.append(len(self._added)))
    run(tmp_path / "t.db", SETTINGS.model_copy(update={"trees_in_flight": 2}), asked=letters(40))
    assert max(remembered) <= 2 and remembered[-1] == 0


def test_trees_that_are_finished_at_one_moment_are_stored_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Out of the journal all are finished at once; where they cannot be stored, every one's task says so."""
    serial, together = (SETTINGS.model_copy(update={"trees_in_flight": number}) for number in (1, 8))
    put, batches = TreeStore.put, list[int]()

    def counted(self: TreeStore, *trees: StoredTree) -> None:
        batches.append(len(trees))
        put(self, *trees)

    with FakeServerThread(reply=reply) as server:
        asyncio.run(grow(server.url, tmp_path / "serial.db", serial))
        monkeypatch.setattr(TreeStore, "put", counted)
        asyncio.run(grow(server.url, tmp_path / "again.db", together, journal=tmp_path / "serial.journal"))
        assert sum(batches) == 8 and max(batches) > 1
        assert stored(tmp_path / "again.db") == stored(tmp_path / "serial.db")

        def full(self: TreeStore, *trees: StoredTree) -> None:
            raise CotreeError(f"no space for {len(trees)}")

        monkeypatch.setattr(TreeStore, "put", full)
        with pytest.raises(ExceptionGroup) as raised:
            asyncio.run(grow(server.url, tmp_path / "full.db", together, journal=tmp_path / "serial.journal"))
        assert {str(error) for error in raised.value.exceptions} <= {f"no space for {n}" for n in range(2, 9)}
        assert stored(tmp_path / "full.db") == []


def kill_and_resume(tmp_path: Path, kills: int) -> None:
    with FakeServerThread(reply=reply) as server:
        asyncio.run(grow(server.url, tmp_path / "whole.db", SETTINGS))
        needed = server.calls
    with FakeServerThread(reply=reply, latency=(0.01, 0.03)) as server:
        command = [sys.executable, __file__, server.url, str(tmp_path / "killed.db")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path])}
        for kill in range(kills):
            child = subprocess.Popen(command, env=environment)
            wanted, started = server.calls + 5 + 3 * kill, time.monotonic()
            while server.calls < wanted and child.poll() is None and time.monotonic() - started < 60:
                time.sleep(0.005)
            child.send_signal(signal.SIGKILL)
            child.wait()
        assert subprocess.run(command, env=environment, check=False).returncode == 0
        # A call in flight at a kill was not completed; there are at most 4 trees x 3 rollouts of those.
        assert server.calls <= needed + 12 * kills
    assert stored(tmp_path / "whole.db") == stored(tmp_path / "killed.db")
    names = [f"letters/{question.id}/0" for _, question in letters(8)]
    with Journal(tmp_path / "killed.journal") as journal:
        assert unused(journal, names) == (0, 0)


def test_kill_and_resume_give_the_undisturbed_store(tmp_path: Path) -> None:
    kill_and_resume(tmp_path, 3)


@pytest.mark.slow
def test_twenty_kills_give_the_undisturbed_store(tmp_path: Path) -> None:
    kill_and_resume(tmp_path, 20)


def test_no_completed_call_is_made_twice(tmp_path: Path) -> None:
    """The journal holds what a killed search had: emptying the store alone makes the resume call nothing."""
    with FakeServerThread(reply=reply) as server:
        _, first = asyncio.run(grow(server.url, tmp_path / "t.db", SETTINGS))
        before, calls = stored(tmp_path / "t.db"), server.calls
        with sqlite3.connect(tmp_path / "t.db") as db:
            db.execute("DELETE FROM nodes")
            db.execute("DELETE FROM trees")
        _, second = asyncio.run(grow(server.url, tmp_path / "t.db", SETTINGS))
        assert (second.calls, second.recalled) == (0, first.calls)
        assert (stored(tmp_path / "t.db"), server.calls) == (before, calls)


def test_a_stored_verdict_keeps_its_reason_and_the_version_of_its_judge(tmp_path: Path) -> None:
    class Stopped(type(letters(1)[0][0])):  # type: ignore[misc]
        def verify(self, answer: str, question: Question) -> Verdict:
            return Verdict.of(None, answer, f"not checked: stopped at {answer}")

    ((_, question),) = letters(1)
    (tree,), _ = run(tmp_path / "t.db", SETTINGS, asked=[(Stopped(), question)])
    leaves = [node for node in tree.nodes if node.verdict == "undecided"]
    assert leaves and all(leaf.detail == f"not checked: stopped at {leaf.answer}" for leaf in leaves)
    assert tree.verdict_version == VERDICT_VERSION
    export_trees(tmp_path / "t.db", tmp_path / "t.parquet")
    (row,) = read_rows(tmp_path / "t.parquet")
    assert row["verdict_version"] == VERDICT_VERSION
    assert {node["detail"] for node in row["nodes"]} == {"", *(leaf.detail for leaf in leaves)}


def test_the_writer_of_a_type() -> None:
    roles = {role: (Writer(model=name),) for role, name in (("thinker", "a"), ("reflector", "b"), ("hypothesis", "c"))}
    kinds = ("thinking", "reflection", "double_check", "hypothesis")
    assert "".join(writers_of(kind, roles, Thought())[0].model for kind in kinds) == "abbc"
    assert writers_of("reflection", {"thinker": roles["thinker"]}, Thought()) == roles["thinker"]
    plan = Thought(prefixes=("Plan:",), role="reflector")
    assert writers_of("plan", roles, plan) == roles["reflector"]
    assert writers_of("hypothesis", roles, Thought(role="thinker")) == roles["thinker"], "the recipe's word counts"


if __name__ == "__main__":
    asyncio.run(grow(sys.argv[1], Path(sys.argv[2]), SETTINGS))
