r"""Whether a mathematical answer equals the gold one: math-verify's result, from processes that can be killed.

Invariant: a comparison takes at most `math_worker.LIMIT_SECONDS` and never fails the run, whatever the answer is. One
that was stopped counts as wrong, with a detail that says so: there was an answer, and nobody would accept it.

The workers are children of one `python -m` subprocess, which starts when it is first needed and ends with this process;
so this works in threads, notebooks and scripts from stdin. Answers that are written like the gold one, and plain
numbers, are decided here in 10 µs instead of the library's 10 ms; a test holds that the library agrees.
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
from cotree.tasks.math_worker import LIMIT_BYTES, LIMIT_SECONDS
from cotree.tasks.plain_numbers import normalize, parse_number

# Golds have up to a hundred characters; what is longer than this comes from a loop.
_MAX_CHARACTERS = 1000
# Seconds after the worker's own limit until a worker that does not keep it is killed.
_GRACE_SECONDS = 2.0
_NUMBER_WITH_BASE = re.compile(r"([0-9A-F]+)_\{?([0-9]+)\}?")


@lru_cache(1 << 14)
def check_math_answer(gold: str, answer: str) -> tuple[bool, str]:
    """Whether an answer equals the gold one, and why it was not compared ("" if it was).

    Raises:
        CotreeError: no worker can be started.
    """
    gold, answer = normalize(gold), normalize(answer)
    if answer == gold:
        return True, ""
    numbers = parse_number(gold), parse_number(answer)
    # Different decimals are left to the library, to which they are equal if they agree in six places.
    if None not in numbers and (numbers[0] == numbers[1] or "." not in gold + answer):
        return numbers[0] == numbers[1], ""
    if len(answer) > _MAX_CHARACTERS:
        return False, f"not checked: longer than {_MAX_CHARACTERS} characters"
    based = _NUMBER_WITH_BASE.fullmatch(gold), _NUMBER_WITH_BASE.fullmatch(answer)
    if based[0] and based[1]:
        # The library drops the base.
        return based[0].groups() == based[1].groups(), ""
    equal = _ask_worker(gold, answer)
    if equal is None:
        return False, f"not checked: stopped at {LIMIT_SECONDS:.0f} s or {LIMIT_BYTES >> 30} GiB"
    return equal, ""


class _WorkerPool:
    """The `math_worker` process and a socket to each of its children, one per core; ready when constructed."""

    def __init__(self) -> None:
        pairs = [socket.socketpair() for _ in range(os.cpu_count() or 1)]
        child_ends = [child_end.fileno() for _, child_end in pairs]
        # The subprocess must find the same packages, also those that are only on this process's sys.path.
        path = os.pathsep.join([str(Path(cotree.__file__).parents[1]), *filter(None, sys.path)])
        # -P: no file of the working directory, say a random.py, is imported instead of a library.
        command = [sys.executable, "-P", "-m", "cotree.tasks.math_worker", *map(str, child_ends)]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": path},
            pass_fds=child_ends,
        )
        self.sockets = [own_end for own_end, _ in pairs]
        self._free: queue.LifoQueue[socket.socket] = queue.LifoQueue()
        for own_end, child_end in pairs:
            child_end.close()
            own_end.settimeout(LIMIT_SECONDS + _GRACE_SECONDS)
            self._free.put(own_end)
        assert self.process.stdout is not None
        if self.process.stdout.readline() != b"ready\n":
            self.close()
            raise CotreeError(f"the math verifier does not start; see what `{' '.join(command[:4])}` says")

    def ask(self, gold: str, answer: str) -> bool | None:
        """Whether they are equal, None when the comparison was stopped; OSError when the process is gone."""
        own_end = self._free.get()
        try:
            own_end.sendall(json.dumps([gold, answer]).encode() + b"\n")
            # The worker sends its few bytes at once, so they arrive at once.
            reply = own_end.recv(16)
            if not reply:
                raise ConnectionResetError
        except BaseException:
            # A reply that still comes would be taken for that to the next question on this socket.
            self.close()
            own_end.close()
            raise
        finally:
            self._free.put(own_end)
        equal: bool | None = json.loads(reply)
        return equal

    def close(self) -> None:
        """Kill the process; comparisons that other threads wait for fail with OSError."""
        self.process.kill()
        self.process.wait()
        # Its children hold the other end of the pipe until they notice, so nobody reads it to its end.
        if self.process.stdout is not None:
            self.process.stdout.close()
        for own_end in self.sockets:
            # Not closed: a thread that waits on the descriptor would go on waiting, and its number may be used again.
            with suppress(OSError):
                own_end.shutdown(socket.SHUT_RDWR)


_starting = threading.Lock()
_pool: _WorkerPool | None = None


def _ask_worker(gold: str, answer: str) -> bool | None:
    """Whether math-verify takes the answer for the gold, None when it was stopped. Starts the process if need be."""
    global _pool
    for _ in range(2):
        with _starting:
            if _pool is None or _pool.process.poll() is not None:
                _pool = _WorkerPool()
            pool = _pool
        with suppress(OSError):
            # It fails if somebody killed the process or interrupted another thread, whatever the answer is: once more.
            return pool.ask(gold, answer)
    raise CotreeError("the math verifier died twice; is there enough memory?")


def _forget_pool() -> None:
    """Give a forked child its own pool: it must not use its parent's sockets."""
    global _starting, _pool
    _starting = threading.Lock()
    for own_end in _pool.sockets if _pool else ():
        own_end.close()
    _pool = None


os.register_at_fork(after_in_child=_forget_pool)
