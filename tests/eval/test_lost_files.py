"""Damaged files of an evaluation are made again of its journal, and one process at a time asks in a folder."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
from tests.eval.test_evaluate import command, results, run, said
from tests.support.experiment import KeptOutput
from tests.support.fake_server import FakeServerThread

from cotree.base.errors import UsageError
from cotree.base.lock import locked
from cotree.eval.compare import compare_evaluations
from cotree.eval.evaluate import evaluate_model
from cotree.eval.journal import JOURNAL, read_all_lines, read_samples
from cotree.report.table import table_of


def evaluated(server: FakeServerThread, out: Path) -> tuple[int, list[str], float]:
    """How many requests an evaluation of six questions made, what it said, and the accuracy."""
    output, before = KeptOutput(), server.calls
    found = evaluate_model(server.url, ["letters"], chat=True, served="fake", limit=6, out=out, output=output)
    return server.calls - before, output.lines, found.rows[0].accuracy


def test_damaged_lines_are_counted_and_only_what_they_held_is_asked_again(tmp_path: Path) -> None:
    with FakeServerThread(reply=said) as server:
        first = evaluated(server, tmp_path)
        journal = tmp_path / JOURNAL
        lines = journal.read_bytes().splitlines(keepends=True)
        wrong = json.dumps(json.loads(lines[3]) | {"tokens": "many"}).encode() + b"\n"
        damaged = [lines[0], lines[1][:40] + b"\n", b"\x00\xff\n", wrong, b"[1]\n", *lines[4:-1], lines[-1][:30]]
        journal.write_bytes(b"".join(damaged))
        assert [len(read_samples(journal)), read_all_lines(journal)[1]] == [2, 4]
        calls, told, accuracy = evaluated(server, tmp_path)
        assert (calls, accuracy) == (4, first[2])
        assert [line for line in told if "damaged line" in line] == [
            "fake: 4 damaged lines of journal.jsonl left out; what is lacking is asked again"
        ]
        assert journal.read_bytes().startswith(b"".join(damaged[:-1])), "what can be read stays where it is"
        assert evaluated(server, tmp_path)[0] == 0


def test_a_flipped_bit_in_a_journal_changes_no_reply(tmp_path: Path) -> None:
    with FakeServerThread(reply=said) as server:
        first = evaluated(server, tmp_path)
        journal = tmp_path / JOURNAL
        whole, samples = journal.read_bytes(), read_samples(journal)
        line = whole.splitlines(keepends=True)[0]
        for bit in range(8 * (len(line) - 1)):
            flipped = bytearray(line)
            flipped[bit // 8] ^= 1 << bit % 8
            journal.write_bytes(flipped)
            assert read_all_lines(journal) in (([], 1), ([], 2), (samples[:1], 0)), "damaged, or in the sum's name"
        assert b"boxed{2}" in whole
        journal.write_bytes(whole.replace(b"boxed{2}", b"boxed{3}", 1))
        calls, told, accuracy = evaluated(server, tmp_path)
        assert (calls, accuracy) == (1, first[2])
        assert "fake: 1 damaged line of journal.jsonl left out; what is lacking is asked again" in told
        older = [json.loads(line) for line in whole.splitlines()]
        journal.write_text("".join(json.dumps(row) + "\n" for row in older if row.pop("crc32")))
        assert read_samples(journal) == samples
        assert evaluated(server, tmp_path)[::2] == (0, first[2]), "of an older cotree"


def test_a_journal_without_any_whole_line_is_asked_anew(tmp_path: Path) -> None:
    with FakeServerThread(reply=said) as server:
        evaluated(server, tmp_path)
        (tmp_path / JOURNAL).write_bytes(b"\x00" * 300 + b"\n")
        with pytest.raises(UsageError, match="holds no samples of an evaluation"):
            compare_evaluations(tmp_path, tmp_path)
        assert evaluated(server, tmp_path)[0] == 6


@pytest.mark.parametrize(
    "text", [None, "", "{", "[]", '{"cotree": 3}', '{"cotree": {"rows": 3, "questions": 4}}', "\x00"]
)
def test_damaged_results_and_records_are_one_line_and_made_again(text: str | None, tmp_path: Path) -> None:
    with FakeServerThread(reply=said) as server:
        _, _, accuracy = evaluated(server, tmp_path)
        (path,) = tmp_path.glob("results_*.json")
        for file in (path, tmp_path / "node.json"):
            file.write_text(text or "")
        if text is None:
            (tmp_path / "node.json").unlink()
        with pytest.raises(UsageError, match=r"results_.*json"):
            table_of([str(tmp_path)])
        with pytest.raises(UsageError, match="results_") if "cotree" not in (text or "") else nullcontext():
            compare_evaluations(tmp_path, tmp_path)
        calls, told, again = evaluated(server, tmp_path)
        assert (calls, again) == (0, accuracy), "nothing is asked"
        lost = f"{tmp_path}: node.json is {'gone' if text is None else 'damaged'}; "
        assert told[0] == f"{lost}taken for an evaluation of this model with these settings"
        assert results(tmp_path)["cotree"]["rows"][0]["accuracy"] == accuracy
        assert table_of([str(tmp_path)]).rows[0].accuracy == accuracy


def test_a_number_that_a_flipped_bit_changed_is_in_no_table(tmp_path: Path) -> None:
    with FakeServerThread(reply=said) as server:
        _, _, accuracy = evaluated(server, tmp_path)
        (path,) = tmp_path.glob("results_*.json")
        path.write_text(path.read_text().replace('"n": 6', '"n": 7'))
        with pytest.raises(UsageError, match=r"results_.*json is damaged"):
            table_of([str(tmp_path)])
        assert evaluated(server, tmp_path)[::2] == (0, accuracy)
    assert table_of([str(tmp_path)]).rows[0].first.n == 6


def test_two_at_once_in_one_folder_ask_each_question_once(tmp_path: Path) -> None:
    with FakeServerThread(reply=said, latency=0.05) as server:
        words = command(server.url, tmp_path / "out")
        started = [subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in "ab"]
        ended = [(process.communicate()[1], process.returncode) for process in started]
        assert server.calls == 60 and (tmp_path / "out" / JOURNAL).read_text().count("\n") == 180
    (refusal,) = [text for text, code in ended if code == 2]
    assert sorted(code for _, code in ended) == [0, 2]
    assert refusal.startswith("cotree: another cotree works in ") and refusal.count("\n") == 1
    assert "wait for it, or choose another --out" in refusal


def test_a_folder_in_use_is_refused_before_a_server_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ("eval", "--model", "http://127.0.0.1:9", "--chat", "--task", "letters", "--out", tmp_path)
    with locked(tmp_path):
        assert run(monkeypatch, *asked) == 2
    assert "another cotree works in" in capsys.readouterr().err
    assert sys.argv[0] == "cotree"
