"""The packages of cotree import in one direction only, and importing cotree loads nothing heavy."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import cotree

SOURCE = Path(cotree.__file__).parent
# A package imports only from those before it.
ORDER = ["base", "tasks", "models", "search", "data", "train", "decode", "eval", "report", "view", "experiment", "cli"]
HEAVY = ["torch", "transformers", "datasets", "aiohttp", "matplotlib", "numpy", "pyarrow", "sympy", "pydantic", "yaml",
         "rich.progress", "sqlite3", "asyncio"]  # fmt: skip


def modules() -> dict[str, Path]:
    """All modules of cotree but its `__init__`, by their dotted names."""
    found = {}
    for path in SOURCE.rglob("*.py"):
        parts = path.relative_to(SOURCE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    del found["cotree"]
    return found


def imports(path: Path) -> Iterator[tuple[str, int, bool]]:
    """What a module imports of cotree: the names as written, the line, and whether only a type checker does it."""

    def walk(node: ast.AST, types_only: bool) -> Iterator[tuple[str, int, bool]]:
        types_only |= isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno, types_only) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            for alias in node.names:
                yield f"{node.module}.{alias.name}", node.lineno, types_only
        for child in ast.iter_child_nodes(node):
            yield from walk(child, types_only)

    for name, line, types_only in walk(ast.parse(path.read_text(encoding="utf-8")), False):
        if name.partition(".")[0] == "cotree":
            yield name, line, types_only


def module_of(name: str, known: dict[str, Path]) -> str:
    """The module that an imported name is, or is in; "cotree" for the package itself."""
    while name not in known and name != "cotree":
        name = name.rpartition(".")[0]
    return name


def test_every_package_has_its_place() -> None:
    packages = {name.split(".")[1] for name in modules()}
    assert packages == set(ORDER)


def test_a_package_imports_only_from_those_before_it() -> None:
    known, wrong = modules(), []
    for module, path in known.items():
        own = ORDER.index(module.split(".")[1])
        for name, line, _ in imports(path):
            found = module_of(name, known)
            if found == "cotree":  # where it is and its version; its lazy API would be a circle
                allowed = name in ("cotree", "cotree.__version__")
            else:
                allowed = ORDER.index(found.split(".")[1]) <= own
            if not allowed:
                wrong.append(f"{path.relative_to(SOURCE)}:{line} imports {name}")
    assert wrong == []


def test_no_two_modules_need_each_other() -> None:
    known = modules()
    needed = {
        module: {module_of(name, known) for name, _, types_only in imports(path) if not types_only} - {module, "cotree"}
        for module, path in known.items()
    }
    try:
        graphlib.TopologicalSorter(needed).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" -> ".join(reversed(error.args[1])))


def test_lazy_names_lead_somewhere() -> None:
    known = modules()
    assert {place.partition(":")[0] for place in cotree._LAZY.values()} <= set(known)


@pytest.mark.parametrize("module", ["cotree", "cotree.cli"])
def test_importing_loads_nothing_heavy(module: str) -> None:
    code = f"import {module}, sys; print([m for m in {HEAVY} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
