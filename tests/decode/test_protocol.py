"""Request bodies over real HTTP: what front ends usually send, what cannot be done, and what no client should send."""

from __future__ import annotations

import asyncio
import contextlib
import json
from operator import attrgetter
from typing import Any

import aiohttp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.decode.test_server import HELLO, ask, events, served
from tests.decode.test_strategies import talk
from tests.support.fake_server import FakeServer

from cotree.decode.answer import read_settings
from cotree.decode.protocol import ChatBody, settings_for_request

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
# What a front end may send beside model, question and `stream`: names from its source, values that it or we chose.
OPEN_WEBUI: dict[str, Any] = {
    "temperature": 0.8,
    "top_p": 0.9,
    "max_tokens": 128,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "seed": 0,
    "stop": [],
    "logit_bias": {},
    "top_k": 0,
    "min_p": 0.0,
    "repeat_penalty": 1.0,
}
LANGCHAIN: dict[str, Any] = {
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "logprobs": False,
    "n": 1,
    "temperature": 0.7,
    "max_completion_tokens": 400,
    "service_tier": "auto",
    "store": False,
}
LANGCHAIN_TEXT: dict[str, Any] = {
    "temperature": 0.7,
    "top_p": 1,
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "n": 1,
    "logit_bias": None,
    "seed": None,
    "logprobs": None,
    "max_tokens": 256,
}
AGENT = {"tools": [], "tool_choice": "none", "parallel_tool_calls": False, "response_format": {"type": "text"}}
TURNS: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief.", "name": "rules"},
    {"role": "user", "content": [{"type": "text", "text": "One?"}, {"type": "text", "text": "Two?"}], "name": "ann"},
    {"role": "assistant", "content": "1", "refusal": None, "tool_calls": [], "annotations": [], "audio": None},
    {"role": "user", "content": "How many?"},
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "body", "plain"),
    [
        (CHAT, OPEN_WEBUI, {"temperature": 0.8, "top_p": 0.9, "max_tokens": 128, "seed": 0}),
        (CHAT, {"max_completion_tokens": 1000, "metadata": {"task": "title_generation", "chat_id": "7"}}, {}),
        (CHAT, LANGCHAIN, {"temperature": 0.7, "max_completion_tokens": 400}),
        (CHAT, AGENT | {"tool_choice": "auto", "functions": [], "function_call": "auto"}, {}),
        (CHAT, AGENT | {"parallel_tool_calls": True, "user": "5e1", "safety_identifier": "5e1"}, {}),
        (CHAT, {"modalities": ["text"], "top_logprobs": 0, "top_k": -1, "min_tokens": 0, "ignore_eos": False}, {}),
        (CHAT, {"messages": TURNS}, {"messages": [{k: m[k] for k in ("role", "content")} for m in TURNS]}),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": "How many?"}]}]}, {}),
        (TEXT, LANGCHAIN_TEXT | {"prompt": ["How many?"]}, {"temperature": 0.7, "top_p": 1, "max_tokens": 256}),
        (TEXT, {"best_of": 1, "suffix": "", "echo": False, "user": "me"}, {}),
    ],
)
async def test_what_front_ends_send_to_ask_for_nothing_changes_nothing(
    path: str, body: dict[str, Any], plain: dict[str, Any], stream: bool
) -> None:
    async with FakeServer(reply=talk) as fake, served(fake, rollouts=2) as (session, _):
        _, expected = await ask(session, path, **plain)
        if not stream:
            status, reply = await ask(session, path, stream=False, **body)
            assert (status, reply.get("choices")) == (200, expected["choices"])
            return
        said = {"messages": HELLO} if path == CHAT else {"prompt": "How many?"}
        options = {"include_usage": True, "include_obfuscation": False}
        asked = {"model": "one", "stream": True, "stream_options": options, **said, **body}
        async with session.post(path, json=asked) as streamed:
            assert streamed.status == 200
            chunk, usage, done = await events(streamed)
    piece, whole = chunk["choices"][0], expected["choices"][0]
    assert piece.get("text", piece.get("delta")) == whole.get("text", whole.get("message"))
    assert (usage["usage"]["completion_tokens"], done) == (expected["usage"]["completion_tokens"], "[DONE]")


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"tools": [{"type": "function"}]}, "tools", "is not supported"),
        ({"tool_choice": "required"}, "tool_choice", "is not supported"),
        ({"logprobs": True}, "logprobs", "is not supported"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "is not supported"),
        ({"frequency_penalty": 0.5}, "frequency_penalty", "is not supported"),
        ({"presence_penalty": False}, "presence_penalty", "is not supported"),
        ({"top_k": 40}, "top_k", "is not supported"),
        ({"best_of": 4}, "best_of", "is not supported"),
        ({"store": True}, "store", "is not supported"),
        ({"reasoning_effort": "high"}, "reasoning_effort", "is not supported"),
        ({"stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation", "is not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format", "is not supported"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": 99}, "n", "less than or equal to 8"),
        ({"n": True}, "n", "must be a number"),
        ({"temperature": "hot"}, "temperature", "must be a number"),
        ({"temperature": True}, "temperature", "must be a number"),
        ({"max_tokens": "5"}, "max_tokens", "must be a number"),
        ({"max_tokens": -1}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": 10**30}, "max_tokens", "less than"),
        ({"max_completion_tokens": 10**400}, "max_completion_tokens", "less than"),
        ({"seed": 10**4000}, "seed", "less than"),
        ({"stream": 1}, "stream", "valid boolean"),
        ({"stop": ["a"] * 5}, "stop", "at most 4 stop strings"),
        ({"stop": ""}, "stop.0", "at least 1 character"),
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": ["x"]}, "messages.0", "JSON object"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role", "'user'"),
        ({"messages": [*HELLO, {"role": "assistant", "content": "It"}]}, "messages", "must be the user's"),
        ({"messages": [{"role": "user", "content": "a\0b"}]}, "messages.0.content.0.text", "NUL"),
        ({"messages": [{"role": "user", "content": {"text": "x"}}]}, "messages.0.content", "text only"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "messages.0.content.0", "JSON object"),
        (
            {
                "messages": [
                    *HELLO,
                    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]},
                ]
            },
            "messages.1.content.0.type",
            "text only, no part of type `image_url`",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]},
            "messages.0.content.0.type",
            "text only",
        ),
        ({"model": "another"}, "model", "there is no model `another`; there is one"),
        ({"model": 5}, "model", "valid string"),
    ],
)
async def test_what_cannot_be_done_is_refused_in_openais_form(body: dict[str, Any], param: str, message: str) -> None:
    async with FakeServer(reply=talk) as fake, served(fake) as (session, _):
        status, reply = await ask(session, **body)
        assert status == (404 if body.get("model") == "another" else 400)
        assert (reply["error"]["param"], reply["error"]["type"]) == (param, "invalid_request_error")
        assert message in reply["error"]["message"]
        assert fake.calls == 0


@pytest.mark.parametrize("prompt", [["one", "two"], [], [5, 6], [[5, 6]], 5, "", [""], "a\0b"])
async def test_a_completion_takes_one_prompt_of_text(prompt: Any) -> None:
    async with FakeServer(reply=talk) as fake, served(fake) as (session, _):
        status, reply = await ask(session, TEXT, prompt=prompt)
        assert (status, reply["error"]["param"], fake.calls) == (400, "prompt", 0)
        if prompt == ["one", "two"]:
            assert "one prompt a request" in reply["error"]["message"]


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (b"", "EOF"),
        (b"{", "EOF"),
        (b"[1]", "object"),
        (b'"x"', "object"),
        (b"null", "object"),
        (b"[" * 10**5, "recursion limit"),
        (b'{"a":' * 10**4, "recursion limit"),
        (b'{"model": "one"} {}', "trailing characters"),
        (b'{"model": "\xff"}', "unicode"),
        (rb'{"model": "one", "messages": [{"role": "user", "content": "\ud800"}]}', "hex escape"),
        (rb'{"model": "one", "messages": [{"role": "user", "content": "\udfff x"}]}', "surrogate"),
        (b'{"model": "one", "max_tokens": NaN}', "expected value"),
        (b'{"model": "one", "max_tokens": -Infinity}', "invalid number"),
        (b'{"model": "one", "max_tokens": ' + b"9" * 5000 + b"}", "out of range"),
        (b'{"model": "one", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1e400}', "`max_tokens`"),
        (b'{"model": "one", "messages": [{"role": "user", "content": "x"}], "temperature": 1e400}', "`temperature`"),
        ('{"model": "one"}'.encode("utf-16"), "expected value"),
        (b'{"model": "one", "model": "two"}', "`model` stands twice in one JSON object; send it once"),
        (b'{"messages": [{"role": "user", "content": "x", "role": "user"}]}', "`role` stands twice"),
    ],
)
async def test_a_broken_body_is_refused_with_its_fault(data: bytes, fault: str) -> None:
    async with FakeServer(reply=talk) as fake, served(fake) as (session, _):
        async with session.post(CHAT, data=data, headers={"Content-Type": "application/json"}) as reply:
            assert reply.status == 400
            assert fault in (await reply.json())["error"]["message"]
        assert fake.calls == 0


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Content-Type": "application/json; charset=utf-8"}, 200),
        ({"Content-Type": "application/json; charset=foo"}, 200),
        ({}, 200),
        ({"Content-Type": "text/plain"}, 400),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 400),
        ({"Content-Type": "multipart/form-data; boundary=x"}, 400),
        ({"Content-Type": "application/json", "Content-Encoding": "gzip"}, 400),
        ({"Content-Type": "application/json", "Content-Encoding": "deflate"}, 400),
    ],
)
async def test_a_body_is_json_by_its_headers_too(headers: dict[str, str], status: int) -> None:
    data = json.dumps({"model": "one", "messages": HELLO}).encode()
    async with (
        FakeServer(reply=talk) as fake,
        served(fake, rollouts=1) as (session, _),
        session.post(CHAT, data=data, headers=headers) as reply,
    ):
        assert reply.status == status
        assert ("choices" if status == 200 else "error") in await reply.json()


@pytest.mark.parametrize(
    "body", [{"model": "m" * 10**5}, {"model": "one", "n" * 10**5: 1}, {"model": "one", "messages": [{"r" * 10**5: 1}]}]
)
async def test_no_refusal_repeats_a_name_without_end(body: dict[str, Any]) -> None:
    async with FakeServer(reply=talk) as fake, served(fake) as (session, _):
        async with session.post(CHAT, json={"messages": HELLO, **body}) as reply:
            assert reply.status in (400, 404)
            assert len(await reply.read()) < 2000
        async with session.get(f"/v1/models/{'m' * 5000}") as reply:
            assert reply.status == 404 and len(await reply.read()) < 2000


FIELDS = (
    *("messages", "prompt", "max_tokens", "max_completion_tokens", "temperature", "top_p", "seed", "stop", "stream"),
    *("stream_options", "tools", "response_format", "logit_bias", "metadata", "presence_penalty", "role", "content"),
)
ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=20)
NUMBERS = st.integers() | st.floats() | st.sampled_from([2**31, 2**63, 10**400, -1, 0])
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | ANY_TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(FIELDS) | ANY_TEXT, inner, max_size=3),
    max_leaves=8,
)


def test_whatever_json_a_field_holds_the_answer_is_200_or_400() -> None:
    with asyncio.Runner() as runner:
        stack = contextlib.AsyncExitStack()

        async def start() -> aiohttp.ClientSession:
            fake = await stack.enter_async_context(FakeServer(reply=talk))
            session, _ = await stack.enter_async_context(served(fake, rollouts=1))
            return session

        async def status(path: str, data: bytes) -> int:
            async with session.post(path, data=data, headers={"Content-Type": "application/json"}) as reply:
                await reply.read()
                return reply.status

        @settings(max_examples=150, deadline=None)
        @given(st.sampled_from([CHAT, TEXT]), st.sampled_from(FIELDS), JSON_VALUES, st.booleans())
        def check(path: str, field: str, value: Any, escaped: bool) -> None:
            said: dict[str, Any] = {"messages": HELLO} if path == CHAT else {"prompt": "How many?"}
            if field in ("role", "content"):
                said, field, value = {}, "messages", [{**HELLO[0], field: value}]
            body = json.dumps({"model": "one", **said, field: value}, ensure_ascii=escaped)
            assert runner.run(status(path, body.encode("utf-8", "surrogatepass"))) in (200, 400)

        session = runner.run(start())
        try:
            check()
        finally:
            runner.run(stack.aclose())


def test_no_request_asks_for_more_than_the_budget() -> None:
    """Of the command line and of an HTTP request; a setting that the user gives wins over the command line's budget."""
    limits = attrgetter("max_thought_tokens", "max_chain_tokens")
    assert limits(read_settings(["smollm2-135m-instruct"])) == (256, 1024)
    assert limits(read_settings(["smollm2-135m-instruct"], budget_tokens=100)) == (100, 100)
    given = read_settings(["smollm2-135m-instruct"], ["max_chain_tokens=700"], budget_tokens=300)
    assert limits(given) == (256, 700)
    body = ChatBody.model_validate({"model": "m", "messages": HELLO, "max_completion_tokens": 260})
    assert limits(settings_for_request(given, body)) == (256, 260)
