"""`make bench-train` in its tiny form: every shape has real numbers, and the sides compute the same gradient."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
KEYS = ("speedup_fair", "speedup_as_is", "token_ratio", "flop_ratio", "peak_memory_ratio_bs1", "gradient_rel_l2")


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.timeout(600)
def test_the_tiny_form_writes_every_key_with_real_numbers(tmp_path: Path) -> None:
    out = tmp_path / "train.json"
    command = [sys.executable, "-m", "benchmarks.train", "--tiny", "--repeats", "1", "--out", str(out)]
    # In two calls, as one does it when time is short: the second adds to the file of the first.
    for some in (["early", "mcts", "late"], ["one_pair", "demo", "sft_4_chains"]):
        done = subprocess.run([*command, "--shapes", *some], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(out.read_text())["shapes"]
    assert set(found) == {"early", "mcts", "late", "one_pair", "demo", "sft_4_chains"}
    for shape in found.values():
        assert all(math.isfinite(shape[key]) and shape[key] > 0 for key in KEYS)
        assert shape["gradient_rel_l2"] < 2e-5
        assert shape["loss_cotree"] == pytest.approx(shape["loss_trl"], rel=1e-5)
        assert shape["token_ratio"] >= 1
        assert shape["speedup_fair_range"][0] <= shape["speedup_fair"] <= shape["speedup_fair_range"][1]
