"""Load a benchmark's rows from the hub, a file, or a folder of files.

Invariant: rows are plain dicts in the source's order, without renamed fields. Tasks read fields with `field_value`,
which accepts the hub's and the local files' names.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from cotree.base.errors import UsageError
from cotree.base.rows import Row, read_rows

DATA_VARIABLE = "COTREE_DATA"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_FILE_ENDINGS = (".jsonl", ".json", ".gz", ".parquet")


def packaged_text(name: str) -> str:
    """Read a text file beside this module."""
    return files("cotree.tasks").joinpath(name).read_text(encoding="utf-8")


@cache
def packaged_yaml(name: str) -> Any:
    """Read a YAML file beside this module."""
    return yaml.safe_load(packaged_text(name))


@dataclass(frozen=True, slots=True)
class Source:
    """One published set of rows: its file name in a data folder, and its id on the hub.

    size: number of rows as published. configs: hub configurations, concatenated; empty: the only one.
    split: the hub's split; None: all. id_prefix: rows without an id get this plus their number from 0.
    """

    file: str
    hub: str
    licence: str
    size: int
    configs: tuple[str, ...] = ()
    split: str | None = None
    id_prefix: str = ""


def load_rows(source: Source, data: str | Path | None = None) -> list[Row]:
    """Load the rows of a source.

    Args:
        source: which rows.
        data: a JSONL, JSONL.gz or Parquet file; a folder with `source.file` (or its `.gz`) or a dataset in the hub's
            layout; a hub id. By default the folder in the environment variable COTREE_DATA, if it has the file, else
            the hub.

    Raises:
        UsageError: missing or unreadable; one line that names the file, the hub id and COTREE_DATA.
    """
    place = os.environ.get(DATA_VARIABLE) if data is None else data
    if place:
        # COTREE_DATA serves all tasks, so it must be a folder: one file would be the rows of every task.
        given = () if data is None else (Path(place),)
        for file in (*given, Path(place, source.file), Path(place, f"{source.file}.gz")):
            if file.is_file():
                return list(read_rows(file))
    looks_like_hub = data is None or (HUB_ID.fullmatch(str(data)) and Path(data).suffix not in _FILE_ENDINGS)
    if looks_like_hub or Path(str(data)).is_dir():
        return _load_hub_rows(source, str(data or source.hub))
    raise UsageError(f"no file or folder at {data}; {_data_hint(source)}")


def field_value(row: Row, *names: str) -> Any:
    """The value of the first of these fields that the row has; UsageError if it has none."""
    for name in names:
        if row.get(name) is not None:
            return row[name]
    there = ", ".join(str(name) for name, value in row.items() if value is not None)
    raise UsageError(f"a row has no field `{'` or `'.join(names)}`; its fields: {there}")


def _data_hint(source: Source) -> str:
    """A hint for error messages on how to give the rows' source."""
    other = f"a file, a folder or a hub id ({source.hub}) with --data, or data= in Python"
    return f"set {DATA_VARIABLE} to a folder with {source.file}, or name {other}"


@cache
def _load_hub_rows(source: Source, hub: str) -> list[Row]:
    """Load the rows of a hub id, or of a folder in the hub's layout; all errors become UsageErrors."""
    import huggingface_hub
    from datasets import get_dataset_config_names, load_dataset

    rows: list[Row] = []
    try:
        if not Path(hub).is_dir() and not huggingface_hub.is_offline_mode():
            # Check the connection first: without a network `datasets` would retry for half a minute.
            huggingface_hub.HfApi().dataset_info(hub, timeout=10)
        there = get_dataset_config_names(hub)
        configs = [name for name in source.configs if name in there] or there
        if len(configs) > max(1, len(source.configs)):
            raise ValueError(f"it has the configurations {', '.join(configs)}, and which one is meant is not known")
        for config in configs:
            splits = load_dataset(hub, config)
            if source.split not in (None, *splits) and len(splits) > 1:
                raise ValueError(f"it has the splits {', '.join(splits)}, and not `{source.split}`")
            for split in [source.split] if source.split in splits else splits:
                rows += splits[split]
    except Exception as error:  # noqa: BLE001 - the hub client and `datasets` raise dozens of unrelated types
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UsageError(f"no {source.file}: cannot load {hub} ({reason}); {_data_hint(source)}") from None
    return rows
