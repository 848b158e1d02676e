"""Files and folders that a kill cannot tear, and that say in one line why they could not be written.

Invariant: what stands at a path was written whole: it was made beside its place and renamed. Those that write the same
path at once, on whatever machine, do not disturb each other; what a process that was killed on this machine left goes
with the next write.
"""

from __future__ import annotations

import glob
import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from cotree.base.errors import CotreeError, UsageError

_PLACE = "choose another place"


@contextmanager
def whole(path: Path, place: str = _PLACE) -> Iterator[Path]:
    """A draft path: the file or folder made there becomes `path` when the block ends, and vanishes when it fails.

    A file (or an empty folder) that is there is replaced. place: how another one is chosen, for the message.

    Raises:
        UsageError: a part of the path is a file.
        CotreeError: writing failed (disk full, no permission), in one line.
    """
    here = socket.gethostname().replace(".", "-")
    draft = path.with_name(f".{path.name}.{here}.{os.getpid()}.{uuid4().hex[:8]}.draft")
    try:
        with writing(path, place):
            path.parent.mkdir(parents=True, exist_ok=True)
            for left in path.parent.glob(f".{glob.escape(path.name)}.{here}.*.draft"):
                if not _runs(left.name.split(".")[-3]):
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
def writing(path: Path, place: str = _PLACE) -> Iterator[None]:
    """Turn a failure to write `path` into one line: UsageError or CotreeError, as in `whole`."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, OSError) and type(error).__name__ != "SafetensorError":
            raise
        if isinstance(error, FileExistsError | NotADirectoryError):
            raise UsageError(f"cannot write {path}: a part of its path is a file, no folder; {place}") from error
        # What safetensors raises has no errno.
        reason = getattr(error, "strerror", None) or (str(error).strip() or type(error).__name__).splitlines()[0]
        fix = f"free some space, or {place}, and run the same command again"
        raise CotreeError(f"cannot write {path}: {reason}; {fix}") from error


def _runs(process: str) -> bool:
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except (ValueError, OverflowError, PermissionError):  # no draft of ours, or somebody else's process
        pass
    return True


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(NotADirectoryError):
            path.unlink(missing_ok=True)
