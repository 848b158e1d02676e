"""The errors a user can cause or has to act on.

Invariant: whatever a user can do wrong ends in one of these two, with one line that names the fault and the fix. The
command line turns them into exit codes; anything else that escapes is a bug of cotree and shows its traceback.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class CotreeError(Exception):
    """Work failed after it had started (exit code 1): a server died, the disk is full, training cannot go on."""

    exit_code = 1


class UsageError(CotreeError):
    """Bad input, found before any work started (exit code 2): nothing was called, written or lost."""

    exit_code = 2


@contextmanager
def spoken_for() -> Iterator[None]:
    """Work that runs side by side fails side by side: of a group of errors the first user error speaks for all."""
    try:
        yield
    except ExceptionGroup as group:
        errors: list[Exception] = list(group.exceptions)
        while errors:
            error = errors.pop(0)
            if isinstance(error, ExceptionGroup):
                errors += error.exceptions
            elif isinstance(error, CotreeError):
                raise error from None
        raise
