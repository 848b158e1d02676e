"""The folder of a node: what another fingerprint replaces is kept and comes back, whenever a kill comes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.support.full_disk import full_disk

from cotree.base.errors import CotreeError, UsageError
from cotree.base.machine import usable_cores
from cotree.base.run_folder import NodeFolder, NodeRecord, RunFolder, check_against_record, find_run


class Killed(BaseException):
    """Nothing handles it, as nothing handles a kill."""


@contextmanager
def killed_after(steps: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Stop the block before it changes a name on disk for the `steps`-th time."""
    left = [steps]
    with monkeypatch.context() as patched:
        for name in ("rename", "replace", "unlink", "rmdir"):

            def step(*args: object, change: object = getattr(os, name), **more: object) -> object:
                if not left[0]:
                    raise Killed
                left[0] -= 1
                return change(*args, **more)  # type: ignore[operator]

            patched.setattr(os, name, step)
        yield


def folder_of(path: Path) -> NodeFolder:
    return RunFolder(path).node("students/dpo")


def record(base: str, questions: str = "") -> NodeRecord:
    return NodeRecord(f"{base}{questions}", base, parts={"alpha": base, "questions": questions})


def fill(folder: NodeFolder, of: NodeRecord) -> None:
    """Finish content of a fingerprint: two files, one of them in a folder, and a hidden one."""
    begun = folder.begin(of)
    assert not begun.done
    with folder.working(begun) as work:
        (work.path / "model").mkdir()
        (work.path / "model" / "weights").write_text(of.base)
        (work.path / "log.jsonl").write_text(of.base)
        (work.path / ".hidden").write_text(of.base)
        work.result["of"] = of.base
        work.files += ["model", "log.jsonl"]


def texts(folder: Path) -> dict[str, str]:
    """What the files of a folder say, node.json and drafts aside."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".json", ".draft")]
    return {str(path.relative_to(folder)): path.read_text() for path in files}


def whole(base: str) -> dict[str, str]:
    return {"model/weights": base, "log.jsonl": base, ".hidden": base}


def test_content_is_kept_and_comes_back(tmp_path: Path) -> None:
    folder, a, b = folder_of(tmp_path), record("a"), record("b")
    fill(folder, a)
    assert folder.complete("a") and not folder.complete("b")
    fill(folder, b)
    assert texts(folder.path) == whole("b") and texts(folder.older / "a") == whole("a")
    kept = folder.older_record("a")
    assert kept is not None and kept.done and kept.result == {"of": "a"}
    again = folder.begin(a)
    assert again.done and again.result == {"of": "a"} and [*again.files] == ["model", "log.jsonl"]
    assert folder.complete("a")
    assert texts(folder.path) == whole("a") and texts(folder.older) == {f"b/{k}": v for k, v in whole("b").items()}


def test_more_questions_go_on_with_what_is_there(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    fill(folder, record("a", "-four"))
    more = folder.begin(record("a", "-five"))
    assert not more.done and more.result == {}
    assert texts(folder.path) == whole("a") and not folder.older.exists()


@pytest.mark.parametrize("wanted", ["a", "b"])
def test_a_kill_at_any_moment_of_a_change_loses_nothing(
    wanted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is content of `b`, and of `a` from before; a change to `a` is killed, then one of the two is wanted."""
    done = False
    for steps in range(60):
        folder = folder_of(tmp_path / str(steps))
        fill(folder, record("a"))
        fill(folder, record("b"))
        with killed_after(steps, monkeypatch):
            try:
                folder.begin(record("a"))
                done = True
            except Killed:
                pass
        for base in ("a", "b"):
            assert not folder.complete(base) or texts(folder.path) == whole(base)
        other = {"a": "b", "b": "a"}[wanted]
        begun = folder.begin(record(wanted))
        assert begun.done and begun.result == {"of": wanted}, steps
        assert folder.complete(wanted)
        assert texts(folder.path) == whole(wanted)
        assert texts(folder.older / other) == whole(other)
        assert not list((tmp_path / str(steps)).rglob("moving.json"))
        if done:
            return
    raise AssertionError("the change never ended")


def test_work_that_fails_is_not_done_and_its_seconds_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_of(tmp_path)
    clock = [0.0]
    monkeypatch.setattr("cotree.base.run_folder.time.monotonic", lambda: clock[0])

    def work_until_killed() -> None:
        with folder.working(folder.begin(record("a"))) as work:
            work.resolved["precision"] = "fp32"
            clock[0] = 7.0
            work.save_periodically(3, 8)
            assert json.loads((folder.path / "node.json").read_text())["seconds"] == 7.0, "kept on the way"
            clock[0] = 8.0
            raise Killed

    with pytest.raises(Killed):
        work_until_killed()
    left = folder.record()
    assert left is not None and not left.done and not left.result and left.seconds == 8.0
    assert left.progress == (3, 8)
    again = folder.begin(record("a"))
    assert again.seconds == 8.0 and again.resolved == {"precision": "fp32"}
    with folder.working(again):
        clock[0] = 10.0
    ended = folder.record()
    assert ended is not None and ended.done and ended.seconds == 10.0


def test_what_is_gone_makes_it_unfinished(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    fill(folder, record("a"))
    (folder.path / "log.jsonl").unlink()
    assert not folder.complete("a") and not folder.begin(record("a")).done
    assert texts(folder.path) == {".hidden": "a"}, "half of a model would be taken for a whole one"


def test_a_full_disk_leaves_what_was_there(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    fill(folder, record("a"))
    before = texts(folder.path)
    with full_disk(room=4), pytest.raises(CotreeError, match=r"cannot write .*: File too large; free some space"):
        folder.begin(record("b"))
    assert texts(folder.path) == before and folder.complete("a")
    fill(folder, record("b"))
    assert texts(folder.older / "a") == whole("a")


@pytest.mark.parametrize("name", ["alpha@alpha=0.5", 'text@text="think"', "a@path=x/../y", "a@k=%2F", "a@k=ä"])
def test_a_nodes_name_is_one_folder_and_comes_back(name: str, tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    for model in (None, name):
        node = run.node(f"{'students' if model is None else 'evaluations'}/{name}", model)
        node.begin(record("a"))
    assert list(run.nodes()) == [f"students/{name}"]
    assert list(run.cells()) == [(name, name)]
    assert {path.parent.name for path in (tmp_path / "students").rglob("node.json")} == {
        path.name for path in (tmp_path / "students").iterdir()
    }


def test_a_record_that_any_bit_was_changed_in_is_none(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    folder = run.node("students/dpo")
    fill(folder, record("a"))
    path, kept = folder.path / "node.json", folder.record()
    text = path.read_bytes()
    for at in range(0, len(text), 3):
        for changed in (text[:at], text[:at] + bytes([text[at] ^ 1 << at % 8]) + text[at + 1 :]):
            path.write_bytes(changed)
            now = folder.record()  # white space between values says nothing
            assert now is None or now == kept, at
    path.write_bytes(text[:-9])
    assert folder.without_record() == "node.json is damaged" and run.damaged() == ["students/dpo"]
    assert not folder.complete("a") and run.nodes() == {}
    assert not folder.begin(record("a")).done and texts(folder.path) == whole("a"), "what is there stays"


@pytest.mark.parametrize("text", ["", "null", "[]", "{}", '{"fingerprint": "a", "wrong": 1}', '{"sha256": 1}',
                                  "[" * 9999, '{"fingerprint": 1, "base": 2}',
                                  '{"fingerprint": "a", "base": "a", "files": 3}',
                                  '{"fingerprint": "a", "base": "a", "seconds": "x", "reads": {}}'])  # fmt: skip
def test_what_is_no_record_is_none(text: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    folder.begin(record("a"))
    (folder.path / "node.json").write_text(text)
    assert folder.record() is None and folder.without_record() == "node.json is damaged"
    (folder.path / "node.json").unlink()
    assert folder.without_record() == ""
    (folder.path / "log.jsonl").touch()
    assert folder.without_record() == "node.json is gone"


def test_a_record_of_before_hashes_is_read(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    fill(folder, record("a"))
    content = json.loads((folder.path / "node.json").read_text())
    del content["sha256"]
    (folder.path / "node.json").write_text(json.dumps(content | {"files": ["model", "log.jsonl"]}))
    assert folder.complete("a")
    (folder.path / "log.jsonl").write_text("other")
    assert folder.complete("a"), "nothing is known of its content"
    (folder.path / "log.jsonl").write_text("")
    assert not folder.complete("a")


def test_a_file_that_is_not_as_it_was_written_is_named(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    with folder.working(folder.begin(record("a"))) as work:
        (work.path / "model").mkdir()
        for name in ("rows.parquet", "model/weights.json", "README.md"):
            (work.path / name).write_text("written")
        work.result[3] = {10: 1, 2: 2}  # type: ignore[index]  # a key that is no text, as JSON has it
        work.add_files("rows.*", "model", "model/*", "README.md", "none.*")
    kept = folder.record()
    assert kept is not None and [*kept.files] == ["rows.parquet", "model", "model/weights.json", "README.md"]
    (folder.path / "model" / "weights.json").write_text("has checks of its own")
    assert folder.complete("a")
    (folder.path / "README.md").write_text("writ")
    assert folder.faults(kept) == ["README.md is damaged"]
    (folder.path / "README.md").write_text("written")
    check_against_record(folder.path / "rows.parquet")
    (folder.path / "rows.parquet").write_text("writtem")
    assert folder.faults(kept) == ["rows.parquet is damaged"]
    with pytest.raises(UsageError, match=r"rows\.parquet is damaged"):
        check_against_record(folder.path / "rows.parquet")
    (folder.path / "model" / "weights.json").unlink()
    assert not folder.begin(record("a")).done
    assert sorted(path.name for path in folder.path.iterdir()) == ["README.md", "node.json", "rows.parquet"]


def test_content_without_a_record_is_kept_beside_what_comes_back(tmp_path: Path) -> None:
    folder, a, b = folder_of(tmp_path), record("a"), record("b")
    fill(folder, a)
    fill(folder, b)
    (folder.path / "node.json").write_text("{")
    assert folder.begin(a).done and texts(folder.path) == whole("a")
    assert texts(folder.older / "unknown") == whole("b")


def test_only_runs_of_today_are_found(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is no run folder"):
        find_run(tmp_path)
    (tmp_path / "recipe.yaml").touch()
    assert find_run(tmp_path).path == tmp_path
    (tmp_path / "manifest.json").touch()
    with pytest.raises(UsageError, match=r"a run of an older cotree.*docs/migration\.md"):
        find_run(tmp_path)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system binds no process to cores")
def test_a_process_bound_to_one_core_counts_one() -> None:
    bind = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})"
    count = "from cotree.base.machine import usable_cores; print(usable_cores())"
    counted = subprocess.run([sys.executable, "-c", f"{bind}; {count}"], capture_output=True, text=True, check=True)
    assert counted.stdout == "1\n"
    assert usable_cores() >= 1
