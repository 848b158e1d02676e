"""A run on a file system of several machines is worked on elsewhere and copied, or refused before anything is done."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from tests.support.experiment import KeptOutput
from tests.support.fake_server import FakeServer, FakeServerThread
from tests.support.knowing import knowing_reply
from tests.support.search import content

import cotree
from cotree.base import disk
from cotree.base.errors import CotreeError, UsageError
from cotree.base.shards import Shard
from cotree.data.annotations import Annotations
from cotree.experiment.recipe import build_recipe
from cotree.experiment.run import run
from cotree.search import scratch
from cotree.search.index import TreeIndex
from cotree.search.merge import merge_journals, merge_stores
from cotree.search.store import TreeStore


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServerThread(reply=knowing_reply) as thread:
        yield thread.server


@pytest.fixture
def recipe(server: FakeServer) -> dict[str, Any]:
    trees = {"questions": {"letters": 6}, "roles": {"thinker": "far"}, "rollouts": 3, "patterns": ["plain"]}
    far = {"url": server.url, "model": "fake", "mode": "chat", "max_in_flight": 1}
    return {"name": "many", "models": {"far": far}, "trees": {"train": trees | {"trees_in_flight": 1}}}


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that looks as if it were on NFS."""
    (folder := tmp_path / "nfs").mkdir()
    mounts = "24 1 8:1 / / rw - ext4 /dev/vda rw\n"
    mounts += f"30 24 0:50 / {folder} rw - nfs4 server:/runs rw,vers=4.2,local_lock=all\n"
    (tmp_path / "mountinfo").write_text(mounts)
    monkeypatch.setattr(disk, "_MOUNTS", tmp_path / "mountinfo")
    return folder


def grow(recipe: dict[str, Any], runs: Path, **options: Any) -> list[str]:
    output = KeptOutput()
    run(build_recipe(recipe), runs, only="trees", output=output, **options)
    return output.lines


def trees_in(runs: Path) -> list[tuple[Any, ...]]:
    return content(sorted(cotree.open_run(runs / "many").trees("train"), key=lambda tree: tree.tree_id))


def asked(server: FakeServer) -> Counter[str]:
    return Counter(json.dumps(body, sort_keys=True) for body in server.answered)


def test_a_store_on_the_wrong_disk_is_refused(recipe: dict[str, Any], server: FakeServer, shared: Path) -> None:
    for options in ({}, {"shard": Shard(2, 0)}):
        with pytest.raises(UsageError, match=r"many.* is on nfs4, where SQLite's WAL is not safe; add --scratch DIR"):
            grow(recipe, shared, **options)
    with pytest.raises(UsageError, match=r"--scratch \$NOWHERE/x: the variable is not set here"):
        grow(recipe, shared, scratch="$NOWHERE/x")
    with pytest.raises(UsageError, match=r"--scratch .* is on nfs4; name a folder on a local disk"):
        grow(recipe, shared, scratch=shared / "scratch")
    assert server.calls == 0


@pytest.mark.parametrize("shard", [None, Shard(1, 0)])
def test_copies_are_what_was_worked_on(
    recipe: dict[str, Any],
    server: FakeServer,
    shared: Path,
    tmp_path: Path,
    *,
    monkeypatch: pytest.MonkeyPatch,
    shard: Shard | None,
) -> None:
    grow(recipe, tmp_path / "local")
    alone = asked(server)
    monkeypatch.setenv("PLACE", str(tmp_path))
    lines = grow(recipe, shared, scratch="$PLACE/scratch", shard=shard)
    assert (tmp_path / "scratch").is_dir()
    assert any("other machines do not see file locks there (mounted with local_lock=all)" in line for line in lines)
    assert trees_in(shared) == trees_in(tmp_path / "local")
    folder = shared / "many" / ("" if shard is None else "shards/0-of-1")
    for name in ("journal.db", "trees/train/trees.db"):
        assert not (folder / f"{name}-wal").exists()
        with closing(sqlite3.connect(folder / name)) as copy:
            assert copy.execute("PRAGMA journal_mode").fetchone() == ("delete",)
    calls = server.calls
    grow(recipe, shared, scratch=tmp_path / "another machine's")
    assert server.calls == calls and asked(server) == alone + alone


def test_what_is_written_there_without_scratch_has_no_wal(recipe: dict[str, Any], shared: Path, tmp_path: Path) -> None:
    """Annotations, the viewer's index, merged and imported stores; one that has a WAL already loses it."""
    local = tmp_path / "local"
    grow(recipe, local)
    store, folder = local / "many" / "trees" / "train" / "trees.db", shared / "written"
    folder.mkdir()
    with closing(sqlite3.connect(store)) as db:
        assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    shutil.copyfile(store, folder / "trees.db")
    assert merge_stores([store], folder / "trees.db") == 0
    assert merge_stores([store], folder / "merged.db") == 6
    assert merge_journals([local / "many" / "journal.db"], folder / "journal.db") > 0
    with Annotations(folder / "annotations.db"), TreeStore(folder / "merged.db") as trees, TreeIndex(trees) as index:
        assert index.fill() == 6
        assert {path.name for path in folder.iterdir() if path.suffix.endswith(("-wal", "-shm"))} == set()
    for path in folder.glob("*.db"):
        with closing(sqlite3.connect(path)) as db:
            assert db.execute("PRAGMA journal_mode").fetchone() == ("delete",), path.name
    assert len(list(folder.glob("*.db"))) == 5


def test_what_was_not_copied_comes_along_on_its_machine(
    recipe: dict[str, Any], server: FakeServer, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.faults = dict.fromkeys(range(20, 1000), "400")
    with monkeypatch.context() as killed:
        killed.setattr(scratch.Scratch, "copy", lambda self: None)  # as if it were killed before its first copy
        with pytest.raises(CotreeError):
            grow(recipe, shared, scratch=tmp_path / "scratch")
    assert not (shared / "many" / "journal.db").exists()
    server.faults = {}
    grow(recipe, shared, scratch=tmp_path / "scratch")
    assert max(asked(server).values()) == 1, "nothing was paid twice"
    assert len(trees_in(shared)) == 6


def test_copies_are_made_while_work_goes_on(
    recipe: dict[str, Any], server: FakeServer, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied: list[int] = []
    copy = scratch.Scratch.copy

    def counted(self: scratch.Scratch) -> None:
        copy(self)
        copied.append(len(server.answered))

    monkeypatch.setattr(scratch.Scratch, "copy", counted)
    monkeypatch.setattr(scratch, "_TREES", 2)
    server.latency = 0.01
    grow(recipe, shared, scratch=tmp_path / "scratch")
    assert len(copied) > 1 and copied[0] < len(server.answered), "after two trees and at the end"


def test_a_copy_that_cannot_be_made_ends_the_work(
    recipe: dict[str, Any], server: FakeServer, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(source: Path, target: Path) -> None:
        raise CotreeError("the disk is full")

    monkeypatch.setattr(scratch, "_back_up", full)
    monkeypatch.setattr(scratch, "_TREES", 1)
    server.latency = 0.01
    with pytest.raises(CotreeError, match="the disk is full"):
        grow(recipe, shared, scratch=tmp_path / "scratch")
    monkeypatch.undo()
    calls = asked(server)
    assert sum(calls.values()) < 6 * 13
