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
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Annotated, Any, Literal, TypeVar

from aiohttp import web
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from yarl import URL

from cotree.config import Search, SearchRecipe, Thought, Writer
from cotree.decoding import Backend
from cotree.errors import CotreeError, UsageError, spoken_for
from cotree.llm.endpoints import Endpoint, open_endpoints
from cotree.progress import Output
from cotree.search.calls import Calls, Progress
from cotree.search.decode import Decoded, Open, decode, settled
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


_Stop = Annotated[str, Field(min_length=1)]


class _StreamOptions(_Part):
    include_usage: bool = False


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


class _Completion(_Body):
    prompt: str = Field(min_length=1)


_B = TypeVar("_B", bound=_Body)


class _AsWritten:
    """In the place of a tokenizer: the prompt is the text that the client sent."""

    chat_template = "as written"
    bos_token = None

    def apply_chat_template(self, messages: Sequence[Mapping[str, str]], **_: object) -> str:
        return messages[-1]["content"]


class _Refused(Exception):  # noqa: N818 - not every refusal is an error
    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code


class Server:
    """The handlers. `at_once` searches run, as many as `queue` wait, the next is told to come again (429)."""

    def __init__(
        self,
        endpoints: Mapping[str, Endpoint],
        names: Sequence[str],
        recipe: SearchRecipe,
        *,
        strategy: str = "mcts",
        value: str | None = None,
        boxed: bool = False,
        at_once: int = 8,
        queue: int = 64,
        host: str = "127.0.0.1",
        token: str | None = None,
    ) -> None:
        self.endpoints, self.names, self.recipe, self.strategy = endpoints, names, recipe, strategy
        self.task, self.token, self.host = Open(boxed=boxed), token, host
        self.value = settled(self.task, strategy, value, recipe.search)
        self._slots, self._room, self._started = asyncio.Semaphore(at_once), at_once + queue, int(time.time())
        self.there = 0

    def app(self) -> web.Application:
        """The web application."""
        app = web.Application(client_max_size=_BODY_BYTES, middlewares=[self._guard])
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_post("/v1/completions", self._completion)
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
        except _Refused as refused:
            return _error(refused.status, str(refused), refused.param, refused.code)
        except web.HTTPException as error:
            return _error(error.status, error.reason)
        except UsageError as error:
            return _error(400, str(error))
        except CotreeError as error:
            return _error(502, str(error))

    def _check_sender(self, request: web.Request) -> None:
        origin = request.headers.get("Origin")
        try:
            host = URL(f"http://{request.host}").host
            page = host if origin is None else URL(origin).host
        except ValueError:
            host = page = None
        if host is None or (self.host in _LOOPBACK and host not in _LOOPBACK):
            raise _Refused(403, f"this server answers to {self.host}, not to the name that was asked for")
        if page != host:
            raise _Refused(403, "pages of other servers may not ask this one")
        scheme, _, said = request.headers.get("Authorization", "").partition(" ")
        said = said if scheme.casefold() == "bearer" else ""
        open_to_all = self.token is None or request.path == "/health"
        if not open_to_all and not hmac.compare_digest(
            said.encode("utf-8", "surrogateescape"), str(self.token).encode()
        ):
            raise _Refused(401, f"send the server's {TOKEN} as the API key", code="invalid_api_key")

    async def _health(self, request: web.Request) -> web.Response:
        return web.json_response({"status": "ok", "searches": self.there})

    async def _models(self, request: web.Request) -> web.Response:
        about = {"object": "model", "created": self._started, "owned_by": "cotree"}
        return web.json_response({"object": "list", "data": [{"id": name, **about} for name in self.names]})

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        body = await _read(request, _Chat)
        if body.messages[-1].role != "user":
            raise _Refused(400, "the last message must be the user's", "messages")
        messages = [said.plain() for said in body.messages]
        return await self._reply(request, body, messages, self.endpoints, body.max_completion_tokens)

    async def _completion(self, request: web.Request) -> web.StreamResponse:
        body = await _read(request, _Completion)
        endpoints = dict(self.endpoints)
        for name in {body.model, *(w.model for role in self.recipe.roles.values() for w in role)} & endpoints.keys():
            if endpoints[name].tokenizer is None:
                what = f"the backend of `{name}` takes conversations only: ask /v1/chat/completions"
                raise _Refused(400, what, "prompt")
            endpoints[name] = replace(endpoints[name], tokenizer=_AsWritten())
        return await self._reply(request, body, [{"role": "user", "content": body.prompt}], endpoints, None)

    async def _reply(
        self,
        request: web.Request,
        body: _Body,
        messages: list[Message],
        endpoints: Mapping[str, Endpoint],
        budget: int | None,
    ) -> web.StreamResponse:
        if body.model not in self.names:
            what = f"there is no model `{body.model}`; there is {', '.join(self.names)}"
            raise _Refused(404, what, "model", "model_not_found")
        question, settings = self.task.ask(messages), self._settings(body, budget)
        roles = {**self.recipe.roles, "thinker": (Writer(model=body.model),)}
        calls, seed = Calls(None, endpoints, Progress()), self.recipe.seed if body.seed is None else body.seed

        async def search() -> list[Decoded]:
            async with asyncio.TaskGroup() as group:
                found = [
                    group.create_task(
                        decode(
                            self.task, question, calls, roles, settings,
                            strategy=self.strategy, value=self.value, seed=seed + number,
                        )
                    )
                    for number in range(body.n)
                ]  # fmt: skip
            return [one.result() for one in found]

        async with self._turn():
            if body.stream:
                return await self._stream(request, body, search)
            found = await search()
        chat = isinstance(body, _Chat)
        choices = [
            {"index": i, **_said(self._text(best, body), best.reasoning, "message" if chat else "text"), **_end(best)}
            for i, best in enumerate(found)
        ]
        return web.json_response({**_head(body, stream=False), "choices": choices, "usage": _usage(found)})

    def _settings(self, body: _Body, budget: int | None) -> Search:
        """The server's settings with what the request changes."""
        search = self.recipe.search
        asked: dict[str, Any] = {k: v for k in ("temperature", "top_p") if (v := getattr(body, k)) is not None}
        if body.max_tokens is not None:
            answer = search.thoughts.get("answer", Thought()).model_copy(update={"max_tokens": body.max_tokens})
            asked["thoughts"] = {**search.thoughts, "answer": answer}
        if budget is not None:
            least = min(budget, search.stop.tokens or budget)
            asked["stop"] = search.stop.model_copy(update={"tokens": least})
        return search.model_copy(update=asked)

    @asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        if self.there >= self._room:
            raise _Refused(429, "too many searches wait already; ask again later", code="rate_limit_exceeded")
        self.there += 1
        try:
            async with self._slots:
                yield
        finally:
            self.there -= 1

    async def _stream(
        self, request: web.Request, body: _Body, search: Callable[[], Awaitable[list[Decoded]]]
    ) -> web.StreamResponse:
        """Server-sent events: nothing can be said before the search has ended, so until then only comments go out."""
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-store"})
        await response.prepare(request)
        head, chat = _head(body, stream=True), isinstance(body, _Chat)

        async def send(**more: object) -> None:
            await response.write(f"data: {json.dumps({**head, **more})}\n\n".encode())

        searching = asyncio.ensure_future(search())
        try:
            while not (await asyncio.wait({searching}, timeout=_HEARTBEAT))[0]:
                await response.write(b": searching\n\n")
            with spoken_for():
                found = searching.result()
        except CotreeError as error:
            await response.write(f"data: {json.dumps(_problem(502, str(error)))}\n\n".encode())
            return response
        finally:
            searching.cancel()
        for index, best in enumerate(found):
            said = _said(self._text(best, body), best.reasoning, "delta" if chat else "text")
            await send(choices=[{"index": index, **said, "finish_reason": None}])
            nothing: dict[str, object] = {"delta": {}} if chat else {"text": ""}
            await send(choices=[{"index": index, **nothing, **_end(best)}])
        if body.stream_options.include_usage:
            await send(choices=[], usage=_usage(found))
        await response.write(b"data: [DONE]\n\n")
        return response

    def _text(self, best: Decoded, body: _Body) -> str:
        """What is returned as the answer, up to the first stop string."""
        text = best.said if self.task.comparable else spoken(best.said)
        stops = [body.stop] if isinstance(body.stop, str) else body.stop
        return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]


async def _read(request: web.Request, kind: type[_B]) -> _B:
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
        said = "is not supported where answers are decoded with search; leave it out" if unknown else first["msg"]
        raise _Refused(400, f"`{param}`: {said}", param, "unsupported_parameter" if unknown else None) from None
    except (ValueError, AttributeError, RecursionError, LookupError):
        raise _Refused(400, "the body is no JSON object") from None


def _said(text: str, reasoning: str, where: str) -> dict[str, Any]:
    if where == "text":
        return {"text": text, "reasoning": reasoning, "logprobs": None}
    return {where: {"role": "assistant", "content": text, "reasoning_content": reasoning}}


def _end(best: Decoded) -> dict[str, Any]:
    """How it ended, and what is not OpenAI's: the votes and why the search stopped."""
    about = {"votes": best.votes, "chains": best.chains, "stopped": best.stopped}
    return {"finish_reason": "length" if best.cut else "stop", "search": about}


def _head(body: _Body, *, stream: bool) -> dict[str, Any]:
    chat = isinstance(body, _Chat)
    kind = ("chat.completion.chunk" if stream else "chat.completion") if chat else "text_completion"
    name = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
    return {"id": name, "object": kind, "created": int(time.time()), "model": body.model}


def _usage(found: Sequence[Decoded]) -> dict[str, Any]:
    """All that the searches generated and read; `reasoning_tokens` is what did not go into the returned answers."""
    prompt = sum(best.spent.prompt_tokens for best in found)
    completion = sum(best.spent.completion_tokens for best in found)
    returned = sum(best.said_tokens for best in found)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(best.spent.cached_tokens for best in found)},
        "completion_tokens_details": {"reasoning_tokens": max(completion - returned, 0)},
    }


def _problem(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    kind = "invalid_request_error" if status < 429 else "rate_limit_error" if status == 429 else "server_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _error(status: int, message: str, param: str | None = None, code: str | None = None) -> web.Response:
    headers = {"Retry-After": "1"} if status == 429 else None
    return web.json_response(_problem(status, message, param, code), status=status, headers=headers)


def serve(
    backend: Backend,
    *,
    strategy: str = "mcts",
    value: str | None = None,
    boxed: bool = False,
    budget_tokens: int | None = None,
    rollouts: int | None = None,
    seed: int = 0,
    at_once: int = 8,
    host: str = "127.0.0.1",
    port: int = 8000,
    output: Output | None = None,
) -> None:
    """Serve until Ctrl-C (or SIGTERM); says its address when it listens. Port 0: a free one.

    Raises:
        UsageError: the models or settings are wrong, or `host` is not loopback and there is no token.
    """
    token = os.environ.get(TOKEN) or None
    if host not in _LOOPBACK and token is None:
        raise UsageError(f"{host} can be reached by others: set {TOKEN} to a secret that clients send as their API key")
    recipe, said = backend.recipe(budget_tokens, rollouts, seed), output or Output()
    value = settled(Open(boxed=boxed), strategy, value, recipe.search)
    used = recipe.used_models() | {name: recipe.models[name] for name in backend.names()}

    async def run() -> None:
        ended = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, ended.set)
        async with open_endpoints(used, widest=recipe.search.widest) as endpoints:
            server = Server(
                endpoints, backend.names(), recipe, strategy=strategy, value=value, boxed=boxed, at_once=at_once,
                host=host, token=token,
            )  # fmt: skip
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
