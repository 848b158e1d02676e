"""The samples file is both output and memory: whole lines only, and it survives a kill."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from cotree.eval.evaluate import EvalSample, append_line, read_samples


def sample(i: int, text: str = "x") -> EvalSample:
    return EvalSample("letters", str(i), text, "stop", 3, 10, "wrong", "2", "3")


def test_samples_come_back_as_written(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "s.jsonl"
    samples = [sample(0, "naïve\u2028line\x85\r\n日本"), sample(1, '{"a": "\\n"}')]
    for item in samples:
        append_line(path, asdict(item))
    assert read_samples(path) == samples


def test_a_line_that_a_kill_cut_short_is_dropped_and_its_question_asked_again(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    append_line(path, asdict(sample(0)))
    whole = path.read_bytes()
    for cut in range(1, len(whole)):
        path.write_bytes(whole + whole[:cut])
        assert read_samples(path) == [sample(0)]
        assert path.read_bytes() == whole
    append_line(path, asdict(sample(1)))
    assert read_samples(path) == [sample(0), sample(1)]


def test_no_file_is_no_samples(tmp_path: Path) -> None:
    assert read_samples(tmp_path / "none.jsonl") == []
