"""Datasets of trees, for the tests that need their rows."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from tests.support.tiny_student import tiny_tokenizer

from cotree.data.build import build_dataset
from cotree.data.gates import DatasetCounts, Rules
from cotree.data.settings import Dataset
from cotree.search.store import StoredTree


def dataset_of(
    trees: Iterable[StoredTree], folder: Path, rows: str = "sft", *, seed: int = 0, passed: Any = None, **settings: Any
) -> DatasetCounts:
    """Build a dataset of trees for the tiny student; `passed` goes to `Rules`, its `about` to `build_dataset`."""
    given = dict(passed or {})
    about = given.pop("about", None)
    rules = Rules(Dataset(trees=("train",), rows=rows, **settings), tiny_tokenizer(), seed, **given)
    return build_dataset(rules, folder, name=folder.name, trees=trees, about=about)


def rows_in(folder: Path) -> list[dict[str, Any]]:
    """The rows of a dataset's folder."""
    found: list[dict[str, Any]] = pq.read_table(folder / "train.parquet").to_pylist()
    return found
