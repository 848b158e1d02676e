"""What the client's tests share: requests, clients with short waits, and a server that says one thing."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from aiohttp import web
from tests.support.fake_server import count_tokens

from cotree.models.client import Client, Request


def request(prompt: str = "two and two", **changes: Any) -> Request:
    fields: dict[str, Any] = {"n": 2, "max_tokens": 32, "temperature": 0.8, "top_p": 1.0, "seed": 1, "stop": ()}
    return Request(prompt, **(fields | changes))


def client(url: str, **changes: Any) -> Client:
    options: dict[str, Any] = {"max_in_flight": 8, "count_tokens": count_tokens, "backoff": 0.005}
    return Client("thinker", url, "fake", **(options | changes))


async def until(true: Callable[[], bool]) -> None:
    for _ in range(1000):
        if true():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it never came true")


async def texts(url: str, *requests: Request) -> list[tuple[str, ...]]:
    async with client(url) as c:
        done = await asyncio.gather(*map(c.complete, requests))
    return [tuple(choice.text for choice in completion.choices) for completion in done]


@contextlib.asynccontextmanager
async def raw_server(answer: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> AsyncIterator[str]:
    """A server that gives one answer to everything; yields its URL."""
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()
