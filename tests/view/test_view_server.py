"""The viewer's server over real HTTP: what the page reads of a run, annotations, and who may ask."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from tests.report.conftest import RECIPE, make_run
from tests.support.trees import random_tree

from cotree.base.run_folder import RunFolder
from cotree.experiment.recipe import build_recipe
from cotree.experiment.run import nodes_of
from cotree.search.store import TreeStore
from cotree.view.server import Viewer

APPLES = "a" * 16
HOSTILE = "<script>alert(1)</script>\u202e\x1b[2J $\\frac{1$ 日本 "
NODES = nodes_of(build_recipe(RECIPE))
ANNA: dict[str, Any] = {"node": "train", "tree": APPLES, "leaf": 8, "annotator": "anna", "verdict": "accept"}


@contextlib.asynccontextmanager
async def viewed(run: RunFolder, **options: Any) -> AsyncIterator[aiohttp.ClientSession]:
    """A viewer of a run, and a session with its address."""
    runner = web.AppRunner(Viewer(run, NODES, **options).app(), access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    jar = aiohttp.CookieJar(unsafe=True)
    try:
        async with aiohttp.ClientSession(f"http://127.0.0.1:{runner.addresses[0][1]}", cookie_jar=jar) as session:
            yield session
    finally:
        await runner.cleanup()


async def get(session: aiohttp.ClientSession, path: str, **query: Any) -> Any:
    async with session.get(f"/api/{path}", params=query) as reply:
        assert reply.status == 200, await reply.text()
        return await reply.json()


async def change(session: aiohttp.ClientSession, method: str = "POST", **body: Any) -> tuple[int, Any]:
    async with session.request(method, "/api/annotations", json=body) as reply:
        return reply.status, await reply.json()


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run that the tests only read."""
    return make_run(tmp_path_factory.mktemp("view") / "laptop", hostile=HOSTILE)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return make_run(tmp_path / "laptop")


async def test_a_run_its_trees_and_their_chains_are_read(shown: RunFolder) -> None:
    async with viewed(shown, read_only=True) as session:
        about = await get(session, "run")
        assert (about["name"], about["read_only"], about["annotator"]) == ("laptop", True, None)
        nodes = {node["name"]: node for node in about["nodes"]}
        assert nodes["students/dpo"]["reads"] == ["students/sft", "datasets/pairs"]
        assert nodes["trees/train"]["state"] == "done" and nodes["trees/train"]["seconds"] == 251.3
        assert {each["node"]: each["questions"] for each in about["trees"]} == {"sampled": 0, "train": 7}
        test, _ = about["evaluations"]
        assert test["name"] == "test" and "dpo" in test["models"] and test["tasks"] == ["arithmetic", "letters"]
        assert {"name": "dpo", "parent": "sft", "method": "dpo"} in about["students"]

        page = await get(session, "trees/train", sort="hard", limit=3)
        assert (page["total"], page["tasks"]) == (7, {"arithmetic": 4, "letters": 3})
        shares = [row["correct"] / (row["correct"] + row["wrong"] + row["no_answer"]) for row in page["rows"]]
        assert shares == sorted(shares) and len(shares) == 3
        found = await get(session, "trees/train", q="apples bags", desc=1, verdicts="mixed", reflected="helped")
        assert [row["tree"] for row in found["rows"]] == [APPLES]
        assert (await get(session, "trees/train", annotated=1))["total"] == 0

        tree = await get(session, f"trees/train/{APPLES}")
        thoughts = [dict(zip(tree["columns"], values, strict=True)) for values in tree["thoughts"]]
        assert [each["id"] for each in thoughts] == list(range(len(thoughts)))
        assert all(each["parent"] < each["id"] for each in thoughts[1:])
        assert any(HOSTILE in each["text"] for each in thoughts), "text comes as it is"
        assert tree["chosen"]["datasets/sft"] == [{"leaf": 8, "as": "chain", "other": None, "row": 0}]
        pair = tree["chosen"]["datasets/pairs"]
        assert [(use["as"], use["leaf"], use["other"]) for use in pair] == [("chosen", 3, 5), ("rejected", 5, 3)]
        first = thoughts[2]
        assert first["ucb"] == pytest.approx(first["value"] / first["visits"] + (1.3862944 / first["visits"]) ** 0.5)

        curve = next(each for each in await get(session, "students") if each["name"] == "dpo")["curve"]
        assert [line["step"] for line in curve] == list(range(1, 57))
        first_table = (await get(session, "tables"))[0]
        assert all(len(row) == len(first_table["header"]) for row in first_table["rows"])


@pytest.mark.parametrize(
    ("path", "status", "words"),
    [
        ("trees/tain", 404, "did you mean `train`"),
        ("trees/train/absent", 404, "has no tree absent"),
        ("trees/train?sort=size", 400, "sort: Input should be"),
        ("trees/train?order=1", 400, "order: Extra inputs"),
        ("trees/train?limit=many", 400, "limit: "),
        ("trees/train?offset=-1", 400, "offset: "),
        (f"trees/train?offset={2**63}", 400, "offset: "),
        (f"trees/train?min_depth={2**63}", 400, "min_depth: "),
        ("trees/..%2F..%2Fdatasets", 404, "has no trees"),
        ("replies?evaluation=test&model=absent", 404, "has no model `absent`"),
        ("nothing", 404, ""),
    ],
)
async def test_a_wrong_request_is_one_line(shown: RunFolder, path: str, status: int, words: str) -> None:
    async with viewed(shown) as session, session.get(f"/api/{path}") as reply:
        text = await reply.text()
        assert reply.status == status and words in text and "Traceback" not in text


async def test_annotations_are_kept_and_no_save_is_lost(run: RunFolder) -> None:
    async with viewed(run, annotator="anna") as session, viewed(run) as other:
        assert await change(session, **ANNA, note="naïve 日本") == (200, {"version": 1})
        status, conflict = await change(other, **ANNA | {"verdict": "reject"})
        assert status == 409 and conflict["annotation"]["note"] == "naïve 日本"
        assert (await change(other, **ANNA | {"verdict": "reject", "seen": 1}))[1] == {"version": 2}
        fixed = {"annotator": "ben", "verdict": "fix", "text": "3 * 6 + 14 = 32. The answer is: \\boxed{32}"}
        assert (await change(session, **ANNA | fixed))[0] == 200
        tree = await get(other, f"trees/train/{APPLES}")
        assert [(each["annotator"], each["verdict"]) for each in tree["annotations"]] == [
            ("anna", "reject"),
            ("ben", "fix"),
        ]
        found = await get(session, "annotations", node="train")
        assert found["agreement"] == {"pairs": 1, "equal": 0, "kappa": 0.0}
        page = await get(session, "trees/train", sort="hard")
        assert [row["annotated"] for row in page["rows"]] == [0] * 6 + [1]
        assert (await get(session, "trees/train", annotated=1))["rows"][0]["tree"] == APPLES
        gone = {key: ANNA[key] for key in ("node", "tree", "leaf", "annotator")}
        assert (await change(session, "DELETE", **gone, seen=2))[0] == 200
        assert [row["annotator"] for row in (await get(session, "annotations"))["rows"]] == ["ben"]


async def test_many_annotators_at_once_lose_nothing(run: RunFolder) -> None:
    async with viewed(run) as session, viewed(run) as other:
        bodies = [ANNA | {"annotator": f"a{n}", "verdict": ["accept", "reject"][n % 2]} for n in range(24)]
        replies = await asyncio.gather(*(change([session, other][n % 3 % 2], **body) for n, body in enumerate(bodies)))
        assert sorted(reply["version"] for _, reply in replies) == list(range(1, 25))
        found = await get(session, "annotations")
        assert {(row["annotator"], row["verdict"]) for row in found["rows"]} == {
            (body["annotator"], body["verdict"]) for body in bodies
        }


@pytest.mark.parametrize(
    ("wrong", "status", "words"),
    [
        ({"leaf": 1}, 404, "no chain of tree"),
        ({"leaf": 999}, 404, "no chain of tree"),
        ({"tree": "absent"}, 404, "has no tree absent"),
        ({"annotator": " "}, 400, "annotator's name"),
        ({"verdict": "maybe"}, 400, "an annotation is accept, reject, fix"),
        ({"verdict": "fix"}, 400, "a corrected text goes with `fix`"),
        ({"text": "x"}, 400, "a corrected text goes with `fix`"),
        ({"note": "\ud800"}, 400, "Invalid JSON"),
        ({"more": 1}, 400, "more: Extra inputs"),
    ],
)
async def test_a_wrong_annotation_is_refused(run: RunFolder, wrong: dict[str, Any], status: int, words: str) -> None:
    async with viewed(run) as session:
        answered, reply = await change(session, **ANNA | wrong)
        assert answered == status and words in reply["error"]
        async with session.post("/api/annotations", data="{}", headers={"Content-Type": "text/plain"}) as form:
            assert form.status == 400, "a form of another page sends no JSON"
    assert not (run.path / "annotations.db").exists()


async def test_read_only_takes_nothing(run: RunFolder) -> None:
    async with viewed(run, read_only=True) as session:
        status, reply = await change(session, **ANNA)
        assert status == 403 and "--read-only" in reply["error"]
    assert not (run.path / "annotations.db").exists()


@pytest.mark.parametrize(
    "headers", [{"Host": "evil.example"}, {"Origin": "http://evil.example"}, {"Origin": "null"}, {"Host": ""}]
)
async def test_no_other_page_reaches_it(shown: RunFolder, headers: dict[str, str]) -> None:
    async with viewed(shown) as session:
        for path in ("/", "/api/run", "/static/index.html"):
            async with session.get(path, headers=headers) as reply:
                assert reply.status in (400, 403)
        async with session.post("/api/annotations", json=ANNA, headers=headers) as reply:
            assert reply.status in (400, 403)


async def test_a_tree_that_no_dataset_took_is_read(shown: RunFolder) -> None:
    async with viewed(shown) as session:
        found = await get(session, "trees/train/t00000004")
        assert found["chosen"] == {} and len(found["thoughts"]) == len(random_tree(4).nodes)


async def test_an_index_that_is_deleted_while_it_is_open_is_made_again(run: RunFolder) -> None:
    index = run.path / "trees" / "train" / "trees_index.db"
    async with viewed(run) as session:
        before = await get(session, "trees/train")
        for path in index.parent.glob("trees_index.db*"):
            path.unlink()
        assert await get(session, "trees/train") == before and index.is_file()


async def test_every_reply_forbids_scripts_of_others(shown: RunFolder) -> None:
    async with viewed(shown) as session:
        for path in ("/", "/static/index.html", "/api/run", "/api/nothing", "/api/trees/train?sort=x"):
            async with session.get(path) as reply:
                policy = reply.headers["Content-Security-Policy"]
                assert policy.startswith("default-src 'self';") and "unsafe" not in policy
                assert reply.headers["X-Content-Type-Options"] == "nosniff"
        async with session.get("/static/../server.py") as reply:
            assert reply.status == 404


async def test_beyond_loopback_a_token_is_needed_once(shown: RunFolder) -> None:
    viewer = Viewer(shown, NODES, host="0.0.0.0")
    assert (
        viewer.token
        and viewer.token != Viewer(shown, NODES, host="0.0.0.0").token
        and Viewer(shown, NODES).token is None
    )
    async with viewed(shown, host="0.0.0.0") as session:
        for query in ("", "?token=", "?token=wrong"):
            async with session.get(f"/api/run{query}") as reply:
                assert reply.status == 403 and "token" in (await reply.json())["error"]


async def test_the_token_becomes_a_cookie(shown: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COTREE_TOKEN", "s3cret")
    async with viewed(shown) as session:
        async with session.get("/?token=s3cret", allow_redirects=False) as reply:
            assert (reply.status, reply.headers["Location"]) == (303, "/")
            assert "HttpOnly" in reply.headers["Set-Cookie"] and "SameSite=Strict" in reply.headers["Set-Cookie"]
        assert (await get(session, "run"))["name"] == "laptop"


async def test_trees_that_come_while_it_is_watched_are_seen(run: RunFolder) -> None:
    store = run.node("trees/train").path / "trees.db"
    async with viewed(run) as session:
        seen = await get(session, "version", node="train")
        assert await get(session, "version", node="train") == seen
        with TreeStore(store) as growing:
            growing.put(replace(random_tree(77), question_id="new", task="letters"))
            now = await get(session, "version", node="train")
            assert now != seen
            assert (await get(session, "trees/train", task="letters"))["total"] == 4
        moved = store.rename(store.with_name("elsewhere.db"))
        with TreeStore(store) as another:  # a changed setting began a new store in its place
            another.put(random_tree(78))
        assert (await get(session, "trees/train"))["total"] == 1 and moved.exists()
        assert (await change(session, **ANNA | {"tree": "t00000078", "leaf": last_leaf()}))[0] == 200
        assert await get(session, "version", node="train") != now


def last_leaf() -> int:
    return max(each.node_id for each in random_tree(78).nodes if each.verdict)


def test_the_verb_serves_until_it_is_ended(shown: RunFolder) -> None:
    command = [sys.executable, "-m", "cotree.cli", "view", str(shown.path), "--no-browser", "--annotator", "anna"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"COLUMNS": "200"})
    assert process.stdout is not None
    line = process.stdout.readline()
    address = re.search(r"http://127\.0\.0\.1:\d+/", line)
    assert address, line

    async def ask() -> Any:
        async with aiohttp.ClientSession() as session, session.get(f"{address[0]}api/run") as reply:
            return await reply.json()

    assert asyncio.run(ask())["annotator"] == "anna"
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 0 and process.stdout.read().strip() == "closed"
