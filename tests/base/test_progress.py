"""What is printed fits a terminal, and cannot drive it, whoever wrote it."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest
from rich.table import Table

from cotree.base.progress import Output

HOSTILE = "\x1b[2J\x1b]0;owned\x07a\rb\x9b1m\u202eevil\ud800 [/bold] [red]\tvä 等等\nnext"
SHOWN = "\ufffd[2J\ufffd]0;owned\ufffda\ufffdb\ufffd1m\ufffdevil\ufffd [/bold] [red]\tvä 等等\nnext"


def test_what_is_said_has_no_control_characters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = Output()
    output.log = tmp_path / "log.jsonl"
    output.print(HOSTILE)
    told = capsys.readouterr().out
    assert told.replace(" ", "") == f"{SHOWN}\n".expandtabs(8).replace(" ", "")
    assert json.loads(output.log.read_text())["line"] == SHOWN


@pytest.mark.parametrize("tty", [True, False])
def test_nor_has_a_remark(tty: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: tty)
    monkeypatch.setattr("cotree.base.progress._PLAIN_SECONDS", 0.0)
    with Output().progress("tokens [/x]") as update:
        update(1, 2, HOSTILE.replace("\n", " "))
    told = capsys.readouterr().out
    assert "\x9b" not in told and "\u202e" not in told and "owned\x07" not in told
    assert tty or "[/bold] [red]" in told


def test_a_long_remark_leaves_the_counter_in_sight(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("rich._console", None)  # made anew, for this width
    remark = "62 correct, 187 wrong, 28 cut or without answer; 3.6 thoughts/s, 40 tokens/s; about 1 min left"
    with Output().progress("trees") as update:
        update(78, 112, remark)
    told = re.sub("\x1b\\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().out)
    first, *rest = told[told.rindex("trees") :].splitlines()
    assert "78/112" in first
    assert " ".join(" ".join(rest).split()) == remark


def test_a_table_in_a_file_is_as_wide_as_its_words(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table = Table("name", "words")
    table.add_row("first", "word " * 60)
    for tty, one_line in ((False, True), (True, False)):
        monkeypatch.setattr("sys.stdout.isatty", lambda tty=tty: tty)
        Output().print(table)
        assert (("word " * 60).strip() in capsys.readouterr().out) is one_line


def test_work_that_does_not_move_is_not_silent(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("cotree.base.progress._SILENT_SECONDS", 0.02)
    with Output().progress("test") as update:
        update(3, 40, "2 correct")
        time.sleep(0.2)
    lines = capsys.readouterr().out.splitlines()
    assert lines and all(re.fullmatch(r"  test 3/40  2 correct  \(working for 0\.\d s\)", line) for line in lines)
