"""Damaged stores and journals: all that can be read is kept, and nothing is lost without a word."""

from __future__ import annotations

import os
import re
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from tests.search.test_journal import said
from tests.search.test_store import node, tree

from cotree.base.errors import UsageError
from cotree.search.journal import Journal
from cotree.search.rescue import readable_rows
from cotree.search.store import StoredTree, TreeStore

Damage = Callable[[bytes], bytes]


def cut(data: bytes) -> bytes:
    return data[: len(data) * 9 // 10]


def grown(number: int) -> StoredTree:
    """A tree of thoughts of many lengths, some of which need pages of their own."""
    nodes = [node(i, i - 1 if i else None, f"<{number}.{i}> 日本 " * (1 + 37 * number * i % 800)) for i in range(12)]
    return replace(tree(sha256(b"%d" % number).hexdigest()[:16], f"q{number}"), nodes=nodes)


TREES = {each.tree_id: each for each in map(grown, range(24))}
COMPLETIONS = {sha256(b"%d" % i).digest(): said(f"({i}) " * (1 + i % 300), i) for i in range(314)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a store and a journal."""
    folder = tmp_path_factory.mktemp("whole")
    with TreeStore(folder / "trees.db") as store, Journal(folder / "journal.db") as journal:
        for each in TREES.values():
            store.put(each)
            journal.set_current(store.path, {each.question_name: each.tree_id})
        for number, (key, completion) in enumerate(COMPLETIONS.items()):
            journal.add([(key, f"letters/q{number}/0", completion)])
            journal.add_uses({"a": [key]})
    return folder


def damaged(whole: Path, to: Path, name: str, damage: Damage) -> Path:
    shutil.copytree(whole, to)
    (to / name).write_bytes(damage((to / name).read_bytes()))
    return to / name


def kept_trees(store: TreeStore) -> int:
    """How many trees are there; all are what they were."""
    trees = list(store.trees())
    assert all(TREES[each.tree_id] == each for each in trees)
    return len(trees)


def kept_completions(journal: Journal) -> int:
    found = {key: journal.recall(key) for key in COMPLETIONS}
    assert all(completion in (None, COMPLETIONS[key]) for key, completion in found.items())
    return sum(completion is not None for completion in found.values())


def test_every_row_of_a_whole_file_is_read(whole: Path) -> None:
    for name, tables in (("trees.db", ("trees", "nodes")), ("journal.db", ("completions", "uses", "current"))):
        with sqlite3.connect(whole / name) as db:
            rows = [tuple(row) for row in readable_rows(whole / name)]
            assert all(set(db.execute(f"SELECT * FROM {table}")) <= set(rows) for table in tables)
        db.close()


def test_a_store_that_was_cut_keeps_the_trees_that_are_whole(whole: Path, tmp_path: Path) -> None:
    path = damaged(whole, tmp_path / "cut", "trees.db", cut)
    content = path.read_bytes()
    with pytest.raises(UsageError, match=r"is damaged \(database disk image is malformed\); `cotree run` on its run"):
        TreeStore(path, reading=True)
    assert path.read_bytes() == content, "reading changes nothing"
    with TreeStore(path) as store:
        kept = kept_trees(store)
        assert 15 <= kept < 24
        assert f"{kept} of at least 24 trees are kept, not those of letters/q" in store.rescued
        assert store.rescued.endswith("trees.db.damaged-1") and store.lost == 24 - kept
        assert path.with_name("trees.db.damaged-1").read_bytes() == content
        for each in TREES.values():
            store.put(each)
        assert kept_trees(store) == 24, "what was lost can be grown again"
    with TreeStore(path) as store:
        assert not store.rescued
    path.write_bytes(content)
    with TreeStore(path) as store:
        assert store.rescued.endswith("trees.db.damaged-2")


def test_a_journal_that_was_cut_keeps_what_was_paid_for(whole: Path, tmp_path: Path) -> None:
    path = damaged(whole, tmp_path / "cut", "journal.db", cut)
    with Journal(path) as journal:
        kept = kept_completions(journal)
        said = re.search(r"(\d+) of at least (\d+) completions are kept;", journal.rescued)
        assert said and int(said[1]) == kept and 250 < kept < int(said[2]) <= 314, journal.rescued
        uses = journal._db.execute("SELECT count(*) FROM uses").fetchone()[0]
        assert uses > 200 and journal._db.execute("SELECT count(*) FROM current").fetchone()[0] > 0
        for key, completion in COMPLETIONS.items():
            journal.add([(key, "letters/q/0", completion)])
        assert kept_completions(journal) == 314


@pytest.mark.parametrize("page", [0, 1, 2, 10])
@pytest.mark.parametrize("name", ["trees.db", "journal.db"])
def test_a_page_of_zeros_costs_what_was_in_it(whole: Path, tmp_path: Path, name: str, page: int) -> None:
    def zero(data: bytes) -> bytes:
        return data[: page * 4096] + bytes(4096) + data[(page + 1) * 4096 :]

    path = damaged(whole, tmp_path / "zeros", name, zero)
    if name == "trees.db":
        with TreeStore(path) as store:
            # All rows of `trees` are in its page.
            assert (
                kept_trees(store) >= (20 if page != 1 else 0) and store.rescued and kept_trees(store) + store.lost == 24
            )
    else:
        with Journal(path) as journal:
            assert kept_completions(journal) >= 280 and journal.rescued


def test_a_flipped_bit_of_a_text_is_found(whole: Path, tmp_path: Path) -> None:
    path = damaged(whole, tmp_path / "a", "trees.db", lambda data: data.replace(b"<7.3>", b"<7.2>", 1))
    with TreeStore(path, reading=True) as store:
        with pytest.raises(UsageError, match="the tree of letters/q7 is not as it was stored"):
            list(store.trees())
        assert store.tree(grown(8).tree_id) == grown(8), "the others can be read"
    with TreeStore(path) as store:
        assert kept_trees(store) == 23 and "23 of at least 24 trees are kept, not those of letters/q7;" in store.rescued
    path = damaged(whole, tmp_path / "b", "trees.db", lambda data: data.replace(b"<7.3> \xe6", b"<7.3> \xff", 1))
    with pytest.raises(UsageError, match="is damaged"), TreeStore(path, reading=True) as store:
        list(store.trees())
    with TreeStore(path) as store:
        assert kept_trees(store) == 23
    path = damaged(whole, tmp_path / "c", "journal.db", lambda data: data.replace(b"(41) (41)", b"(41) (40)", 1))
    with Journal(path) as journal:
        assert kept_completions(journal) == 313 and "not those of letters/q41/0;" in journal.rescued


@hypothesis_settings(max_examples=25, deadline=None)
@given(at=st.floats(0, 0.999999), bit=st.integers(0, 7), name=st.sampled_from(["trees.db", "journal.db"]))
def test_a_flipped_bit_anywhere_gives_no_other_content(
    whole: Path, tmp_path_factory: pytest.TempPathFactory, at: float, bit: int, name: str
) -> None:
    def flip(data: bytes) -> bytes:
        place = int(at * len(data))
        return data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :]

    path = damaged(whole, tmp_path_factory.mktemp("flipped") / "f", name, flip)
    try:
        if name == "trees.db":
            with TreeStore(path) as store:
                assert kept_trees(store) >= 23 - 3
        else:
            with Journal(path) as journal:
                assert kept_completions(journal) >= 314 - 60
    except UsageError:  # the name of a table, or the version
        assert path.read_bytes() == flip((whole / name).read_bytes())


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.search.test_rescue import TREES
from cotree.search.store import TreeStore
store = TreeStore(Path(sys.argv[1]))
for tree in TREES.values():
    store.put(tree)
os.kill(os.getpid(), signal.SIGKILL)
"""


def killed(path: Path) -> Path:
    """A store whose process was killed: its trees are in the `-wal`."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False, env=environment).returncode == -9
    return path.with_name(f"{path.name}-wal")


def test_a_log_that_was_cut_or_damaged_after_a_kill_is_told(tmp_path: Path) -> None:
    log = killed(tmp_path / "trees.db")
    shutil.copytree(tmp_path, tmp_path.with_name("copy"))
    here = tmp_path / "trees.db"
    with TreeStore(here) as store:
        assert not store.rescued and kept_trees(store) == 24, "a kill alone damages nothing"
    content = tmp_path.with_name("copy").joinpath(log.name).read_bytes()
    half = len(content) // 2
    for name, change, least in (
        ("cut", content[:half], 8),
        ("missing", b"", 0),
        ("flipped", content[:half] + b"\xff" + content[half + 1 :], 22),
        ("head", b"\xff" * 32 + content[32:], 24),
    ):
        path = shutil.copytree(tmp_path.with_name("copy"), tmp_path / name) / "trees.db"
        path.with_name(log.name).write_bytes(change)
        if name == "missing":
            path.with_name(log.name).unlink()
        with pytest.raises(UsageError, match=r"is damaged \(its -wal lacks commits\)"):
            TreeStore(path, reading=True)
        if name == "missing":
            # Nothing was in the file itself.
            with pytest.raises(UsageError, match=r"lacks commits\), and nothing in it can be read; move it away"):
                TreeStore(path)
            path.unlink()
            with TreeStore(path) as store:
                assert store.is_new and not store.rescued
            continue
        with TreeStore(path) as store:
            assert kept_trees(store) >= least and "its -wal lacks commits" in store.rescued, name
        assert path.with_name("trees.db.damaged-1-wal").read_bytes() == change
    # A half-written frame at the end is what a kill leaves, and its commit was acknowledged to nobody.
    path = shutil.copytree(tmp_path.with_name("copy"), tmp_path / "torn") / "trees.db"
    path.with_name(log.name).write_bytes(content + content[32:1000])
    with TreeStore(path) as store:
        assert not store.rescued and kept_trees(store) == 24


def test_a_kill_between_the_files_of_a_rescue_loses_nothing(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run" / "journal.db").rename(tmp_path / "run" / "journal.db.rescued")
    with Journal(tmp_path / "run" / "journal.db") as journal:
        assert kept_completions(journal) == 314


def test_a_large_file_is_checked_where_it_is_read_and_as_a_whole_once_damage_was_found(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cotree.search.database.LARGE", 0)
    store_at = damaged(whole, tmp_path / "run", "trees.db", lambda data: data.replace(b"<7.3>", b"<7.2>", 1))
    journal_at = store_at.with_name("journal.db")
    journal_at.write_bytes(journal_at.read_bytes().replace(b"(211) (211)", b"(211) (210)", 1))
    fault = "is not as it was stored.; `cotree run` on its run moves it aside and keeps all that can be read"
    for reading in (False, True):
        with TreeStore(store_at, reading=reading) as store:
            assert not store.rescued, "opening reads nothing of the trees"
            assert len(store.finished()) == 24
            with pytest.raises(UsageError, match=f"the tree of letters/q7 {fault}"):
                list(store.trees())
        store_at.with_name("trees.db.suspected").unlink()
    with TreeStore(store_at) as store, pytest.raises(UsageError):
        list(store.trees())
    with TreeStore(store_at) as store:
        assert "23 of at least 24 trees are kept, not those of letters/q7" in store.rescued
        assert kept_trees(store) == 23
    key = sha256(b"211").digest()
    with Journal(journal_at) as journal:
        assert not journal.rescued
        assert journal.recall(sha256(b"210").digest()) == COMPLETIONS[sha256(b"210").digest()]
        with pytest.raises(UsageError, match=f"a completion of letters/q211/0 {fault}"):
            journal.recall(key)
    with Journal(journal_at) as journal:
        assert "313 of at least 314 completions are kept" in journal.rescued
        assert journal.recall(key) is None
    assert not list(store_at.parent.glob("*.suspected"))
    with Journal(journal_at) as journal:
        assert not journal.rescued
