"""A fleet of servers with rate limits is used whole, and the loss of one costs little more than its share."""

from __future__ import annotations

import asyncio

import pytest
from benchmarks.fleet import compare


@pytest.mark.slow
@pytest.mark.timed
def test_eight_servers_are_seven_times_one_and_a_lost_one_costs_its_share() -> None:
    found = asyncio.run(compare(8, 40, seed=1))
    assert found["ratio_to_one"] >= 7.0
    assert found["loss_beyond_its_share"] < 0.15
