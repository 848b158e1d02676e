"""What is printed cannot drive the terminal, whoever wrote it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cotree.progress import Output

HOSTILE = "\x1b[2J\x1b]0;owned\x07a\rb\x9b1m\u202eevil\ud800 [/bold] [red]\tvä 等等\nnext"
SHOWN = "\ufffd[2J\ufffd]0;owned\ufffda\ufffdb\ufffd1m\ufffdevil\ufffd [/bold] [red]\tvä 等等\nnext"


def test_what_is_said_has_no_control_characters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = Output()
    output.log = tmp_path / "log.jsonl"
    output.say(HOSTILE)
    told = capsys.readouterr().out
    assert told.replace(" ", "") == f"{SHOWN}\n".expandtabs(8).replace(" ", "")
    assert json.loads(output.log.read_text())["line"] == SHOWN


@pytest.mark.parametrize("tty", [True, False])
def test_nor_has_a_remark(tty: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: tty)
    monkeypatch.setattr("cotree.progress._PLAIN_SECONDS", 0.0)
    with Output().progress("tokens [/x]") as update:
        update(1, 2, HOSTILE.replace("\n", " "))
    told = capsys.readouterr().out
    assert "\x9b" not in told and "\u202e" not in told and "owned\x07" not in told
    assert tty or "[/bold] [red]" in told
