"""Run Python's cyclic garbage collector less often while a process creates very many objects."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

# Threshold of generation 0; CPython's default of 700 is reached constantly while trees grow.
_NEW_OBJECTS = 100_000


@contextmanager
def infrequent_gc() -> Iterator[None]:
    """Raise the collector's threshold and freeze existing objects (libraries, questions) while the block runs.

    Otherwise half of the CPU time of growing small trees goes into scanning these. New garbage is still collected.
    """
    before, frozen = gc.get_threshold(), gc.get_freeze_count()
    gc.freeze()
    gc.set_threshold(_NEW_OBJECTS, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)
        if not frozen:  # keep what the caller froze
            gc.unfreeze()
