"""A model server that is not there: the OpenAI completions API over real HTTP on loopback, with faults to order.

Invariant: a reply's text is a pure function of (prompt, seed, index, temperature), whatever the latency, the order of
requests or the faults before it. Faults are chosen by request number (from 0) or drawn at a rate by the server's seed.

In the test's own loop: `async with FakeServer() as server`. In a thread, for tests that kill client processes:
`with FakeServerThread() as server`. As a process: `python -m tests.support.fake_server --port 8000`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import json
import random
import socket
import struct
import threading
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self, get_args

from aiohttp import web

Kind = Literal["400", "429", "500", "reset", "half", "hang", "garbage", "empty", "fewer"]
Habit = Literal["continues", "restarts", "closes", "echoes"]
Reply = Callable[[str, int, int], str]
ASSISTANT = "<assistant>"
WORDS = (
    "we",
    "know",
    "that",
    "the",
    "sum",
    "of",
    "two",
    "numbers",
    "is",
    "less",
    "than",
    "seven",
    "so",
    "count",
    "again",
)


@dataclass(frozen=True)
class Fault:
    """What goes wrong. reset: the connection is cut before the reply; half: amid its body; hang: no reply ever."""

    kind: Kind
    retry_after: float | str | None = None


def count_tokens(text: str) -> int:
    """The fake's tokens are words."""
    return len(text.split())


def draw(*parts: object) -> int:
    """A number that depends on the parts only, the same in every process."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big")


def babble(prompt: str, seed: int, index: int, temperature: float) -> str:
    """3 to 12 words by hash; at temperature 0 all samples are alike, as with a real server."""
    rng = random.Random(draw(prompt, *((seed, index, temperature) if temperature else ())))
    return " " + " ".join(rng.choices(WORDS, k=rng.randint(3, 12)))


def tell(prompt: str, seed: int, index: int) -> str:
    """Text as a greedy model writes it: each word is drawn by all before it, and a word cut short is completed."""
    text = prompt
    for _ in range(60):
        head, _space, partial = text.rpartition(" ")
        word = WORDS[draw(head) % len(WORDS)]
        if word.startswith(partial) and word != partial:
            text += word[len(partial) :]
        else:
            text += " " + WORDS[draw(text) % len(WORDS)]
    return text[len(prompt) :]


class FakeServer:
    """A scripted endpoint. `requests` holds every body in order of arrival, `answered` those that got a whole reply.

    reply: (prompt, seed, index) -> text, instead of babble; `stop` and `max_tokens` are applied to it.
    latency: seconds before each reply, or a range from which (seed, prompt, request seed) draws.
    faults: by request number; fault_rate draws one of fault_kinds for the others.
    usage: how completion tokens are reported for n > 1: `llama.cpp` the first choice's only, `vllm` all; `absurd`: far
        more than were asked for.
    habit: what becomes of the assistant's words in a prompt (in `/v1/completions`, those after `<assistant>`): they are
        continued, dropped, closed as a turn before a new one, or continued and repeated.
    ignores: parts of a request that are not heeded. keeps_stop: a stop string stays in the text.
    chat_only: there is no `/v1/completions`.
    models: what `/v1/models` lists (None: no such page). Any model's name is answered unless `only_listed`.
    step: what ends a step in a conversation that `/pooling` scores.
    api_key: what clients must send; a refusal quotes what they sent. log: a file that gets each body as a line.
    """

    def __init__(
        self,
        *,
        reply: Reply | None = None,
        latency: float | tuple[float, float] = 0.0,
        faults: Mapping[int, Fault | Kind] | None = None,
        fault_rate: float = 0.0,
        fault_kinds: Sequence[Kind] = ("429", "500", "reset", "half", "garbage", "empty", "fewer"),
        seed: int = 0,
        usage: Literal["llama.cpp", "vllm", "absurd"] = "llama.cpp",
        cached_tokens: int = 0,
        habit: Habit = "continues",
        ignores: Collection[Literal["stop", "n", "logprobs"]] = (),
        keeps_stop: bool = False,
        chat_only: bool = False,
        models: Sequence[str] | None = ("fake",),
        only_listed: bool = False,
        api_key: str | None = None,
        step: str = "<extra_0>",
        port: int = 0,
        log: str | None = None,
    ) -> None:
        self.reply, self.latency, self.seed = reply, latency, seed
        self.faults, self.fault_rate, self.fault_kinds = dict(faults or {}), fault_rate, fault_kinds
        self.usage, self.cached_tokens = usage, cached_tokens
        self.habit, self.ignores, self.keeps_stop, self.chat_only = habit, ignores, keeps_stop, chat_only
        self.models, self.only_listed, self.api_key = models, only_listed, api_key
        self.step = step
        self.port, self.log = port, log
        self.requests: list[dict[str, Any]] = []
        self.answered: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.in_flight = self.most_in_flight = self.dropped = 0
        self._runner: web.AppRunner | None = None

    @property
    def calls(self) -> int:
        return len(self.requests)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> None:
        """Listen; after a `stop`, again on the same port."""
        app = web.Application(client_max_size=1 << 26)
        if not self.chat_only:
            app.router.add_post("/v1/completions", self._completions)
        app.router.add_post("/v1/chat/completions", self._completions)
        app.router.add_post("/pooling", self._completions)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/health", self._health)
        # Handlers are cancelled when their client goes away, as a server that frees its slot does.
        self._runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port, reuse_address=True)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        """Close all connections; from now on they are refused."""
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        body: dict[str, Any] = await request.json()
        number = len(self.requests)
        self.requests.append(body)
        self.headers.append(dict(request.headers))
        if self.log:
            with open(self.log, "a") as file:  # noqa: ASYNC230 (one short line, and it must be there before the reply)
                file.write(json.dumps(body) + "\n")
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            return await self._answer(request, body, self._fault(number))
        except asyncio.CancelledError:
            self.dropped += 1
            raise
        finally:
            self.in_flight -= 1

    def _fault(self, number: int) -> Fault | None:
        fault = self.faults.get(number)
        if fault is None and self.fault_rate:
            rng = random.Random(draw(self.seed, number))
            fault = rng.choice(self.fault_kinds) if rng.random() < self.fault_rate else None
        return Fault(fault) if isinstance(fault, str) else fault

    async def _answer(self, request: web.Request, body: dict[str, Any], fault: Fault | None) -> web.StreamResponse:
        if self._is_stranger(request):
            return self._unknown(request)
        if self.only_listed and body.get("model") not in (self.models or ()):
            return _error(404, f"The model `{body.get('model')}` does not exist.")
        chat = "messages" in body
        scores = request.path == "/pooling"
        if chat and not scores and (refused := _refused(body)):
            return _error(400, refused)
        seconds = self.latency
        if not isinstance(seconds, int | float):
            low, high = seconds
            seconds = (
                low
                + (high - low) * draw(self.seed, str(body.get("messages") or body["prompt"]), body.get("seed")) / 2**64
            )
        if seconds:
            await asyncio.sleep(seconds)
        kind = fault.kind if fault else None
        if kind == "400":
            return _error(400, "the prompt is longer than the context of 8 tokens")
        if fault and kind in ("429", "500"):
            headers = {} if fault.retry_after is None else {"Retry-After": str(fault.retry_after)}
            return _error(int(fault.kind), "slow down" if kind == "429" else "CUDA\nout of memory", headers)
        if kind == "hang":
            await asyncio.Event().wait()
        if kind == "reset":
            return _cut(request)
        if kind == "garbage":
            return web.Response(text='{"choices": [{"text": "we', content_type="application/json")
        payload = (
            self._scores(body)
            if scores
            else self._payload(body, {"empty": 0, "fewer": body.get("n", 1) - 1}.get(str(kind)))
        )
        content = json.dumps(payload).encode()
        if kind == "half":
            response = web.StreamResponse(headers={"Content-Type": "application/json"})
            response.content_length = len(content)
            await response.prepare(request)
            await response.write(content[: len(content) // 2])
            await asyncio.sleep(0.01)
            return _cut(request)
        if kind is None:
            self.answered.append(body)
        return web.Response(body=content, content_type="application/json")

    def _payload(self, body: dict[str, Any], only: int | None) -> dict[str, Any]:
        seed, temperature, chat = body.get("seed") or 0, body.get("temperature", 1.0), "messages" in body
        prompt = _render(body["messages"]) if chat else body["prompt"]
        head, assistant, begun = prompt.rpartition(ASSISTANT)
        if self.habit == "restarts":
            prompt = head + assistant
        elif self.habit == "closes" and begun:
            prompt = f"{prompt}</s>{ASSISTANT}"
        stop = () if "stop" in self.ignores else body.get("stop") or ()
        wanted = 1 if "n" in self.ignores else body.get("n", 1)
        choices: list[dict[str, Any]] = []
        counts = []
        for index in range(wanted if only is None else only):
            whole = self.reply(prompt, seed, index) if self.reply else babble(prompt, seed, index, temperature)
            text, finish, tokens = _cut_text(whole, stop, body.get("max_tokens", 16))
            if (self.keeps_stop or body.get("include_stop_str_in_output")) and finish == "stop":
                text += next((s for s in stop if whole.startswith(text + s)), "")
            if self.habit == "echoes":
                text = (begun if chat else prompt) + text
            said = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
            logprobs = self._logprobs(text, tokens, chat, len(text) < len(whole)) if body.get("logprobs") else None
            choices.append({"index": index, **said, "finish_reason": finish, "logprobs": logprobs})
            if body.get("prompt_logprobs") is not None:  # vLLM's: none for the first token, each with its alternatives
                known = [{word: {"logprob": -(draw(word) % 1000) / 400, "rank": 1}} for word in prompt.split()[1:]]
                choices[-1]["prompt_logprobs"] = [None, *known]
            counts.append(tokens)
        completion_tokens = 10**7 if self.usage == "absurd" else sum(counts if self.usage == "vllm" else counts[:1])
        prompt_tokens = count_tokens(prompt)
        usage = {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }
        kind = "chat.completion" if chat else "text_completion"
        return {"object": kind, "model": body.get("model"), "choices": choices, "usage": usage}

    def _logprobs(self, text: str, tokens: int, chat: bool, stopped: bool) -> dict[str, Any] | None:
        """A number for each token, drawn by its word; in vLLM's form for completions, or as all write it for chat."""
        words = [*text.split(), "</s>"][:tokens]
        values = [-(draw(word) % 1000) / 400 for word in words]
        # llama.cpp leaves out the tokens of the stop string, be they part of the text.
        if "logprobs" in self.ignores or (self.usage == "llama.cpp" and stopped and len(words) < 3):
            return None
        if self.usage == "vllm" and not chat:
            return {"tokens": words, "token_logprobs": values}
        return {"content": [{"token": w, "logprob": v} for w, v in zip(words, values, strict=True)]}

    def _scores(self, body: dict[str, Any]) -> dict[str, Any]:
        """vLLM's pooling reply of a step pooler: (bad, good) for each step, good for those of three words or more."""
        last = body["messages"][-1]["content"]
        steps = last.split(self.step)[:-1] if self.step in last else [last]
        good = [0.875 if count_tokens(step) > 2 else 0.25 for step in steps]
        pooled = [[1 - score, score] for score in good]
        usage = {"prompt_tokens": count_tokens(_render(body["messages"]))}
        return {"object": "list", "data": [{"index": 0, "object": "pooling", "data": pooled}], "usage": usage}

    async def _models(self, request: web.Request) -> web.StreamResponse:
        if self._is_stranger(request):
            return self._unknown(request)
        if self.models is None:
            return _error(404, "no such page")
        return web.json_response({"object": "list", "data": [{"id": name, "object": "model"} for name in self.models]})

    def _is_stranger(self, request: web.Request) -> bool:
        return self.api_key is not None and request.headers.get("Authorization") != f"Bearer {self.api_key}"

    def _unknown(self, request: web.Request) -> web.Response:
        return _error(401, f"Incorrect API key provided: {request.headers.get('Authorization')}")

    async def _health(self, request: web.Request) -> web.StreamResponse:
        return web.json_response({"status": "ok"})


def _render(messages: Sequence[Mapping[str, str]]) -> str:
    """The fake's chat template: a last message of the assistant is left open."""
    open_turn = messages[-1]["role"] == "assistant"
    turns = "".join(f"<{message['role']}>{message['content']}" for message in messages)
    return turns if open_turn else turns + ASSISTANT


def _refused(body: Mapping[str, Any]) -> str:
    """What vLLM and llama.cpp refuse in a conversation that is to be continued."""
    if body.get("continue_final_message", False):
        if body.get("add_generation_prompt", True):
            return "Cannot set both add_generation_prompt and continue_final_message to true."
        if body["messages"][-1]["role"] != "assistant":
            return "continue_final_message is set but the final message is not from the assistant."
    elif body["messages"][-1]["role"] == "assistant":
        return "The last message is from the assistant; consider continue_final_message."
    return ""


def _cut_text(text: str, stop: Sequence[str], max_tokens: int) -> tuple[str, Literal["stop", "length"], int]:
    """What a server makes of `text`: (text without the stop string, finish_reason, tokens with the stop token)."""
    ends = [text.index(s) for s in stop if s in text]
    shown = text[: min(ends)] if ends else text
    if count_tokens(shown) < max_tokens:
        return shown, "stop", count_tokens(shown) + 1
    rest = shown.split(None, max_tokens)
    kept = shown[: len(shown) - len(rest[max_tokens])] if len(rest) > max_tokens else shown
    return kept.rstrip(), "length", max_tokens


def _error(status: int, message: str, headers: Mapping[str, str] | None = None) -> web.Response:
    return web.json_response({"error": {"code": status, "message": message}}, status=status, headers=headers)


def _cut(request: web.Request) -> web.StreamResponse:
    """Reset the connection: with a zero linger time the kernel sends RST, not FIN."""
    assert request.transport is not None
    connection: socket.socket = request.transport.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    request.transport.abort()
    return web.Response()


class FakeServerThread:
    """A `FakeServer` in a thread with a loop of its own: `.url`, `.calls`, `.requests`; `stop` and `start` again."""

    def __init__(self, **options: Any) -> None:
        self.server = FakeServer(**options)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    @property
    def url(self) -> str:
        return self.server.url

    @property
    def calls(self) -> int:
        return self.server.calls

    @property
    def requests(self) -> list[dict[str, Any]]:
        return self.server.requests

    def start(self) -> None:
        self._run(self.server.start())

    def stop(self) -> None:
        self._run(self.server.stop())

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    def __enter__(self) -> Self:
        self._thread.start()
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()


async def _serve(server: FakeServer) -> None:
    async with server:
        print(server.url, flush=True)
        await asyncio.Event().wait()


def main() -> None:
    """Serve until killed; the first line of stdout is the URL."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--latency", type=float, nargs="+", default=[0.0], metavar="SECONDS", help="one, or low high")
    parser.add_argument("--fault-rate", type=float, default=0.0)
    parser.add_argument("--fault-kinds", nargs="+", choices=get_args(Kind), default=["429", "500", "reset", "half"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log", help="a file that gets each request's body as a line")
    options = vars(parser.parse_args())
    low, high = options["latency"][0], options["latency"][-1]
    options["latency"] = low if low == high else (low, high)
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_serve(FakeServer(**options)))


if __name__ == "__main__":
    main()
