"""The store keeps what it was given, whole or not at all."""

from __future__ import annotations

import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest

from cotree.base.errors import CotreeError, UsageError
from cotree.search.journal import Journal
from cotree.search.store import StoredNode, StoredTree, TreeStore


def node(node_id: int, parent: int | None, text: str = "x") -> StoredNode:
    return StoredNode(node_id, parent, "thinking", text, "", "m", 1, 1, 0.5, None, None, None, 3, "stop", 7, 0.1)


def tree(tree_id: str = "t1", question: str = "q1") -> StoredTree:
    nodes = [node(0, None), node(1, 0, "naïve 日本 \u2028 line"), node(2, 1)]
    asked = [{"role": "user", "content": "?"}]
    return StoredTree(
        tree_id, "letters", question, 0, "c", "count", asked, "2", "plain", 6, "rollouts", 3, 100, 50, 20, nodes
    )


def test_round_trip(tmp_path: Path) -> None:
    with TreeStore(tmp_path / "t.db") as store:
        store.put(tree())
        assert list(store.trees("c")) == [tree()]
        assert list(store.trees("other")) == []
        assert [n.node_id for n in store.tree("t1").chain(2)] == [1, 2]
    with TreeStore(tmp_path / "t.db") as store:
        assert store.finished("c") == store.finished() == {"t1": 6}
        assert store.finished("other") == {}
        assert store.tree("t1").question_name == "letters/q1/0"


def test_a_tree_that_is_there_stays_as_it_is(tmp_path: Path) -> None:
    with TreeStore(tmp_path / "t.db") as store:
        store.put(tree())
        store.put(replace(tree(), gold="9", nodes=[node(0, None)]))
        assert list(store.trees()) == [tree()]


def test_a_tree_that_breaks_half_way_leaves_nothing(tmp_path: Path) -> None:
    broken = replace(tree(), nodes=[node(0, None), node(0, None)])
    with TreeStore(tmp_path / "t.db") as store:
        with pytest.raises(UsageError, match="UNIQUE"):
            store.put(broken)
        assert list(store.trees()) == []
        store.put(tree())
        assert list(store.trees()) == [tree()]


def test_a_changed_question_has_a_tree_beside_the_old_one(tmp_path: Path) -> None:
    with TreeStore(tmp_path / "t.db") as store:
        store.put(tree())
        store.put(replace(tree("t2"), gold="9"))
        assert [(kept.question_id, kept.gold) for kept in store.trees("c")] == [("q1", "2"), ("q1", "9")]


def test_a_full_disk_is_one_clear_line_and_loses_nothing(tmp_path: Path) -> None:
    with TreeStore(tmp_path / "t.db") as store:
        store.put(tree())
        store._db.execute("PRAGMA max_page_count = 12")

        def fill() -> None:
            for i in range(1000):
                store.put(tree(f"more{i}"))

        with pytest.raises(CotreeError, match="full; free some space, then re-run the same command to resume"):
            fill()
        store._db.execute("PRAGMA max_page_count = 100000")
        kept = list(store.trees())
        assert kept[-1] == tree()
        assert all(replace(other, tree_id="t1") == tree() for other in kept), "whole or not at all"
        store.put(tree("t2", "q2"))


def test_files_that_are_no_store_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.db").write_text("no database, but long enough to be looked at " * 50)
    with pytest.raises(UsageError, match="is not a tree store"):
        TreeStore(tmp_path / "text.db")
    with sqlite3.connect(tmp_path / "other.db") as db:
        db.execute("CREATE TABLE mine (x)")
    before = (tmp_path / "other.db").read_bytes()
    with pytest.raises(UsageError, match="is not a tree store"):
        TreeStore(tmp_path / "other.db")
    assert (tmp_path / "other.db").read_bytes() == before
    with Journal(tmp_path / "j.db"), pytest.raises(UsageError, match="is not a tree store"):
        TreeStore(tmp_path / "j.db")
    with TreeStore(tmp_path / "t.db"), pytest.raises(UsageError, match="is not a journal"):
        Journal(tmp_path / "t.db")
    with sqlite3.connect(tmp_path / "t.db") as db:
        db.execute("UPDATE meta SET value = '99'")
    with pytest.raises(UsageError, match=r"schema version 99.*; choose another name="):
        TreeStore(tmp_path / "t.db")
