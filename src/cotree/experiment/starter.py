"""`cotree init`: a commented recipe to start from, with every kind of node."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from cotree.base.atomic import write_text
from cotree.base.errors import UsageError


def write_starter(path: Path) -> str:
    """Write the recipe; returns what to do next.

    Raises:
        UsageError: there is a file already.
    """
    if path.exists():
        raise UsageError(f"{path} is there already; name another file")
    name = path.stem if path.stem[:1].isalnum() else "mine"
    starter = files("cotree.experiment").joinpath("starter.yaml").read_text(encoding="utf-8")
    write_text(path, starter.replace("{file}", str(path)).replace("{name}", name))
    return f"{path}: a recipe to start from; `cotree plan {path}` shows what it would do"
