"""Damaged and lost files of a finished run: what can be made of the rest is made again, and no verb ends otherwise."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.experiment.conftest import Done
from tests.support.experiment import KeptOutput, begun
from tests.support.fake_server import FakeServerThread

import cotree
from cotree.base.errors import UsageError
from cotree.base.run_folder import RunFolder
from cotree.cli import main
from cotree.experiment.plan import plan
from cotree.experiment.recipe import build_recipe
from cotree.experiment.run import rewrite_report, run

DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda text: text[: len(text) // 2],
    "empty": lambda text: b"",
    "no text": lambda text: b"\x00\xff" * 40,
    "no object": lambda text: b"[1, 2]",
    "wrong types": lambda text: b'{"fingerprint": 1, "base": 2, "files": 3, "done": "x", "result": []}',
    "another number": lambda text: text.replace(b'"seconds": ', b'"seconds": 1', 1),
}
NODES = [("trees/train", None), ("datasets/pairs", None), ("students/joint", None), ("evaluations/test", "sft")]


def damage(path: Path, kind: str) -> None:
    path.write_bytes(DAMAGE[kind](path.read_bytes()))


def said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: object) -> tuple[int, str]:
    """The exit code and the words of a verb; a traceback would be an exception here."""
    monkeypatch.setattr(sys, "argv", ["cotree", *map(str, words)])
    with pytest.raises(SystemExit) as left:
        main()
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    return int(left.value.code or 0), out + err


@pytest.mark.parametrize("kind", ["cut", "empty", "wrong types", "another number", "gone"])
def test_a_damaged_record_is_made_of_what_is_there(kind: str, done: Done, server: FakeServerThread) -> None:
    written, runs = done
    folder, calls = RunFolder(runs / "steps"), server.calls
    before = {node: folder.node(*node).record() for node in NODES}
    for node in NODES:
        path = folder.node(*node).path / "node.json"
        damage(path, kind) if kind != "gone" else path.unlink()
    weights = folder.node("students/joint").path / "model" / "model.safetensors"
    stamp = weights.stat().st_mtime_ns
    gone = {"url": "http://127.0.0.1:9", "model": "fake", "mode": "chat"}  # its server: it need not be there
    recipe = build_recipe({**written, "models": written["models"] | {"far": gone}})
    states = {each.name: each for each in plan(recipe, runs)}
    why = f"node.json is {'gone' if kind == 'gone' else 'damaged'}"
    assert (states["datasets/pairs"].state, states["datasets/pairs"].why) == ("partial", [why])
    output = KeptOutput()
    run(recipe, runs, output=output)
    names = ["trees/train", "datasets/pairs", "students/joint", "evaluations/test/sft"]
    assert [line for line in output.lines if why in line] == [
        f"{name}: {why}; made again from what is whole" for name in names
    ]
    assert server.calls == calls and weights.stat().st_mtime_ns == stamp, "nothing that was paid for is paid again"
    for node, record in before.items():
        now = folder.node(*node).record()
        assert now is not None and record is not None and (now.done, now.fingerprint) == (True, record.fingerprint)
    assert begun(written, runs) == []


def test_what_readers_say_of_a_damaged_record(
    done: Done, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, runs = done
    path = runs / "steps"
    for node in (("evaluations/test", "sft"), ("students/joint", None)):
        damage(RunFolder(path).node(*node).path / "node.json", "cut")
    code, words = said(capsys, monkeypatch, "table", path)
    assert code == 0 and "evaluations/test/sft" in " ".join(words.split()) and "masked" in words
    assert "damaged" in words, "a row that is not there is no secret"
    assert said(capsys, monkeypatch, "show", path)[0] == 0
    assert said(capsys, monkeypatch, "report", path, "-o", tmp_path / "page.html")[0] == 0
    assert "damaged" in (tmp_path / "page.html").read_text()
    assert said(capsys, monkeypatch, "export", path, "--to", "jsonl", "-o", tmp_path / "out")[0] == 0
    assert said(capsys, monkeypatch, "clean", path, "--dry-run")[0] == 0
    assert said(capsys, monkeypatch, "preview", path, "pairs")[0] == 0
    damage(RunFolder(path).node("trees/train").path / "node.json", "empty")
    code, words = said(capsys, monkeypatch, "show", path)
    assert code == 2 and "trees/train" in words and "damaged" in words and "cotree run" in words


def test_what_is_gone_or_damaged_of_a_finished_node_is_made_again(done: Done, server: FakeServerThread) -> None:
    written, runs = done
    folder, calls = RunFolder(runs / "steps"), server.calls
    cell, card = folder.node("evaluations/test", "sft").path, folder.node("datasets/pairs").path / "README.md"
    journal, text = (cell / "journal.jsonl").read_bytes(), card.read_bytes()

    def found() -> tuple[bytes, Any, Any]:
        (results,), (samples,) = cell.glob("results_*.json"), cell.glob("samples_*.jsonl")
        summary = json.loads((folder.path / "summary.json").read_text())
        return samples.read_bytes(), json.loads(results.read_text())["cotree"], summary["eval"]

    before = found()
    for kind in ("cut", "empty", "no object", "gone"):
        for path in (*cell.glob("results_*"), *cell.glob("samples_*"), card, folder.path / "summary.json"):
            if kind == "gone":
                path.unlink()
            else:
                damage(path, kind)
        assert begun(written, runs) == ["datasets/pairs", "evaluations/test/sft"]
        assert (server.calls, (cell / "journal.jsonl").read_bytes()) == (calls, journal), "nothing is asked"
        assert (found(), card.read_bytes()) == (before, text)
    card.write_bytes(text + b"Written by Ada.")
    assert begun(written, runs) == ["datasets/pairs"]
    assert card.with_name("README.before.md").read_bytes() == text + b"Written by Ada.", "its owner's words are kept"


def test_numbers_come_from_the_nodes_whatever_the_summary_is(done: Done) -> None:
    _, runs = done
    opened = cotree.open_run(runs / "steps")
    rows = opened.table()
    assert [row["model"] for row in rows] == ["sft", "joint", "masked"]
    for kind in DAMAGE:
        damage(runs / "steps" / "summary.json", kind)
        assert opened.table() == rows
    rewrite_report(runs / "steps")
    assert json.loads((runs / "steps" / "summary.json").read_text())["eval"] == rows


def test_a_flipped_bit_in_rows_is_found_and_the_rows_are_made_again(
    done: Done, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    written, runs = done
    path = RunFolder(runs / "steps").node("datasets/pairs").path / "train.parquet"
    before = path.read_bytes()
    for at in (35, len(before) // 2, len(before) - 40):
        flipped = bytearray(before)
        flipped[at] ^= 4
        path.write_bytes(flipped)
        for verb in (("check-data", path), ("preview", runs / "steps", "pairs"),
                     ("export", runs / "steps", "--to", "jsonl", "-o", tmp_path / "out"),
                     ("diagnose", path)):  # fmt: skip
            code, words = said(capsys, monkeypatch, *verb)
            assert code == 2 and "train.parquet" in words and "is damaged" in words, verb
        with pytest.raises(UsageError, match=r"train\.parquet is damaged"):
            list(cotree.open_run(runs / "steps").dataset("pairs"))
        output = KeptOutput()
        run(build_recipe(written), runs, output=output)
        assert "datasets/pairs: train.parquet is damaged; made again from what is whole" in output.lines
        assert path.read_bytes() == before
    shutil.copy(path, tmp_path / "train.parquet")  # elsewhere nothing is known of it
    assert said(capsys, monkeypatch, "check-data", tmp_path / "train.parquet")[0] == 0


def test_a_damaged_line_of_a_journal_is_counted_and_asked_again(
    done: Done, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written, runs = done
    two = ("evaluations.test.questions", {"letters": 2})
    begun(written, runs, two, only=["evaluations"])
    cells = [RunFolder(runs / "steps").node("evaluations/test", model).path for model in ("sft", "joint")]
    path = cells[0] / "journal.jsonl"
    first, second = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first[: len(first) // 2] + b"\n" + second)
    code, words = said(capsys, monkeypatch, "compare", *cells)
    assert code == 2 and "journal.jsonl" in words and "1 damaged line" in words
    assert said(capsys, monkeypatch, "diagnose", cells[0])[1].count("1 damaged line") == 1
    output = KeptOutput()
    changed = build_recipe({**written, "evaluations": {"test": written["evaluations"]["test"] | {"questions": two[1]}}})
    run(changed, runs, output=output)
    assert "evaluations/test/sft: journal.jsonl is damaged; made again from what is whole" in output.lines
    assert any("1 damaged line" in line and line.startswith("sft: ") for line in output.lines)
    assert path.read_bytes().count(b"\n") == 3, "one question is asked again, the other is kept"
    assert said(capsys, monkeypatch, "compare", *cells)[0] == 0


def test_a_damaged_recipe_of_a_run_is_one_line_and_written_again(
    done: Done, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written, runs = done
    for text in (b"\x00\xff", b"[1]", b"a: ["):
        (runs / "steps" / "recipe.yaml").write_bytes(text)
        for verb in ("show", "table", "report", "plan", "clean"):
            code, words = said(capsys, monkeypatch, verb, runs / "steps")
            assert code == 2 and "recipe.yaml" in words and words.count("\n") == 1, verb
        assert begun(written, runs) == []
        assert said(capsys, monkeypatch, "show", runs / "steps")[0] == 0


def test_a_damaged_log_of_a_training_ends_no_report(done: Done) -> None:
    written, runs = done
    log = RunFolder(runs / "steps").node("students/joint").path / "log.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"\x00{\n" + b"".join(lines[1:]))
    assert begun(written, runs) == []
    assert "1 damaged line" in (runs / "steps" / "report.html").read_text()
    log.unlink()
    rewrite_report(runs / "steps")


def test_content_of_an_unknown_record_never_mixes_with_what_comes_back(done: Done) -> None:
    written, runs = done
    changed = ("students.joint.alpha", 0.5)
    node = RunFolder(runs / "steps").node("students/joint")
    first = (node.path / "model" / "model.safetensors").read_bytes()
    begun(written, runs, changed, only=["students/joint"])
    (node.path / "node.json").write_bytes(b"")
    (node.path / "left.txt").touch()
    assert begun(written, runs, only=["students/joint"]) == []
    assert (node.path / "model" / "model.safetensors").read_bytes() == first
    assert not (node.path / "left.txt").exists()
