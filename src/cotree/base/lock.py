"""Lock a folder for one process; others are refused with a one-line error before they do anything."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cotree.base.atomic import explain_write_errors
from cotree.base.errors import UsageError


@contextmanager
def locked(path: Path, mode: int = fcntl.LOCK_EX, *, other: str = "choose another name=") -> Iterator[None]:
    """Lock a folder exclusively, or share it with other readers (`fcntl.LOCK_SH`).

    A shared lock creates no file, because the folder may be read-only.

    Args:
        other: advice on using another folder, for errors.

    Raises:
        UsageError: another process has locked it, or its file system has no locks.
        CotreeError: the folder cannot be created.
    """
    place, shared = path / ".lock", mode == fcntl.LOCK_SH
    if shared and not place.exists():  # never locked by a writer
        yield
        return
    with explain_write_errors(path):
        if not shared:
            path.mkdir(parents=True, exist_ok=True)
        lock = place.open("rb" if shared else "ab")
    with lock:
        try:
            fcntl.flock(lock, mode | fcntl.LOCK_NB)
            if not shared:
                with place.open("rb") as again, suppress(BlockingIOError):
                    fcntl.flock(again, fcntl.LOCK_SH | fcntl.LOCK_NB)
                    raise OSError("it lets two have one lock")
        except BlockingIOError:
            raise UsageError(f"another cotree works in {path}; wait for it, or {other}") from None
        except OSError as error:
            if not shared:  # readers continue without a lock
                why = f"the file system of {path} has no file locks ({error.strerror or error})"
                raise UsageError(f"{why}, so two could write there at once; use a folder on a local disk") from None
        yield
