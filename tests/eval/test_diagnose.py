"""`cotree diagnose` on a whole run, an evaluation and the hub: every source and language apart."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cotree.base.errors import UsageError
from cotree.eval.diagnose import diagnose_file
from cotree.eval.journal import JOURNAL, EvalSample, append_line

LOOP = "I count the apples once more. " * 100


def test_a_run_is_its_samples_and_its_data_by_model_and_script(tmp_path: Path) -> None:
    for i, (model, text) in enumerate((("base", LOOP), ("dpo", "\\boxed{2}"), ("dpo", "答案是二。"))):
        sample = EvalSample("letters", str(i), text, "stop", 3, 9, "no_answer" if text is LOOP else "correct", "2", "2")
        journal = tmp_path / "evaluations" / "test" / model / JOURNAL
        append_line(journal, asdict(sample))
        append_line(journal, asdict(sample))  # judged again: still one sample
    (tmp_path / "datasets" / "sft").mkdir(parents=True)
    rows = [{"completion": [{"role": "assistant", "content": "So it is \\boxed{3}"}], "task": "letters"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "datasets" / "sft" / "train.parquet")
    _, *lines = diagnose_file(tmp_path)
    shown = [line.split() for line in lines if not line.startswith("\n")]
    assert sorted((cells[0], cells[2], cells[3]) for cells in shown) == [
        ("datasets/sft:", "latin", "1"),
        ("test/base:", "latin", "1"),
        ("test/dpo:", "cjk", "1"),
        ("test/dpo:", "latin", "1"),
    ]
    assert "1 (100.0%)" in next(line for line in lines if line.startswith("test/base"))
    assert [line for line in lines if line.startswith("\ntest/base, row 0, 0: loop")], "file, row and id"
    _, line, *_ = diagnose_file(tmp_path / "evaluations" / "test" / "base")
    assert line.startswith("base: letters"), "one evaluation has the name of its folder"


def test_sample_files_count_each_response_once(tmp_path: Path) -> None:
    about = {"doc": {"id": "q1", "task": "letters"}, "resps": [["\\boxed{2}", LOOP]], "doc_id": 0}
    own = {"verdicts": ["correct", "no_answer"], "finish_reasons": ["stop", "length"]}
    for name in ("strict-match", "flexible-extract"):
        append_line(tmp_path / "samples_letters.jsonl", about | {"filter": name, "cotree": own})
    append_line(tmp_path / "samples_other.jsonl", {"doc": {}, "doc_id": 3, "resps": [["So it is \\boxed{4}"]]})
    _, line, worst = diagnose_file(tmp_path / "samples_letters.jsonl")
    assert line.split()[:3] == ["letters", "latin", "2"]
    assert worst.startswith("\nsamples_letters, row 0, q1: loop, instruction_failure, no_answer")
    _, line = diagnose_file(tmp_path / "samples_other.jsonl")
    assert line.split()[:3] == ["samples_other", "latin", "1"], "a row of lm-eval itself"


def test_an_empty_reply_is_a_text_without_an_answer(tmp_path: Path) -> None:
    append_line(tmp_path / "rows.jsonl", {"completion": "", "solution": "The answer is 4.", "source": "mine"})
    _, line, *_ = diagnose_file(tmp_path / "rows.jsonl")
    assert line.split()[-2:] == ["1", "(100.0%)"]


def test_what_is_neither_is_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="has no replies of an evaluation and no rows of a dataset"):
        list(diagnose_file(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match="cannot load nobody/nothing from the hub: "):
        list(diagnose_file("nobody/nothing"))
