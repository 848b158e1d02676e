r"""Compare mathematical answers by math-verify in processes that can be killed. Both ends of the protocol are here.

`compare` asks. The first call starts a server, a subprocess that loads math-verify once and forks a worker for each
socket that it gets (`socket.send_fds` on its standard input). A worker takes JSON lines, `[gold, answer]`, and answers
each with `true` or `false`. At the limit the kernel ends the worker, so that neither C code nor a number that fills the
memory can delay it: the asking side then reads the end of the stream, and the next worker is forked in milliseconds.

The server ends with the process that started it, and its workers with it. All of this works in threads, in notebooks
and in scripts from stdin, and a forked child of the asking process starts a server of its own.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import resource
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import cotree
from cotree.base.errors import CotreeError

LIMIT_SECONDS = 3.0
LIMIT_BYTES = 2 << 30


def compare(gold: str, answer: str) -> bool | None:
    """Whether math-verify takes an answer for the gold; None when the comparison was stopped at a limit.

    Raises:
        CotreeError: the server does not start, or dies twice.
    """
    for _ in range(2):
        with suppress(OSError):
            return _running_server().ask_worker(gold, answer)
        # Somebody killed the processes, perhaps not all of them yet, whatever the answer is: once more.
        time.sleep(0.1)
    raise CotreeError("the math verifier died twice; is there enough memory?")


class _Server:
    """The server process and the sockets to its workers, at most one per core; ready when constructed."""

    def __init__(self) -> None:
        # The subprocess must find the same packages, also those that are only on this process's sys.path.
        path = os.pathsep.join([str(Path(cotree.__file__).parents[1]), *filter(None, sys.path)])
        # -P: no file of the working directory, say a random.py, is imported instead of a library.
        command = [sys.executable, "-P", "-c", "from cotree.tasks.math_worker import serve; serve()"]
        self._control, server_end = socket.socketpair()
        with server_end:
            quiet, env = subprocess.DEVNULL, os.environ | {"PYTHONPATH": path}
            self.process = subprocess.Popen(command, stdin=server_end.fileno(), stdout=quiet, stderr=quiet, env=env)
        if not self._control.recv(1):
            raise CotreeError(f"the math verifier does not start; see what `{shlex.join(command)}` says")
        # The sockets that nobody waits on; None in the place of a worker that is still to be forked.
        self._idle: queue.LifoQueue[socket.socket | None] = queue.LifoQueue()
        for _ in range(os.cpu_count() or 1):
            self._idle.put(None)

    def ask_worker(self, gold: str, answer: str) -> bool | None:
        """Whether they are equal; None when the worker was stopped. OSError when it was lost with its server."""
        worker, reply = self._idle.get(), b""
        try:
            worker = worker or self._fork_worker()
            worker.sendall(json.dumps([gold, answer]).encode() + b"\n")
            # The worker sends its few bytes at once, so they arrive at once.
            reply = worker.recv(16)
        finally:
            # Without a reply the worker has ended, or this thread was interrupted and the reply may still come.
            if worker and not reply:
                worker.close()
            self._idle.put(worker if reply else None)
        if reply:
            return reply == b"true"
        with suppress(subprocess.TimeoutExpired):
            # A moment, since the server may be dying together with the worker.
            self.process.wait(0.1)
            raise ConnectionResetError
        return None

    def _fork_worker(self) -> socket.socket:
        """A socket to a new worker."""
        own_end, worker_end = socket.socketpair()
        with worker_end:
            socket.send_fds(self._control, [b"x"], [worker_end.fileno()])
        return own_end


_starting = threading.Lock()
_server: _Server | None = None


def _running_server() -> _Server:
    """The server of this process, started if there is none or it was killed."""
    global _server
    with _starting:
        if _server is None or _server.process.poll() is not None:
            _server = _Server()
        return _server


def _forget_server() -> None:
    """In a forked child: it must not use its parent's sockets, whose copies close with the object."""
    global _starting, _server
    _starting, _server = threading.Lock(), None


os.register_at_fork(after_in_child=_forget_server)


def serve() -> None:
    """Run the server: fork a worker for each socket that comes through standard input, until that is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Nobody waits for workers that have ended: the kernel takes them away.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    # Without a handler the alarm ends a worker, whatever it is doing.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    # A power tower or a factorial asks for all the memory there is.
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT_BYTES, LIMIT_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    logging.disable(logging.CRITICAL)
    # This loads the libraries, which all workers then have.
    math_equal("1", r"\frac{2}{2}")
    control = socket.socket(fileno=sys.stdin.fileno())
    control.sendall(b"1")
    while descriptors := socket.recv_fds(control, 1, 1)[1]:
        with socket.socket(fileno=descriptors[0]) as requests:
            if os.fork() == 0:
                # The asking side must see the server's end, even while workers are still there.
                control.close()
                try:
                    _work(requests)
                finally:
                    os._exit(0)


def _work(requests: socket.socket) -> None:
    """Answer the lines of one socket until its other end is closed; ends the process at a limit."""
    for line in requests.makefile():
        signal.setitimer(signal.ITIMER_REAL, LIMIT_SECONDS)
        equal = math_equal(*json.loads(line))
        signal.setitimer(signal.ITIMER_REAL, 0)
        requests.sendall(json.dumps(equal).encode())


def math_equal(gold: str, answer: str) -> bool:
    """Whether math-verify takes the answer for the gold; False where it fails on either."""
    from math_verify import verify

    try:
        # Its own time limits raise inside sympy and may leave half-made objects in sympy's caches: off.
        return bool(verify(_parse_gold(gold), _parse(answer), timeout_seconds=None))
    except (Exception, RecursionError, MemoryError):  # noqa: BLE001 - sympy raises anything
        return False


def _parse(text: str) -> list[Any]:
    from math_verify import parse

    return list(parse(f"${text}$", parsing_timeout=None))


# Many answers to one question come one after another.
_parse_gold = lru_cache(256)(_parse)
