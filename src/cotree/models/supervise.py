"""Run a server until it ends, until SIGTERM, or until the process that wanted it is gone; leave none of its processes.

A program of its own, `python supervise.py PARENT_PID COMMAND...`, because the process that wants the server may be
ended by kill -9, and the server's own workers may outlive it. It exits when the last of the server's processes is gone,
so whoever waits for it finds the GPU free.
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
# Seconds that a server has for ending by itself, and that its processes have for being gone after SIGKILL.
_GRACE, _GONE = 5.0, 30.0


def supervise(parent: int, command: list[str]) -> int:
    """Run the command; returns its exit code, 128 + the signal that ended it, or 0 where it was told to stop."""
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: stopped.append(number))
    if sys.platform == "linux":  # processes whose parent has ended become children of this one
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
            if number == signal.SIGKILL:  # those that come to light when their parents end
                _signal(server.pid, number)
            time.sleep(0.05)
    return 0 if code is None else code if code >= 0 else 128 - code


def _end_with_parent() -> None:
    """Have this process told to stop if the one that watches it is killed."""
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
