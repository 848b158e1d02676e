"""Replies that will be the same again, of servers with words of their own: asked for once, and told as they are."""

from __future__ import annotations

import asyncio
import json
import re
import tracemalloc
from typing import Any

import pytest
from aiohttp import web
from tests.support.asking import client, raw_server, request
from tests.support.fake_server import FakeServer

from cotree.base.errors import CotreeError
from cotree.models.client import Choice, Completion, Request

KEY = "sk-very-secret-0123456789"
CHAT = request("", n=1, max_tokens=4, messages=(("user", "why"),))


async def ask(reply: Any, asked: Request, status: int = 200, **options: Any) -> tuple[Completion | str, int, int]:
    """What a server's one reply becomes, a completion or the error's words; how often it was asked, and repeats."""
    calls = []

    async def answer(_: web.Request) -> web.Response:
        calls.append(1)
        return web.json_response(reply, status=status)

    async with raw_server(answer) as url, client(url, **({"attempts": 6} | options)) as c:
        try:
            found: Completion | str = await c.complete(asked)
        except CotreeError as error:
            found = str(error)
        return found, len(calls), c.counters.repeats


@pytest.mark.parametrize("reason", [None, "", "eos", "end_turn", "STOP", "missing"])
@pytest.mark.parametrize("words", [" one two", " one two three four"])
async def test_a_whole_reply_is_a_whole_reply_whatever_its_finish_reason(reason: str | None, words: str) -> None:
    choice = {"text": words} if reason == "missing" else {"text": words, "finish_reason": reason}
    found, calls, repeats = await ask({"choices": [choice]}, request(n=1, max_tokens=4))
    assert isinstance(found, Completion)
    # Of a reason that says nothing, only the number of tokens tells whether the text was cut.
    cut = len(words.split()) == 4 and reason in (None, "", "missing")
    assert found.choices == (Choice(words, "length" if cut else "stop", len(words.split()) + (not cut)),)
    assert (calls, repeats) == (1, 0)


@pytest.mark.parametrize("reason", ["length", "content_filter", "max_tokens", "model_length", "MAX_TOKENS"])
async def test_a_text_that_was_cut_is_known_by_any_servers_word_for_it(reason: str) -> None:
    found, calls, _ = await ask({"choices": [{"text": " one", "finish_reason": reason}]}, request(n=1))
    assert isinstance(found, Completion)
    assert (found.choices[0].finish_reason, calls) == ("length", 1)


@pytest.mark.parametrize(
    ("choice", "says"),
    [
        ({"message": {"content": None, "reasoning_content": "hm"}, "finish_reason": "stop"}, "reasoning parser"),
        ({"message": {"content": None, "reasoning": "hm"}, "finish_reason": "length"}, "reasoning parser"),
        ({"message": {"content": None}, "finish_reason": "stop"}, "has no text"),
        ({"message": {"content": [{"type": "text"}]}, "finish_reason": "stop"}, "has no text"),
        ({"message": {"content": "", "tool_calls": [{}]}, "finish_reason": "tool_calls"}, "calls a tool"),
    ],
)
async def test_a_choice_without_text_will_be_the_same_again(choice: Any, says: str) -> None:
    found, calls, repeats = await ask({"choices": [choice]}, CHAT)
    assert says in str(found)
    assert "(1 attempt)" in str(found)
    assert (calls, repeats) == (1, 0)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (
            {"error": {"message": "The prompt has\n9000 tokens", "code": 400}},
            "HTTP 200 with an error (The prompt has 9000",
        ),
        ({"error": "no such model"}, "HTTP 200 with an error (no such model)"),
        ({"error": {"message": "no credit"}, "choices": []}, "(no credit)"),
        ({"object": "error", "message": "bad stop", "code": 40001}, "(bad stop)"),
        ({"detail": "Not here"}, "(Not here)"),
        ({"error": {"message": f"{KEY} is no key"}}, "(*** is no key)"),
        ({"error": {"message": "x" * 290 + KEY}}, "x***"),
    ],
)
@pytest.mark.parametrize("asked", [request(), CHAT, Request("", messages=(("user", "why"),), scores=True)])
async def test_an_error_with_status_200_is_told_in_the_servers_words_at_the_first(
    body: Any, says: str, asked: Request
) -> None:
    found, calls, _ = await ask(body, asked, api_key=KEY)
    assert says in str(found)
    assert KEY[:8] not in str(found)
    assert (calls, "\n" in str(found)) == (1, False)


@pytest.mark.parametrize("code", [408, 425, 429, "429", 500, 503])
async def test_an_error_with_status_200_that_will_pass_is_asked_again(code: int | str) -> None:
    found, calls, repeats = await ask({"error": {"message": "busy", "code": code}}, CHAT, attempts=3)
    assert "HTTP 200 with an error (busy) (3 attempts)" in str(found)
    assert (calls, repeats) == (3, 2)


@pytest.mark.parametrize("field", ["code", "type"])
@pytest.mark.parametrize("word", ["insufficient_quota", "billing_hard_limit_reached", "billing_not_active"])
@pytest.mark.parametrize("status", [200, 429])
async def test_an_empty_account_is_not_asked_again(field: str, word: str, status: int) -> None:
    found, calls, _ = await ask({"error": {"message": "You exceeded your quota", field: word}}, CHAT, status)
    assert "(You exceeded your quota)" in str(found)
    assert calls == 1


async def test_an_empty_account_that_only_the_message_tells_is_not_asked_again() -> None:
    for status, error in (429, {"message": "insufficient_quota: pay"}), (429, "insufficient_quota"):
        assert (await ask({"error": error}, CHAT, status))[1] == 1
    found, _, _ = await ask({"choices": [{"message": {"content": "insufficient_quota"}}]}, CHAT)
    assert isinstance(found, Completion)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("<html>\n<title>Log in, \x1b[31m" + "x" * 900, "(<html> <title>Log in, [31mx"),
        ("", "(it is empty)"),
        ("data: {}\n\n", "(data: {})"),
        ("null", "(null)"),
        ("\xff\x00", "not JSON ("),
        (f"<p>{KEY}", "(<p>***)"),
    ],
)
async def test_a_page_in_place_of_a_reply_is_told_at_the_first(body: str, says: str) -> None:
    calls = []

    async def answer(_: web.Request) -> web.Response:
        calls.append(1)
        return web.Response(body=body.encode("latin-1"))

    async with raw_server(answer) as url, client(url, api_key=KEY) as c:
        with pytest.raises(CotreeError, match=r"the reply is not JSON \(.*check `url`.*\(1 attempt\)") as failed:
            await c.complete(CHAT)
        assert (len(calls), c.counters.prompt_tokens) == (1, 1)
        assert says in str(failed.value)
        assert str(failed.value).isprintable() and len(str(failed.value)) < 700
        assert "not JSON" in await c.find_problem()


@pytest.mark.parametrize("asked", [CHAT, Request("", messages=(("user", "why"),), scores=True)])
async def test_broken_json_is_asked_for_as_often_as_a_paid_reply(asked: Request) -> None:
    found, calls, _ = await ask({"chosen": []}, asked)
    assert re.search(r"the reply is not JSON with .*\(5 attempts\)", str(found))
    assert calls == 5


@pytest.mark.parametrize(("status", "expected"), [(408, 3), (425, 3), (429, 3), (502, 3), (501, 1), (505, 1), (402, 1)])
async def test_only_what_may_pass_is_asked_again(status: int, expected: int) -> None:
    found, calls, repeats = await ask({"error": {"message": "no"}}, CHAT, status, attempts=3)
    assert f"HTTP {status} (no)" in str(found)
    assert (calls, repeats) == (expected, expected - 1)


@pytest.mark.parametrize("reason", ["abort", "error"])
async def test_a_paid_reply_that_is_of_no_use_is_asked_for_five_times_at_most(reason: str) -> None:
    said = {"choices": [{"message": {"content": " one"}, "finish_reason": reason, "error": {"message": "upstream"}}]}
    found, calls, repeats = await ask(said, CHAT)
    assert re.search(rf"broke off \({reason}.*\(5 attempts\)", str(found))
    assert (calls, repeats) == (5, 4)
    async with FakeServer(ignores={"n"}) as server, client(server.url) as c:
        with pytest.raises(CotreeError, match=r"1 choices came back for n=2 \(5 attempts\)"):
            await c.complete(request())
        assert server.calls == 5


# --- bounds -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [200, 500])
@pytest.mark.parametrize("page", ["completions", "models"])
async def test_an_endless_body_is_read_no_further_than_a_reply_can_be_long(status: int, page: str) -> None:
    sent: list[int] = []

    async def answer(asked: web.Request) -> web.StreamResponse:
        if page not in asked.path:
            return web.json_response({"data": []})
        response = web.StreamResponse(status=status)
        await response.prepare(asked)
        block = b"x" * 2**20
        while len(sent) < 200:
            sent.append(1)
            try:
                await response.write(block)
            except ConnectionError:
                break
        return response

    async with raw_server(answer) as url, client(url, attempts=3) as c:
        tracemalloc.start()
        try:
            if page == "models":
                says = await c.find_problem()
            else:
                with pytest.raises(CotreeError) as failed:
                    await asyncio.wait_for(c.complete(request(max_tokens=8)), 10)
                says = str(failed.value)
            most = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert re.search(rf"at {url}: the reply is longer than the [\d,]+ bytes that it can need \(1 attempt\)", says)
    assert len(sent) < 60
    assert most < 100e6


@pytest.mark.parametrize("asked", [request(max_tokens=8), CHAT])
async def test_a_text_that_max_tokens_cannot_hold_is_no_reply(asked: Request) -> None:
    def said(characters: int) -> Any:
        text = "a " * (characters // 2)
        return {"choices": [{"text": text, "message": {"content": text}, "finish_reason": "stop"}] * 2}

    found, calls, _ = await ask(said(10_000), asked)
    assert "a choice has 10,000 characters, more than max_tokens=" in str(found)
    assert "`rename`" in str(found)
    assert calls == 1
    # A token can be a long run of spaces.
    assert isinstance((await ask(said(128 * asked.max_tokens), asked))[0], Completion)


async def test_the_longest_replies_that_can_be_are_read_whole() -> None:
    words = "\N{GRINNING FACE}" * 128 * 32
    logprobs = [{"token": words[:100], "logprob": -1.0, "bytes": [240] * 100, "top_logprobs": []}] * 32
    choice = {"text": words, "finish_reason": "length", "logprobs": {"content": logprobs}}
    asked = request("\N{GRINNING FACE}" * 9000, logprobs=True)
    found, _, _ = await ask({"choices": [choice] * 2, "prompt": asked.prompt}, asked)
    assert isinstance(found, Completion)
    assert [one.text for one in found.choices] == [words] * 2
    several = json.dumps({"data": [{"id": f"model-{i}", "about": "x" * 500} for i in range(5000)] + [{"id": "fake"}]})

    async def answer(_: web.Request) -> web.Response:
        return web.Response(text=several)

    async with raw_server(answer) as url, client(url) as c:
        assert await c.find_problem() == ""


IMPOSSIBLE = [-1, True, False, "7", 7.5, [7], {}, 10**30, 2**47]


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("count", IMPOSSIBLE)
@pytest.mark.parametrize("which", ["prompt_tokens", "completion_tokens", "cached_tokens"])
async def test_counts_that_cannot_be_true_are_counted_here_and_that_is_noted(n: int, count: Any, which: str) -> None:
    usage: dict[str, Any] = {"prompt_tokens": 3, "completion_tokens": 3 * n}
    if which == "cached_tokens":
        usage["prompt_tokens_details"] = {which: count}
    else:
        usage[which] = count
    reply = {"choices": [{"text": " two words", "finish_reason": "stop"}] * n, "usage": usage}

    async def answer(_: web.Request) -> web.Response:
        return web.json_response(reply)

    async with raw_server(answer) as url, client(url) as c:
        done = await c.complete(request(n=n))
        assert (done.prompt_tokens, done.completion_tokens) == (3, 3 * n)
        assert (done.cached_tokens, done.misreported, c.counters.misreported) == (0, True, 1)
        assert "misreported" not in done.to_json()
        assert Completion.from_json(done.to_json()) == done


@pytest.mark.parametrize(("n", "count", "believed"), [(1, 32, True), (1, 33, True), (1, 34, False), (2, 67, False)])
async def test_more_tokens_than_were_allowed_are_not_believed(n: int, count: int, believed: bool) -> None:
    reply = {"choices": [{"text": " x", "finish_reason": "stop"}] * n, "usage": {"completion_tokens": count}}
    found, _, _ = await ask(reply, request(n=n))
    assert isinstance(found, Completion)
    assert found.completion_tokens == (count if believed else 2 * n)
    assert found.misreported is not believed


async def test_names_of_models_are_told_in_one_short_line() -> None:
    async with FakeServer(models=["a\x1b[31m\nb" + "x" * 10**6], only_listed=True) as server, client(server.url) as c:
        problem = await c.find_problem()
    assert problem.isprintable()
    assert len(problem) < 1000
