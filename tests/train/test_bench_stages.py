"""`benchmarks.train_stages` trains both stages of a run twice, to the same loss; packed it computes fewer tokens."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from benchmarks import train_stages

LAPTOP = Path(__file__).parents[2] / "recipes" / "laptop.yaml"


def test_both_ways_end_at_the_same_loss(
    student: Path,
    sft_rows: Path,
    dpo_rows: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = tmp_path / "run"
    for stage, rows in (("sft", sft_rows), ("dpo", dpo_rows)):
        (run / "data" / stage).mkdir(parents=True)
        shutil.copy(rows, run / "data" / stage / "train.parquet")
    for name in ("base", "sft"):
        shutil.copytree(student, run / "checkpoints" / name / "model")
    shutil.copy(LAPTOP, run / "recipe.yaml")
    monkeypatch.setattr("sys.argv", ["train_stages", str(run)])
    train_stages.main()
    found = re.findall(r"(\w+), .*?: .* (\d+) tokens computed for (\d+), last loss (\S+)", capsys.readouterr().out)
    assert [stage for stage, *_ in found] == ["sft", "sft", "dpo", "dpo"]
    for alone, packed in (found[:2], found[2:]):
        assert int(packed[1]) < int(alone[1]) <= int(alone[2]) == int(packed[2])
        assert float(alone[3]) == pytest.approx(float(packed[3]), abs=2e-5)
