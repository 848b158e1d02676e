"""The server that decodes with search, over real HTTP: OpenAI's protocol, its client, who may ask, and who leaves."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from tests.decode.test_strategies import poem, talk
from tests.support.asking import until
from tests.support.fake_server import FakeServer, FakeServerThread, count_tokens
from tests.support.search import PlainTemplate
from yarl import URL

from cotree.base.errors import UsageError
from cotree.base.progress import Output
from cotree.cli import main
from cotree.decode.answer import decode
from cotree.decode.server import Server, serve
from cotree.models.client import Client
from cotree.models.endpoints import Endpoint

HELLO = [{"role": "user", "content": "How many?"}]
MALFORMED = (
    b"GET\r\n\r\n",
    b"\x16\x03\x01\x00\xf8",  # TLS
    b"GET / HTTP/1.1\r\nContent-Length: x\r\n\r\n",
    b"GET / HTTP/1.1\r\nX: " + b"x" * 20_000 + b"\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n",
)
LINES = ("ends=line", "patterns=[plain]")
TOKEN = "s3cret-of-the-server"


@contextlib.asynccontextmanager
async def served(
    backend: FakeServer, *, chat_only: bool = False, overrides: tuple[str, ...] = (), **options: Any
) -> AsyncIterator[tuple[aiohttp.ClientSession, Server]]:
    """A server before a fake backend, and a session with its address."""
    rollouts, tokenizer = options.pop("rollouts", 6), None if chat_only else "its own"
    given = {"served": "one", "tokenizer": tokenizer, "rollouts": rollouts, "seed": 3, "boxed": True}
    async with Client("one", backend.url, "one", max_in_flight=64, count_tokens=count_tokens, backoff=0.01) as client:
        server = Server([backend.url], overrides=(*LINES, *overrides), **(given | options))
        server.endpoints = {"one": Endpoint("one", (client,), None if chat_only else PlainTemplate(), "one")}
        runner = web.AppRunner(server.app(), access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        try:
            async with aiohttp.ClientSession(f"http://127.0.0.1:{runner.addresses[0][1]}") as session:
                yield session, server
        finally:
            await runner.cleanup()


async def ask(session: aiohttp.ClientSession, path: str = "/v1/chat/completions", **body: Any) -> tuple[int, Any]:
    said = {"messages": HELLO} if "chat" in path else {"prompt": "How many?"}
    async with session.post(path, json={"model": "one", **said, **body}) as reply:
        return reply.status, await reply.json()


async def test_a_chat_completion_is_the_answer_of_the_search_and_says_what_was_used() -> None:
    async with FakeServer(reply=talk, usage="vllm", cached_tokens=1) as fake, served(fake) as (session, _):
        status, reply = await ask(session)
        (choice,) = reply["choices"]
        assert status == 200
        assert reply["object"] == "chat.completion"
        assert re.fullmatch(r"The answer is: \\boxed\{[345]\}", choice["message"]["content"])
        assert "step" in choice["message"]["reasoning_content"]
        assert choice["finish_reason"] == "stop"
        assert sum(choice["search"]["votes"].values()) == choice["search"]["chains"] >= 6
        usage = reply["usage"]
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
        assert usage["prompt_tokens_details"] == {"cached_tokens": fake.calls}
        assert 0 < usage["completion_tokens_details"]["reasoning_tokens"] < usage["completion_tokens"]


async def test_a_text_completion_goes_on_from_the_prompt_as_it_was_sent() -> None:
    async with FakeServer(reply=talk) as fake:
        async with served(fake) as (session, _):
            status, reply = await ask(session, "/v1/completions", prompt="Q: How many?\nA:")
            assert (status, reply["object"]) == (200, "text_completion")
            assert reply["choices"][0]["text"].startswith("The answer is")
            assert all(request["prompt"].startswith("Q: How many?\nA:") for request in fake.requests)
            _, short = await ask(session, "/v1/completions", max_completion_tokens=10)
            assert short["choices"][0]["search"]["stopped"] == "tokens"
            assert short["usage"]["completion_tokens"] < reply["usage"]["completion_tokens"]
        async with served(fake, chat_only=True) as (session, _):
            status, reply = await ask(session, "/v1/completions")
            assert status == 400
            assert "takes conversations only" in reply["error"]["message"]


async def events(reply: aiohttp.ClientResponse) -> list[Any]:
    found = []
    async for line in reply.content:
        if line.startswith(b"data: "):
            data = line[6:].strip()
            found.append(data.decode() if data == b"[DONE]" else json.loads(data))
    return found


@pytest.mark.parametrize("include", [True, False])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_a_stream_says_the_same_in_pieces(path: str, include: bool) -> None:
    async with FakeServer(reply=talk) as fake, served(fake) as (session, _):
        _, whole = await ask(session, path)
        said = {"messages": HELLO} if "chat" in path else {"prompt": "How many?"}
        body = {"model": "one", "stream": True, "stream_options": {"include_usage": include}, **said}
        async with session.post(path, json=body) as reply:
            assert reply.content_type == "text/event-stream"
            *chunks, done = await events(reply)
    assert done == "[DONE]"
    assert len({chunk["id"] for chunk in chunks}) == 1
    if include:
        *chunks, last = chunks
        assert (last["choices"], last["usage"]) == ([], whole["usage"])
    assert all("usage" not in chunk for chunk in chunks)
    pieces = [chunk["choices"][0] for chunk in chunks]
    text = "".join(p["delta"].get("content", "") if "chat" in path else p["text"] for p in pieces)
    choice = whole["choices"][0]
    assert text == (choice["message"]["content"] if "chat" in path else choice["text"])
    assert [p["finish_reason"] for p in pieces] == ["stop"]


async def test_every_parameter_that_is_taken_changes_the_outcome() -> None:
    async with FakeServer(reply=poem, usage="vllm") as fake, served(fake, boxed=False) as (session, _):
        _, plain = await ask(session)
        assert (await ask(session))[1]["choices"] == plain["choices"], "the same question, the same answer"
        told = plain["choices"][0]["message"]["content"]

        async def changed(**body: Any) -> Any:
            before = fake.calls
            status, reply = await ask(session, **body)
            assert status == 200
            return reply, fake.requests[before:]

        reply, requests = await changed(temperature=0.25, top_p=0.5)
        assert {(r["temperature"], r["top_p"]) for r in requests} == {(0.25, 0.5)}
        reply, requests = await changed(seed=99)
        assert reply["choices"] != plain["choices"]
        reply, _ = await changed(n=3)
        assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2]
        assert reply["choices"][0]["message"] == plain["choices"][0]["message"]
        assert len({choice["message"]["content"] for choice in reply["choices"]}) > 1
        assert reply["usage"]["completion_tokens"] > 2 * plain["usage"]["completion_tokens"]
        later, earlier = told[-1], told.split()[1]
        for stops in (later, told[-12:], ["no such word", later, earlier]):
            reply, _ = await changed(stop=stops)
            ends = min(told.index(stop) for stop in ([stops] if isinstance(stops, str) else stops[1:]))
            assert reply["choices"][0]["message"]["content"] == told[:ends]
        reply, _ = await changed(max_tokens=2)
        assert len(reply["choices"][0]["message"]["content"].split()) <= 2
        assert reply["choices"][0]["finish_reason"] == "length"
        few, many = [(await changed(max_completion_tokens=n))[0]["usage"]["completion_tokens"] for n in (20, 200)]
        assert few < many <= 250


async def test_max_completion_tokens_is_the_budget_also_where_the_server_has_none() -> None:
    async with FakeServer(reply=talk, usage="vllm") as fake, served(fake, rollouts=500) as (session, _):
        _, reply = await ask(session, max_completion_tokens=150)
        assert abs(reply["usage"]["completion_tokens"] - 150) < 60
        assert reply["choices"][0]["search"]["stopped"] == "tokens"


async def test_size_and_addresses() -> None:
    async with FakeServer(reply=talk) as fake, served(fake) as (session, _):
        async with session.post("/v1/chat/completions", data=b" " * (1 << 21)) as reply:
            assert reply.status == 413
            assert (await reply.json())["error"]["message"]
        for method, path, status in (("GET", "/v1/chat/completions", 405), ("GET", "/nowhere", 404)):
            async with session.request(method, path) as reply:
                assert (reply.status, "error" in await reply.json()) == (status, True)
        async with session.get("/health") as reply:
            assert await reply.json() == {"status": "ok", "searches": 0}
        assert fake.calls == 0


@pytest.mark.parametrize("name", ["one", "Qwen/Qwen3-8B"])
async def test_models_are_listed_and_found_by_name(name: str) -> None:
    async with FakeServer(reply=talk) as fake, served(fake, served=name) as (session, _):
        async with session.get("/v1/models") as reply:
            listed, address = (await reply.json())["data"], str(reply.url)
        assert [model["id"] for model in listed] == [name]
        for path in (name, name.replace("/", "%2F")):
            async with session.get(URL(f"{address}/{path}", encoded=True)) as reply:
                assert (reply.status, await reply.json()) == (200, listed[0])
        for path in ("two", "%ff", "one%00", "Qwen"):
            async with session.get(URL(f"{address}/{path}", encoded=True)) as reply:
                assert reply.status == 404
                assert (await reply.json())["error"]["code"] == "model_not_found"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example"}, 403),
        ({"Host": "127.0.0.1.evil.example:80"}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://["}, 403),
        ({"Host": "127.0.0.1:x:y"}, 403),
        ({"Origin": ""}, 403),
        ({"Origin": "http://127.0.0.1:9"}, 403),
        ({"Origin": "http://localhost:3000", "Host": "localhost:1"}, 403),
        ({"Origin": "http://localhost", "Host": "localhost:8000"}, 403),
        ({"Origin": "http://localhost:99999", "Host": "localhost:99999"}, 403),
        ({"Origin": "http://localhost:8000", "Host": "localhost:8000"}, 200),
        ({"Origin": "http://LOCALHOST:8000", "Host": "localhost:8000"}, 200),
        ({"Origin": "http://localhost", "Host": "localhost:80"}, 200),
        ({"Origin": "https://localhost", "Host": "localhost"}, 200),
        ({"Origin": "http://[::1]:8000", "Host": "[::1]:8000"}, 200),
        ({"Host": "localhost:8000"}, 200),
        ({}, 200),
    ],
)
async def test_a_page_cannot_reach_a_loopback_server_by_a_name_of_its_own(headers: dict[str, str], status: int) -> None:
    async with FakeServer(reply=talk) as fake, served(fake) as (session, _):
        async with session.post(
            "/v1/chat/completions", json={"model": "one", "messages": HELLO}, headers=headers
        ) as reply:
            assert reply.status == status
        assert (fake.calls > 0) == (status == 200)


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (None, 401),
        ("Bearer wrong", 401),
        ("Bearer ", 401),
        ("Bearer \udcff", 401),
        (f"Bearer {TOKEN}", 200),
        (f"bearer {TOKEN}", 200),
    ],
)
async def test_a_token_is_asked_for_and_never_quoted(
    sent: str | None, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COTREE_TOKEN", TOKEN)
    headers = {} if sent is None else {"Authorization": sent}
    async with FakeServer(reply=talk) as fake, served(fake, host="0.0.0.0") as (session, _):
        async with session.get("/v1/models", headers=headers) as reply:
            assert reply.status == status
            assert TOKEN not in await reply.text()
        async with session.get("/health") as reply:
            assert reply.status == 200


def test_beyond_loopback_a_token_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COTREE_TOKEN", raising=False)
    with pytest.raises(UsageError, match="set COTREE_TOKEN"):
        serve(["smollm2-135m-instruct"], host="0.0.0.0")


async def test_more_searches_than_may_wait_are_told_to_come_again() -> None:
    async with FakeServer(reply=talk, latency=0.05) as fake, served(fake, at_once=1, queue=1) as (session, server):
        replies = await asyncio.gather(*(ask(session) for _ in range(5)))
        assert sorted(status for status, _ in replies) == [200, 200, 429, 429, 429]
        refused = next(reply for status, reply in replies if status == 429)
        assert refused["error"]["type"] == "rate_limit_error"
        assert server.searches == 0
        assert (await ask(session))[0] == 200


@pytest.mark.parametrize("stream", [False, True])
async def test_who_leaves_takes_the_backends_requests_along(stream: bool) -> None:
    faults = dict.fromkeys(range(1, 99), "hang")
    async with FakeServer(reply=talk, faults=faults) as fake, served(fake, at_once=1) as (session, server):  # type: ignore[arg-type]

        async def leave() -> None:
            async with session.post(
                "/v1/chat/completions", json={"model": "one", "messages": HELLO, "stream": stream, "n": 3}
            ) as reply:
                await reply.read()

        asking = asyncio.create_task(leave())
        await until(lambda: fake.in_flight == 3)
        asking.cancel()
        await until(lambda: fake.in_flight == 0)
        await until(lambda: server.searches == 0)
        calls = fake.calls
        await asyncio.sleep(0.05)
        assert fake.calls == calls, "nothing more is asked for a client that left"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_backend_that_refuses_is_an_error_and_no_traceback(stream: bool) -> None:
    async with FakeServer(reply=talk, only_listed=True, models=("x",)) as fake, served(fake) as (session, server):
        body = {"model": "one", "messages": HELLO, "stream": stream}
        async with session.post("/v1/chat/completions", json=body) as reply:
            found = (await events(reply))[0] if stream else await reply.json()
            assert reply.status == (200 if stream else 502)
        assert "does not exist" in found["error"]["message"]
        assert server.searches == 0


@pytest.mark.parametrize("stream", [False, True])
async def test_a_prompt_that_the_backend_refuses_is_the_clients_fault_in_the_backends_words(stream: bool) -> None:
    async with FakeServer(reply=talk, faults={0: "400"}) as fake, served(fake, rollouts=1) as (session, server):
        body = {"model": "one", "messages": HELLO, "stream": stream}
        async with session.post("/v1/chat/completions", json=body) as reply:
            found = (await events(reply))[0] if stream else await reply.json()
            assert reply.status == (200 if stream else 400)
        words = "the model's server refuses this request: the prompt is longer than the context of 8 tokens"
        assert (found["error"]["message"], found["error"]["type"]) == (words, "invalid_request_error")
        assert server.searches == 0


async def test_free_texts_cannot_vote_so_a_server_of_them_takes_likelihood() -> None:
    async with FakeServer(reply=poem) as fake:
        async with served(fake, boxed=False) as (session, _):
            _, reply = await ask(session)
        assert fake.requests[0]["logprobs"] == 1
    assert "The answer is" not in reply["choices"][0]["message"]["content"]


async def test_the_official_client_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COTREE_TOKEN", TOKEN)
    openai = pytest.importorskip("openai", reason="openai is not installed: pip install 'cotree[dev]'")
    async with FakeServer(reply=talk) as fake, served(fake, at_once=1, queue=0) as (session, _):
        client = openai.AsyncOpenAI(
            base_url=f"http://127.0.0.1:{session._base_url_origin and session._base_url_origin.port}/v1",
            api_key=TOKEN,
            max_retries=0,
        )
        assert [model.id async for model in await client.models.list()] == ["one"]
        assert (await client.models.retrieve("one")).id == "one"
        whole = await client.chat.completions.create(model="one", messages=HELLO, temperature=0.7, n=2, seed=4)
        assert whole.choices[0].message.content.startswith("The answer is")
        assert whole.usage.completion_tokens_details.reasoning_tokens > 0
        again = [*HELLO, whole.choices[0].message, *HELLO]
        assert (await client.chat.completions.create(model="one", messages=again)).choices[0].message.content
        stream = await client.chat.completions.create(
            model="one",
            messages=HELLO,
            temperature=0.7,
            n=2,
            seed=4,
            stream=True,
            stream_options={"include_usage": True},
        )
        said: dict[int, str] = {0: "", 1: ""}
        usage: Any = None
        async for chunk in stream:
            usage = chunk.usage or usage
            for choice in chunk.choices:
                said[choice.index] += choice.delta.content or ""
        assert list(said.values()) == [choice.message.content for choice in whole.choices]
        assert usage.completion_tokens == whole.usage.completion_tokens
        text = await client.completions.create(model="one", prompt="How many?", max_tokens=8)
        assert text.choices[0].text.startswith("The answer is")
        with pytest.raises(openai.BadRequestError, match="tools"):
            await client.chat.completions.create(model="one", messages=HELLO, tools=[{"type": "function"}])
        with pytest.raises(openai.NotFoundError):
            await client.chat.completions.create(model="two", messages=HELLO)
        with pytest.raises(openai.AuthenticationError):
            await client.with_options(api_key="wrong").models.list()
        fake.latency = 0.05
        asked = (client.chat.completions.create(model="one", messages=HELLO) for _ in range(2))
        results = await asyncio.gather(*asked, return_exceptions=True)
        assert sum(isinstance(result, openai.RateLimitError) for result in results) == 1
        await client.close()


def environment() -> dict[str, str]:
    kept = {name: told for name, told in os.environ.items() if name != "COTREE_TOKEN"}
    return kept | {"PYTHONPATH": os.pathsep.join(sys.path)}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_verb_says_its_address_and_ends_cleanly(number: signal.Signals) -> None:
    with FakeServerThread(reply=talk, models=("one",)) as fake:
        command = [sys.executable, "-m", "cotree.cli", "serve", fake.url, "--served", "one", "--port", "0", "--boxed"]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
        )
        assert process.stdout is not None
        said = process.stdout.readline()
        found = re.search(r"serving one at (http://127\.0\.0\.1:\d+)/v1", said)
        assert found is not None, said

        async def asked() -> tuple[int, Any]:
            async with aiohttp.ClientSession(found[1]) as session:
                return await ask(session)

        assert asyncio.run(asked())[0] == 200
        for text in MALFORMED:
            with socket.create_connection((URL(found[1]).host, URL(found[1]).port)) as wire:
                wire.sendall(text)
                assert wire.recv(12)[8:] == b" 400", text
        process.send_signal(number)
        out, errors = process.communicate(timeout=120)
    assert (process.returncode, out, errors) == (0, "closed\n", "")


def test_the_decode_verb_prints_answer_chain_votes_and_tokens(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with FakeServerThread(reply=talk, models=("one",)) as fake:
        words = ["decode", "How many?", "--model", fake.url, "--served", "one", "--boxed", "--rollouts", "5", *LINES]
        monkeypatch.setattr(sys, "argv", ["cotree", *words, "temperature=0.5"])
        with pytest.raises(SystemExit) as left:
            main()
        assert {request["temperature"] for request in fake.requests} == {0.5}
        said = capsys.readouterr().out
        monkeypatch.setattr(sys, "argv", ["cotree", *words, "temperature=0.5", "-q"])
        with pytest.raises(SystemExit):
            main()
        assert re.fullmatch(r"[345]\n", capsys.readouterr().out)
    assert left.value.code == 0
    assert re.search(r"answer: [345]\n\n.*\\boxed\{[345]\}\n\nvotes: \d+ for “[345]”", said, re.DOTALL)
    assert re.search(r"\d+ chains; \d+ tokens generated, \d+ read .* stopped by: rollouts", said)


def test_decode_says_how_often_a_request_was_sent_again(capsys: pytest.CaptureFixture[str]) -> None:
    with FakeServerThread(reply=talk, models=("one",), faults={1: "reset", 3: "429"}) as fake:
        found = decode("How many?", fake.url, served="one", boxed=True, rollouts=3)
        assert fake.calls == found.spent.requests + 2
    assert f"in {found.spent.requests} calls (sent again after failures: 2); stopped by" in capsys.readouterr().out


@pytest.mark.parametrize("quiet", [True, False])
def test_no_answer_is_a_failure_in_one_line(
    quiet: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with FakeServerThread(
        reply=lambda prompt, seed, index: "}" if prompt.endswith("{") else " hm", models=("one",)
    ) as fake:
        words = ["decode", "How many?", "--model", fake.url, "--served", "one", "--boxed", "--rollouts", "3"]
        monkeypatch.setattr(sys, "argv", ["cotree", *words, *(["-q"] if quiet else [])])
        with pytest.raises(SystemExit) as left:
            main()
    out, errors = capsys.readouterr()
    assert (left.value.code, errors.count("\n")) == (1, 1)
    assert re.match(r"cotree: none of the \d+ chains that were written has an answer; raise --budget-tokens", errors)
    assert out == "" if quiet else "no chain has one" in out


def test_a_judge_of_another_server_is_named_by_overrides() -> None:
    def judged(prompt: str, seed: int, index: int) -> str:
        return " yes" if "Reply with yes or no" in prompt else talk(prompt, seed, index)

    with (
        FakeServerThread(reply=judged, models=("one",)) as fake,
        FakeServerThread(reply=judged, models=("two",)) as other,
    ):
        found = decode(
            "How many?",
            fake.url,
            served="one",
            boxed=True,
            rollouts=4,
            overrides=[
                "models.judge.url=" + other.url,
                "models.judge.model=two",
                "models.judge.mode=chat",
                "reward.judge=judge",
            ],
            output=Output(quiet=True),
        )
        assert found.answer in found.votes
        assert fake.calls > 0
        assert other.calls > 0
        assert all("Reply with yes or no" in request["messages"][0]["content"] for request in other.requests)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["decode"], "give a question in quotes"),
        (["decode", "Why?", "--value", "vote"], "free texts cannot vote"),
        (["decode", "Why?", "--strategy", "trees"], "'trees' is not one of 'mcts'"),
        (["decode", "--task", "arithmetic", "--id", "none"], "has no question `none`"),
        (
            ["decode", "Why?", "--task", "letters"],
            "--task needs --id, one of its questions, and takes neither words nor",
        ),
        (["decode", "--task", "arithmetic"], "--task needs --id, one of its questions, and takes neither words nor"),
        (["decode", "Why?", "--value", "verifier"], "not verifier: a verifier needs a `reward` in the settings"),
        (["decode", "Why?", "rolouts=4"], "did you mean `rollouts`"),
        (["decode", "Why?", "--model", "llama-9"], "nothing at `llama-9`"),
        (["decode", "Why?", "roles.reflector=nobody"], "unknown model `nobody`"),
        (["decode", "Why?", "roles.critic=smollm2-135m-instruct"], "unknown role `critic`"),
        (["decode", "Why?", "temperature"], "`temperature` is no setting"),
        (["decode", "Why?", "rollouts.x=1"], "`rollouts` is a value, not a section"),
        (["decode", "Why?", "reward.process=smollm2-135m-instruct"], "names a model with `mode: pooling`"),
        (["decode", "Why?", "--model", "http://127.0.0.1:9"], "start the server"),
        (["serve", "http://127.0.0.1:9", "--value", "vote"], "free texts cannot vote"),
        (["serve", "http://127.0.0.1:9", "--host", "0.0.0.0"], "set COTREE_TOKEN"),
    ],
)
def test_a_mistake_is_one_line(
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("COTREE_TOKEN", raising=False)
    monkeypatch.setattr(sys, "argv", ["cotree", *words])
    with pytest.raises(SystemExit) as left:
        main()
    said = capsys.readouterr().err
    assert (left.value.code, said.count("\n")) == (2, 1)
    assert message in said
