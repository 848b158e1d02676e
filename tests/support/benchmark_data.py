"""Rows of the benchmark files for tests: from the folder that COTREE_DATA names, or the test is skipped."""

from __future__ import annotations

import os
from typing import Any

import pytest

from cotree.tasks.loading import Source, load_rows


def benchmark_rows(name: str) -> list[dict[str, Any]]:
    """The rows of a file; with COTREE_DATA set, a file that is absent fails the test."""
    folder = os.environ.get("COTREE_DATA")
    if not folder:
        pytest.skip(f"benchmark data not found: {name} (set COTREE_DATA to run this test)")
    return load_rows(Source(name.removesuffix(".gz"), "none/none", "", 0), os.path.join(folder, name))
