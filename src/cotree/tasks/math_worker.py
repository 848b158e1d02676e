r"""Compare mathematical answers by math-verify in processes that can be killed. Both ends of the protocol are here.

`compare` asks. The first call starts a server, a subprocess that loads math-verify once and forks a worker for each
socket that it gets (`socket.send_fds` on its standard input). A worker takes JSON lines, `[gold, answer]`, and answers
each with `true` or `false`. At a limit the kernel ends the worker, so that neither C code nor a number that fills the
memory can delay it: the asking side then reads the end of the stream, and the next worker is forked in milliseconds.
The limit is CPU time, so a verdict does not depend on what else the machine does; a long wall time stands behind it.

The server ends with the process that started it, and its workers with it. All of this works in threads, in notebooks
and in scripts from stdin, and a forked child of the asking process starts a server of its own.
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
        for _ in range(usable_cores()):
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
        own_end.settimeout(WALL_SECONDS + 10)  # of a worker that is not even ended at its limit
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
    # Without a handler the timers' signals end a worker, whatever it is doing.
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
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
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        signal.setitimer(signal.ITIMER_REAL, WALL_SECONDS)
        equal = math_equal(*json.loads(line))
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        requests.sendall(json.dumps(equal).encode())


def math_equal(gold: str, answer: str) -> bool:
    """Whether a normalized answer equals the gold one: for math-verify, and to the last digit. False where it fails.

    Raises:
        MemoryError: the comparison needs more than `LIMIT_BYTES`.
    """
    both_ways = (gold, answer), (answer, gold)
    if any(one.startswith("(") and other.startswith(r"\{") and "(" not in other for one, other in both_ways):
        return False  # a set of numbers is no tuple, interval or point
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
    """Whether math-verify takes one reading of the answer for one of the gold, and their digits are equal.

    places: after the decimal point, where the gold is an approximation.
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
    """A list of inequalities as the set where all hold, x >= 0 and x < 9, or else any, x < 1 or x > 2; and |x| < 1.

    Anything else as it is.
    """
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
    """Whether two expressions without variables, which math-verify compares in 15 digits, are equal in 20, or to the
    gold's decimal places where it is an approximation; True for anything else."""
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
    """The ways to read an answer, as sympy has it; its `i` is the imaginary unit."""
    from math_verify import parse
    from sympy import Expr, I

    found = parse(f"${_OR.sub(', ', text)}$", parsing_timeout=None)
    return [
        each.subs({symbol: I for symbol in each.free_symbols if symbol.name == "i"})
        if isinstance(each, Expr)
        else _inequalities_as_set(each)
        for each in found
    ]


# Many answers to one question come one after another.
_parse_gold = lru_cache(256)(_parse)
