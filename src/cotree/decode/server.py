"""An OpenAI-compatible server whose answers are decoded with search, in front of any backend.

Invariants: every parameter that is taken changes the outcome, any other is refused; what is reported as used was really
generated or read. A client that leaves takes its search and the backend's requests with it. A page in a browser cannot
reach a loopback server through a name of its own (Host and Origin are checked), and beyond loopback a token is needed.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import os
import signal
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

from aiohttp import web
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from yarl import URL

from cotree.base.errors import CotreeError, UsageError, spoken_for
from cotree.base.progress import Output
from cotree.decode.answer import Backend
from cotree.decode.strategies import Decoded, Open, decode, settled
from cotree.experiment.recipe import Search, Thought, Writer
from cotree.models.chat import Prompt
from cotree.models.client import Counters
from cotree.models.endpoints import Endpoint, open_endpoints
from cotree.search.calls import Calls, Progress
from cotree.tasks.base import Message
from cotree.tasks.extract import spoken

TOKEN = "COTREE_TOKEN"  # noqa: S105 - the variable's name
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_BODY_BYTES = 1 << 20
# A comment now and then keeps proxies from closing a stream in which nothing is said yet.
_HEARTBEAT = 10.0
# Values by which clients ask for nothing.
_NOTHING = {"frequency_penalty": 0, "presence_penalty": 0, "logprobs": False, "echo": False, "store": False}


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _Text(_Part):
    type: Literal["text"]
    text: str


class _Said(_Part):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[_Text]
    # What this server said with an answer comes back with it in the next turn; thinking stays behind.
    reasoning_content: str | None = None

    def plain(self) -> Message:
        text = self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class _StreamOptions(_Part):
    include_usage: bool = False


_Stop = Annotated[str, Field(min_length=1)]


class _Body(_Part):
    """What both addresses take. `max_tokens` bounds the answer that is returned."""

    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    n: int = Field(1, ge=1, le=8)
    seed: int | None = None
    stop: _Stop | Annotated[list[_Stop], Field(max_length=4)] = []
    stream: bool = False
    stream_options: _StreamOptions = _StreamOptions()


class _Chat(_Body):
    """`max_completion_tokens` bounds all that is generated, the reasoning included: it is the search's budget."""

    messages: list[_Said] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)

    @field_validator("messages")
    @classmethod
    def _asks(cls, messages: list[_Said]) -> list[_Said]:
        if messages[-1].role != "user":
            raise ValueError("the last message must be the user's")
        return messages

    def conversation(self) -> list[Message]:
        return [said.plain() for said in self.messages]


class _Completion(_Body):
    prompt: str = Field(min_length=1)
    max_completion_tokens: ClassVar = None

    def conversation(self) -> list[Message]:
        return [{"role": "user", "content": self.prompt}]


_Asked = _Chat | _Completion


class _AsWritten(Endpoint):
    """A model whose prompt is the text that the client sent."""

    def begin(self, messages: Sequence[Mapping[str, str]]) -> Prompt:
        return Prompt(messages[-1]["content"])


class _Refused(Exception):  # noqa: N818 - not every refusal is an error
    """A refusal in OpenAI's form: `status` and `body`."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        kind = "invalid_request_error" if status < 429 else "rate_limit_error" if status == 429 else "server_error"
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


class Server:
    """The handlers. `at_once` searches run, as many as `queue` wait, the next is told to come again (429).

    `endpoints` are opened by whoever serves.
    """

    endpoints: Mapping[str, Endpoint]

    def __init__(
        self,
        backend: Backend,
        *,
        strategy: str = "mcts",
        value: str | None = None,
        boxed: bool = False,
        at_once: int = 8,
        queue: int = 64,
        host: str = "127.0.0.1",
    ) -> None:
        self.names, self.recipe = backend.names(), backend.recipe()
        self.task, self.strategy = Open(boxed=boxed), strategy
        self.value = settled(self.task, strategy, value, self.recipe.search)
        self.host, self.token = host, os.environ.get(TOKEN)
        if host not in _LOOPBACK and not self.token:
            raise UsageError(f"{host} can be reached by others: set {TOKEN} to a secret that clients send as API key")
        self._slots, self._room, self._started = asyncio.Semaphore(at_once), at_once + queue, int(time.time())
        self.there = 0

    def app(self) -> web.Application:
        """The web application."""
        app = web.Application(client_max_size=_BODY_BYTES, middlewares=[self._guard])
        app.router.add_post("/v1/chat/completions", partial(self._reply, _Chat))
        app.router.add_post("/v1/completions", partial(self._reply, _Completion))
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/health", self._health)
        return app

    @web.middleware
    async def _guard(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        """Who may ask; and every refusal in OpenAI's form."""
        try:
            self._check_sender(request)
            with spoken_for():
                return await handler(request)
        except _Refused as error:
            refused = error
        except web.HTTPException as error:
            refused = _Refused(error.status, error.reason)
        except CotreeError as error:
            refused = _Refused(400 if isinstance(error, UsageError) else 502, str(error))
        headers = {"Retry-After": "1"} if refused.status == 429 else None
        return web.json_response(refused.body, status=refused.status, headers=headers)

    def _check_sender(self, request: web.Request) -> None:
        origin = request.headers.get("Origin")
        try:
            host = URL(f"http://{request.host}").host
            page = host if origin is None else URL(origin).host
        except ValueError:
            host = page = None
        if host is None or page != host or (self.host in _LOOPBACK and host not in _LOOPBACK):
            raise _Refused(403, f"this server answers to {self.host} by no other name, and to no other server's pages")
        if not self.token or request.path == "/health":
            return
        scheme, _, said = request.headers.get("Authorization", "").partition(" ")
        same = hmac.compare_digest(said.encode("utf-8", "surrogateescape"), self.token.encode())
        if scheme.casefold() != "bearer" or not same:
            raise _Refused(401, f"send the server's {TOKEN} as the API key", code="invalid_api_key")

    async def _health(self, request: web.Request) -> web.Response:
        return web.json_response({"status": "ok", "searches": self.there})

    async def _models(self, request: web.Request) -> web.Response:
        about = {"object": "model", "created": self._started, "owned_by": "cotree"}
        return web.json_response({"object": "list", "data": [{"id": name, **about} for name in self.names]})

    async def _reply(self, kind: type[_Asked], request: web.Request) -> web.StreamResponse:
        body = await _read(request, kind)
        if body.model not in self.names:
            what = f"there is no model `{body.model}`; there is {', '.join(self.names)}"
            raise _Refused(404, what, "model", "model_not_found")
        roles = {**self.recipe.roles, "thinker": (Writer(model=body.model),)}
        endpoints = dict(self.endpoints)
        for name in {writer.model for role in roles.values() for writer in role} if kind is _Completion else ():
            if endpoints[name].tokenizer is None:
                what = f"the backend of `{name}` takes conversations only: ask /v1/chat/completions"
                raise _Refused(400, what, "prompt")
            endpoints[name] = _AsWritten(**vars(endpoints[name]))
        calls, question = Calls(None, endpoints, Progress()), self.task.ask(body.conversation())
        settings, first = self._settings(body), self.recipe.seed if body.seed is None else body.seed

        async def search() -> list[Decoded]:
            async with asyncio.TaskGroup() as group:
                found = [
                    group.create_task(
                        decode(
                            self.task, question, calls, roles, settings,
                            strategy=self.strategy, value=self.value, seed=seed,
                        )
                    )
                    for seed in range(first, first + body.n)
                ]  # fmt: skip
            return [one.result() for one in found]

        if self.there >= self._room:
            raise _Refused(429, "too many searches wait already; ask again later", code="rate_limit_exceeded")
        self.there += 1
        try:
            async with self._slots:
                if body.stream:
                    return await self._stream(request, body, search)
                found = await search()
        finally:
            self.there -= 1
        choices = [self._choice(body, index, best) for index, best in enumerate(found)]
        return web.json_response({**_head(body), "choices": choices, "usage": _usage(found)})

    def _settings(self, body: _Asked) -> Search:
        """The server's settings with what the request changes."""
        search = self.recipe.search
        asked: dict[str, Any] = {k: v for k in ("temperature", "top_p") if (v := getattr(body, k)) is not None}
        if body.max_tokens is not None:
            answer = search.thoughts.get("answer", Thought()).model_copy(update={"max_tokens": body.max_tokens})
            asked["thoughts"] = {**search.thoughts, "answer": answer}
        if body.max_completion_tokens is not None:
            least = min(body.max_completion_tokens, search.stop.tokens or body.max_completion_tokens)
            asked["stop"] = search.stop.model_copy(update={"tokens": least})
        return search.model_copy(update=asked)

    async def _stream(
        self, request: web.Request, body: _Asked, search: Callable[[], Awaitable[list[Decoded]]]
    ) -> web.StreamResponse:
        """Server-sent events: nothing can be said before the search has ended, so until then only comments go out."""
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-store"})
        await response.prepare(request)
        head = _head(body)

        async def send(data: dict[str, Any]) -> None:
            await response.write(f"data: {json.dumps(data)}\n\n".encode())

        searching = asyncio.ensure_future(search())
        try:
            while not (await asyncio.wait({searching}, timeout=_HEARTBEAT))[0]:
                await response.write(b": searching\n\n")
            with spoken_for():
                found = searching.result()
        except CotreeError as error:
            await send(_Refused(502, str(error)).body)
            return response
        finally:
            searching.cancel()
        for index, best in enumerate(found):
            await send({**head, "choices": [self._choice(body, index, best)]})
        if body.stream_options.include_usage:
            await send({**head, "choices": [], "usage": _usage(found)})
        await response.write(b"data: [DONE]\n\n")
        return response

    def _choice(self, body: _Asked, index: int, best: Decoded) -> dict[str, Any]:
        """An answer, up to the first stop string, and what is not OpenAI's: the votes and why the search stopped."""
        text = best.said if self.task.comparable else spoken(best.said)
        stops = [body.stop] if isinstance(body.stop, str) else body.stop
        text = text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]
        said: dict[str, Any] = {"text": text, "reasoning": best.reasoning, "logprobs": None}
        if isinstance(body, _Chat):
            message = {"role": "assistant", "content": text, "reasoning_content": best.reasoning}
            said = {"delta" if body.stream else "message": message}
        about = {"votes": best.votes, "chains": best.chains, "stopped": best.stopped}
        return {"index": index, **said, "finish_reason": "length" if best.cut else "stop", "search": about}


async def _read(request: web.Request, kind: type[_Asked]) -> _Asked:
    try:
        raw = await request.json()
        asked = {key: told for key, told in raw.items() if told is not None and _NOTHING.get(key, _NOTHING) != told}
        if isinstance(asked.get("messages"), list):
            asked["messages"] = [{k: v for k, v in said.items() if v is not None} for said in asked["messages"]]
        return kind.model_validate(asked)
    except ValidationError as error:
        first = error.errors()[0]
        param = ".".join(map(str, first["loc"]))
        unknown = first["type"] == "extra_forbidden"
        said = first["msg"].removeprefix("Value error, ")
        if unknown:
            said = "is not supported where answers are decoded with search; leave it out"
        raise _Refused(400, f"`{param}`: {said}", param, "unsupported_parameter" if unknown else None) from None
    except (ValueError, AttributeError, RecursionError, LookupError):
        raise _Refused(400, "the body is no JSON object") from None


def _head(body: _Asked) -> dict[str, Any]:
    name, kind = "cmpl", "text_completion"
    if isinstance(body, _Chat):
        name, kind = "chatcmpl", "chat.completion.chunk" if body.stream else "chat.completion"
    return {"id": f"{name}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": body.model}


def _usage(found: Sequence[Decoded]) -> dict[str, Any]:
    """All that the searches generated and read; `reasoning_tokens` is what did not go into the returned answers."""
    spent = sum((best.spent for best in found), Counters())
    returned = sum(best.said_tokens for best in found)
    return {
        "prompt_tokens": spent.prompt_tokens,
        "completion_tokens": spent.completion_tokens,
        "total_tokens": spent.prompt_tokens + spent.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": spent.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": max(spent.completion_tokens - returned, 0)},
    }


def serve(
    backend: Backend,
    *,
    strategy: str = "mcts",
    value: str | None = None,
    boxed: bool = False,
    at_once: int = 8,
    host: str = "127.0.0.1",
    port: int = 8000,
    output: Output | None = None,
) -> None:
    """Serve until Ctrl-C (or SIGTERM); says its address when it listens. Port 0: a free one.

    Raises:
        UsageError: the models or settings are wrong, or `host` is not loopback and there is no token.
    """
    server = Server(backend, strategy=strategy, value=value, boxed=boxed, at_once=at_once, host=host)
    recipe, said = server.recipe, output or Output()
    used = recipe.used_models() | {name: recipe.models[name] for name in server.names}

    async def run() -> None:
        ended = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, ended.set)
        async with open_endpoints(used, widest=recipe.search.widest) as server.endpoints:
            # A handler ends when its client leaves, and the search with it.
            runner = web.AppRunner(server.app(), access_log=None, handler_cancellation=True, shutdown_timeout=1.0)
            await runner.setup()
            try:
                await web.TCPSite(runner, host, port).start()
            except OSError as error:
                await runner.cleanup()
                raise UsageError(f"cannot listen on {host}:{port}: {error.strerror}; choose another --port") from None
            where = f"[{host}]" if ":" in host else host
            said.say(
                f"serving {', '.join(server.names)} at http://{where}:{runner.addresses[0][1]}/v1 (Ctrl-C ends it)"
            )
            await ended.wait()
            await runner.cleanup()
            said.say("closed")

    asyncio.run(run())
