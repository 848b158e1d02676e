"""Files and folders that a kill cannot tear, and that say in one line why they could not be written.

Invariant: what stands at a path was written whole: it was made beside its place and renamed. Processes that write the
same path do not disturb each other, and what a killed one left goes with the next write.
"""

from __future__ import annotations

import glob
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cotree.errors import CotreeError


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A draft path: the file or folder made there becomes `path` when the block ends, and vanishes when it fails.

    A file (or an empty folder) that is there is replaced.

    Raises:
        CotreeError: writing failed (disk full, no permission), in one line.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}.draft")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            for left in path.parent.glob(f".{glob.escape(path.name)}.*.draft"):
                process = left.name.split(".")[-2]
                if process.isdecimal() and not _other_runs(int(process)):
                    _remove(left)
            yield draft
            draft.replace(path)
    finally:
        _remove(draft)


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    with whole(path) as draft:
        draft.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Write JSON whole or not at all."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a failure to write `path` into one line.

    Raises:
        CotreeError: in place of OSError, or of what safetensors calls it.
    """
    try:
        yield
    except Exception as error:
        if not isinstance(error, OSError) and type(error).__name__ != "SafetensorError":
            raise
        raise unwritable(path, error) from error


def unwritable(path: Path, error: Exception) -> CotreeError:
    """What to say when a file or folder cannot be written."""
    reason = getattr(error, "strerror", None) or (str(error).strip() or type(error).__name__).splitlines()[0]
    fix = "free some space, or choose another place, and run the same command again"
    return CotreeError(f"cannot write {path}: {reason}; {fix}")


def _other_runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return process != os.getpid()


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(NotADirectoryError):
            path.unlink(missing_ok=True)
