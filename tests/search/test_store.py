"""The store keeps what it was given, whole or not at all."""

from __future__ import annotations

import os
import shutil
import sqlite3
import tempfile
from collections.abc import Callable
from contextlib import closing
from dataclasses import astuple, fields, replace
from pathlib import Path
from typing import Any

import pytest
from tests.support.full_disk import full_disk

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


def test_verdicts_keep_their_reasons_and_the_version_of_their_judge(tmp_path: Path) -> None:
    leaf = replace(node(3, 2), verdict="undecided", answer="5", detail="not checked: stopped at 3 s")
    judged = replace(tree(), nodes=[*tree().nodes, leaf], verdict_version=7)
    with TreeStore(tmp_path / "t.db") as store:
        store.put(judged)
    with TreeStore(tmp_path / "t.db", reading=True) as store:
        assert store.tree("t1") == judged
    with sqlite3.connect(tmp_path / "t.db") as db:
        db.execute("UPDATE nodes SET visits = visits + 1 WHERE node_id IN (0, 1, 2, 3)")
        db.execute("UPDATE trees SET checksum = NULL")
    with TreeStore(tmp_path / "t.db", reading=True) as store:
        assert store.tree("t1") == judged, "an older cotree counted what could not be judged"


OLDER = (
    "CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",
    "INSERT INTO meta VALUES ('schema_version', '4')",
    """CREATE TABLE trees (tree_id TEXT NOT NULL, task TEXT NOT NULL, question_id TEXT NOT NULL, turn INTEGER NOT NULL,
       config TEXT NOT NULL, family TEXT NOT NULL, messages TEXT NOT NULL, gold TEXT NOT NULL, pattern TEXT NOT NULL,
       rollouts INTEGER NOT NULL, stopped TEXT NOT NULL, calls INTEGER NOT NULL, prompt_tokens INTEGER NOT NULL,
       cached_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL, PRIMARY KEY (tree_id)) WITHOUT ROWID""",
    """CREATE TABLE nodes (tree_id TEXT NOT NULL REFERENCES trees, node_id INTEGER NOT NULL, parent_id INTEGER,
       type TEXT, text TEXT NOT NULL, prefix TEXT NOT NULL, model TEXT NOT NULL, depth INTEGER NOT NULL,
       visits INTEGER NOT NULL,
       value REAL NOT NULL, verdict TEXT, reward REAL, answer TEXT, tokens INTEGER NOT NULL,
       finish_reason TEXT NOT NULL, seed INTEGER NOT NULL, seconds REAL NOT NULL,
       PRIMARY KEY (tree_id, node_id)) WITHOUT ROWID""",
)


def test_a_store_of_the_version_before_is_read_as_it_is_and_upgraded_in_place(tmp_path: Path) -> None:
    path = tmp_path / "t.db"
    with closing(sqlite3.connect(path)) as db, db:
        for statement in OLDER:
            db.execute(statement)
        row: list[Any] = [getattr(tree(), column.name) for column in fields(StoredTree)[:15]]
        row[6] = '[{"role": "user", "content": "?"}]'
        db.execute(f"INSERT INTO trees VALUES ({', '.join('?' * 15)})", row)
        for each in tree().nodes:
            db.execute(f"INSERT INTO nodes VALUES ({', '.join('?' * 17)})", ("t1", *astuple(each)[:16]))
    before = path.read_bytes()
    with TreeStore(path, reading=True) as store:
        assert list(store.trees()) == [tree()]
    assert path.read_bytes() == before
    with TreeStore(path) as store:
        assert list(store.trees()) == [tree()]
        store.put(replace(tree("t2"), verdict_version=2))
    with TreeStore(path, reading=True) as store:
        assert [each.verdict_version for each in store.trees()] == [None, 2]
    with sqlite3.connect(path) as db:
        db.execute("UPDATE nodes SET text = 'y' WHERE tree_id = 't1' AND node_id = 2")
    with TreeStore(path) as store:
        assert list(store.finished()) == ["t2"] and "letters/q1" in store.rescued, "upgraded trees have checksums too"


def test_reading_makes_and_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "run" / "t.db"
    path.parent.mkdir()
    for content in (None, b""):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(UsageError, match="is missing; `cotree run`" if content is None else "is damaged"):
            TreeStore(path, reading=True)
        assert (path.read_bytes() if path.exists() else None) == content
    path.unlink()
    with TreeStore(path) as store:
        store.put(tree())
    before = path.read_bytes()
    path.chmod(0o444)
    path.parent.chmod(0o555)
    try:
        with TreeStore(path, reading=True) as store:
            assert list(store.trees()) == [tree()]
        assert path.read_bytes() == before and os.listdir(path.parent) == ["t.db"]
    finally:
        path.parent.chmod(0o755)


def test_a_snapshot_that_cannot_be_written_is_read_with_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "temporary").mkdir()
    (tmp_path / "snapshot").mkdir()
    with TreeStore(tmp_path / "t.db") as store:
        store.put(tree())
        for end in ("", "-wal"):
            shutil.copyfile(f"{tmp_path}/t.db{end}", f"{tmp_path}/snapshot/t.db{end}")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(os, "access", lambda *_: False)
    with TreeStore(tmp_path / "snapshot" / "t.db", reading=True) as store:
        assert list(store.trees()) == [tree()]
    assert sorted(os.listdir(tmp_path / "snapshot")) == ["t.db", "t.db-wal"], "nothing is made beside it"
    with full_disk(), pytest.raises(CotreeError, match=r"cannot write .*temporary: File too large; .*TMPDIR"):
        TreeStore(tmp_path / "snapshot" / "t.db", reading=True)
    assert not os.listdir(tmp_path / "temporary")


def connect_with(monkeypatch: pytest.MonkeyPatch, fails: Callable[[str], sqlite3.OperationalError | None]) -> None:
    """SQLite as it is on a file system where some of its statements fail."""

    class Connection(sqlite3.Connection):
        def execute(self, sql: str, *values: Any) -> sqlite3.Cursor:
            if error := fails(sql):
                raise error
            return super().execute(sql, *values)

    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *place, **more: connect(*place, **more, factory=Connection))


@pytest.mark.parametrize(
    ("name", "words", "fix"),
    [
        ("SQLITE_IOERR_LOCK", "disk I/O error", "has no file locks or no shared memory.*local disk"),
        ("SQLITE_IOERR_SHMMAP", "disk I/O error", "has no file locks or no shared memory.*local disk"),
        ("SQLITE_PROTOCOL", "locking protocol", "has no file locks or no shared memory.*local disk"),
        ("SQLITE_BUSY", "database is locked", "close other users of it"),
        ("SQLITE_IOERR_READ", "disk I/O error", "look after the disk"),
        ("SQLITE_IOERR_WRITE", "disk I/O error", "free some space"),
    ],
)
def test_a_file_system_without_locks_is_told_from_other_faults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, words: str, fix: str
) -> None:
    def fails(sql: str) -> sqlite3.OperationalError | None:
        error = sqlite3.OperationalError(words)
        error.sqlite_errorname = name
        return error if "journal_mode" in sql else None

    connect_with(monkeypatch, fails)
    with pytest.raises(CotreeError, match=f"t.db: {words}; .*{fix}") as raised:
        TreeStore(tmp_path / "t.db")
    assert raised.value.exit_code == 1


def test_a_file_system_that_cannot_keep_a_log_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLite itself says so, where it has no shared memory: by keeping to another mode."""
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda name, **more: connect(f"{name}&vfs=unix-none", **more))
    with pytest.raises(CotreeError, match="no file locks or no shared memory"):
        TreeStore(tmp_path / "t.db")
