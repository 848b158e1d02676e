"""`benchmarks.train_stages` trains a run's students twice, to the same loss; packed it computes fewer tokens."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from benchmarks import train_stages


def test_both_ways_end_at_the_same_loss(
    student: Path,
    sft_rows: Path,
    dpo_rows: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = tmp_path / "run"
    recipe = {
        "name": "run",
        "models": {"tiny": {"weights": str(student)}},
        "datasets": {"chains": {"file": str(sft_rows), "rows": "sft"}, "pairs": {"file": str(dpo_rows), "rows": "dpo"}},
        "students": {
            "sft": {"from": "tiny", "method": "sft", "data": "chains"},
            "dpo": {"from": "sft", "method": "dpo", "data": "pairs"},
        },
    }
    for name, rows in (("chains", sft_rows), ("pairs", dpo_rows)):
        (run / "datasets" / name).mkdir(parents=True)
        shutil.copy(rows, run / "datasets" / name / "train.parquet")
    shutil.copytree(student, run / "students" / "sft" / "model")
    (run / "recipe.yaml").write_text(json.dumps(recipe))
    monkeypatch.setattr("sys.argv", ["train_stages", str(run)])
    train_stages.main()
    found = re.findall(
        r"(\w+), fp32, .*?: .* (\d+) tokens computed for (\d+), last loss (\S+)", capsys.readouterr().out
    )
    assert [name for name, *_ in found] == ["sft", "sft", "dpo", "dpo"]
    for alone, packed in (found[:2], found[2:]):
        assert int(packed[1]) < int(alone[1]) <= int(alone[2]) == int(packed[2])
        assert float(alone[3]) == pytest.approx(float(packed[3]), abs=2e-5)
