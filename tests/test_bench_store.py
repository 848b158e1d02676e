"""The store benchmark in its tiny form: it runs, and says what it promises."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_bench_store(tmp_path: Path) -> None:
    out = tmp_path / "store.json"
    command = [sys.executable, "-m", "benchmarks.store", "--tiny", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    found = json.loads(out.read_text())
    assert found["rows_per_second"] > 0
    assert 50 < found["peak_mb"] < 2_000
    assert f"{found['rows']:,} rows" in done.stdout
