"""`make bench-search` in its tiny form: it runs from end to end and what it writes are real numbers."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


def numbers(value: Any) -> Iterator[float]:
    """Every measured number of a result."""
    if isinstance(value, dict):
        for key, part in value.items():
            if key not in ("seed", "date", "machine", "version"):
                yield from numbers(part)
    else:
        yield value


@pytest.mark.slow
@pytest.mark.real
def test_the_tiny_form_writes_every_key_with_real_numbers(tmp_path: Path) -> None:
    out = tmp_path / "search.json"
    command = [sys.executable, "-m", "benchmarks.search", "--tiny", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(out.read_text())
    for key in (
        "stub_thoughts_per_second",
        "cpu_ratio_to_bare_client",
        "embedded_share_of_raw",
        "embedded_share_of_evaluation",
        "one_tree_speedup",
    ):
        assert isinstance(result[key], float)
    assert set(result["tree_ms_per_thought"]) == {"100", "200"}
    assert ("treequest" in result) == (importlib.util.find_spec("treequest") is not None)
    measured = list(numbers(result))
    assert len(measured) >= 20
    assert all(math.isfinite(number) and number > 0 for number in measured)
    # The table says the same numbers.
    lines = {line.split("  ")[0]: line for line in done.stdout.splitlines()}
    assert f"{result['stub_thoughts_per_second']:.0f} thoughts/s" in lines["many trees, 50 ms a request"]
    one = result["one_tree_seconds"]
    assert result["one_tree_speedup"] == pytest.approx(one["1"] / one["4"])
    # A request lasts 50 ms and a rollout at k = 1 makes at least one: nobody can be faster than that.
    assert one["1"] >= 0.05 * result["one_tree_rollouts"]
    bare, ours = result["bare_cpu_ms_per_request"], result["cpu_ms_per_thought"]
    assert result["cpu_ratio_to_bare_client"] == pytest.approx(ours / bare)
