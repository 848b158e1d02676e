"""The journal keeps what it was given, whole or not at all, and knows what no tree uses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tests.support.search import unused

from cotree.base.errors import CotreeError, UsageError
from cotree.models.client import Choice, Completion
from cotree.search.journal import Journal


def said(text: str = "text", tokens: int = 1) -> Completion:
    return Completion((Choice(text, "stop", tokens),), 1, 0, tokens)


def test_the_first_completion_under_a_key_stays(tmp_path: Path) -> None:
    with Journal(tmp_path / "j.db") as journal:
        assert journal.recall(b"k") is None
        journal.add([(b"k", "t/q/0", said())])
        journal.add([(b"l", "t/q/0", said("beside it"))])
        journal.add([(b"k", "t/q/0", said("another"))])
        assert journal.recall(b"k") == said()
    with Journal(tmp_path / "j.db") as journal:
        assert journal.recall(b"k") == said()
        assert journal.recall(b"l") == said("beside it")
        assert journal.recall(b"m") is None


def test_a_completion_that_cannot_be_kept_is_not_there(tmp_path: Path) -> None:
    for _ in range(2):
        with Journal(tmp_path / "j.db") as journal:
            with pytest.raises(UsageError, match="binding"):
                journal.add([(b"k", object(), said())])  # type: ignore[list-item]
            assert journal.recall(b"k") is None


def test_a_full_disk_is_one_clear_line_and_loses_nothing(tmp_path: Path) -> None:
    with Journal(tmp_path / "j.db") as journal:
        journal.add([(b"first", "t/q/0", said())])
        journal._db.execute("PRAGMA max_page_count = 20")

        def fill() -> None:
            for i in range(1000):
                journal.add([(str(i).encode(), "t/q/0", said("x" * 1000))])

        with pytest.raises(CotreeError, match="full; free some space, then re-run the same command to resume"):
            fill()
        journal._db.execute("PRAGMA max_page_count = 100000")
        assert journal.recall(b"first") == said()
        journal.add([(b"last", "t/q/0", said())])
        assert journal.recall(b"last") == said()


def test_what_was_added_survives_a_kill(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from cotree.search.journal import Journal\n"
        "from cotree.models.client import Choice, Completion\n"
        "said = Completion((Choice('text', 'stop', 1),), 1, 0, 1)\n"
        "journal = Journal(Path(sys.argv[1])); journal.add([(b'k', 't/q/0', said)])\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "j.db")], check=False).returncode == -9
    with Journal(tmp_path / "j.db") as journal:
        assert journal.recall(b"k") == said()


def test_unused_is_what_no_current_tree_is_made_of(tmp_path: Path) -> None:
    here, there = tmp_path / "trees" / "a" / "trees.db", tmp_path / "trees" / "b" / "trees.db"
    with Journal(tmp_path / "j.db") as journal:
        for i in range(1, 5):
            journal.add([(bytes([i]), "t/q/0", said(tokens=10 * i))])
        journal.add([(b"other", "t/r/0", said(tokens=7))])
        assert unused(journal, ["t/q/0"]) == (4, 100)
        journal.add_uses({"old": [bytes([1]), bytes([2])]})
        journal.set_current(here, {"t/q/0": "old"})
        assert unused(journal, ["t/q/0"]) == (2, 70)
        journal.add_uses({"new": [bytes([2]), bytes([3])]})
        assert unused(journal, ["t/q/0"]) == (2, 70), "a tree counts when it is the current one"
        journal.set_current(here, {"t/q/0": "new"})
        assert unused(journal, ["t/q/0"]) == (2, 50), "what only the old tree used is now unused"
        journal.add_uses({"elsewhere": [bytes([4])]})
        journal.set_current(there, {"t/q/0": "elsewhere"})
        assert unused(journal, ["t/q/0"]) == (1, 10), "another node's tree uses it too"
        journal.set_current(here, {"t/q/0": "old"})
        assert unused(journal, ["t/q/0"]) == (1, 30), "the old settings are back"
        assert unused(journal, ["t/q/0", "t/r/0", "t/s/0"]) == (2, 37)
    (tmp_path / "moved").mkdir()
    (tmp_path / "j.db").rename(tmp_path / "moved" / "j.db")
    with Journal(tmp_path / "moved" / "j.db") as journal:
        journal.set_current(tmp_path / "moved" / "trees" / "a" / "trees.db", {"t/q/0": "new"})
        assert unused(journal, ["t/q/0"]) == (1, 10), "a run folder may be moved or renamed"


def test_extra_rollouts_stay_what_they_were_first(tmp_path: Path) -> None:
    with Journal(tmp_path / "j.db") as journal:
        assert journal.extra_rollouts("a", 3) == 3
        assert journal.extra_rollouts("a", 5) == 3
    with Journal(tmp_path / "j.db") as journal:
        assert (journal.extra_rollouts("a", 0), journal.extra_rollouts("b", 0)) == (3, 0)
