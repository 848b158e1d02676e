"""The viewer's benchmark in its tiny form: it runs, and says what it promises."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_bench_view(tmp_path: Path) -> None:
    out = tmp_path / "view.json"
    command = [sys.executable, "-m", "benchmarks.view", "--tiny", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    found = json.loads(out.read_text())
    assert 0 < found["list_ms"] < 1_000 and 0 < found["search_ms"] < 1_000
    assert 50 < found["peak_mb"] < 1_000
    assert f"{found['trees']:,} trees".replace(",", "") in done.stdout.replace(",", "")
