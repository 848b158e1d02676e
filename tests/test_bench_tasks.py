"""`make bench-tasks` in its tiny form: every task there is, or why it is not measured."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cotree.tasks import TASKS

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.parametrize("with_data", [True, False])
def test_every_task_has_a_rate(with_data: bool, tmp_path: Path) -> None:
    if with_data and not os.environ.get("COTREE_DATA"):
        pytest.skip("benchmark data not found: gsm8k_test.jsonl (set COTREE_DATA to run this test)")
    out = tmp_path / "tasks.json"
    command = [sys.executable, "-m", "benchmarks.tasks", "--tiny", "--out", str(out)]
    env = os.environ | {"HF_HUB_OFFLINE": "1"} | ({} if with_data else {"COTREE_DATA": str(tmp_path)})
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    rates = json.loads(out.read_text())["verdicts_per_second"]
    assert rates.keys() == (set(TASKS) if with_data else {name for name, kind in TASKS.items() if kind.source is None})
    assert all(math.isfinite(rate) and rate > 0 for rate in rates.values())
    for name, rate in rates.items():
        assert any(line.startswith(name) and f"{rate:,.0f}" in line for line in done.stdout.splitlines())
