"""Run a server until it ends, until SIGTERM, or until its owner process dies; then end all of its processes.

A separate program, `python supervise.py PARENT_PID COMMAND...`, because the owner may be killed by kill -9, and the
server's workers may outlive the server. It exits after the last of the server's processes, when the GPU is free.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

_DEATH_SIGNAL, _SUBREAPER = 1, 36  # PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER
# Seconds from SIGTERM to SIGKILL, and from SIGKILL to giving up.
_GRACE, _GONE = 5.0, 30.0


def supervise(parent: int, command: list[str]) -> int:
    """Run the command; returns its exit code, 128 + the signal that ended it, or 0 after SIGTERM."""
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: stopped.append(number))
    if sys.platform == "linux":  # adopt orphaned descendants
        ctypes.CDLL(None).prctl(_SUBREAPER, 1, 0, 0, 0)
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL, process_group=0, preexec_fn=_end_with_parent)
    while (code := server.poll()) is None and not stopped and os.getppid() == parent:
        time.sleep(0.1)
    for number, seconds in (signal.SIGTERM, _GRACE), (signal.SIGKILL, _GONE):
        deadline = time.monotonic() + seconds
        _signal(server.pid, number)
        while _children_left():
            if time.monotonic() > deadline:
                break
            if number == signal.SIGKILL:  # also those that were adopted meanwhile
                _signal(server.pid, number)
            time.sleep(0.05)
    return 0 if code is None else code if code >= 0 else 128 - code


def _end_with_parent() -> None:
    """Let the kernel send SIGTERM to this process when its supervisor dies."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DEATH_SIGNAL, signal.SIGTERM, 0, 0, 0)


def _signal(group: int, number: int) -> None:
    """Send a signal to a process group and, if it is SIGKILL, to children of this process that left the group."""
    with suppress(ProcessLookupError):
        os.killpg(group, number)
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    if number == signal.SIGKILL and children.exists():
        for child in children.read_text().split():
            with suppress(ProcessLookupError):
                os.kill(int(child), number)


def _children_left() -> bool:
    """Whether a child still runs; those that have ended are reaped."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(supervise(int(sys.argv[1]), sys.argv[2:]))
