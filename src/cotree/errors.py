"""The errors a user can cause or has to act on.

Invariant: whatever a user can do wrong ends in one of these two, with one line that names the fault and the fix. The
command line turns them into exit codes; anything else that escapes is a bug of cotree and shows its traceback.
"""

from __future__ import annotations


class CotreeError(Exception):
    """Work failed after it had started (exit code 1): a server died, the disk is full, training cannot go on."""

    exit_code = 1


class UsageError(CotreeError):
    """Bad input, found before any work started (exit code 2): nothing was called, written or lost."""

    exit_code = 2
