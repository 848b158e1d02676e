"""Files and folders that are written whole or not at all, and one-line errors where they cannot be written.

Invariant: what stands at a path is complete: it was made beside its place and renamed. Processes that write the same
path at once, on whatever machines, do not disturb each other; drafts that a killed process of this machine left behind
are removed by the next write of that path.
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

_REMEDY = "choose another place"


@contextmanager
def atomic_draft(path: Path, remedy: str = _REMEDY) -> Iterator[Path]:
    """Yield a temporary path whose file or folder is renamed to `path` when the block ends, and removed if it fails.

    Replaces a file (or an empty folder) at `path`.

    Args:
        remedy: how the user chooses another place, for the error message.

    Raises:
        UsageError: a part of the path is a file.
        CotreeError: writing failed (disk full, no permission).
    """
    host = socket.gethostname().replace(".", "-")
    draft = path.with_name(f".{path.name}.{host}.{os.getpid()}.{uuid4().hex[:8]}.draft")
    try:
        with explain_write_errors(path, remedy):
            path.parent.mkdir(parents=True, exist_ok=True)
            for abandoned in path.parent.glob(f".{glob.escape(path.name)}.{host}.*.draft"):
                if not _is_running(abandoned.name.split(".")[-3]):
                    remove(abandoned)
            yield draft
            draft.replace(path)
    finally:
        remove(draft)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file, whole or not at all."""
    with atomic_draft(path) as draft:
        draft.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file, whole or not at all."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


@contextmanager
def explain_write_errors(path: Path, remedy: str = _REMEDY) -> Iterator[None]:
    """Turn a failure to write `path` in the block into a one-line UsageError or CotreeError, as in `atomic_draft`."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, OSError) and type(error).__name__ != "SafetensorError":
            raise
        if isinstance(error, FileExistsError | NotADirectoryError):
            raise UsageError(f"cannot write {path}: a part of its path is a file, no folder; {remedy}") from error
        # What safetensors raises has no errno.
        reason = getattr(error, "strerror", None) or (str(error).strip() or type(error).__name__).splitlines()[0]
        fix = f"free some space, or {remedy}, and run the same command again"
        raise CotreeError(f"cannot write {path}: {reason}; {fix}") from error


def _is_running(process: str) -> bool:
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except (ValueError, OverflowError, PermissionError):  # no draft of ours, or somebody else's process
        pass
    return True


def remove(path: Path) -> None:
    """Delete a file or a folder with all its content; nothing where there is none."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(NotADirectoryError):
            path.unlink(missing_ok=True)
