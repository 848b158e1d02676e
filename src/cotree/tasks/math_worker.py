"""The process that compares mathematical answers: `python -m cotree.tasks.math_worker FD...`, run by `math_verdicts`.

Invariant: on each socket FD one JSON line in, `[gold, answer]`, and one line out: `true`, `false`, or `null` for a
comparison that was stopped. A forked child serves each socket, and the kernel ends it at the limit, so that neither C
code nor a number that fills the memory can hold it up; the next child is there in milliseconds, libraries loaded.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import socket
import sys
from functools import lru_cache
from typing import Any

SECONDS = 3.0
BYTES = 2 << 30


def main(descriptors: list[int]) -> None:
    """Keep a child for each socket until all are closed. A line `ready` says that the libraries are loaded."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A power tower or a factorial asks for all the memory there is.
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    logging.disable(logging.CRITICAL)
    equal("1", r"\frac{2}{2}")
    print("ready", flush=True)
    sockets = [socket.socket(fileno=descriptor) for descriptor in descriptors]
    children = {_fork(served, sockets): served for served in sockets}
    while children:
        child, status = os.wait()
        served = children.pop(child)
        try:
            if status != 0:
                served.sendall(b"null\n")
                children[_fork(served, sockets)] = served
        except OSError:
            # Whoever asked has gone.
            continue


def _fork(served: socket.socket, sockets: list[socket.socket]) -> int:
    child = os.fork()
    if child == 0:
        # A socket ends for its other side when nobody holds it any more.
        for other in sockets:
            if other is not served:
                other.close()
        _serve(served)
        os._exit(0)
    return child


def _serve(served: socket.socket) -> None:
    for line in served.makefile():
        # SIGALRM, unhandled, ends the process in whatever it is doing.
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        result = equal(*json.loads(line))
        signal.setitimer(signal.ITIMER_REAL, 0)
        served.sendall(json.dumps(result).encode() + b"\n")


def equal(gold: str, answer: str) -> bool:
    """Whether math-verify takes the answer for the gold; False where it fails on either."""
    from math_verify import verify

    try:
        # Its own time limits raise inside sympy and may leave half-made objects in sympy's caches: off.
        return bool(verify(_parsed_gold(gold), _parsed(answer), timeout_seconds=None))
    except (Exception, RecursionError, MemoryError):  # noqa: BLE001 - sympy raises anything
        return False


def _parsed(text: str) -> list[Any]:
    from math_verify import parse

    parsed: list[Any] = parse(f"${text}$", parsing_timeout=None)
    return parsed


# Many answers to one question come one after another.
_parsed_gold = lru_cache(256)(_parsed)

if __name__ == "__main__":
    main([int(word) for word in sys.argv[1:]])
