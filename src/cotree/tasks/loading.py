"""Where a benchmark's rows come from: the hub, a file, or a folder of files.

Invariant: rows are plain dicts in the origin's order and nothing is renamed here; a task maps the fields that it needs
with `value`, which knows the names of the hub and of the local files. What is missing ends in one line.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from cotree.base.errors import UsageError
from cotree.base.rows import read_rows

Row = dict[str, Any]
DATA_FOLDER = "COTREE_DATA"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_FILES = (".jsonl", ".json", ".gz", ".parquet")


@dataclass(frozen=True, slots=True)
class Source:
    """One set of rows: its file name in a data folder, and its place on the hub.

    size: rows of the full set, as published. configs: hub configurations, joined in this order; none: the only one.
    split: the hub's split; None: all of them. ids: a row without an id is called this and its number.
    """

    file: str
    hub: str
    licence: str
    size: int
    configs: tuple[str, ...] = ()
    split: str | None = None
    ids: str = ""


def load_rows(source: Source, data: str | Path | None = None) -> list[Row]:
    """The rows of a source.

    Args:
        data: a JSONL, JSONL.gz or Parquet file; a folder that holds `source.file` (or its `.gz`) or a data set in the
            hub's layout; a hub id. By default the folder that the environment variable COTREE_DATA names, where the
            file is in it, and else the hub.

    Raises:
        UsageError: nothing there, or not readable; one line that names the file, the hub id and COTREE_DATA.
    """
    place = os.environ.get(DATA_FOLDER) if data is None else data
    if place:
        # The environment names a folder for all tasks; a file would be the rows of each.
        named = () if data is None else (Path(place),)
        for file in (*named, Path(place, source.file), Path(place, f"{source.file}.gz")):
            if file.is_file():
                return list(read_rows(file))
    if data is None:
        return _from_hub(source, source.hub)
    if Path(data).is_dir() or (HUB_ID.fullmatch(str(data)) and Path(data).suffix not in _FILES):
        return _from_hub(source, str(data))
    raise UsageError(f"no file or folder at {data}; {_where(source)}")


def value(row: Row, *names: str) -> Any:
    """The first of these fields that the row has; UsageError that lists both sides where it has none."""
    for name in names:
        if row.get(name) is not None:
            return row[name]
    there = ", ".join(str(name) for name, told in row.items() if told is not None)
    raise UsageError(f"a row has no field `{'` or `'.join(names)}`; its fields: {there}")


def _where(source: Source) -> str:
    other = f"a file, a folder or a hub id ({source.hub}) with --data, or data= in Python"
    return f"set {DATA_FOLDER} to a folder with {source.file}, or name {other}"


@cache
def _from_hub(source: Source, where: str) -> list[Row]:
    import huggingface_hub
    from datasets import get_dataset_config_names, load_dataset

    rows: list[Row] = []
    try:
        if not Path(where).is_dir() and not huggingface_hub.is_offline_mode():
            # One question first: `datasets` itself would try for half a minute before it says that there is no hub.
            huggingface_hub.HfApi().dataset_info(where, timeout=10)
        there = get_dataset_config_names(where)
        names = [name for name in source.configs if name in there] or there
        if len(names) > max(1, len(source.configs)):
            raise ValueError(f"it has the configurations {', '.join(names)}, and which one is meant is not known")
        for name in names:
            splits = load_dataset(where, name)
            if source.split not in (None, *splits) and len(splits) > 1:
                raise ValueError(f"it has the splits {', '.join(splits)}, and not `{source.split}`")
            for split in [source.split] if source.split in splits else splits:
                rows += splits[split]
    except Exception as error:  # noqa: BLE001 - the hub client and `datasets` raise dozens of unrelated types
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UsageError(f"no {source.file}: cannot load {where} ({reason}); {_where(source)}") from None
    return rows
