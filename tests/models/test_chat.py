"""Chat mode: what is sent to continue the assistant's words, what is made of the reply, and templates rendered here."""

from __future__ import annotations

import json
from typing import Any

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st
from tests.support.asking import client, raw_server
from tests.support.fake_server import ASSISTANT, FakeServer, count_tokens, tell

from cotree.base.errors import CotreeError
from cotree.models.client import Choice, Completion, Request
from cotree.models.encode import render_prompt
from cotree.models.endpoints import Endpoint
from cotree.models.wire import Failure, Prompt, read_reply
from cotree.tasks.extract import extract_answer

ASKED = (("system", "be brief"), ("user", "two and two?"))
MESSAGES = [{"role": role, "content": content} for role, content in ASKED]


def request(prompt: str = "", messages: tuple[tuple[str, str], ...] = ASKED, **changes: Any) -> Request:
    fields: dict[str, Any] = {"n": 2, "max_tokens": 8, "temperature": 0.8, "top_p": 1.0, "seed": 1, "stop": ()}
    return Request(prompt, **(fields | changes), messages=messages)


async def test_the_assistants_words_are_sent_to_be_continued() -> None:
    async with FakeServer(reply=tell) as server, client(server.url) as c:
        await c.complete(request("The sum", stop=("\n",)))
        await c.complete(request())
    assert server.requests[0] == {
        "model": "fake",
        "messages": [*MESSAGES, {"role": "assistant", "content": "The sum"}],
        "add_generation_prompt": False,
        "continue_final_message": True,
        "n": 2,
        "max_tokens": 8,
        "temperature": 0.8,
        "top_p": 1.0,
        "seed": 1,
        "stop": ["\n"],
    }
    assert server.requests[1]["messages"] == MESSAGES
    assert not {"add_generation_prompt", "continue_final_message", "prompt"} & set(server.requests[1])


@pytest.mark.parametrize("habit", ["continues", "echoes"])
async def test_a_text_in_pieces_is_the_whole_text(habit: Any) -> None:
    async with FakeServer(reply=tell, habit=habit) as server, client(server.url) as c:
        whole = (await c.complete(request(max_tokens=20, n=1))).choices[0]
        for cut in range(1, len(whole.text), 7):
            rest = (await c.complete(request(whole.text[:cut], max_tokens=30, n=1))).choices[0].text
            assert (whole.text[:cut] + rest).startswith(whole.text)


async def test_chat_and_completions_read_the_same_text() -> None:
    rendered = "".join(f"<{role}>{content}" for role, content in ASKED) + ASSISTANT
    async with FakeServer(reply=tell) as server, client(server.url) as c:
        one = await c.complete(request("So"))
        two = await c.complete(request(rendered + "So", ()))
    assert one.choices == two.choices
    assert one.prompt_tokens == two.prompt_tokens


async def test_a_server_without_chat_completions_says_so() -> None:
    async def answer(_: web.Request) -> web.Response:
        return web.json_response({"detail": "Not Found"}, status=404)

    async with raw_server(answer) as url, client(url) as c:
        with pytest.raises(CotreeError, match=r"HTTP 404.*check `url`, `model` and `mode`"):
            await c.complete(request("x"))


async def test_ready_asks_the_way_that_will_be_used() -> None:
    async with FakeServer(models=["a.gguf"], chat_only=True) as server, client(server.url) as c:
        assert await c.find_problem("chat") == ""
        assert server.requests[0]["messages"] == [{"role": "user", "content": "Hi"}]
        assert "HTTP 404" in await c.find_problem()


@pytest.mark.parametrize(
    ("message", "problem", "permanent"),
    [
        ({"content": "four"}, "", False),
        ({"content": ""}, "", False),
        ({"content": None}, "has no text", True),
        ({}, "has no text", True),
        (None, "has no text", True),
        ({"content": "", "reasoning_content": "hm"}, "without a reasoning parser", True),
        ({"content": "", "reasoning": "hm"}, "without a reasoning parser", True),
        ({"content": "four", "reasoning_content": None}, "", False),
    ],
)
def test_odd_messages(message: Any, problem: str, permanent: bool) -> None:
    content = json.dumps({"choices": [{"message": message, "finish_reason": "stop"}]}).encode()
    reply = read_reply(content, request(n=1), count_tokens)
    completion: Completion | Failure | None = reply
    if problem:
        assert isinstance(reply, Failure)
        assert problem in reply.reason
        assert (reply.wait is None) == permanent
        completion = reply.counted
    assert isinstance(completion, Completion)
    assert len(completion.choices) == (0 if problem else 1)
    # Nothing says how long the prompt is, so all of its words are counted.
    assert completion.prompt_tokens == 5


async def test_separated_reasoning_is_an_error_and_not_an_empty_thought() -> None:
    calls = []

    async def answer(_: web.Request) -> web.Response:
        calls.append(1)
        choice = {"message": {"content": "", "reasoning_content": "hm"}, "finish_reason": "length"}
        return web.json_response({"choices": [choice] * 2})

    async with raw_server(answer) as url, client(url) as c:
        with pytest.raises(CotreeError, match=r"reasoning parser \(1 attempt\)"):
            await c.complete(request("x"))
    assert len(calls) == 1


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
def test_reasoning_that_a_server_tells_apart_is_kept_before_a_text_that_continues_none(field: str) -> None:
    message = {"content": "It is \\boxed{4}", "reasoning": None, field: " Not \\boxed{3}.\n"}
    content = json.dumps({"choices": [{"message": message, "finish_reason": "stop"}]}).encode()
    reply = read_reply(content, Request("", messages=ASKED, max_tokens=32), count_tokens)
    assert isinstance(reply, Completion)
    text = "<think>\nNot \\boxed{3}.\n</think>\n\nIt is \\boxed{4}"
    assert reply.choices == (Choice(text, "stop", 8),), "its tokens are counted, too"
    assert extract_answer(text) == "4"
    reply = read_reply(content, request("It is", n=1), count_tokens)
    assert isinstance(reply, Failure)
    assert "without a reasoning parser" in reply.reason and reply.wait is None, "it would not continue the text"
    message["content"] = text
    reply = read_reply(json.dumps({"choices": [{"message": message}]}).encode(), request(n=1), count_tokens)
    assert isinstance(reply, Completion) and reply.choices[0].text == text, "some servers tell it twice"


@given(st.lists(st.tuples(st.text(max_size=2), st.text(max_size=2)), max_size=3).map(tuple), st.data())
def test_messages_are_part_of_the_key(messages: Any, data: st.DataObject) -> None:
    other = data.draw(st.lists(st.tuples(st.text(max_size=2), st.text(max_size=2)), max_size=3).map(tuple))
    same = request("p", messages).key("m") == request("p", other).key("m")
    assert same == (messages == other)


class Template:
    """A tokenizer with a beginning token of its own, as Llama's and Gemma's are."""

    bos_token, bos_token_id = "<s>", 1
    chat_template = "as `apply_chat_template` says"

    def __init__(self, adds: bool) -> None:
        self.adds = adds

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [1, 7] if self.adds else [7]}

    def apply_chat_template(self, messages: list[dict[str, str]], **options: Any) -> str:
        assert options == {"tokenize": False, "add_generation_prompt": True}
        return "<s>" + "".join(message["content"] for message in messages)


def test_a_beginning_that_the_server_adds_is_left_out() -> None:
    adding: Any = Template(True)
    assert render_prompt(adding, MESSAGES) == "be brieftwo and two?"
    silent: Any = Template(False)
    assert render_prompt(silent, MESSAGES) == "<s>be brieftwo and two?"


def test_without_a_tokenizer_the_messages_are_the_prompt() -> None:
    prompt = Endpoint("m", (), None, "m").prompt(MESSAGES)
    assert prompt == Prompt("", ASKED)
    assert hash(prompt) == hash(Prompt("", ASKED))
