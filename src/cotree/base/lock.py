"""One process at a time works in a folder; another one is refused in a line before it has done anything."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cotree.base.atomic import explain_write_errors
from cotree.base.errors import UsageError


@contextmanager
def locked(path: Path, mode: int = fcntl.LOCK_EX, *, other: str = "choose another name=") -> Iterator[None]:
    """Have a folder for oneself, or share it with others that change nothing (`fcntl.LOCK_SH`).

    To share a folder, which may be one that cannot be written, nothing is made in it.

    Args:
        other: how the user takes another folder, for errors.

    Raises:
        UsageError: another process works in it, or its file system has no locks.
        CotreeError: it cannot be made.
    """
    place, shared = path / ".lock", mode == fcntl.LOCK_SH
    if shared and not place.exists():  # nothing that locks has worked in it
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
            if not shared:  # who only reads goes on, as at a place that nothing has locked
                why = f"the file system of {path} has no file locks ({error.strerror or error})"
                raise UsageError(f"{why}, so two could write there at once; use a folder on a local disk") from None
        yield
