"""Plain requests: what an HTTP client alone needs for the very bodies that a search has sent."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import aiohttp


@dataclass(frozen=True)
class Sent:
    """One POST: where to and what."""

    url: str
    body: bytes


@dataclass(frozen=True)
class Replay:
    """What the bare client needed for a list of requests, and what came."""

    seconds: float
    cpu_seconds: float
    replies: list[dict[str, Any]]


@contextmanager
def recorded() -> Iterator[list[Sent]]:
    """Every POST that this process makes through aiohttp while the block runs, in order; to be read after the block.

    What is measured meanwhile pays for an append and no more.
    """
    posted: list[tuple[Any, bytes]] = []
    sent: list[Sent] = []
    original = aiohttp.ClientSession.request

    def request(self: aiohttp.ClientSession, method: str, url: Any, **options: Any) -> Any:
        if method == "POST":
            posted.append((url, options["data"]))
        return original(self, method, url, **options)

    try:
        with patch.object(aiohttp.ClientSession, "request", request):
            yield sent
    finally:
        sent += [Sent(str(url), body) for url, body in posted]


async def replay(sent: Sequence[Sent], in_flight: int) -> Replay:
    """Send the same bytes with the bare client, `in_flight` at once; reads and parses each reply, nothing else."""
    left = iter(sent)
    replies: list[dict[str, Any]] = []
    headers = {"Content-Type": "application/json"}
    timeout = aiohttp.ClientTimeout(total=600)
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), headers=headers, timeout=timeout
    ) as session:

        async def work() -> None:
            for request in left:
                async with session.post(request.url, data=request.body) as reply:
                    replies.append(json.loads(await reply.read()))

        started, cpu = time.perf_counter(), time.process_time()
        await asyncio.gather(*(work() for _ in range(in_flight)))
        return Replay(time.perf_counter() - started, time.process_time() - cpu, replies)
