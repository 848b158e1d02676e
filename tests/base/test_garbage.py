"""The garbage collector is left alone for a while, and as it was afterwards."""

from __future__ import annotations

import gc

from cotree.base.garbage import infrequent_gc


class Cycle:
    def __init__(self) -> None:
        self.me = self


def collections() -> int:
    return sum(stats["collections"] for stats in gc.get_stats())


def test_cycles_are_collected_seldom_but_are_collected() -> None:
    before, frozen = gc.get_threshold(), gc.get_freeze_count()
    with infrequent_gc():
        started = collections()
        for _ in range(20_000):
            Cycle()
        assert collections() == started
        for _ in range(200_000):
            Cycle()
        assert collections() > started
        assert sum(isinstance(each, Cycle) for each in gc.get_objects()) < 150_000
        assert gc.get_freeze_count() > 0
    assert gc.get_threshold() == before
    assert (gc.get_freeze_count() > 0) == (frozen > 0)
