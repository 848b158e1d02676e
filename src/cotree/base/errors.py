"""The errors that a user can cause or has to act on.

Each has a message of one line that names the fault and the fix, and the command line turns it into its exit code. Any
other exception that escapes is a bug of cotree and shows its traceback.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class CotreeError(Exception):
    """Work failed after it had started (exit code 1): a server died, the disk is full, training cannot go on."""

    exit_code = 1


class RefusedError(CotreeError):
    """A model's server refuses a request for what is in it, a prompt that is too long for example.

    words: the server's own.
    """

    def __init__(self, message: str, words: str) -> None:
        super().__init__(message)
        self.words = words


class UsageError(CotreeError):
    """Bad input, found before any work started (exit code 2): nothing was called, written or lost."""

    exit_code = 2


class NotFoundError(UsageError):
    """What was asked for by its name is not there."""


@contextmanager
def first_cotree_error() -> Iterator[None]:
    """Replace an ExceptionGroup, which concurrent tasks raise together, by the first CotreeError in it.

    A group without one is raised as it is.
    """
    try:
        yield
    except ExceptionGroup as group:
        error: Exception | None = group.subgroup(CotreeError)
        if error is None:
            raise
        while isinstance(error, ExceptionGroup):
            error = error.exceptions[0]
        raise error from None
