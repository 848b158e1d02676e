"""One process that compares mathematical answers: `python -m cotree.tasks.math_worker`, spoken to by `math_verdicts`.

Invariant: one JSON line in, `{"gold": ..., "answer": ...}`, one line out: `true`, `false`, or `null` for a comparison
that was stopped. A forked child compares, and the kernel ends it at the limit, so that neither C code nor a number that
fills the memory can hold it up; the next child is there in milliseconds, with the libraries loaded.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import sys
from functools import lru_cache
from typing import Any

SECONDS = 3.0
BYTES = 2 << 30


def main() -> None:
    """Keep a comparing child until the input ends. The first line out, `ready`, says that the libraries are loaded."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A power tower or a factorial asks for all the memory there is.
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    logging.disable(logging.CRITICAL)
    # What a library prints must not look like a verdict.
    out = os.dup(1)
    os.dup2(2, 1)
    equal("1", r"\frac{2}{2}")
    os.write(out, b"ready\n")
    while (child := os.fork()) != 0:
        _, status = os.waitpid(child, 0)
        if status == 0:
            return
        os.write(out, b"null\n")
    _serve(out)
    os._exit(0)


def _serve(out: int) -> None:
    for line in sys.stdin:
        request = json.loads(line)
        # SIGALRM, unhandled, ends the process in whatever it is doing.
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        result = equal(request["gold"], request["answer"])
        signal.setitimer(signal.ITIMER_REAL, 0)
        os.write(out, json.dumps(result).encode() + b"\n")


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
    main()
