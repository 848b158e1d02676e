"""`cotree import`: convert files from elsewhere to dataset rows, or rollouts to the trees of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from cotree.base.errors import UsageError
from cotree.data.build import import_file
from cotree.experiment.recipe import build_recipe
from cotree.experiment.run import run


def import_as(
    kind: Literal["rows", "trees"],
    file: Path,
    student: str,
    out: Path,
    *,
    task: str | None = None,
    held_out: Sequence[str] = (),
    max_tokens: int | None = None,
) -> list[str]:
    """Import a file; returns report lines about what was written and left out.

    Args:
        kind: `rows`: chains or pairs, to a Parquet file; `trees`: rollouts, to a run folder with a recipe.
        student: its tokenizer counts or shares tokens: a packaged name, a `.gguf`, a folder or a hub id.
        task: verifies texts with a gold answer. held_out, max_tokens: for rows only.

    Raises:
        UsageError: nothing in the file is usable.
    """
    if kind == "rows":
        counts = import_file(file, student, out, task=task, held_out=held_out, max_tokens=max_tokens or 16_384)
        return [f"{out}: {counts.lines()[0]}", *counts.lines()[1:]]
    if held_out or max_tokens is not None:
        raise UsageError("--held-out and --max-tokens are for rows; of trees the datasets have them (`max_tokens`)")
    if not file.is_file():
        raise UsageError(f"no file at {file}")
    trees: dict[str, Any] = {"file": str(file.absolute()), "tokenizer": "student"} | ({"task": task} if task else {})
    weights = str(Path(student).absolute()) if Path(student).exists() else student
    recipe = {"name": out.name, "models": {"student": {"weights": weights}}, "trees": {"imported": trees}}
    folder = run(build_recipe(recipe), out.parent).path
    return [f"{folder}: look at it with `cotree view {folder}`, and add datasets to {folder / 'recipe.yaml'}"]
