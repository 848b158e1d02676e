"""Which questions the benchmark of search beside sampling draws."""

from __future__ import annotations

import pytest
from benchmarks.worth import drawn
from tests.support.benchmark_data import benchmark_rows


def test_tuning_and_reported_questions_are_different_ones() -> None:
    dev, reported = drawn({"arithmetic": 8}, "dev", None), drawn({"arithmetic": 8}, "train", None)
    assert len(dev) == len(reported) == 8
    assert not {one.id for _, one in dev} & {one.id for _, one in reported}
    assert {one.family for _, one in drawn({"arithmetic": 8}, "dev", "sum")} == {"sum"}


@pytest.mark.parametrize(
    ("file", "task", "family"),
    [("ifeval.jsonl", "ifeval", None), ("blocksworld.jsonl.gz", "blocksworld", "3 blocks")],
)
def test_a_task_with_a_test_set_only_is_split_by_the_hash_of_its_ids(file: str, task: str, family: str | None) -> None:
    assert benchmark_rows(file)
    dev, reported = drawn({task: 16}, "dev", family), drawn({task: 16}, "train", family)
    assert dev and len(reported) == 16
    assert not {one.id for _, one in dev} & {one.id for _, one in reported}
    assert family is None or {one.family for _, one in dev + reported} == {family}
