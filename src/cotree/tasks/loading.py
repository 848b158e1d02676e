"""Where a benchmark's rows come from: the hub, a file, or a folder of files.

Invariant: rows are plain dicts in the origin's order and nothing is renamed here; a task maps the fields that it needs
with `value`, which knows the names of the hub and of the local files. What is missing ends in one line.
"""

from __future__ import annotations

import gzip
import json
import os
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from cotree.errors import UsageError

Row = dict[str, Any]
DATA_FOLDER = "COTREE_DATA"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True, slots=True)
class Source:
    """One set of rows: its file name in a data folder, and its place on the hub.

    size: rows of the full set, as published. configs: hub configurations, joined in this order; none: the only one.
    split: the hub's split; None: the only one. ids: what ids begin with, for rows that have none.
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
    if data is None:
        folder = os.environ.get(DATA_FOLDER)
        file = _in_folder(Path(folder), source.file) if folder else None
        return _read(file) if file else _from_hub(source, source.hub)
    path = Path(data)
    if path.is_file():
        return _read(path)
    if path.is_dir():
        file = _in_folder(path, source.file)
        return _read(file) if file else _from_hub(source, str(path))
    if HUB_ID.fullmatch(str(data)) and not str(data).endswith((".jsonl", ".gz", ".parquet")):
        return _from_hub(source, str(data))
    raise UsageError(f"no file or folder at {data}; {_where(source)}")


def value(row: Row, *names: str) -> Any:
    """The first of these fields that the row has; UsageError that lists both sides where it has none."""
    for name in names:
        if row.get(name) is not None:
            return row[name]
    raise UsageError(f"a row has no field `{'` or `'.join(names)}`; its fields: {', '.join(map(str, row))}")


def _where(source: Source) -> str:
    other = f"a file, a folder or a hub id ({source.hub}) with --data, or data= in Python"
    return f"set {DATA_FOLDER} to a folder with {source.file}, or name {other}"


def _in_folder(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def _read(path: Path) -> list[Row]:
    if path.suffix == ".parquet":
        return _read_parquet(path)
    rows: list[Row] = []
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                row = json.loads(line) if line.strip() else {}
                if not isinstance(row, dict):
                    raise UsageError(f"{path}:{number}: a row is a JSON object, not {type(row).__name__}")
                rows += [row] if row else []
    except ValueError as error:
        raise UsageError(f"{path}:{len(rows) + 1}: not JSON lines in UTF-8: {error}") from None
    except (OSError, EOFError) as error:
        raise UsageError(f"cannot read {path}: {error}") from None
    return rows


def _read_parquet(path: Path) -> list[Row]:
    import pyarrow.parquet

    try:
        rows: list[Row] = pyarrow.parquet.read_table(path).to_pylist()
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read {path}: {' '.join(str(error).split())}") from None
    return rows


@cache
def _hub_rows(where: str, configs: tuple[str, ...], split: str | None) -> tuple[Row, ...]:
    import huggingface_hub
    from datasets import get_dataset_config_names, load_dataset

    if not Path(where).is_dir() and not huggingface_hub.is_offline_mode():
        # One question first: `datasets` itself would try for half a minute before it says that there is no hub.
        huggingface_hub.HfApi().dataset_info(where, timeout=10)
    there = get_dataset_config_names(where)
    names = [name for name in configs if name in there] or there
    if len(names) > max(1, len(configs)):
        raise ValueError(f"it has the configurations {', '.join(names)}, and which one is meant is not known")
    rows: list[Row] = []
    for name in names:
        splits = load_dataset(where, name)
        if split not in splits and len(splits) > 1:
            raise ValueError(f"it has the splits {', '.join(splits)}, and not `{split}`")
        rows += list(splits[split] if split in splits else next(iter(splits.values())))
    return tuple(rows)


def _from_hub(source: Source, where: str) -> list[Row]:
    try:
        return list(_hub_rows(where, source.configs, source.split))
    except Exception as error:  # noqa: BLE001 - the hub client and `datasets` raise dozens of unrelated types
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UsageError(f"no {source.file}: cannot load {where} ({reason}); {_where(source)}") from None
