"""docs/paper.md says where each part of the paper lives; a rename must not leave it pointing at nothing."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def names(source: str) -> set[str]:
    """Top-level names of a module, and Class.method."""
    found = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


def test_every_function_and_test_in_the_paper_table_exists() -> None:
    text = (ROOT / "docs/paper.md").read_text()
    functions = re.findall(r"`([\w/]+\.py):([\w.]+)`", text)
    assert len(functions) > 15
    lost = [f"{path}:{name}" for path, name in functions if name not in names((ROOT / "src/cotree" / path).read_text())]
    assert lost == []
    tests = re.findall(r"`([\w/]*test_\w+\.py)`", text)
    assert tests
    assert [path for path in tests if not (ROOT / "tests" / path).is_file()] == []
