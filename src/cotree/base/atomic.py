"""Atomic writes of files and folders, checksum files, and one-line errors for failed writes.

Invariant: content at a path is complete: it is written to a draft beside it, synced, and renamed. Later damage is
detected if there is a checksum file (`write_sums`). Concurrent writers of a path, also on other machines, do not
interfere; drafts of processes killed on this machine are removed by the next write.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from cotree.base.errors import CotreeError, UsageError

_REMEDY = "choose another place"
_SUMS = "sha256.json"


@contextmanager
def atomic_draft(path: Path, remedy: str = _REMEDY) -> Iterator[Path]:
    """Yield a temporary path whose file or folder is renamed to `path` when the block ends, and removed if it fails.

    Replaces a file (or an empty folder) at `path`.

    Args:
        remedy: advice on choosing another path, for the error message.

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
            sync(draft, *draft.rglob("*"))
            draft.replace(path)
            sync(path.parent)
    finally:
        with suppress(OSError):  # the file system may refuse this too
            remove(draft)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    with atomic_draft(path) as draft:
        draft.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file atomically."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def sync(*paths: Path) -> None:
    """fsync files and folders."""
    for path in paths:
        with suppress(OSError) if path.is_dir() else nullcontext():  # some network file systems cannot sync folders
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def sums_of(path: Path) -> Path:
    """The path of the checksum file of a file (beside it) or of a folder (in it)."""
    return path / _SUMS if path.is_dir() else path.with_name(f"{path.name}.{_SUMS}")


def write_sums(sums: Path, paths: Iterable[Path]) -> None:
    """Sync files, then write their sizes and SHA-256 to a JSON checksum file atomically.

    Args:
        sums: the JSON file, in a folder that contains all the others.
        paths: the files; folders among them are only synced.
    """
    paths = sorted(paths)
    sync(*paths)
    files = [path for path in paths if path.is_file()]
    write_json(sums, {str(f.relative_to(sums.parent)): [f.stat().st_size, content_sha256(f)] for f in files})


def damage(sums: Path) -> str | None:
    """Check files against their checksum file: "x.pt has 3 bytes, not 800", or None if intact.

    Reads the files each time, because a flipped bit on a disk changes neither size nor mtime.
    """
    try:
        for name, (size, sha256) in json.loads(sums.read_text(encoding="utf-8")).items():
            path = sums.parent / name
            if (found := path.stat().st_size) != size:
                return f"{name} has {found} bytes, not {size}"
            if content_sha256(path) != sha256:
                return f"{name} has other content than was written"
    except (OSError, ValueError, TypeError, AttributeError) as error:
        return f"{Path(getattr(error, 'filename', None) or sums).name}: {getattr(error, 'strerror', None) or error}"
    return None


def content_sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def data_sha256(content: Any) -> str:
    """SHA-256 of plain data as JSON with sorted keys, in hex."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@contextmanager
def explain_write_errors(path: Path, remedy: str = _REMEDY) -> Iterator[None]:
    """Convert a failed write of `path` in the block to a one-line UsageError or CotreeError, as in `atomic_draft`."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, OSError) and type(error).__name__ != "SafetensorError":
            raise
        if isinstance(error, FileExistsError | NotADirectoryError):
            raise UsageError(f"cannot write {path}: a part of its path is a file, no folder; {remedy}") from error
        # Errors of safetensors have no errno.
        reason = getattr(error, "strerror", None) or (str(error).strip() or type(error).__name__).splitlines()[0]
        fix = f"free some space, or {remedy}, and run the same command again"
        raise CotreeError(f"cannot write {path}: {reason}; {fix}") from error


def _is_running(process: str) -> bool:
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except (ValueError, OverflowError, PermissionError):  # not our draft, or another user's process
        pass
    return True


def remove(path: Path) -> None:
    """Delete a file or a folder with its content, if it exists."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(NotADirectoryError):
            path.unlink(missing_ok=True)
