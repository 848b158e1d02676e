"""Models with several servers: who is asked what, who is down, what it took and what it cost."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support import asking
from tests.support.asking import until
from tests.support.fake_server import FakeServer, Fault, count_tokens, tell

from cotree.base.errors import CotreeError, UsageError
from cotree.models.client import Client, Counters, Request
from cotree.models.endpoints import Endpoint, check_servers, open_endpoints
from cotree.models.resolve import identity_text
from cotree.models.settings import Model, Price
from cotree.models.tokenizer import token_counter

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
    shares = Counter(endpoint(*URLS).servers_for(question)[0].url for question in QUESTIONS)
    # 500 each; five standard deviations of a fair draw are 97.
    assert len(shares) == 4
    assert all(abs(share - 500) < 97 for share in shares.values())


def test_a_server_less_moves_only_its_own_questions() -> None:
    four, three = endpoint(*URLS), endpoint(*URLS[:3])
    for question in QUESTIONS:
        before = four.servers_for(question)[0].url
        if before != four.clients[3].url:
            assert three.servers_for(question)[0].url == before


@given(st.permutations(URLS), st.text())
def test_the_order_of_the_servers_and_the_form_of_a_url_decide_nothing(urls: list[str], question: str) -> None:
    plain = endpoint(*(url.removesuffix("/v1") + "/" for url in urls))
    assert plain.servers_for(question)[0].url == endpoint(*URLS).servers_for(question)[0].url


async def test_each_server_has_its_own_limit() -> None:
    async with FakeServer(latency=0.02) as one, FakeServer(latency=0.02) as two:
        model = Model(url=(one.url, two.url), model="fake", mode="chat", max_in_flight=3)
        async with open_endpoints({"m": model}) as endpoints:
            m = endpoints["m"]
            await asyncio.gather(*(m.complete(request(q), q) for q in QUESTIONS[:40]))
            assert (one.most_in_flight, two.most_in_flight) == (3, 3)
            assert one.calls + two.calls == sum(client.counters.requests for client in m.clients) == 40
            # While it has a place free, the same question goes to the same server again.
            one.requests.clear()
            for q in QUESTIONS[:40]:
                await m.complete(request(q, seed=2), q)
            asked = {body["messages"][-1]["content"] for body in one.requests}
            assert asked == {q for q in QUESTIONS[:40] if m.servers_for(q)[0].url == one.url}


async def test_a_full_servers_questions_go_where_a_place_is_free_and_nowhere_while_all_are_full() -> None:
    async with (
        FakeServer(latency=0.1) as one,
        FakeServer(latency=0.1) as two,
        endpoint_at(one, two, max_in_flight=4) as m,
    ):
        mine = shared_out(m, 12)[0]
        await asyncio.gather(*(m.complete(asking.request(q), q) for q in mine))
        # Four go to each at once; the other four came when both were full, and wait for their own.
        assert asked_of(two) == Counter(mine[4:8])
        assert asked_of(one) == Counter([*mine[:4], *mine[8:]])


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


@pytest.mark.parametrize("key", ["AKIA0123456789SECRET", "SECRET_" * 6])
async def test_a_key_in_place_of_its_variables_name_is_not_shown(key: str) -> None:
    model = Model(url="http://127.0.0.1:9", model="fake", mode="chat", api_key_env=key)
    with pytest.raises(UsageError, match=r"the environment variable that `api_key_env` .* is not set") as failed:
        await check_servers({"m": model})
    assert key[:8] not in str(failed.value)


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


# --- other servers in the place of one that is lost ---------------------------------------------------------------


@asynccontextmanager
async def endpoint_at(*servers: FakeServer, **options: Any) -> AsyncIterator[Endpoint]:
    """A model on these servers, each lost after a tenth of a second."""
    async with AsyncExitStack() as stack:
        clients = [asking.client(s.url, **{"takeover": 0.1, "attempts": 1000} | options) for s in servers]
        for each in clients:
            await stack.enter_async_context(each)
        yield Endpoint("thinker", tuple(clients), None, "m")


def shared_out(model: Endpoint, count: int) -> list[list[str]]:
    """So many questions for each of the servers, in their order."""
    return [[q for q in QUESTIONS if model.servers_for(q)[0] is client][:count] for client in model.clients]


def asked_of(server: FakeServer) -> Counter[str]:
    return Counter(body["prompt"] for body in server.requests)


async def test_others_take_over_what_a_server_that_is_gone_would_be_asked_and_it_is_used_again() -> None:
    async with (
        FakeServer(latency=0.01) as one,
        FakeServer() as two,
        FakeServer() as three,
        FakeServer() as alone,
        endpoint_at(one, two, three, max_in_flight=2) as m,
        endpoint_at(alone) as plain,
    ):
        questions = [q for share in shared_out(m, 12) for q in share]
        expected = {q: (await plain.complete(asking.request(q), q)).choices for q in questions}
        work = asyncio.gather(*(m.complete(asking.request(q), q) for q in questions))
        await until(lambda: one.calls > 3)
        await one.stop()
        assert {q: done.choices for q, done in zip(questions, await work, strict=True)} == expected
        servers = (one, two, three)
        answered = Counter(body["prompt"] for server in servers for body in server.answered)
        # A reply may still have been on its way when the server went.
        assert set(answered) == set(questions) and sum(answered.values()) <= len(questions) + 2
        # Where it is answered changes nothing of a request.
        bodies = {json.dumps(b, sort_keys=True) for server in (*servers, alone) for b in server.requests}
        assert len(bodies) == len(questions)
        assert sum(client.counters.repeats for client in m.clients) > 0
        assert m.lost == [f"{m.clients[0]}: {m.clients[0].problem}"] and "cannot connect" in m.lost[0]
        # It comes back, and its questions to it.
        await one.start()
        before = one.calls
        await asyncio.sleep(0.15)
        await m.complete(asking.request(questions[0], seed=2), questions[0])
        for q in questions[:5]:
            await m.complete(asking.request(q, seed=3), q)
        assert one.calls - before == 6
        assert m.lost == []


async def test_a_hung_servers_questions_are_taken_over_and_one_request_at_a_time_tries_it() -> None:
    hang = dict.fromkeys(range(100), Fault("hang"))
    async with (
        FakeServer(faults=hang) as hung,
        FakeServer() as good,
        endpoint_at(hung, good, max_in_flight=3, silence=0.3) as m,
    ):
        mine = shared_out(m, 30)[0]
        started = time.monotonic()
        await asyncio.gather(*(m.complete(asking.request(q, max_tokens=16_000), q) for q in mine))
        # Those that waited for a slot did not hang too.
        assert 0.3 <= time.monotonic() - started < 1.0
        assert (hung.calls, len(good.answered)) == (3, 30)
        assert m.clients[0].counters.prompt_tokens == 3
        assert "no answer to any request for 0.3 s" in m.lost[0]
        await asyncio.sleep(0.15)
        await asyncio.gather(*(m.complete(asking.request(q, seed=2), q) for q in mine))
        assert hung.calls == 4


async def test_a_slow_server_that_answers_others_is_not_hung() -> None:
    async with (
        FakeServer(latency=0.1) as slow,
        FakeServer() as other,
        endpoint_at(slow, other, silence=0.3, max_in_flight=2) as m,
    ):
        questions = shared_out(m, 10)[0]
        slow.faults[0] = "hang"
        long = asyncio.create_task(m.complete(asking.request(questions[0]), questions[0]))
        await until(lambda: slow.in_flight == 1)
        for q in questions[1:]:
            await m.complete(asking.request(q), q)
        assert not long.done()
        assert (slow.calls, other.calls) == (10, 0)
        await asyncio.wait_for(long, 2)
        assert asked_of(other) == {questions[0]: 1}


@pytest.mark.parametrize("kind", ["429", "500", "reset"])
async def test_a_server_that_only_fails_is_lost_too_but_not_one_that_fails_now_and_then(kind: Any) -> None:
    async with (
        FakeServer(fault_rate=1.0, fault_kinds=[kind]) as bad,
        FakeServer() as good,
        endpoint_at(bad, good) as m,
    ):
        mine = shared_out(m, 4)[0]
        await asyncio.gather(*(m.complete(asking.request(q), q) for q in mine))
        assert sum(asked_of(good).values()) == 4
    async with (
        FakeServer(fault_rate=0.5, fault_kinds=[kind], latency=0.03) as shaky,
        FakeServer() as good,
        endpoint_at(shaky, good, takeover=5.0, max_in_flight=20) as m,
    ):
        mine = shared_out(m, 20)[0]
        await asyncio.gather(*(m.complete(asking.request(q), q) for q in mine))
        assert (len(shaky.answered), good.calls) == (20, 0)


async def test_a_server_that_asks_for_a_long_wait_gets_it_while_others_answer() -> None:
    async with (
        FakeServer(faults={0: Fault("429", 3600)}) as busy,
        FakeServer() as good,
        endpoint_at(busy, good) as m,
    ):
        mine = shared_out(m, 3)[0]
        await m.complete(asking.request(mine[0]), mine[0])
        await asyncio.sleep(0.15)
        await asyncio.gather(*(m.complete(asking.request(q), q) for q in mine[1:]))
        assert (busy.calls, good.calls) == (1, 3)


async def test_a_request_that_is_refused_is_not_asked_of_the_others() -> None:
    async with (
        FakeServer(models=["x"], only_listed=True) as wrong,
        FakeServer() as good,
        endpoint_at(wrong, good) as m,
    ):
        question = shared_out(m, 1)[0][0]
        with pytest.raises(CotreeError, match=r"HTTP 404 .*\(1 attempt\)"):
            await m.complete(asking.request(question), question)
        assert good.calls == 0


async def test_all_servers_gone_end_in_one_line_or_the_first_to_come_back_answers() -> None:
    async with FakeServer() as one, FakeServer() as two:
        async with endpoint_at(one, two, patience=0.6) as m:
            await one.stop()
            await two.stop()
            with pytest.raises(CotreeError, match=r"cannot connect .*attempts at 2 servers\); fix that"):
                await m.complete(asking.request("q"), "q")
        async with endpoint_at(one, two, patience=5.0, backoff=0.001) as m:
            own = m.servers_for("q")[0]
            work = asyncio.gather(*(m.complete(asking.request(f"q{i}"), "q") for i in range(4)))
            await until(lambda: len(m.lost) == 2)
            await (one if one.url == own.url else two).start()
            assert len(await asyncio.wait_for(work, 3)) == 4


async def test_the_wait_for_a_single_hung_server_is_bounded_however_many_tokens_are_asked_for() -> None:
    async with (
        FakeServer(fault_rate=1.0, fault_kinds=["hang"]) as hung,
        endpoint_at(hung, longest=0.2, patience=0.1) as m,
    ):
        started = time.monotonic()
        says = r"no answer within 0 s; raise the model's `timeout` if it is only slow \(2 attempts\)"
        with pytest.raises(CotreeError, match=says):
            await m.complete(asking.request(max_tokens=16_000), "q")
        assert time.monotonic() - started < 1.0
    model = Model(url=("http://127.0.0.1:1",), model="fake", mode="chat")
    assert model.timeout <= 1800


async def test_a_model_is_open_while_one_of_its_servers_is_gone_and_that_is_said() -> None:
    async with FakeServer() as gone:
        pass
    async with FakeServer() as up:
        model = Model(url=(up.url, gone.url), model="fake", mode="chat", timeout=600)
        said = await check_servers({"m": model})
        assert len(said) == 1
        assert re.search(rf"{gone.url}: cannot connect .*other servers are asked in its place", said[0])
        async with open_endpoints({"m": model}) as endpoints:
            m = endpoints["m"]
            assert {(client.longest, client.silence) for client in m.clients} == {(600, 200)}
            for question in QUESTIONS[:20]:
                await asyncio.wait_for(m.complete(request(question), question), 2)
            assert m.clients[1].counters.requests == 0
        with pytest.raises(UsageError, match="1 of 2 servers are not ready"):
            await open_endpoints({"m": model}, all_ready=True).__aenter__()


def test_another_place_is_the_same_model() -> None:
    urls: list[Any] = ["http://one:1", ["http://two:2"], ["http://one:1", "http://two:2"]]
    assert len({identity_text(Model(url=url, model="fake", mode="chat")) for url in urls}) == 1
