"""Models with several servers: who is asked what, who is down, what it took and what it cost."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.fake_server import FakeServer, count_tokens, tell

from cotree.base.errors import UsageError
from cotree.models.client import Client, Counters, Request
from cotree.models.endpoints import Endpoint, check_servers, open_endpoints
from cotree.models.settings import Model, Price
from cotree.models.tokenizer import token_counter
from cotree.models.weights import identity_text

KEY = "sk-very-secret-0123456789"


def request(prompt: str = "", **changes: Any) -> Request:
    fields: dict[str, Any] = {"n": 1, "max_tokens": 8, "temperature": 0.0, "top_p": 1.0, "seed": 1, "stop": ()}
    return Request(prompt, **(fields | changes), messages=(("user", "hi"),))


def endpoint(*urls: str) -> Endpoint:
    clients = [Client("m", url, "m", max_in_flight=1, count_tokens=count_tokens) for url in urls]
    return Endpoint("m", tuple(clients), None, "m")


URLS = [f"http://host{i}:8000/v1" for i in range(4)]
QUESTIONS = [f"task/question-{i}" for i in range(2000)]


def test_questions_are_shared_out_evenly() -> None:
    shares = Counter(endpoint(*URLS).client_for(question).url for question in QUESTIONS)
    # 500 each; five standard deviations of a fair draw are 97.
    assert len(shares) == 4
    assert all(abs(share - 500) < 97 for share in shares.values())


def test_a_server_less_moves_only_its_own_questions() -> None:
    four, three = endpoint(*URLS), endpoint(*URLS[:3])
    for question in QUESTIONS:
        before = four.client_for(question).url
        if before != four.clients[3].url:
            assert three.client_for(question).url == before


@given(st.permutations(URLS), st.text())
def test_the_order_of_the_servers_and_the_form_of_a_url_decide_nothing(urls: list[str], question: str) -> None:
    plain = endpoint(*(url.removesuffix("/v1") + "/" for url in urls))
    assert plain.client_for(question).url == endpoint(*URLS).client_for(question).url


async def test_each_server_has_its_own_limit() -> None:
    async with FakeServer(latency=0.02) as one, FakeServer(latency=0.02) as two:
        model = Model(url=(one.url, two.url), model="fake", mode="chat", max_in_flight=3)
        async with open_endpoints({"m": model}) as endpoints:
            m = endpoints["m"]
            await asyncio.gather(*(m.client_for(q).complete(request(q)) for q in QUESTIONS[:40]))
            assert (one.most_in_flight, two.most_in_flight) == (3, 3)
            assert one.calls + two.calls == sum(client.counters.requests for client in m.clients) == 40
            # The same question goes to the same server again.
            asked = {body["messages"][-1]["content"] for body in one.requests}
            assert asked == {q for q in QUESTIONS[:40] if m.client_for(q).url == one.url}


async def test_the_tokens_of_all_servers_are_counted_and_priced() -> None:
    async with FakeServer(cached_tokens=1, reply=tell) as one, FakeServer(faults={0: "half"}, reply=tell) as two:
        price = Price(prompt=2.0, cached=0.5, completion=8.0)
        model = Model(url=(one.url, two.url), model="fake", mode="chat", price=price)
        async with open_endpoints({"m": model}) as endpoints:
            m = endpoints["m"]
            done = [await client.complete(request("x")) for client in m.clients]
            first, second = (client.counters for client in m.clients)
            assert (first.requests, second.requests, first.cached_tokens + second.cached_tokens) == (1, 2, 1)
            unanswered = token_counter(None)(request("x").prompt_text())
            assert first.prompt_tokens == done[0].prompt_tokens
            assert second.prompt_tokens == done[1].prompt_tokens + unanswered > 0
            prompts, written = unanswered + sum(d.prompt_tokens for d in done), sum(d.completion_tokens for d in done)
            expected = 2.0 * (prompts - 1) + 0.5 + 8.0 * written
            assert m.cost == pytest.approx(expected / 1e6)


def test_cached_tokens_cost_as_much_as_others_unless_said() -> None:
    counters = Counters(prompt_tokens=1000, cached_tokens=400, completion_tokens=10)
    assert counters.cost(Price(prompt=1.0)) == pytest.approx(1e-3)
    assert counters.cost(Price(prompt=1.0, cached=0.0)) == pytest.approx(6e-4)
    assert endpoint(*URLS).cost is None


async def test_servers_that_are_down_are_all_named_and_the_others_are_not() -> None:
    async with FakeServer() as gone:
        pass
    async with FakeServer() as up, FakeServer(models=["other"], only_listed=True) as wrong:
        model = Model(url=(up.url, gone.url, wrong.url), model="fake", mode="chat")
        for work in (check_servers({"m": model}), open_endpoints({"m": model}).__aenter__()):
            with pytest.raises(UsageError, match="2 of 3 servers are not ready: model `m`") as failed:
                await work
            line = str(failed.value)
            assert gone.url in line and "cannot connect" in line
            assert wrong.url in line and "the server lists other" in line
            assert up.url not in line
            assert "\n" not in line


async def test_a_chat_server_that_lists_another_name_is_asked_in_chat() -> None:
    async with FakeServer(models=["a.gguf"], chat_only=True) as server:
        model = Model(url=server.url, model="fake", mode="chat")
        async with open_endpoints({"m": model}):
            assert [body["messages"] for body in server.requests] == [[{"role": "user", "content": "Hi"}]]


async def test_a_key_comes_from_the_environment_and_goes_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COTREE_TEST_KEY", raising=False)
    async with FakeServer(api_key=KEY) as server:
        model = Model(url=server.url, model="fake", mode="chat", api_key_env="COTREE_TEST_KEY")
        with pytest.raises(UsageError, match="COTREE_TEST_KEY is not set"):
            await check_servers({"m": model})
        monkeypatch.setenv("COTREE_TEST_KEY", KEY)
        await check_servers({"m": model})
        async with open_endpoints({"m": model}) as endpoints:
            await endpoints["m"].clients[0].complete(request())
            assert KEY not in repr(endpoints) + repr(model)
        assert server.headers[0]["Authorization"] == f"Bearer {KEY}"


async def test_tokens_that_nobody_counts_are_estimated() -> None:
    async with FakeServer(faults={0: "half"}) as server:
        model = Model(url=server.url, model="fake", mode="chat")
        async with open_endpoints({"m": model}) as endpoints:
            done = await endpoints["m"].clients[0].complete(request("x" * 37))
            # "hi", a line break and 37 characters, four bytes a token.
            assert endpoints["m"].clients[0].counters.prompt_tokens == done.prompt_tokens + 10


@pytest.mark.parametrize("mode", ["chat", "completions"])
def test_parameters_are_left_out_and_renamed_and_nothing_else_changes(mode: str) -> None:
    asked = request() if mode == "chat" else Request("p", stop=("x",))
    plain = json.loads(asked.body("m"))
    assert asked.body("m", (), {}) == asked.body("m")
    changed = json.loads(asked.body("m", ("temperature", "seed"), {"max_tokens": "max_completion_tokens"}))
    assert changed.pop("max_completion_tokens") == plain.pop("max_tokens")
    assert changed == {name: value for name, value in plain.items() if name not in ("temperature", "seed")}


async def test_a_recipes_omit_and_rename_reach_the_server_and_only_omit_is_another_model() -> None:
    async with FakeServer(models=["other"]) as server:
        plain = Model(url=server.url, model="fake", mode="chat")
        renamed = Model(**plain.model_dump() | {"rename": {"max_tokens": "max_completion_tokens"}})
        both = Model(**renamed.model_dump() | {"omit": ["temperature"]})
        async with open_endpoints({"m": both}) as endpoints:
            await endpoints["m"].clients[0].complete(request())
        assert len(server.requests) == 2
        for body in server.requests:
            assert "max_completion_tokens" in body and not {"max_tokens", "temperature"} & body.keys()
    assert identity_text(plain) == identity_text(renamed) != identity_text(both)
    with pytest.raises(ValueError, match="`omit` and `rename` are for servers"):
        Model(weights="x.gguf", omit=("seed",))
