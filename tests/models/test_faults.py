"""Every fault that the retry rules name, on a real server over loopback: survived, or one line; never a completion."""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from tests.support.asking import client, raw_server, request, texts, until
from tests.support.fake_server import FakeServer, Fault, Kind

from cotree.base.errors import CotreeError
from cotree.models.client import Choice, Counters
from cotree.models.llama_cpp import _warm_up


@pytest.mark.parametrize("kind", ["429", "500", "reset", "half", "garbage", "empty", "fewer"])
async def test_a_burst_of_faults_is_survived(kind: Kind) -> None:
    async with FakeServer() as calm:
        expected = await texts(calm.url, request())
    async with FakeServer(faults=dict.fromkeys(range(4), kind)) as server, client(server.url) as c:
        done = await c.complete(request())
        assert tuple(choice.text for choice in done.choices) == expected[0]
        assert (server.calls, len(server.answered)) == (5, 1)
        assert c.counters.requests == 5
        counted = 4 if kind in ("reset", "half", "garbage", "empty", "fewer") else 0
        assert c.counters.prompt_tokens == (1 + counted) * done.prompt_tokens
        assert all(body == server.requests[0] for body in server.requests)


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("429", r"HTTP 429 \(slow down\)"),
        ("500", r"HTTP 500 \(CUDA out of memory\)"),
        ("reset", "the connection broke"),
        ("half", "the connection broke"),
        ("hang", "no answer within"),
        ("garbage", "not JSON"),
        ("empty", "0 choices came back for n=2"),
        ("fewer", "1 choices came back for n=2"),
    ],
)
async def test_a_lasting_fault_spends_the_budget_and_says_what_to_do(kind: Kind, says: str) -> None:
    limit = 0.05 if kind == "hang" else 60.0
    async with (
        FakeServer(fault_rate=1.0, fault_kinds=[kind]) as server,
        client(server.url, attempts=3, timeout=limit, seconds_per_token=0.0) as c,
    ):
        with pytest.raises(CotreeError, match=says) as failed:
            await c.complete(request())
    line = str(failed.value)
    assert server.calls == 3
    assert "\n" not in line
    for part in ("`thinker`", "(fake)", server.url, "3 attempts", "re-run the same command to resume"):
        assert part in line
    assert type(failed.value) is CotreeError


async def test_a_lasting_fault_is_told_at_once_and_not_with_every_repetition(caplog: pytest.LogCaptureFixture) -> None:
    told: list[str] = []
    async with FakeServer(faults=dict.fromkeys(range(6), "500")) as server:
        async with client(server.url, on_problem=told.append) as c:
            await asyncio.gather(*(c.complete(request(seed=seed)) for seed in range(3)))
            c._warned -= 60.0  # a minute later
            server.faults[server.calls] = "500"
            await c.complete(request())
        line = f"{c}: HTTP 500 (CUDA out of memory); the request is repeated for 300 s at most"
        assert told == [line, line]
        server.faults[server.calls] = "500"
        async with client(server.url) as c:
            await c.complete(request())
        assert caplog.messages == [line]


async def test_refused_connections_end_in_one_line() -> None:
    async with FakeServer() as server:
        pass
    async with client(server.url, attempts=4) as c:
        with pytest.raises(CotreeError, match=r"cannot connect .*4 attempts"):
            await c.complete(request())
        assert (c.counters.requests, c.counters.prompt_tokens) == (4, 0)


async def test_a_server_that_goes_and_comes_back_loses_nothing() -> None:
    async with FakeServer(latency=0.02) as server:
        wanted = [request(f"q{i}") for i in range(40)]
        expected = await texts(server.url, *wanted)
        before = server.calls
        async with client(server.url, max_in_flight=4, attempts=100, backoff=0.05) as c:
            work = asyncio.gather(*map(c.complete, wanted))
            await asyncio.sleep(0.08)
            await server.stop()
            await asyncio.sleep(0.3)
            await server.start()
            done = await work
        assert [tuple(choice.text for choice in d.choices) for d in done] == expected
        assert c.counters.requests > 40
        assert len(server.answered) - before >= 40


@pytest.mark.parametrize(
    "gone", [pytest.param(2.0, id="two seconds"), pytest.param(60.0, id="a minute", marks=pytest.mark.slow)]
)
async def test_the_usual_budget_outlasts_a_server_that_is_gone(gone: float) -> None:
    # Only the first waits are shortened, and only in the small form.
    changes = {"backoff": 0.5 if gone > 30 else 0.02}
    async with FakeServer() as server:
        wanted = [request(f"q{i}") for i in range(20)]
        expected = await texts(server.url, *wanted)
        await server.stop()
        async with client(server.url, max_in_flight=4, **changes) as c:
            work = asyncio.gather(*map(c.complete, wanted))
            await asyncio.sleep(gone)
            assert not work.done()
            await server.start()
            done = await work
    assert [tuple(choice.text for choice in d.choices) for d in done] == expected
    assert c.counters.prompt_tokens == sum(d.prompt_tokens for d in done)


async def test_endless_repetition_comes_back_as_cut_by_length() -> None:
    async with FakeServer(reply=lambda p, s, i: " again" * 10_000) as server, client(server.url) as c:
        done = await c.complete(request(max_tokens=50, stop=("\n",)))
    assert done.choices == (Choice(" again" * 50, "length", 50),) * 2


@pytest.mark.parametrize("how", ["timeout", "reset", "half", "garbage", "cancelled"])
async def test_the_prompt_of_an_abandoned_attempt_is_counted(how: str) -> None:
    kinds: dict[str, Kind] = {"timeout": "hang", "cancelled": "hang", "reset": "reset", "half": "half"}
    async with (
        FakeServer(faults={0: kinds.get(how, "garbage")}) as server,
        client(server.url, timeout=0.1 if how == "timeout" else 60.0, seconds_per_token=0.0) as c,
    ):
        if how == "cancelled":
            task = asyncio.create_task(c.complete(request("five words of a prompt")))
            await until(lambda: server.in_flight == 1)
            task.cancel()
            await asyncio.wait([task])
        done = await c.complete(request("five words of a prompt"))
        assert c.counters == Counters(2, 10, 0, done.completion_tokens, 0 if how == "cancelled" else 1)


async def test_refused_attempts_cost_no_tokens() -> None:
    async with FakeServer(faults={0: "429", 1: "500"}) as server, client(server.url) as c:
        done = await c.complete(request("three words here"))
        assert c.counters == Counters(3, 3, 0, done.completion_tokens, 2)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
async def test_a_refused_request_is_not_repeated(status: int) -> None:
    calls = []

    async def answer(_: web.Request) -> web.Response:
        calls.append(1)
        return web.json_response({"error": {"message": "\x1b[31mtoo\nlong " + "x" * 900}}, status=status)

    async with raw_server(answer) as url, client(url) as c:
        with pytest.raises(CotreeError, match=rf"HTTP {status} \(\[31mtoo long x+\)") as failed:
            await c.complete(request())
    assert len(calls) == 1
    assert 200 < str(failed.value).count("x") <= 300
    assert str(failed.value).isprintable()


async def test_redirects_are_not_followed() -> None:
    async def answer(_: web.Request) -> web.Response:
        raise web.HTTPFound("/v1/elsewhere")

    async with raw_server(answer) as url, client(url) as c:
        with pytest.raises(CotreeError, match="HTTP 302"):
            await c.complete(request())


@pytest.mark.parametrize("form", ["seconds", "date"])
async def test_retry_after_is_honoured(form: str) -> None:
    started = time.monotonic()
    # Dates have whole seconds: two ahead is at least one.
    asked = 0.4 if form == "seconds" else format_datetime(datetime.now(UTC) + timedelta(seconds=2), usegmt=True)
    async with FakeServer(faults={0: Fault("429", asked)}) as server, client(server.url) as c:
        await c.complete(request())
    assert time.monotonic() - started >= (0.4 if form == "seconds" else 0.9)


async def test_a_wait_beyond_the_budget_is_not_begun() -> None:
    async with FakeServer(faults={0: Fault("429", 3600)}) as server, client(server.url, patience=30) as c:
        with pytest.raises(CotreeError, match=r"asks to wait 3600 s \(1 attempt\)"):
            await asyncio.wait_for(c.complete(request()), 5)


async def test_requests_that_fail_together_do_not_come_back_together() -> None:
    arrivals: list[float] = []

    async def answer(_: web.Request) -> web.Response:
        arrivals.append(time.monotonic())
        return web.json_response({}, status=503)

    async with raw_server(answer) as url, client(url, max_in_flight=30, attempts=2, backoff=0.4) as c:
        await asyncio.gather(*(c.complete(request(f"q{i}")) for i in range(30)), return_exceptions=True)
    first, second = arrivals[:30], arrivals[30:]
    assert len(second) == 30
    assert max(second) - min(first) < 3
    assert max(second) - min(second) > 0.2 + max(first) - min(first)


async def test_an_unreadable_retry_after_is_ignored() -> None:
    values = ["soon", "nan", "-5", "", "Mon, 01 Jan 99999999999999999999 00:00:00 GMT"]
    faults = {number: Fault("429", value) for number, value in enumerate(values)}
    async with FakeServer(faults=faults) as server, client(server.url) as c:
        await asyncio.wait_for(c.complete(request()), 5)
        assert c.counters.requests == len(values) + 1


async def test_patience_counts_from_the_first_failure() -> None:
    faults = dict.fromkeys(range(100), Fault("500", 0.1))
    async with FakeServer(faults=faults) as server, client(server.url, patience=0.35, backoff=0.001) as c:
        with pytest.raises(CotreeError, match=r"HTTP 500.*, asks to wait 0.1 s \(\d attempts\)"):
            await c.complete(request())
        assert 2 <= server.calls <= 4


async def test_the_timeout_grows_with_the_tokens_asked_for() -> None:
    pace: dict[str, Any] = {"timeout": 0.05, "seconds_per_token": 0.01, "attempts": 1}
    async with FakeServer(latency=0.3) as server, client(server.url, **pace) as c:
        for short in (request(max_tokens=5, n=2), request(max_tokens=10, n=1)):
            with pytest.raises(CotreeError, match="no answer within"):
                await c.complete(short)
        await c.complete(request(max_tokens=10, n=30))
        await c.complete(request(max_tokens=300, n=1))
        assert c.counters.requests == 4


async def test_the_engine_in_this_process_is_not_asked_through_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    asked = []

    async def complete(request: web.Request) -> web.Response:
        asked.append(await request.json())
        return web.json_response({})

    app = web.Application()
    app.router.add_post("/completion", complete)
    async with TestServer(app) as server:
        await asyncio.to_thread(_warm_up, f"http://127.0.0.1:{server.port}")
    assert len(asked) == 1
