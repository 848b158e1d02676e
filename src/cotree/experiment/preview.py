"""`cotree preview`: a dataset of a run as its trainer sees it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from cotree.base.errors import UsageError
from cotree.base.progress import Output
from cotree.base.settings import nearest
from cotree.data.preview import preview
from cotree.experiment.fingerprints import Fingerprints
from cotree.experiment.recipe import Recipe
from cotree.experiment.run import run_folder
from cotree.experiment.work import Worker

if TYPE_CHECKING:
    from rich.text import Text


def preview_dataset(recipe: Recipe, runs_dir: Path, name: str, rows: int) -> Text:
    """The first rows of a dataset node, token by token.

    Raises:
        UsageError: the recipe has no such dataset, or it has not been made yet.
    """
    node = recipe.nodes.get(f"datasets/{name}")
    if node is None:
        known = [each.name for each in recipe.of_kind("datasets")]
        raise UsageError(f"unknown dataset `{name}`; {nearest(name, known)}")
    run = run_folder(recipe, runs_dir)
    path = run.node(node.id).path / "train.parquet"
    if not path.is_file():
        raise UsageError(f"no rows at {path}; make them with `cotree run RECIPE --only datasets/{name}`")
    tokenizer = Worker(recipe, run, Fingerprints(recipe), Output()).tokenizer(node.dataset.tokenizer)
    return preview(path, tokenizer, node.dataset.max_tokens, rows)
