"""Eight servers, each with a rate limit of its own, beside one: what the fleet gives, and what the loss of one costs.

    python -m benchmarks.fleet

A search grows trees of letters questions against servers in this process, each of which answers so many requests a
second and lets the others wait. Prints requests a second of one and of all, their ratio, and, for a run in which one
server dies half-way, its seconds beside what its share alone would cost. Time that passes before a server counts as
lost is shortened as the run is, from 30 s to 1 s.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from benchmarks.search_server import Connection, completion
from benchmarks.search_stub import grow, stub_settings

from cotree.models.endpoints import open_endpoints
from cotree.models.settings import Model
from cotree.models.weights import locate
from cotree.tasks import task

SERVERS, RATE, TREES, TAKEOVER = 8, 8.0, 40, 1.0
_LATENCY = 0.05


class Server:
    """Answers `rate` requests a second in the order of their arrival, until it dies."""

    def __init__(self, rate: float) -> None:
        self.gap, self.free_at, self.answered, self.url = 1 / rate, 0.0, 0, ""
        self.connections: set[Limited] = set()
        self.listening: asyncio.Server

    async def start(self) -> None:
        loop = asyncio.get_running_loop()
        self.listening = await loop.create_server(lambda: Limited(self), "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self.listening.sockets[0].getsockname()[1]}"

    def delay(self) -> float:
        """Seconds until the reply of a request that has just come."""
        now = asyncio.get_running_loop().time()
        self.free_at = max(self.free_at, now) + self.gap
        return self.free_at - now + _LATENCY

    def die(self) -> None:
        """Refuse and cut all connections."""
        self.listening.close()
        for connection in list(self.connections):
            connection.transport.abort()


class Limited(Connection):
    """A connection to a server with a rate limit."""

    def __init__(self, server: Server) -> None:
        super().__init__(_LATENCY)
        self.server = server

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.server.connections.add(self)

    def connection_lost(self, error: Exception | None) -> None:
        self.server.connections.discard(self)

    def answer(self, body: dict[str, Any]) -> None:
        self.loop.call_later(self.server.delay(), self.reply, completion(body))
        self.server.answered += 1


@asynccontextmanager
async def servers(count: int, rate: float) -> AsyncIterator[list[Server]]:
    """So many servers that listen."""
    async with AsyncExitStack() as stack:
        made = [Server(rate) for _ in range(count)]
        for each in made:
            await each.start()
            stack.callback(each.die)
        yield made


async def measure(
    count: int, trees: int, seed: int, *, rate: float = RATE, dies_after: float | None = None
) -> dict[str, float]:
    """Grow so many trees a server; `dies_after`: seconds after which one of the servers dies."""
    letters = task("letters")
    asked = [(letters, question) for question in letters.questions(None, trees * count)]
    settings = stub_settings(rollouts=4, leaves_per_round=2, trees_in_flight=12 * count)
    async with servers(count, rate) as fleet:
        urls = tuple(each.url for each in fleet)
        model = Model(url=urls, tokenizer=str(locate("smollm2-135m-instruct")), max_in_flight=16)
        async with open_endpoints({"stub": model}) as endpoints:
            for client in endpoints["stub"].clients:
                client.takeover = TAKEOVER
            if dies_after is not None:
                asyncio.get_running_loop().call_later(dies_after, fleet[-1].die)
            started = time.perf_counter()
            grown = await grow(endpoints, settings, asked, seed)
            seconds = time.perf_counter() - started
        answered = [each.answered for each in fleet]
    counts = {"trees": len(asked), "calls": grown.calls, "tokens": grown.tokens, "least_asked": min(answered)}
    sizes = {"store_bytes": grown.store_bytes, "journal_bytes": grown.journal_bytes}
    return {"seconds": seconds, "cpu_seconds": grown.cpu_seconds, "rate": grown.calls / seconds, **counts, **sizes}


async def compare(count: int, trees: int, seed: int) -> dict[str, Any]:
    """One server, all of them, and all of which one dies half-way."""
    one = await measure(1, trees, seed)
    whole = await measure(count, trees, seed)
    half = whole["seconds"] / 2
    shrunk = await measure(count, trees, seed, dies_after=half)
    share = half + half * count / (count - 1)
    return {
        "servers": count,
        "seed": seed,
        "one_requests_per_second": one["rate"],
        "all_requests_per_second": whole["rate"],
        "ratio_to_one": whole["rate"] / one["rate"],
        "seconds": whole["seconds"],
        "seconds_with_a_loss": shrunk["seconds"],
        "loss_beyond_its_share": shrunk["seconds"] / share - 1,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--servers", type=int, default=SERVERS)
    parser.add_argument("--trees", type=int, default=TREES, help="a server")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(json.dumps(asyncio.run(compare(options.servers, options.trees, options.seed)), indent=1))


if __name__ == "__main__":
    main()
