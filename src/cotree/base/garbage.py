"""Python's collector of garbage in cycles, run less often while a process makes and drops very many objects."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

# New objects before the youngest are looked through; CPython's own is 700, which trees of thoughts reach every moment.
_NEW_OBJECTS = 100_000


@contextmanager
def seldom_collected() -> Iterator[None]:
    """Look through new objects seldom, and not at all through those that are there now (libraries, questions).

    Half of the CPU time of growing small trees went into looking through these again and again. What is dropped
    meanwhile is still collected.
    """
    before, frozen = gc.get_threshold(), gc.get_freeze_count()
    gc.freeze()
    gc.set_threshold(_NEW_OBJECTS, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)
        if not frozen:  # else whoever froze some of it wants it to stay so
            gc.unfreeze()
