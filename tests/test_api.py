"""The Python API: its names, and an import that loads nothing."""

from __future__ import annotations

import subprocess
import sys

import cotree


def test_the_names_are_frozen_and_there() -> None:
    assert cotree.__all__ == [
        "CotreeError",
        "Question",
        "Task",
        "UsageError",
        "Verdict",
        "__version__",
        "build_dpo",
        "build_sft",
        "decode",
        "diagnose",
        "evaluate",
        "task",
    ]
    assert all(hasattr(cotree, name) for name in cotree.__all__)


def test_importing_and_judging_load_nothing_heavy() -> None:
    heavy = ["torch", "transformers", "datasets", "pyarrow", "matplotlib", "numpy", "sympy", "pydantic"]
    code = (
        "import cotree, sys; assert 'cotree.tasks' not in sys.modules; task = cotree.task('letters');"
        "q = task.questions(limit=1)[0]; assert task.judge(q, '\\\\boxed{%s}' % q.gold).reward == 1.0;"
        f"print([m for m in {heavy} if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
