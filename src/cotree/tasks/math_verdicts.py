r"""Whether a mathematical answer equals the gold one: math-verify's word, from processes that can be killed.

Invariants: a comparison costs at most `math_worker.SECONDS` and never the run, whatever the answer is; one that was
stopped is wrong, with a detail that says so (an answer was there, and nobody would accept it). The workers are children
of one `python -m` subprocess that starts when it is first needed and ends when this process has gone, so this works in
threads, notebooks and scripts from stdin. Answers written like the gold one, and plain numbers, are decided here: the
library agrees about them (a test asks it), and it needs 10 ms for what takes 10 µs.
"""

from __future__ import annotations

import json
import os
import queue
import re
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import cotree
from cotree.base.errors import CotreeError
from cotree.tasks.math_worker import BYTES, SECONDS
from cotree.tasks.numbers import number, tidy

# Golds have up to a hundred characters; what is longer than this is a loop, not an answer.
_LONGEST = 1000
# The worker keeps the limit itself; one that does not, is killed.
_GRACE = 2.0
_BASED = re.compile(r"([0-9A-F]+)_\{?([0-9]+)\}?")


@lru_cache(1 << 14)
def compare(gold: str, answer: str) -> tuple[bool, str]:
    """Whether the answer is right, and why it was not checked where it was not.

    Raises:
        CotreeError: no worker can be started.
    """
    gold, answer = tidy(gold), tidy(answer)
    if answer == gold:
        return True, ""
    numbers = number(gold), number(answer)
    # The library takes decimals for equal that differ after six places.
    if None not in numbers and (numbers[0] == numbers[1] or "." not in gold + answer):
        return numbers[0] == numbers[1], ""
    if len(answer) > _LONGEST:
        return False, f"not checked: longer than {_LONGEST} characters"
    based = _BASED.fullmatch(gold), _BASED.fullmatch(answer)
    if based[0] and based[1]:
        # The library drops the base.
        return based[0].groups() == based[1].groups(), ""
    equal = _ask(gold, answer)
    return equal is True, "" if equal is not None else f"not checked: stopped at {SECONDS:.0f} s or {BYTES >> 30} GiB"


class _Workers:
    """The `math_worker` process and a socket to each of its children, one a core; ready when constructed."""

    def __init__(self) -> None:
        pairs = [socket.socketpair() for _ in range(os.cpu_count() or 1)]
        theirs = [pair[1].fileno() for pair in pairs]
        # What this process found through sys.path alone the other one must find too.
        path = os.pathsep.join([str(Path(cotree.__file__).parents[1]), *filter(None, sys.path)])
        # -P: nothing in the working directory, say a random.py, is taken for a library.
        command = [sys.executable, "-P", "-m", "cotree.tasks.math_worker", *map(str, theirs)]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": path},
            pass_fds=theirs,
        )
        self.sockets = [ours for ours, _ in pairs]
        self._free: queue.LifoQueue[socket.socket] = queue.LifoQueue()
        for ours, their in pairs:
            their.close()
            ours.settimeout(SECONDS + _GRACE)
            self._free.put(ours)
        assert self.process.stdout is not None
        if self.process.stdout.readline() != b"ready\n":
            self.close()
            raise CotreeError(f"the math verifier does not start; see what `{' '.join(command[:4])}` says")

    def ask(self, gold: str, answer: str) -> bool | None:
        """Whether they are equal, None when the comparison was stopped; OSError when the process is gone."""
        ours = self._free.get()
        reply = b""
        try:
            ours.sendall(json.dumps([gold, answer]).encode() + b"\n")
            while not reply.endswith(b"\n"):
                part = ours.recv(16)
                if not part:
                    raise ConnectionResetError
                reply += part
        except BaseException:
            # The next line on this socket would be this one's reply.
            self.close()
            ours.close()
            raise
        finally:
            self._free.put(ours)
        equal: bool | None = json.loads(reply)
        return equal

    def close(self) -> None:
        """End the process; comparisons in other threads fail."""
        self.process.kill()
        self.process.wait()
        # Its children hold the other end until they notice, so nobody waits for the end of what it says.
        if self.process.stdout is not None:
            self.process.stdout.close()
        for ours in self.sockets:
            # Not closed here: a thread that waits for its reply would go on waiting, on a number that others may get.
            with suppress(OSError):
                ours.shutdown(socket.SHUT_RDWR)


_starting = threading.Lock()
_workers: _Workers | None = None


def _ask(gold: str, answer: str) -> bool | None:
    global _workers
    for _ in range(2):
        with _starting:
            if _workers is None or _workers.process.poll() is not None:
                _workers = _Workers()
            workers = _workers
        try:
            return workers.ask(gold, answer)
        except OSError:
            # Somebody killed the process, or another thread was interrupted; that says nothing about the answer.
            continue
    raise CotreeError("the math verifier died twice; is there enough memory?")


def _after_fork() -> None:
    """A forked child must not speak on its parent's sockets."""
    global _starting, _workers
    _starting = threading.Lock()
    for ours in _workers.sockets if _workers else ():
        ours.close()
    _workers = None


os.register_at_fork(after_in_child=_after_fork)
