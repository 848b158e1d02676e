"""`cotree clean`: what the recipe no longer refers to goes, what it refers to and what was paid for stays."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.experiment.conftest import Done
from tests.support.experiment import begun
from tests.support.fake_server import FakeServerThread

from cotree.base.errors import UsageError
from cotree.base.run_folder import RunFolder, find_run
from cotree.cli import main
from cotree.experiment.clean import clean, removed_lines, unused_content


def paths(run: RunFolder) -> set[str]:
    return {str(each.path) for each in unused_content(run)}


def test_a_finished_run_has_nothing_to_remove(done: Done) -> None:
    _, runs = done
    run, before = find_run(runs / "steps"), sorted(runs.rglob("*"))
    assert unused_content(run) == clean(run) == []
    assert removed_lines([], dry_run=False) == ["0 removed, 0.0 MB freed"]
    assert sorted(runs.rglob("*")) == before


def test_older_content_goes_and_the_run_is_as_it_was(done: Done, server: FakeServerThread) -> None:
    written, runs = done
    run, changed = find_run(runs / "steps"), ("students.joint.alpha", 0.5)
    begun(written, runs, changed)
    nodes = [("students/joint",), ("students/masked",), ("evaluations/test", "joint"), ("evaluations/test", "masked")]
    gone = {str(kept.relative_to(run.path)) for node in nodes for kept in run.node(*node).older.iterdir()}
    assert len(gone) == 4
    assert paths(run) == gone
    size = sum(file.stat().st_size for file in (run.path / "older").rglob("*") if file.is_file())
    removed = clean(run)
    assert {str(each.path) for each in removed} == gone
    assert sum(each.bytes for each in removed) == size > 0
    assert not (run.path / "older").exists() and unused_content(run) == []
    assert begun(written, runs, changed) == []
    calls = server.calls
    assert begun(written, runs)[0] == "students/joint", "going back now trains it again"
    assert server.calls == calls


def test_what_the_recipe_refers_to_stays_wherever_it_is(done: Done) -> None:
    written, runs = done
    run = find_run(runs / "steps")
    begun(written, runs, ("students.joint.alpha", 0.5))
    # The recipe goes back, but only its trees are asked for: the students that it means are still beside.
    begun(written, runs, only=["trees"])
    assert paths(run) == set()
    clean(run)
    assert begun(written, runs) == [], "nothing had to be made again"
    assert len(paths(run)) == 4


def test_nodes_and_cells_that_are_no_longer_named_go(done: Done) -> None:
    written, runs = done
    run = find_run(runs / "steps")
    del written["students"]["masked"]
    written["evaluations"]["test"]["models"] = ["sft"]
    assert begun(written, runs) == []
    assert paths(run) == {"students/masked", "evaluations/test/joint", "evaluations/test/masked"}
    (run.path / "students" / "sft" / ".log.jsonl.host.1.abcd.draft").write_text("half")
    (run.path / ".taken").mkdir()
    assert {"students/sft/.log.jsonl.host.1.abcd.draft", ".taken"} < paths(run)
    journal = (run.path / "journal.db").read_bytes()
    clean(run)
    assert (run.path / "journal.db").read_bytes() == journal, "what was paid for stays"
    assert paths(run) == set() and begun(written, runs) == []


def test_what_another_run_has_too_frees_nothing(done: Done) -> None:
    written, runs = done
    begun(written | {"name": "new"}, runs, source=runs / "steps")
    new = find_run(runs / "new")
    del written["students"]["masked"]
    written["evaluations"]["test"]["models"] = ["sft", "joint"]
    begun(written | {"name": "new"}, runs)
    (masked,) = [each for each in unused_content(new) if each.path == Path("students/masked")]
    weights = (new.path / "students" / "masked" / "model" / "model.safetensors").stat().st_size
    assert masked.bytes < weights
    clean(new)
    assert (runs / "steps" / "students" / "masked" / "model" / "model.safetensors").stat().st_size == weights


def test_the_verb(done: Done, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
                  hold: Callable[[Path], Callable[[], None]]) -> None:  # fmt: skip
    written, runs = done
    begun(written, runs, ("evaluations.test.max_tokens", 5))

    def said(*words: str) -> list[str]:
        monkeypatch.setattr(sys, "argv", ["cotree", "clean", str(runs / "steps"), *words])
        with pytest.raises(SystemExit) as left:
            main()
        out, err = capsys.readouterr()
        assert (left.value.code, bool(err)) in ((0, False), (2, True))
        return (out + err).strip().split("\n")

    before = sorted(runs.rglob("*"))
    shown = said("--dry-run")
    assert len(shown) == 4 and re.fullmatch(r"\d+\.\d MB could be freed", shown[-1])
    assert sorted(runs.rglob("*")) == before
    release = hold(runs / "steps")
    assert said()[0].startswith("cotree: another cotree works in")
    release()
    assert said()[:3] == shown[:3] and not (runs / "steps" / "older").exists()
    with pytest.raises(UsageError, match="is no run folder"):
        find_run(runs)
