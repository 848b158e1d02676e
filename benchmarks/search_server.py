"""A model server that is never the bottleneck: fixed-shape completions, a fixed latency, no limit.

    python -m benchmarks.search_server SECONDS

Prints its URL. Bare HTTP/1.1 on an asyncio protocol, a tenth of a web framework's work a request; the texts depend on
the request's seed and the sample's number alone. `GET /stats` gives requests answered and CPU seconds spent.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


@contextmanager
def serving(latency: float) -> Iterator[str]:
    """The server in a process of its own; gives its URL."""
    command = [sys.executable, "-m", "benchmarks.search_server", str(latency)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
    finally:
        process.terminate()
        process.wait()


def cpu_ms_per_request(url: str) -> float:
    """What the server itself has used so far."""
    with urllib.request.urlopen(f"{url}/stats") as reply:
        stats = json.loads(reply.read())
    return float(1000 * stats["cpu_seconds"] / stats["answered"])


def completion(body: dict[str, Any]) -> bytes:
    """`n` samples: a number from 1 to 3 for an answer (a third is right for the letters), else twenty words."""
    n, seed = body.get("n", 1), body.get("seed") or 0
    answer = body["prompt"].endswith("{")
    texts = [
        str(1 + (seed + i) % 3)
        if answer
        else f" I look at letter {seed % 9973 + i} of the word and count it, then I go on to the next one."
        for i in range(n)
    ]
    tokens = (2 if answer else 24) * n
    return json.dumps(
        {
            "object": "text_completion",
            "choices": [{"index": i, "text": text, "finish_reason": "stop"} for i, text in enumerate(texts)],
            "usage": {"prompt_tokens": len(body["prompt"]) // 4, "completion_tokens": tokens},
        }
    ).encode()


class Connection(asyncio.Protocol):
    """One keep-alive connection. Clients send a request when they have the last reply, so replies cannot cross."""

    answered = 0

    def __init__(self, latency: float) -> None:
        self.latency, self.buffer = latency, b""
        self.loop = asyncio.get_running_loop()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        head, end, body = self.buffer.partition(b"\r\n\r\n")
        if not end:
            return
        length = head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0]
        if len(body) < int(length or 0):
            return
        self.buffer = b""
        if head.startswith(b"GET /stats"):
            self.reply(json.dumps({"answered": Connection.answered, "cpu_seconds": time.process_time()}).encode())
        elif head.startswith(b"GET"):
            self.reply(b'{"object": "list", "data": [{"id": "default"}]}')
        else:
            self.answer(json.loads(body))

    def answer(self, body: dict[str, Any]) -> None:
        self.loop.call_later(self.latency, self.reply, completion(body))
        Connection.answered += 1

    def reply(self, content: bytes) -> None:
        if not self.transport.is_closing():
            head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
            self.transport.write(head.encode() + content)


async def main() -> None:
    latency = float(sys.argv[1])
    server = await asyncio.get_running_loop().create_server(lambda: Connection(latency), "127.0.0.1", 0, backlog=4096)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
