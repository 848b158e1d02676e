"""Errors that a user can cause or must act on.

Each has a one-line message with the fault and the fix, and an exit code for the command line. Any other exception is a
bug of cotree and shows its traceback.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class CotreeError(Exception):
    """Work failed after it started (exit code 1): a server died, the disk is full, training cannot continue."""

    exit_code = 1


class RefusedError(CotreeError):
    """A model's server refuses a request because of its content, for example a prompt that is too long.

    words: the server's message.
    """

    def __init__(self, message: str, words: str) -> None:
        super().__init__(message)
        self.words = words


class UsageError(CotreeError):
    """Bad input, found before any work started (exit code 2): nothing was requested, written or lost."""

    exit_code = 2


class NotFoundError(UsageError):
    """Something requested by name does not exist."""


@contextmanager
def first_cotree_error() -> Iterator[None]:
    """Replace an ExceptionGroup raised in the block by the first CotreeError in it.

    A group without one is re-raised.
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
