r"""Whether a mathematical answer equals the gold one: math-verify's word, from processes that can be killed.

Invariants: a comparison costs at most `math_worker.SECONDS` and never the run, whatever the answer is; one that was
stopped is wrong, with a detail that says so (an answer was there, and nobody would accept it). Workers are `python -m`
subprocesses that start when they are first needed, so this works in threads, notebooks and scripts from stdin. Answers
that are the gold text, or another plain integer, are decided here; the library says the same about them.
"""

from __future__ import annotations

import atexit
import json
import os
import queue
import re
import selectors
import subprocess
import sys
import time
from functools import lru_cache
from pathlib import Path

import cotree
from cotree.errors import CotreeError
from cotree.tasks.math_worker import BYTES, SECONDS

# Golds have up to a hundred characters; what is longer than this is a loop, not an answer.
_LONGEST = 1000
_START_SECONDS = 120.0
# The worker keeps the limit itself; one that does not is killed.
_GRACE = 2.0
_INTEGER = re.compile(r"-?[1-9][0-9]{0,11}|0")
_BASED = re.compile(r"([0-9A-F]+)_\{?([0-9]+)\}?")


@lru_cache(1 << 14)
def compare(gold: str, answer: str) -> tuple[bool, str]:
    """Whether the answer is right, and why it was not checked where it was not; at most `SECONDS` on a free worker.

    Raises:
        CotreeError: no worker can be started.
    """
    gold, answer = _tidy(gold), _tidy(answer)
    if answer == gold:
        return True, ""
    if _INTEGER.fullmatch(gold) and _INTEGER.fullmatch(answer):
        return False, ""
    if len(answer) > _LONGEST:
        return False, f"not checked: longer than {_LONGEST} characters"
    based = _BASED.fullmatch(gold), _BASED.fullmatch(answer)
    if based[0] and based[1]:
        # The library drops the base.
        return based[0].groups() == based[1].groups(), ""
    return _pool.compare(gold, answer)


def _tidy(text: str) -> str:
    """Without the dollars around it and the dot after it."""
    return text.strip().strip("$").strip().removesuffix(".").strip()


class _Pool:
    """As many workers as comparisons run at once, up to one a core."""

    def __init__(self) -> None:
        self._free: queue.LifoQueue[_Worker | None] = queue.LifoQueue()
        # Under the workers that have started lie the places of those that have not.
        for _ in range(os.cpu_count() or 1):
            self._free.put(None)

    def compare(self, gold: str, answer: str) -> tuple[bool, str]:
        worker = self._free.get()
        try:
            if worker is None or worker.process.poll() is not None:
                worker = _Worker()
            return worker.compare(gold, answer)
        finally:
            self._free.put(worker)

    def close(self) -> None:
        while not self._free.empty():
            worker = self._free.get()
            if worker is not None:
                worker.kill()


class _Worker:
    """One `math_worker` process; ready when constructed."""

    def __init__(self) -> None:
        # The modules may be found through sys.path alone, and a file of the user's, say random.py, must not be found.
        path = os.pathsep.join([str(Path(cotree.__file__).parents[1]), *filter(None, sys.path)])
        command = [sys.executable, "-P", "-m", "cotree.tasks.math_worker"]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env=os.environ | {"PYTHONPATH": path},
        )
        if self._line(_START_SECONDS) != b"ready\n":
            self.kill()
            raise CotreeError(f"the math verifier does not start; see what `{' '.join(command)}` says")

    def compare(self, gold: str, answer: str) -> tuple[bool, str]:
        assert self.process.stdin is not None
        line = b""
        try:
            self.process.stdin.write(json.dumps({"gold": gold, "answer": answer}).encode() + b"\n")
            line = self._line(SECONDS + _GRACE)
        except BrokenPipeError:
            pass
        finally:
            # Interrupted half way, the next line would be this one's verdict.
            if not line.endswith(b"\n"):
                self.kill()
        equal = json.loads(line) if line.endswith(b"\n") else None
        return (
            equal is True,
            "" if equal is not None else f"not checked: stopped at {SECONDS:.0f} s or {BYTES >> 30} GiB",
        )

    def _line(self, seconds: float) -> bytes:
        """One line from the worker; what there is of it when it has died or the time is over."""
        assert self.process.stdout is not None
        line, deadline = b"", time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while not line.endswith(b"\n") and selector.select(max(0.0, deadline - time.monotonic())):
                part = os.read(self.process.stdout.fileno(), 4096)
                if not part:
                    break
                line += part
        return line

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


_pool = _Pool()


def _after_fork() -> None:
    """A forked child must not speak into its parent's pipes."""
    global _pool
    _pool = _Pool()


os.register_at_fork(after_in_child=_after_fork)
atexit.register(lambda: _pool.close())
