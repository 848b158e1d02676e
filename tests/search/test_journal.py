"""The journal keeps what it was given, whole or not at all, and knows what no tree uses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cotree.base.errors import CotreeError, UsageError
from cotree.search.journal import Entry, Journal


def entry(key: bytes, text: str = "text", question: str = "t/q/0", tokens: int = 1) -> Entry:
    return Entry(key, question, tokens, text)


def test_the_first_completion_under_a_key_stays(tmp_path: Path) -> None:
    with Journal(tmp_path / "j.db") as journal:
        assert journal.recall(b"k") is None
        journal.add([entry(b"k"), entry(b"l", "beside it")])
        journal.add([entry(b"k", "another")])
        assert journal.recall(b"k") == "text"
    with Journal(tmp_path / "j.db") as journal:
        assert journal.recall(b"k") == "text"
        assert journal.recall(b"l") == "beside it"
        assert journal.recall(b"m") is None


def test_completions_are_kept_all_or_none(tmp_path: Path) -> None:
    half = [entry(b"k"), Entry(b"l", "t/q/0", 1, object())]  # type: ignore[arg-type]
    with Journal(tmp_path / "j.db") as journal:
        with pytest.raises(UsageError, match="binding"):
            journal.add(half)
        assert journal.recall(b"k") is None
    with Journal(tmp_path / "j.db") as journal:
        assert journal.recall(b"k") is None


def test_a_full_disk_is_one_clear_line_and_loses_nothing(tmp_path: Path) -> None:
    with Journal(tmp_path / "j.db") as journal:
        journal.add([entry(b"first")])
        journal._db.execute("PRAGMA max_page_count = 20")

        def fill() -> None:
            for i in range(1000):
                journal.add([entry(str(i).encode(), "x" * 1000)])

        with pytest.raises(CotreeError, match="full; free some space, then re-run the same command to resume"):
            fill()
        journal._db.execute("PRAGMA max_page_count = 100000")
        assert journal.recall(b"first") == "text"
        journal.add([entry(b"last")])
        assert journal.recall(b"last") == "text"


def test_what_was_added_survives_a_kill(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from cotree.search.journal import Entry, Journal\n"
        "journal = Journal(Path(sys.argv[1])); journal.add([Entry(b'k', 't/q/0', 1, 'text')])\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "j.db")], check=False).returncode == -9
    with Journal(tmp_path / "j.db") as journal:
        assert journal.recall(b"k") == "text"


def test_unused_is_what_no_current_tree_is_made_of(tmp_path: Path) -> None:
    here, there = tmp_path / "trees" / "a" / "trees.db", tmp_path / "trees" / "b" / "trees.db"
    with Journal(tmp_path / "j.db") as journal:
        journal.add([entry(bytes([i]), tokens=10 * i) for i in range(1, 5)])
        journal.add([entry(b"other", question="t/r/0", tokens=7)])
        assert journal.unused(["t/q/0"]) == (4, 100)
        journal.add_uses("old", [bytes([1]), bytes([2])])
        journal.set_current(here, {"t/q/0": "old"})
        assert journal.unused(["t/q/0"]) == (2, 70)
        journal.add_uses("new", [bytes([2]), bytes([3])])
        assert journal.unused(["t/q/0"]) == (2, 70), "a tree counts when it is the current one"
        journal.set_current(here, {"t/q/0": "new"})
        assert journal.unused(["t/q/0"]) == (2, 50), "what only the old tree used is now unused"
        journal.add_uses("elsewhere", [bytes([4])])
        journal.set_current(there, {"t/q/0": "elsewhere"})
        assert journal.unused(["t/q/0"]) == (1, 10), "another node's tree uses it too"
        journal.set_current(here, {"t/q/0": "old"})
        assert journal.unused(["t/q/0"]) == (1, 30), "the old settings are back"
        assert journal.unused(["t/q/0", "t/r/0", "t/s/0"]) == (2, 37)
    (tmp_path / "moved").mkdir()
    (tmp_path / "j.db").rename(tmp_path / "moved" / "j.db")
    with Journal(tmp_path / "moved" / "j.db") as journal:
        journal.set_current(tmp_path / "moved" / "trees" / "a" / "trees.db", {"t/q/0": "new"})
        assert journal.unused(["t/q/0"]) == (1, 10), "a run folder may be moved or renamed"


def test_shares(tmp_path: Path) -> None:
    with Journal(tmp_path / "j.db") as journal:
        assert journal.share("a") is None
        journal.set_share("a", 3)
    with Journal(tmp_path / "j.db") as journal:
        assert (journal.share("a"), journal.share("b")) == (3, None)
