"""The process that compares mathematical answers: `python -m cotree.tasks.math_worker FD...`, run by `math_verdicts`.

Each socket FD takes a JSON line, `[gold, answer]`, and answers with one: `true`, `false`, or `null` for a comparison
that was stopped. A forked child serves each socket. The kernel ends it at the limit, so that neither C code nor a
number that fills the memory can delay it; the next child is there in milliseconds, with the libraries loaded.
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

LIMIT_SECONDS = 3.0
LIMIT_BYTES = 2 << 30


def main(descriptors: list[int]) -> None:
    """Keep a child for each socket until all are closed. Prints the line `ready` once the libraries are loaded."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A power tower or a factorial asks for all the memory there is.
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT_BYTES, LIMIT_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    logging.disable(logging.CRITICAL)
    math_equal("1", r"\frac{2}{2}")
    print("ready", flush=True)
    sockets = [socket.socket(fileno=descriptor) for descriptor in descriptors]
    children = {_fork_child(served, sockets): served for served in sockets}
    while children:
        child, status = os.wait()
        served = children.pop(child)
        try:
            if status != 0:
                served.sendall(b"null\n")
                children[_fork_child(served, sockets)] = served
        except OSError:
            # The asking process has gone.
            continue


def _fork_child(served: socket.socket, sockets: list[socket.socket]) -> int:
    """Fork a child that serves one socket until the other side closes it; returns its process id."""
    child = os.fork()
    if child == 0:
        # The other sides see the end of a socket only when no process holds it any more.
        for other in sockets:
            if other is not served:
                other.close()
        _serve(served)
        os._exit(0)
    return child


def _serve(served: socket.socket) -> None:
    for line in served.makefile():
        # SIGALRM without a handler ends the process, whatever it is doing.
        signal.setitimer(signal.ITIMER_REAL, LIMIT_SECONDS)
        equal = math_equal(*json.loads(line))
        signal.setitimer(signal.ITIMER_REAL, 0)
        served.sendall(json.dumps(equal).encode() + b"\n")


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

if __name__ == "__main__":
    main([int(word) for word in sys.argv[1:]])
