"""Servers that fail, go, move and come back under a whole run: what is said, counted and asked again."""

from __future__ import annotations

import json
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
from tests.support.experiment import KeptOutput, begun, step_by_step
from tests.support.fake_server import FakeServerThread
from tests.support.knowing import knowing_reply

from cotree.base.run_folder import RunFolder
from cotree.eval.evaluate import evaluate_model
from cotree.experiment.recipe import build_recipe
from cotree.experiment.run import run
from cotree.models.client import Client


def asked(*servers: FakeServerThread) -> Counter[str]:
    return Counter(json.dumps(body, sort_keys=True) for server in servers for body in server.requests)


def test_a_server_that_goes_for_good_costs_no_answer_and_another_url_is_the_same_run(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cotree.models.endpoints.Client", partial(Client, takeover=0.1, backoff=0.01))
    with (
        FakeServerThread(chat_only=True, reply=knowing_reply, latency=0.02) as one,
        FakeServerThread(chat_only=True, reply=knowing_reply, latency=0.02) as two,
        FakeServerThread(chat_only=True, reply=knowing_reply) as alone,
    ):
        written = step_by_step(alone.url, student)
        begun(written | {"name": "alone"}, tmp_path, only=["trees"])
        written["models"]["far"]["url"] = [one.url, two.url]
        one.stop()
        output = KeptOutput()
        run(build_recipe(written), tmp_path, only=["trees"], output=output)
        (line,) = [line for line in output.lines if "in its place" in line]
        assert one.url in line and "cannot connect" in line
        # Each request is asked once, and is that of a run on one server.
        assert asked(two) == asked(alone)
        one.start()
        for url in (one.url, [two.url], [one.url, alone.url]):
            assert begun(written, tmp_path, ("models.far.url", url), only=["trees"]) == []
        assert one.calls == 0


def test_requests_that_were_sent_again_are_in_a_nodes_record(student: Path, tmp_path: Path) -> None:
    with FakeServerThread(chat_only=True, reply=knowing_reply, faults={1: "500", 3: "reset"}) as server:
        written = step_by_step(server.url, student)
        begun(written, tmp_path, only=["trees"])
        record = RunFolder(tmp_path / "steps").node("trees/train").record()
        assert record is not None
        assert (record.result["counts"]["repeats"], record.result["counts"]["misreported"]) == (2, 0)
    with FakeServerThread(faults={1: "500", 3: "reset"}) as server:
        output = KeptOutput()
        found = evaluate_model(server.url, ["letters"], chat=True, limit=6, out=tmp_path / "e", name="m", output=output)
    assert found.repeats == 2
    assert "m: 2 requests sent again after failures" in output.lines
    assert json.loads((tmp_path / "e" / "node.json").read_text())["result"]["repeats"] == 2
