r"""Compare mathematical answers with math-verify in killable worker processes (client and server of the protocol).

`compare` is the client. The first call starts a server, a subprocess that imports math-verify once and forks a worker
for each socket that it gets (`socket.send_fds` on its standard input). A worker reads JSON lines, `[gold, answer]`, and
replies `true` or `false`. At a limit the kernel kills the worker, so that neither C code nor huge numbers can delay it:
the client reads the end of the stream, and a new worker is forked in milliseconds. The limit is CPU time, so verdicts
do not depend on machine load, plus a long wall-time limit.

The server ends with the process that started it, and the workers with the server. This works in threads, notebooks and
scripts from stdin; a forked child of the client starts its own server.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import re
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
from itertools import product
from pathlib import Path
from typing import Any

import cotree
from cotree.base.errors import CotreeError
from cotree.base.machine import usable_cores
from cotree.tasks.math_text import parse_number

CPU_SECONDS = 3.0
WALL_SECONDS = 120.0
LIMIT_BYTES = 2 << 30
_OR = re.compile(r"\\lor ?")
_EXACT_PLACES = 12


def compare(gold: str, answer: str) -> bool | None:
    """Whether math-verify judges an answer equal to the gold; None if the comparison was stopped at a limit.

    Raises:
        CotreeError: the server does not start, or dies twice.
    """
    for _ in range(2):
        with suppress(OSError):
            return _running_server().ask_worker(gold, answer)
        # The processes were killed from outside: retry once.
        time.sleep(0.1)
    raise CotreeError("the math verifier died twice; is there enough memory?")


class _Server:
    """The server process and the sockets to its workers, at most one per core; ready when constructed."""

    def __init__(self) -> None:
        # The subprocess must find the same packages, also those that are only on this process's sys.path.
        path = os.pathsep.join([str(Path(cotree.__file__).parents[1]), *filter(None, sys.path)])
        # -P: do not import files of the working directory, such as a random.py.
        command = [sys.executable, "-P", "-c", "from cotree.tasks.math_worker import serve; serve()"]
        self._control, server_end = socket.socketpair()
        with server_end:
            quiet, env = subprocess.DEVNULL, os.environ | {"PYTHONPATH": path}
            self.process = subprocess.Popen(command, stdin=server_end.fileno(), stdout=quiet, stderr=quiet, env=env)
        if not self._control.recv(1):
            raise CotreeError(f"the math verifier does not start; see what `{shlex.join(command)}` says")
        # Sockets of idle workers; None for a worker that is not forked yet.
        self._idle: queue.LifoQueue[socket.socket | None] = queue.LifoQueue()
        for _ in range(usable_cores()):
            self._idle.put(None)

    def ask_worker(self, gold: str, answer: str) -> bool | None:
        """Whether they are equal; None if the worker was stopped. OSError if the server died."""
        worker, reply = self._idle.get(), b""
        try:
            worker = worker or self._fork_worker()
            worker.sendall(json.dumps([gold, answer]).encode() + b"\n")
            # A reply is a few bytes, so one recv gets all of it.
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
        """Fork a worker; returns its socket."""
        own_end, worker_end = socket.socketpair()
        own_end.settimeout(WALL_SECONDS + 10)  # if even its limit does not end the worker
        with worker_end:
            socket.send_fds(self._control, [b"x"], [worker_end.fileno()])
        return own_end


_starting = threading.Lock()
_server: _Server | None = None


def _running_server() -> _Server:
    """The server of this process; starts it if there is none or it was killed."""
    global _server
    with _starting:
        if _server is None or _server.process.poll() is not None:
            _server = _Server()
        return _server


def _forget_server() -> None:
    """After a fork: drop the parent's server, so that the child does not use its sockets."""
    global _starting, _server
    _starting, _server = threading.Lock(), None


os.register_at_fork(after_in_child=_forget_server)


def serve() -> None:
    """Run the server: fork a worker for each socket received on standard input, until that is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Let the kernel reap finished workers.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    # Default signal handlers, so that the timers' signals kill a worker in any state.
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    # A power tower or a factorial could exhaust the memory.
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT_BYTES, LIMIT_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    logging.disable(logging.CRITICAL)
    # Import the libraries before forking.
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
    """Answer the lines of one socket until it is closed; the process dies at a limit."""
    for line in requests.makefile():
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        signal.setitimer(signal.ITIMER_REAL, WALL_SECONDS)
        equal = math_equal(*json.loads(line))
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        requests.sendall(json.dumps(equal).encode())


def math_equal(gold: str, answer: str) -> bool:
    """Whether a normalized answer equals the gold by math-verify and to the last digit. False if math-verify fails.

    Raises:
        MemoryError: the comparison needs more than `LIMIT_BYTES`.
    """
    both_ways = (gold, answer), (answer, gold)
    if any(one.startswith("(") and other.startswith(r"\{") and "(" not in other for one, other in both_ways):
        return False  # a set of numbers is not a tuple, interval or point
    number = parse_number(gold)
    places = number.places if number is not None and number.approximate else None
    try:
        pairs = list(product(_parse_gold(gold), _parse(answer)))
    except MemoryError:
        raise
    except (Exception, RecursionError):  # noqa: BLE001 - sympy raises anything
        return False
    return any(_equal_readings(one, other, places) for one, other in pairs)


def _equal_readings(gold: Any, answer: Any, places: int | None) -> bool:
    """Whether one parse of the answer equals one of the gold by math-verify, with equal digits.

    places: decimal places, if the gold is an approximation.
    """
    from math_verify import verify

    options = {"float_rounding": places or _EXACT_PLACES, "allow_set_relation_comp": True, "raise_on_error": True}
    try:
        # Its own time limits raise inside sympy and may leave half-made objects in sympy's caches: off.
        return bool(verify(gold, answer, timeout_seconds=None, **options)) and _equal_digits(gold, answer, places)
    except MemoryError:
        raise
    except (Exception, RecursionError):  # noqa: BLE001 - sympy raises anything
        return False


def _inequalities_as_set(answer: Any) -> Any:
    """Convert inequalities to a set: where all hold (x >= 0 and x < 9), or if none, where any holds (x < 1 or x > 2);
    also |x| < 1. Other values are returned unchanged."""
    from sympy import Abs, Eq, FiniteSet, Intersection, Union
    from sympy.core.relational import Relational

    def is_inequality(each: Any) -> bool:
        return isinstance(each, Relational) and not isinstance(each, Eq)

    if is_inequality(answer) and answer.has(Abs):
        return answer.as_set()
    if not (isinstance(answer, FiniteSet) and answer.args and all(map(is_inequality, answer.args))):
        return answer
    sets = [each.as_set() for each in answer.args]
    return Intersection(*sets) or Union(*sets)


def _equal_digits(gold: Any, answer: Any, places: int | None) -> bool:
    """Whether two constant expressions agree in 20 digits (math-verify compares 15), or to the decimal places of an
    approximate gold; True for anything else."""
    from sympy import Eq, Expr, Float, N

    gold, answer = (each.rhs if isinstance(each, Eq) and each.lhs.is_Symbol else each for each in (gold, answer))
    if not all(isinstance(each, Expr) and each.is_number for each in (gold, answer)):
        return True
    gold, answer = gold.doit(), answer.doit()
    if gold == answer or gold.is_infinite or answer.is_infinite:
        return bool(gold == answer)
    difference = abs(N(gold - answer, 30))
    if places is not None:
        return bool(difference <= 10**-places / 2)
    nearly = 1e-12 if gold.has(Float) or answer.has(Float) else 1e-20
    return bool(difference <= nearly * abs(N(gold, 30)))


def _parse(text: str) -> list[Any]:
    """Parse an answer to sympy expressions, all possible readings; `i` is the imaginary unit."""
    from math_verify import parse
    from sympy import Expr, I

    found = parse(f"${_OR.sub(', ', text)}$", parsing_timeout=None)
    return [
        each.subs({symbol: I for symbol in each.free_symbols if symbol.name == "i"})
        if isinstance(each, Expr)
        else _inequalities_as_set(each)
        for each in found
    ]


# Cached, because many answers to the same question follow each other.
_parse_gold = lru_cache(256)(_parse)
