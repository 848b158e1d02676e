"""Damaged stores of a run: `cotree run` mends them and says what was lost; other verbs name the fault and the fix."""

from __future__ import annotations

import errno
import fcntl
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.experiment.conftest import Done
from tests.support.experiment import KeptOutput, begun
from tests.support.fake_server import FakeServerThread

import cotree
from cotree.base.errors import UsageError
from cotree.base.lock import locked
from cotree.cli import main
from cotree.experiment.recipe import build_recipe
from cotree.experiment.run import run
from cotree.search.store import StoredTree


def trees_of(runs: Path) -> list[StoredTree]:
    return list(cotree.open_run(runs / "steps").trees("train"))


def change(path: Path, old: bytes, new: bytes) -> None:
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new, 1))


def test_a_run_rescues_a_damaged_store_and_grows_what_was_lost(done: Done, server: FakeServerThread) -> None:
    written, runs = done
    before, calls = trees_of(runs), server.calls
    store = runs / "steps" / "trees" / "train" / "trees.db"
    text = next(node.text for node in before[1].nodes if node.type == "answer").encode()
    change(store, text, text[:-1] + b"]")
    with pytest.raises(
        UsageError, match=r"trees.db is damaged \(the tree of .* is not as it was stored\); `cotree run`"
    ):
        trees_of(runs)
    output = KeptOutput()
    run(build_recipe(written), runs, output=output)
    said = "\n".join(output.lines)
    assert "trees/train: " in said and "3 of at least 4 trees are kept" in said, said
    assert "trees/train: 1 of its trees are gone and will be grown again" in said
    assert trees_of(runs) == before, "from the journal"
    assert server.calls == calls
    assert begun(written, runs) == []


def test_a_store_of_which_all_trees_can_be_read_is_mended_and_nothing_is_made_again(done: Done) -> None:
    written, runs = done
    before, store = trees_of(runs), runs / "steps" / "trees" / "train" / "trees.db"
    change(store, b"SQLite format 3", b"\0" * 15)
    output = KeptOutput()
    run(build_recipe(written), runs, output=output)
    assert any("4 of at least 4 trees are kept;" in line for line in output.lines)
    assert trees_of(runs) == before and store.with_name("trees.db.damaged-1").is_file()
    assert not [line for line in output.lines if line.endswith((": begins", ": going on"))]


def test_a_journal_that_is_damaged_or_gone_is_told(done: Done, server: FakeServerThread) -> None:
    written, runs = done
    before, journal = trees_of(runs), runs / "steps" / "journal.db"
    (runs / "steps" / "trees" / "train" / "trees.db").unlink()
    content = journal.read_bytes()
    journal.write_bytes(content[: len(content) * 9 // 10])
    output, calls = KeptOutput(), server.calls
    run(build_recipe(written), runs, output=output)
    (said,) = (line for line in output.lines if "completions are kept" in line)
    kept, there = (int(word) for word in said.split("malformed): ")[1].split(" completions")[0].split(" of at least "))
    assert 0 < kept <= there and server.calls - calls < calls
    assert [tree.tree_id for tree in trees_of(runs)] == [tree.tree_id for tree in before]
    journal.unlink()
    output = KeptOutput()
    more = written | {"trees": {"train": written["trees"]["train"] | {"questions": {"arithmetic": 3, "letters": 2}}}}
    run(build_recipe(more), runs, output=output, only=["trees"])
    assert any("journal.db is gone; requests that it had answers to are paid again" in line for line in output.lines)


def test_reading_verbs_name_a_damaged_or_missing_store(
    done: Done, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, runs = done
    path = runs / "steps"
    store = path / "trees" / "train" / "trees.db"

    def said(*words: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["cotree", *map(str, words)])
        with pytest.raises(SystemExit) as left:
            main()
        return int(left.value.code or 0), "".join(capsys.readouterr())

    content = store.read_bytes()
    store.write_bytes(content[: len(content) // 2])
    for verb in (("show", path), ("export", path, "--to", "trees", "-o", tmp_path / "out.parquet")):
        code, words = said(*verb)
        assert code == 2 and "is damaged (database disk image is malformed); `cotree run` on its run" in words, verb
        assert words.count("\n") == 1
    assert store.read_bytes() == content[: len(content) // 2]
    store.unlink()
    code, words = said("show", path)
    assert code == 0 and "trees/train: trees.db is gone; `cotree run" in words
    code, words = said("show", path, "--question", "x")
    assert code == 2 and "trees/train: trees.db is gone; `cotree run" in words


def refuses(code: int) -> Callable[..., None]:
    def flock(*_: object) -> None:
        raise OSError(code, "refused")

    return flock


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EIO, errno.ENOSYS, None])
def test_a_file_system_without_locks_is_told_from_another_cotree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int | None
) -> None:
    with locked(tmp_path), pytest.raises(UsageError, match="another cotree works in"), locked(tmp_path):
        pass
    with locked(tmp_path, fcntl.LOCK_SH), locked(tmp_path, fcntl.LOCK_SH):
        pass
    # A file system that refuses locks, and one that gives everybody all of them.
    monkeypatch.setattr(fcntl, "flock", (lambda *_: None) if code is None else refuses(code))
    with pytest.raises(UsageError, match=r"has no file locks \(.*\), so two .*; use a folder on a local disk$"):
        locked(tmp_path).__enter__()
    with locked(tmp_path, fcntl.LOCK_SH):
        pass
