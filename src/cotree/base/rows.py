"""Read rows from Parquet, JSON lines and JSON arrays, and write JSON lines.

Parquet and JSON lines are streamed, so memory holds one batch only.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from cotree.base.atomic import atomic_draft
from cotree.base.errors import UsageError

Row = dict[str, Any]
ROWS_PER_BATCH = 1_024


def read_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a Parquet, JSON-lines or JSON-array file (also gzipped); detects the format by content.

    Raises:
        UsageError: the file is missing or damaged; the message names the line.
    """
    if not path.is_file():
        raise UsageError(f"{path} is a folder; name a file in it" if path.is_dir() else f"no file at {path}")
    from cotree.base.run_folder import check_against_record  # imports pydantic, which verifiers do not need

    check_against_record(path)
    if _is_parquet(path):
        yield from _parquet_rows(path)
        return
    number = 1
    try:
        opened = gzip.open if path.suffix == ".gz" else open
        with opened(path, "rt", encoding="utf-8-sig") as lines:
            first = next((line.lstrip() for line in lines if line.strip()), "")
            lines.seek(0)
            if first.startswith("["):
                found = json.load(lines)
                if not all(isinstance(row, dict) for row in found):
                    raise ValueError("a row must be an object with columns")
                yield from found
                return
            for line in lines:
                if line.strip():
                    row = json.loads(line.strip())
                    if not isinstance(row, dict):
                        raise ValueError("a row must be an object with columns")
                    yield row
                number += 1
    except (ValueError, OSError, EOFError, zlib.error, RecursionError) as error:
        number += getattr(error, "lineno", 1) - 1  # within an array
        forms = "rows come as .parquet, .jsonl or .json (lines or an array), .gz"
        raise UsageError(f"{path}: line {number}: no JSON row ({error}); {forms}") from None


def _is_parquet(path: Path) -> bool:
    """Whether a file is Parquet by its name or, whatever its name, by its first bytes."""
    if path.suffix == ".parquet":
        return True
    with path.open("rb") as file:
        return file.read(4) == b"PAR1"


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(ROWS_PER_BATCH):
                yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as error:  # damaged pages are an OSError
        raise UsageError(f"{path} is no Parquet file: {str(error).splitlines()[0]}") from None


def read_metadata(path: Path) -> dict[str, Any]:
    """cotree's metadata in a Parquet file's schema; empty for other files."""
    if not _is_parquet(path):
        return {}
    import pyarrow.parquet as pq

    noted: dict[str, Any] = json.loads((pq.read_schema(path).metadata or {}).get(b"cotree", b"{}"))
    return noted


def write_jsonl(path: Path, rows: Iterable[Row]) -> int:
    """Write rows as JSON lines, atomically; returns the number of rows."""
    with atomic_draft(path) as draft, draft.open("w", encoding="utf-8") as file:
        return sum(1 for row in rows if file.write(json.dumps(row, ensure_ascii=False) + "\n"))
