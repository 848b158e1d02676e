"""A server that is added to the recipe of an interrupted run is used when it goes on, and nothing is asked twice."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.support.experiment import begun
from tests.support.fake_server import FakeServerThread
from tests.support.knowing import knowing_reply
from tests.support.search import content

from cotree.base.errors import CotreeError
from cotree.search.store import TreeStore


def written(urls: Sequence[str]) -> dict[str, Any]:
    far = {"url": list(urls), "model": "fake", "mode": "chat"}
    search = {"rollouts": 4, "patterns": ["plain"], "trees_in_flight": 4}
    train = {"questions": {"letters": 24}, "roles": {"thinker": "far"}, **search}
    return {"name": "more", "seed": 0, "models": {"far": far}, "trees": {"train": train}}


def answered(server: FakeServerThread) -> list[str]:
    return [json.dumps(body, sort_keys=True) for body in server.server.answered]


def trees(runs: Path) -> list[Any]:
    with TreeStore(runs / "more" / "trees" / "train" / "trees.db") as store:
        return content(store.trees())


def test_an_added_server_is_used_when_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    with (
        FakeServerThread(chat_only=True, reply=knowing_reply, faults={40: "400"}) as one,
        FakeServerThread(chat_only=True, reply=knowing_reply) as two,
    ):
        with pytest.raises(CotreeError, match="the prompt is longer than the context"):
            begun(written([one.url]), tmp_path)
        before = answered(one)
        assert len(before) >= 40
        assert begun(written([one.url, two.url]), tmp_path) == ["trees/train"]
        assert len(answered(two)) > 20
        asked = answered(one) + answered(two)
        # What was on its way when the run broke off was answered to nobody.
        repeated = len(asked) - len(set(asked))
        assert repeated <= 4 * 2
        assert begun(written([two.url]), tmp_path) == [], "servers are no part of what the trees are"
        assert begun(written([two.url]), tmp_path / "whole") == ["trees/train"]
    assert trees(tmp_path) == trees(tmp_path / "whole")
