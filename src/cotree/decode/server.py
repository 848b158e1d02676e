"""An OpenAI-compatible server that answers with search, in front of any backend.

Invariant: when a client disconnects, its search and backend requests are cancelled. Host and Origin are checked against
DNS rebinding from a browser page, and a token is required beyond loopback.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from functools import partial
from typing import Any

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.typedefs import Handler

from cotree.base.errors import CotreeError, RefusedError, UsageError, first_cotree_error
from cotree.base.progress import Output
from cotree.base.serving import LOOPBACK, TOKEN, is_foreign, is_same_secret, listen
from cotree.decode.answer import read_settings
from cotree.decode.protocol import Body, ChatBody, Refusal, TextBody, read_body, reply_json, settings_for_request
from cotree.decode.strategies import Decoded, OpenTask, choose_value, search_answer
from cotree.models.endpoints import Endpoint, open_endpoints
from cotree.models.wire import Prompt
from cotree.search.journal import SearchModels
from cotree.search.settings import Role, Writer

_BODY_BYTES = 1 << 20
# Seconds between comments that keep proxies from closing a stream without data.
_HEARTBEAT = 10.0
Searches = Coroutine[Any, Any, list[Decoded]]


class _UnrenderedEndpoint(Endpoint):
    """An endpoint whose prompt is the client's text, without a chat template (for `/v1/completions`)."""

    def prompt(self, messages: Sequence[Mapping[str, str]]) -> Prompt:
        return Prompt(messages[-1]["content"])


class Server:
    """HTTP request handlers. `at_once` searches run, up to `queue` wait, further ones get status 429.

    endpoints: to be set before the first request. searches: number running or waiting.
    """

    endpoints: Mapping[str, Endpoint]

    def __init__(
        self,
        models: Sequence[str],
        *,
        strategy: str = "mcts",
        value: str | None = None,
        boxed: bool = False,
        seed: int = 0,
        at_once: int = 8,
        queue: int = 64,
        host: str = "127.0.0.1",
        **options: Any,
    ) -> None:
        self.settings, self.seed = read_settings(models, **options), seed
        self.names = list(self.settings.models)[: len(models)]
        self.task, self.strategy = OpenTask(boxed=boxed), strategy
        self.value = choose_value(self.task, strategy, value, self.settings)
        self.host, self.token = host, os.environ.get(TOKEN)
        if host not in LOOPBACK and not self.token:
            raise UsageError(f"{host} can be reached by others: set {TOKEN} to a secret that clients send as API key")
        self.searches = 0
        self._slots, self._max_searches, self._started = asyncio.Semaphore(at_once), at_once + queue, int(time.time())

    def app(self) -> web.Application:
        """The web application."""
        app = web.Application(client_max_size=_BODY_BYTES, middlewares=[self._refuse_in_openai_form])
        app.router.add_post("/v1/chat/completions", partial(self._answer, ChatBody))
        app.router.add_post("/v1/completions", partial(self._answer, TextBody))
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/v1/models/{name:.+}", self._models)
        app.router.add_get("/health", self._health)
        return app

    @web.middleware
    async def _refuse_in_openai_form(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Middleware: check the sender, and convert all errors to OpenAI's JSON."""
        try:
            self._check_sender(request)
            with first_cotree_error():
                return await handler(request)
        except Refusal as error:
            refusal = error
        except web.HTTPException as error:
            refusal = Refusal(error.status, error.reason)
        except CotreeError as error:
            refusal = _refusal_of(error)
        headers = {"Retry-After": "1"} if refusal.status == 429 else None
        return web.json_response(refusal.body, status=refusal.status, headers=headers)

    def _check_sender(self, request: web.Request) -> None:
        """Refuse an unknown Host, a foreign Origin, or a wrong token."""
        if is_foreign(self.host, request.host, request.headers.get("Origin")):
            raise Refusal(403, f"this server answers to {self.host} by no other name, and to no other server's pages")
        if not self.token or request.path == "/health":
            return
        scheme, _, sent = request.headers.get("Authorization", "").partition(" ")
        if scheme.casefold() != "bearer" or not is_same_secret(sent, self.token):
            raise Refusal(401, f"send the server's {TOKEN} as the API key", code="invalid_api_key")

    async def _health(self, request: web.Request) -> web.Response:
        return web.json_response({"status": "ok", "searches": self.searches})

    async def _models(self, request: web.Request) -> web.Response:
        """List all models, or describe the one in the path."""
        about = {"object": "model", "created": self._started, "owned_by": "cotree"}
        if (name := request.match_info.get("name")) is not None:
            self._require_model(name)
            return web.json_response({"id": name, **about})
        return web.json_response({"object": "list", "data": [{"id": name, **about} for name in self.names]})

    def _require_model(self, name: str) -> None:
        if name not in self.names:
            what = f"there is no model `{name}`; there is {', '.join(self.names)}"
            raise Refusal(404, what, "model", "model_not_found")

    async def _answer(self, kind: type[Body], request: web.Request) -> web.StreamResponse:
        """Run a request's searches when a slot is free, and reply."""
        body = await read_body(request, kind)
        self._require_model(body.model)
        roles = {**self.settings.roles, "thinker": (Writer(model=body.model),)}
        endpoints = self.endpoints if isinstance(body, ChatBody) else self._unrendered(roles)
        if self.searches >= self._max_searches:
            raise Refusal(429, "too many searches wait already; ask again later", code="rate_limit_exceeded")
        self.searches += 1
        try:
            async with self._slots:
                searches = self._search(body, roles, SearchModels(endpoints))
                if body.stream:
                    return await self._stream(request, body, searches)
                return web.json_response(reply_json(body, await searches, boxed=self.task.comparable))
        finally:
            self.searches -= 1

    def _unrendered(self, roles: Mapping[str, Role]) -> dict[str, Endpoint]:
        """All endpoints, with those of these roles as `_UnrenderedEndpoint`s.

        Raises:
            Refusal: a model's server accepts chat requests only.
        """
        endpoints = dict(self.endpoints)
        for name in {writer.model for role in roles.values() for writer in role}:
            if endpoints[name].tokenizer is None:
                what = f"the backend of `{name}` takes conversations only: ask /v1/chat/completions"
                raise Refusal(400, what, "prompt")
            endpoints[name] = _UnrenderedEndpoint(**vars(endpoints[name]))
        return endpoints

    async def _search(self, body: Body, roles: Mapping[str, Role], models: SearchModels) -> list[Decoded]:
        """Run a request's n searches, each with its own seed."""
        settings, question = settings_for_request(self.settings, body), self.task.question_of(body.conversation())
        search = partial(search_answer, self.task, question, models, settings, roles=roles)
        search = partial(search, strategy=self.strategy, value=self.value)
        first = self.seed if body.seed is None else body.seed
        async with asyncio.TaskGroup() as group:
            found = [group.create_task(search(seed=seed)) for seed in range(first, first + body.n)]
        return [searched.result() for searched in found]

    async def _stream(self, request: web.Request, body: Body, searches: Searches) -> web.StreamResponse:
        """Reply with server-sent events: comments until the search ends, then the answer."""
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-store"})
        await response.prepare(request)

        async def send(data: dict[str, Any]) -> None:
            await response.write(f"data: {json.dumps(data)}\n\n".encode())

        searching = asyncio.ensure_future(searches)
        try:
            while not (await asyncio.wait({searching}, timeout=_HEARTBEAT))[0]:
                await response.write(b": searching\n\n")
            with first_cotree_error():
                found = searching.result()
        except CotreeError as error:
            await send(_refusal_of(error).body)
            return response
        finally:
            searching.cancel()
        reply = reply_json(body, found, boxed=self.task.comparable)
        usage, choices = reply.pop("usage"), reply.pop("choices")
        for choice in choices:
            await send({**reply, "choices": [choice]})
        if body.stream_options.include_usage:
            await send({**reply, "choices": [], "usage": usage})
        await response.write(b"data: [DONE]\n\n")
        return response


def _refusal_of(error: CotreeError) -> Refusal:
    """The HTTP error for a failed search: 400 if the client's request is at fault, else 502."""
    if isinstance(error, RefusedError):
        return Refusal(400, f"the model's server refuses this request: {error.words}")
    return Refusal(400 if isinstance(error, UsageError) else 502, str(error))


def _is_ours(record: logging.LogRecord) -> bool:
    """Log filter: whether a record of aiohttp is about a fault of this server, not about a bad request."""
    return record.exc_info is None or not isinstance(record.exc_info[1], HttpProcessingError)


def serve(
    models: Sequence[str], *, host: str = "127.0.0.1", port: int = 8000, output: Output | None = None, **options: Any
) -> None:
    """Serve until Ctrl-C (or SIGTERM); prints the address when it listens.

    Args:
        port: 0 for a free one.
        options: strategy, value, boxed, seed and at_once, as in `Server`, and those of `read_settings`.

    Raises:
        UsageError: invalid models or settings, or `host` is not loopback and there is no token.
    """
    server, output = Server(models, host=host, **options), output or Output()
    listening, address = listen(host, port)

    async def open_models(_: web.Application) -> AsyncIterator[None]:
        used = server.settings.asked_models(*server.names)
        async with open_endpoints(used, widest=server.settings.widest) as server.endpoints:
            yield

    def show(_: str) -> None:
        output.print(f"serving {', '.join(server.names)} at {address}/v1 (Ctrl-C ends it)")

    logging.getLogger("aiohttp.server").addFilter(_is_ours)
    app = server.app()
    app.cleanup_ctx.append(open_models)
    # Cancel a handler, and its search, when the client disconnects.
    web.run_app(app, sock=listening, access_log=None, handler_cancellation=True, shutdown_timeout=1.0, print=show)
    output.print("closed")
