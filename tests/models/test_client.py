"""The endpoint client against a real server over loopback, with every fault that the retry rules name."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import itertools
import json
import re
import subprocess
import sys
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st
from tests.support.asking import client, raw_server, request, texts, until
from tests.support.fake_server import FakeServer, FakeServerThread, Fault, count_tokens, draw

from cotree.base.errors import CotreeError, UsageError
from cotree.models.client import Choice, Completion, Request

KEY = "sk-very-secret-0123456789"


# --- requests and completions -------------------------------------------------------------------------------------

FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "prompt": st.text(max_size=3),
    "n": st.integers(1, 9),
    "max_tokens": st.integers(1, 9),
    "temperature": st.floats(0, 2),
    "top_p": st.floats(0.1, 1),
    "seed": st.integers(0, 2**40),
    "stop": st.lists(st.text(max_size=3), max_size=3).map(tuple),
}


@given(st.fixed_dictionaries(FIELDS), st.sampled_from(sorted(FIELDS)), st.data())
def test_a_change_of_any_field_changes_the_key(fields: dict[str, Any], name: str, data: st.DataObject) -> None:
    changed = fields | {name: data.draw(FIELDS[name])}
    assert (Request(**changed).key("m") == Request(**fields).key("m")) == (changed[name] == fields[name])
    assert Request(**fields).key("m") != Request(**fields).key("n")


@given(st.fixed_dictionaries(FIELDS), st.booleans(), st.booleans())
def test_the_key_is_the_hash_of_the_fields_as_json(fields: dict[str, Any], scores: bool, logprobs: bool) -> None:
    messages = (("user", 'Say "é"'), ("assistant", "\n"))
    asked = Request(**fields, messages=messages, scores=scores, logprobs=logprobs)
    named = [
        "m",
        asked.n,
        asked.max_tokens,
        asked.temperature + 0.0,
        asked.top_p,
        asked.seed,
        asked.stop,
        messages,
        scores,
    ]
    head = json.dumps([*named, "logprobs"] if logprobs else named)
    assert asked.key("m") == hashlib.sha256(f"{head}\n{asked.prompt}".encode("utf-8", "surrogatepass")).digest()


def test_equal_requests_have_equal_keys_and_only_they() -> None:
    prompts = ["a", '"a', "\ud800\udc00", "\U00010000", "\ud800", "\ud801"]
    temperatures, stops = [0, 0.0, -0.0, 1, 1.0], [(), ("",), ("a", "b"), ("ab",), ('a","b',)]
    keys: dict[Request, set[bytes]] = {}
    for prompt, n, temperature, stop in itertools.product(prompts, [1, True], temperatures, stops):
        one = Request(prompt, n, 8, temperature, 1, 0, stop)
        keys.setdefault(one, set()).add(one.key("m"))
    assert {len(found) for found in keys.values()} == {1}
    assert len(set.union(*keys.values())) == len(keys) == 6 * 2 * 5


def test_the_key_is_the_same_in_every_process_and_version() -> None:
    # A change here makes every journal on disk useless: it needs a new schema version.
    known = "695a98a56cd20c0b700ba76784a9f38997dc9ff8608190e83d57af946afca1fa"
    assert request("Grüße\n").key("fake").hex() == known


@given(
    st.lists(
        st.builds(
            Choice,
            st.text(),
            st.sampled_from(["stop", "length"]),
            st.integers(0),
            st.none() | st.floats(max_value=0, allow_infinity=False),
        ),
        max_size=3,
    ).map(tuple),
    st.integers(0),
    st.integers(0),
    st.integers(0),
    st.floats(0, allow_infinity=False),
)
def test_a_completion_survives_the_journal(choices: Any, prompt: int, cached: int, tokens: int, seconds: float) -> None:
    completion = Completion(choices, prompt, cached, tokens, seconds)
    line = completion.to_json()
    assert Completion.from_json(line) == completion
    assert "\n" not in line
    assert isinstance(hash(Completion.from_json(line)), int)


# --- the plain way ------------------------------------------------------------------------------------------------


async def test_the_body_holds_the_request_and_the_choices_come_in_order() -> None:
    async with (
        FakeServer(reply=lambda prompt, seed, index: f" {prompt} {seed} {index}}} more") as server,
        client(server.url + "/v1/") as c,
    ):
        done = await c.complete(request("p", n=3, seed=7, stop=("}", "\n")))
    assert [choice.text for choice in done.choices] == [" p 7 0", " p 7 1", " p 7 2"]
    assert {choice.finish_reason for choice in done.choices} == {"stop"}
    assert server.requests == [
        {
            "model": "fake",
            "prompt": "p",
            "n": 3,
            "max_tokens": 32,
            "temperature": 0.8,
            "top_p": 1.0,
            "seed": 7,
            "stop": ["}", "\n"],
        }
    ]


async def test_no_stop_strings_are_sent_as_null() -> None:
    async with FakeServer() as server:
        await texts(server.url, request(stop=()))
    assert server.requests[0]["stop"] is None


async def test_the_texts_depend_on_the_request_only() -> None:
    wanted = [request(f"question {i}", seed=s, n=4) for i in range(5) for s in range(3)]
    async with FakeServer() as calm:
        expected = await texts(calm.url, *wanted)
    rate: dict[str, Any] = {"fault_rate": 0.4, "latency": (0.0, 0.02), "seed": 1}
    async with FakeServer(**rate) as stormy:
        assert await texts(stormy.url, *reversed(wanted)) == expected[::-1]
        assert stormy.calls > len(wanted)
        assert len(stormy.answered) == len(wanted)
    assert len(set(expected)) == len(wanted)


@pytest.mark.parametrize("usage", ["llama.cpp", "vllm"])
@pytest.mark.parametrize("messages", [(), (("user", "why"),)])
async def test_log_probabilities_come_only_where_they_are_asked_for(usage: Any, messages: Any) -> None:
    def says(prompt: str, seed: int, index: int) -> str:
        return " so count again" if index else " two"

    plain = request("" if messages else "p", messages=messages)
    asked = replace(plain, logprobs=True)
    async with FakeServer(reply=says, usage=usage) as server, client(server.url) as c:
        without, found = await c.complete(plain), await c.complete(asked)
    assert {choice.logprob for choice in without.choices} == {None}
    values = [[-(draw(word) % 1000) / 400 for word in [*text.split(), "</s>"]] for text in ("two", "so count again")]
    assert [choice.logprob for choice in found.choices] == [pytest.approx(sum(v) / len(v)) for v in values]
    assert [replace(choice, logprob=None) for choice in found.choices] == list(without.choices)
    assert "logprobs" not in server.requests[0]
    assert server.requests[1]["logprobs"] == (1 if not messages else True)
    assert asked.key("m") != plain.key("m")
    assert Completion.from_json(found.to_json()) == found


async def test_a_word_that_ends_with_the_stop_string_needs_no_log_probability() -> None:
    said = (" one two\n", "\n", " one\n")
    async with FakeServer(reply=lambda p, s, i: said[i], usage="llama.cpp") as server, client(server.url) as c:
        found = await c.complete(replace(request("p", n=3), stop=("\n",), logprobs=True))
    assert [choice.text for choice in found.choices] == [" one two", "", " one"]
    assert [choice.logprob for choice in found.choices[1:]] == [0.0, 0.0]


@pytest.mark.parametrize("usage", ["llama.cpp", "vllm"])
async def test_tokens_of_several_choices_are_counted_by_text(usage: Any) -> None:
    # First: three words and the stop token. Second: cut at six words, no stop token.
    async with (
        FakeServer(reply=lambda p, s, i: " one two three" if i == 0 else " x" * 50, usage=usage) as server,
        client(server.url) as c,
    ):
        done = await c.complete(request("five words are in here", max_tokens=6))
    assert done.choices == (Choice(" one two three", "stop", 4), Choice(" x x x x x x", "length", 6))
    assert (done.prompt_tokens, done.completion_tokens) == (5, 4 + 6)
    assert done.seconds > 0


async def test_the_servers_count_wins_where_it_is_complete() -> None:
    # The client's tokenizer finds fewer tokens than the server made.
    async with (
        FakeServer(usage="vllm", cached_tokens=2) as server,
        client(server.url, count_tokens=lambda text: 0) as c,
    ):
        one, two = await c.complete(request(n=1)), await c.complete(request())
    assert one.completion_tokens == one.choices[0].tokens == count_tokens(one.choices[0].text) + 1
    assert two.completion_tokens == sum(count_tokens(choice.text) + 1 for choice in two.choices)
    assert (c.counters.prompt_tokens, c.counters.cached_tokens) == (6, 4)
    assert c.counters.completion_tokens == one.completion_tokens + two.completion_tokens


async def test_an_absurd_count_is_none() -> None:
    said = {"choices": [{"text": " two words", "finish_reason": "stop"}] * 2, "usage": {"completion_tokens": 10**30}}

    async def answer(_: web.Request) -> web.Response:
        return web.json_response(said)

    async with raw_server(answer) as url, client(url) as c:
        assert (await c.complete(request())).completion_tokens == 6


async def test_counters_add_up_over_requests_and_retries() -> None:
    async with FakeServer(faults={1: "fewer", 2: "500"}) as server, client(server.url) as c:
        done = [await c.complete(request(f"words {i}")) for i in range(3)]
    assert c.counters.requests == 5
    # The tokens of the reply with too few choices were generated too.
    assert c.counters.prompt_tokens == sum(d.prompt_tokens for d in done) + 2
    assert c.counters.completion_tokens > sum(d.completion_tokens for d in done)


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ({"text": "caf\u00e9", "finish_reason": "eos_token"}, Choice("caf\u00e9", "stop", 2)),
        ({"text": "half \ud83d", "finish_reason": "length"}, Choice("half ?", "length", 2)),
        ({"text": "", "finish_reason": "stop"}, Choice("", "stop", 1)),
        ({"text": "x", "finish_reason": "abort"}, None),
        ({"text": "", "finish_reason": None}, None),
    ],
)
async def test_odd_choices(choice: Any, expected: Choice | None) -> None:
    async def answer(_: web.Request) -> web.Response:
        return web.json_response({"choices": [choice], "usage": None})

    async with raw_server(answer) as url, client(url, attempts=2) as c:
        if expected is None:
            with pytest.raises(CotreeError, match=r"broke off .*\(2 attempts\)"):
                await c.complete(request(n=1))
        else:
            done = await c.complete(request(n=1))
            assert done.choices == (expected,)
            assert done.prompt_tokens == 3
            done.to_json().encode()


@pytest.mark.parametrize(
    "body",
    ["[1]", "{}", '{"choices": 5}', '{"choices": [], "usage": [1]}', "[" * 10**5, "\n{\xff\x00"],
)
async def test_garbage_is_a_failed_request(body: str) -> None:
    async def answer(_: web.Request) -> web.Response:
        return web.Response(body=body.encode("latin-1"), content_type="application/json")

    async with raw_server(answer) as url, client(url, attempts=2) as c:
        with pytest.raises(CotreeError, match=r"choices.*\(2 attempts\)"):
            await c.complete(request())


# --- concurrency and cancellation ---------------------------------------------------------------------------------


async def test_never_more_in_flight_than_allowed_and_as_many_as_allowed() -> None:
    async with (
        FakeServer(latency=(0.005, 0.02), fault_rate=0.2, fault_kinds=["500", "empty"]) as server,
        client(server.url, max_in_flight=5) as c,
    ):
        await asyncio.gather(*(c.complete(request(f"q{i}")) for i in range(60)))
        assert server.most_in_flight == 5


async def test_cancelling_frees_the_slot_and_closes_the_connection() -> None:
    async with FakeServer(faults={0: "hang", 1: "hang"}) as server, client(server.url, max_in_flight=2) as c:
        hanging = [asyncio.create_task(c.complete(request(f"q{i}"))) for i in range(2)]
        await until(lambda: server.in_flight == 2)
        waiting = [asyncio.create_task(c.complete(request(f"w{i}"))) for i in range(3)]
        await asyncio.sleep(0.02)
        assert server.calls == 2
        for task in [*hanging, waiting[0]]:
            task.cancel()
        await asyncio.wait_for(asyncio.gather(*waiting[1:]), 5)
        assert [task.cancelled() for task in [*hanging, waiting[0]]] == [True] * 3
        await until(lambda: server.dropped == 2)
        assert server.calls == c.counters.requests == 4


async def test_cancelling_during_the_wait_for_a_retry_frees_the_slot() -> None:
    async with FakeServer(faults={0: Fault("429", 100)}) as server, client(server.url, max_in_flight=1) as c:
        waiting = asyncio.create_task(c.complete(request()))
        await until(lambda: server.calls == 1 and not server.in_flight)
        await asyncio.sleep(0.2)  # the reply was sent; now it has been read too
        waiting.cancel()
        done = await asyncio.wait_for(c.complete(request("next")), 5)
        assert c.counters.prompt_tokens == done.prompt_tokens


async def test_nothing_is_left_open() -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        async with FakeServer(faults={0: "half", 1: "reset"}) as server:
            async with client(server.url) as c:
                await c.complete(request())
            del c
            gc.collect()
    assert [str(warning.message) for warning in seen] == []


# --- keys and URLs ------------------------------------------------------------------------------------------------


async def test_the_key_is_sent_and_never_shown(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(0)
    async with FakeServer(api_key=KEY) as server, client(server.url, api_key=KEY + "\n") as c:
        await c.complete(request())
        assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
        server.api_key = "another"  # its refusal quotes the key that it got
        shown = [repr(c), str(c)]
        shown.append(await c.find_problem())
        assert re.search(r"HTTP 401.*check the API key", shown[-1])
        with pytest.raises(CotreeError, match=r"HTTP 401.*check the API key") as failed:
            await c.complete(request())
        shown += everything(failed.value)
    async with client(server.url, api_key=KEY, attempts=2) as c:
        with pytest.raises(CotreeError, match="cannot connect") as failed:
            await c.complete(request())
        shown += everything(failed.value)
    shown.append(caplog.text)
    assert "401" in "".join(shown)
    assert KEY not in "".join(shown)


def everything(error: BaseException | None) -> Iterator[str]:
    """All that a log or a crash report could print of an error and of those behind it."""
    while error is not None:
        yield from (str(error), repr(error), repr(error.args), "".join(traceback.format_exception(error)))
        error = error.__cause__ or error.__context__


@pytest.mark.parametrize(
    "url",
    [
        "localhost:8000",
        "ftp://host/v1",
        "http://",
        "http://host:99999999",
        "http://me:sk-hidden@host:1/v1",
        "http://host/v1?key=sk-hidden",
        "",
    ],
)
def test_a_bad_url_is_a_usage_error_that_does_not_repeat_it(url: str) -> None:
    with pytest.raises(UsageError, match="model `thinker`: `url` must look like") as failed:
        client(url)
    assert "sk-hidden" not in "".join(everything(failed.value))


def test_a_key_that_no_header_takes_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="API key") as failed:
        client("http://host", api_key="sk-\nhidden")
    assert "hidden" not in str(failed.value)


# --- find_problem ----------------------------------------------------------------------------------------------------


async def test_asking_for_problems_costs_nothing_when_the_model_is_listed() -> None:
    async with FakeServer() as server, client(server.url) as c:
        assert await c.find_problem() == ""
        assert (server.calls, c.counters.requests) == (0, 0)


async def test_find_problem_asks_a_server_that_lists_nothing() -> None:
    async with FakeServer(models=None) as server, client(server.url) as c:
        assert await c.find_problem() == ""
        assert server.calls == 1


async def test_find_problem_accepts_a_server_that_answers_to_any_name() -> None:
    async with FakeServer(models=["/models/a.gguf"]) as server, client(server.url) as c:
        assert await c.find_problem() == ""
        assert [(body["prompt"], body["max_tokens"], body["n"]) for body in server.requests] == [("Hi", 1, 1)]


async def test_find_problem_names_the_models_that_there_are() -> None:
    async with FakeServer(models=["qwen", "llama"], only_listed=True) as server, client(server.url) as c:
        problem = await c.find_problem()
    assert re.search(r"does not exist.*qwen, llama: set `model`", problem)
    assert "\n" not in problem


async def test_find_problem_says_who_is_unreachable_and_what_to_do() -> None:
    async with FakeServer() as server:
        pass
    async with client(server.url) as c:
        problem = await c.find_problem()
    assert re.search(r"`thinker` \(fake\) at http.*cannot connect.*start the server", problem)
    assert server.url in problem
    assert "\n" not in problem


async def test_find_problem_reports_a_server_that_is_still_loading() -> None:
    async def answer(_: web.Request) -> web.Response:
        return web.json_response({"error": {"message": "Loading model", "code": 503}}, status=503)

    async with raw_server(answer) as url, client(url, attempts=3) as c:
        problem = await c.find_problem()
        assert "HTTP 503 (Loading model) (3 attempts); wait until it is ready, then run" in problem


@pytest.mark.parametrize("status", [408, 425, 429, 503])
@pytest.mark.parametrize("listing", [True, False])
async def test_a_server_that_is_busy_or_loading_is_waited_for(status: int, listing: bool) -> None:
    calls = []

    async def answer(asked: web.Request) -> web.Response:
        if ("models" in asked.path) == listing:
            calls.append(1)
            if len(calls) < 3:
                return web.json_response({"error": {"message": "busy"}}, status=status)
        if "models" in asked.path:
            return web.json_response({"data": [{"id": "fake" if listing else "other"}]})
        return web.json_response({"choices": [{"text": " x", "finish_reason": "length"}]})

    async with raw_server(answer) as url, client(url) as c:
        assert await c.find_problem() == ""
    assert len(calls) == 3


# --- the server from outside its loop -----------------------------------------------------------------------------


def test_the_thread_and_the_process_say_the_same(tmp_path: Path) -> None:
    with FakeServerThread() as thread:
        expected = asyncio.run(texts(thread.url, request()))
        assert thread.calls == 1
        thread.stop()
        with pytest.raises(CotreeError):
            asyncio.run(run_once(thread.url))
        thread.start()
        assert asyncio.run(texts(thread.url, request())) == expected
    log = tmp_path / "requests.jsonl"
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "tests.support.fake_server", "--log", str(log)]
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            assert asyncio.run(texts(process.stdout.readline().strip(), request())) == expected
        finally:
            process.kill()
    assert [json.loads(line)["prompt"] for line in log.read_text().splitlines()] == [request().prompt]


async def run_once(url: str) -> None:
    async with client(url, attempts=1) as c:
        await c.complete(request())
