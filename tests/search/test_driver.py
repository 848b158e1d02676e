"""The driver against a real fake server: the same trees whatever the latency, the concurrency or a kill."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.support.fake_server import FakeServerThread, count_tokens

from cotree.experiment.recipe import Search, Writer
from cotree.models.client import Client
from cotree.models.endpoints import Endpoint
from cotree.search.driver import Grower
from cotree.search.growth import writers_of
from cotree.search.store import TreeStore
from cotree.tasks import task

SETTINGS = Search(rollouts=6, leaves_per_round=3, max_reflections=2, trees_in_flight=4)


THINKER = {"thinker": (Writer(model="fake"),)}


class PlainTemplate:
    """The least a tokenizer must do for prompts."""

    chat_template = "its own"
    bos_token = None

    def apply_chat_template(self, messages: list[dict[str, str]], **_: object) -> str:
        return "".join(f"[{m['role']}] {m['content']}\n" for m in messages) + "[assistant] "


def reply(prompt: str, seed: int, index: int) -> str:
    """Words for a thought; for an answer one of three numbers, so that both verdicts occur."""
    if prompt.endswith("{"):
        return str(1 + (seed + index) % 3)
    return f" step {(seed + 7 * index) % 11}"


def content(path: Path) -> list[tuple[object, ...]]:
    """The trees of a store without the seconds."""
    with sqlite3.connect(path) as db:
        trees = db.execute("SELECT * FROM trees ORDER BY tree_id").fetchall()
        columns = "tree_id, node_id, parent_id, type, text, prefix, model, depth, visits, value, verdict, answer"
        columns += ", tokens, seed"
        return trees + db.execute(f"SELECT {columns} FROM nodes ORDER BY tree_id, node_id").fetchall()


async def grow(url: str, path: Path, settings: Search = SETTINGS, questions: int = 8) -> tuple[int, int]:
    """Grow the trees of the letters task; returns (calls made, calls recalled)."""
    letters = task("letters")
    async with Client("fake", url, "fake", max_in_flight=64, count_tokens=count_tokens, backoff=0.01) as client:
        endpoint = Endpoint("fake", (client,), PlainTemplate(), "fake")
        with TreeStore(path) as store:
            grower = Grower(store, {"fake": endpoint}, THINKER, settings, seed=3)
            progress = await grower.grow_all([(letters, q) for q in letters.questions("train", questions)])
    return progress.calls, progress.recalled


@pytest.mark.parametrize("in_flight", [1, 8, 64])
def test_the_store_is_the_same_for_any_concurrency_and_latency(tmp_path: Path, in_flight: int) -> None:
    with FakeServerThread(reply=reply) as calm:
        asyncio.run(grow(calm.url, tmp_path / "serial.db", SETTINGS.model_copy(update={"trees_in_flight": 1})))
    with FakeServerThread(reply=reply, latency=(0.0, 0.03), fault_rate=0.1, fault_kinds=("500", "reset")) as stormy:
        settings = SETTINGS.model_copy(update={"trees_in_flight": in_flight})
        asyncio.run(grow(stormy.url, tmp_path / "other.db", settings))
    assert content(tmp_path / "serial.db") == content(tmp_path / "other.db")
    verdicts = {row[10] for row in content(tmp_path / "serial.db") if len(row) == 14}
    assert {"correct", "wrong"} <= verdicts


def test_a_second_run_calls_nothing_and_changes_nothing(tmp_path: Path) -> None:
    with FakeServerThread(reply=reply) as server:
        asyncio.run(grow(server.url, tmp_path / "t.db"))
        before = content(tmp_path / "t.db"), server.calls
        assert asyncio.run(grow(server.url, tmp_path / "t.db")) == (0, 0)
        assert (content(tmp_path / "t.db"), server.calls) == before


def test_a_changed_config_adds_trees_and_keeps_the_old(tmp_path: Path) -> None:
    with FakeServerThread(reply=reply) as server:
        asyncio.run(grow(server.url, tmp_path / "t.db"))
        before = content(tmp_path / "t.db")
        asyncio.run(grow(server.url, tmp_path / "t.db", SETTINGS.model_copy(update={"exploration": 0.5})))
        after = content(tmp_path / "t.db")
    assert len(after) > len(before)
    assert set(before) <= set(after)


def kill_and_resume(tmp_path: Path, kills: int) -> None:
    with FakeServerThread(reply=reply) as server:
        asyncio.run(grow(server.url, tmp_path / "whole.db"))
        needed = server.calls
    with FakeServerThread(reply=reply, latency=(0.01, 0.03)) as server:
        command = [sys.executable, __file__, server.url, str(tmp_path / "killed.db")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path])}
        for kill in range(kills):
            child = subprocess.Popen(command, env=environment)
            wanted, started = server.calls + 5 + 3 * kill, time.monotonic()
            while server.calls < wanted and child.poll() is None and time.monotonic() - started < 60:
                time.sleep(0.005)
            child.send_signal(signal.SIGKILL)
            child.wait()
        assert subprocess.run(command, env=environment, check=False).returncode == 0
        # A call in flight at a kill was not completed; there are at most 4 trees x 3 rollouts of those.
        assert server.calls <= needed + 12 * kills
    assert content(tmp_path / "whole.db") == content(tmp_path / "killed.db")


def test_kill_and_resume_give_the_undisturbed_store(tmp_path: Path) -> None:
    kill_and_resume(tmp_path, 3)


@pytest.mark.slow
def test_twenty_kills_give_the_undisturbed_store(tmp_path: Path) -> None:
    kill_and_resume(tmp_path, 20)


def test_no_completed_call_is_made_twice(tmp_path: Path) -> None:
    """The journal holds what a killed search had: emptying the trees alone makes the resume call nothing."""
    with FakeServerThread(reply=reply) as server:
        made, _ = asyncio.run(grow(server.url, tmp_path / "t.db"))
        before, calls = content(tmp_path / "t.db"), server.calls
        with sqlite3.connect(tmp_path / "t.db") as db:
            db.execute("DELETE FROM nodes")
            db.execute("DELETE FROM trees")
        assert asyncio.run(grow(server.url, tmp_path / "t.db")) == (0, made)
        assert (content(tmp_path / "t.db"), server.calls) == (before, calls)


def test_roles() -> None:
    roles = {role: (Writer(model=name),) for role, name in (("thinker", "a"), ("reflector", "b"), ("hypothesis", "c"))}
    kinds = ("thinking", "reflection", "double_check", "hypothesis")
    assert "".join(writers_of(kind, roles)[0].model for kind in kinds) == "abbc"
    assert writers_of("reflection", {"thinker": roles["thinker"]}) == roles["thinker"]


if __name__ == "__main__":
    asyncio.run(grow(sys.argv[1], Path(sys.argv[2])))
