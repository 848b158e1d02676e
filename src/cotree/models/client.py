"""The HTTP client of one OpenAI-compatible model server, with retries and token counters.

Invariant: `complete` returns n whole choices or raises; a failed, cut or malformed reply is never half used. Every
token that a server reports is counted, those of discarded replies too, and so is the prompt of every attempt whose
tokens are unknown. The API key is in the requests and nowhere else: no message, repr or exception holds it.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import KW_ONLY, dataclass, field, replace
from email.utils import parsedate_to_datetime
from functools import partial
from typing import Self, TypeVar

import aiohttp
from yarl import URL

from cotree.base.errors import CotreeError, UsageError
from cotree.base.progress import one_line
from cotree.models.settings import RequestMode
from cotree.models.wire import (
    Choice,
    Completion,
    Counters,
    Failure,
    Request,
    error_message,
    error_status,
    model_names,
    read_reply,
)

__all__ = ["Choice", "Client", "Completion", "Counters", "Request"]

ATTEMPTS = 40
# Of a reply that was paid for and is of no use: too few choices, or one that broke off.
_PAID_ATTEMPTS = 5
_CONNECT_SECONDS = 10.0
_LONGEST_BACKOFF = 15.0
T = TypeVar("T")


@dataclass(eq=False)
class Client:
    """One model at one server; an async context manager: `async with Client(...) as client`.

    name, url, model: the recipe's name, the server's base URL (with or without `/v1`), the model's name at the server.
    max_in_flight: requests at once; a request that waits to be repeated keeps its place, so that a failing server is
        asked less.
    count_tokens: length of a text in the model's tokens, where the server does not report it.
    omit, rename: parameters that are not sent, or sent under another name.
    timeout, seconds_per_token: an attempt may take `timeout + seconds_per_token * max_tokens * n` seconds.
    attempts, patience: no new attempt after this many, or this many seconds after the first failure.
    backoff: seconds; the k-th repetition waits uniform(0, min(15, backoff * 2**(k-1))), or what `Retry-After` asks.

    `counters` has the requests, repetitions and tokens so far.
    """

    name: str
    url: str
    model: str
    _: KW_ONLY
    max_in_flight: int
    count_tokens: Callable[[str], int]
    api_key: str | None = field(default=None, repr=False)
    omit: Sequence[str] = ()
    rename: Mapping[str, str] = field(default_factory=dict)
    timeout: float = 60.0
    seconds_per_token: float = 0.5
    attempts: int = ATTEMPTS
    patience: float = 300.0
    backoff: float = 0.5

    def __post_init__(self) -> None:
        self._root = _root_url(self.name, self.url)
        self.url = str(self._root)
        self.api_key = (self.api_key or "").strip()
        if not (self.api_key.isascii() and self.api_key.isprintable()):
            fault = "its API key has characters that no HTTP header can carry; set it again"
            raise UsageError(f"model `{self.name}`: {fault}")
        self.counters = Counters()
        self._slots = asyncio.Semaphore(self.max_in_flight)
        self._jitter = random.Random()  # its own, so that nobody's seeded global generator moves
        self._session: aiohttp.ClientSession

    async def __aenter__(self) -> Self:
        headers = {"Content-Type": "application/json"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        # The semaphore limits requests in flight; a second limit in the connector would only hide the queue from it.
        connector, cookies = aiohttp.TCPConnector(limit=0), aiohttp.DummyCookieJar()
        self._session = aiohttp.ClientSession(connector=connector, cookie_jar=cookies, headers=headers)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    def __str__(self) -> str:
        return f"model `{self.name}` ({self.model}) at {self.url}"

    async def complete(self, request: Request) -> Completion:
        """Generate `request.n` samples, with retries. Cancelling closes the connection and frees the slot.

        Raises:
            CotreeError: the server refuses the request or would give the same reply again, or no attempt is left.
        """
        limits = _limits(self.timeout + self.seconds_per_token * request.max_tokens * request.n)
        async with self._slots:
            result = await self._repeated(partial(self._attempt, request, limits))
        if isinstance(result, Completion):
            return result
        raise CotreeError(f"{self}: {result.reason}; fix that, then re-run the same command to resume")

    async def _repeated(self, attempt: Callable[[], Awaitable[T | Failure]]) -> T | Failure:
        """Try until something else than a failure comes, or the last failure, which says how often it was tried."""
        attempts, paid, deadline = 0, 0, math.inf
        while True:
            result = await attempt()
            if not isinstance(result, Failure):
                return result
            attempts, paid = attempts + 1, paid + (result.counted is not None)
            now = time.monotonic()
            deadline = min(deadline, now + self.patience)
            longest = min(_LONGEST_BACKOFF, self.backoff * 2 ** min(attempts - 1, 20))
            wait = (result.wait or 0.0) + self._jitter.uniform(0.0, longest)
            spent = attempts >= self.attempts or paid >= _PAID_ATTEMPTS or now + wait > deadline
            if result.wait is None or spent:
                tried = "1 attempt" if attempts == 1 else f"{attempts} attempts"
                return replace(result, reason=f"{result.reason} ({tried})")
            await asyncio.sleep(wait)
            self.counters.repeats += 1

    async def find_problem(self, mode: RequestMode = "completions") -> str:
        """Why the server cannot be asked, and the fix, in one line; "" if it is there and serves the model.

        Costs no tokens unless the server does not list the model: some (llama.cpp, Ollama) answer to other names too,
        and some list none, so one token is asked for. A server that is busy or still loading is waited for as by a
        request; one that cannot be connected to is not.

        Args:
            mode: how the model will be asked.
        """
        limits = _limits(2 * _CONNECT_SECONDS)
        served = await self._repeated(partial(self._listed_models, limits))
        if isinstance(served, Failure):
            return f"{self}: {served.reason}{_advice(served)}, then run the same command again"
        if self.model in served:
            return ""
        rendered = mode == "completions"
        messages = () if rendered else (("user", "Hi"),)
        request = Request("Hi" if rendered else "", messages=messages, scores=mode == "pooling")
        result = await self._repeated(partial(self._attempt, request, limits))
        if isinstance(result, Completion):
            return ""
        if served and result.wait is None:
            return f"{self}: {result.reason}; the server lists {', '.join(served[:8])}: set `model` to one"
        return f"{self}: {result.reason}{_advice(result)}, then run the same command again"

    async def _listed_models(self, limits: aiohttp.ClientTimeout) -> list[str] | Failure:
        """The names that the server lists, none where it has no such page."""
        try:
            async with self._session.get(self._root / "v1/models", timeout=limits, allow_redirects=False) as reply:
                status, content = reply.status, await reply.read()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            failure = _connection_failure(error, limits)
            lost = isinstance(error, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError)
            fix = "; start the server or correct the recipe's `url`"
            return Failure(failure.reason + fix, None) if lost else failure
        if status in (200, 404, 405, 501):
            return model_names(content)
        return Failure(self._refusal(status, content), _wait_after(status, reply.headers.get("Retry-After")))

    async def _attempt(self, request: Request, limits: aiohttp.ClientTimeout) -> Completion | Failure:
        """Send the request once and count its tokens; raises only when cancelled.

        A failure is a value because the exceptions of aiohttp hold the headers and must not travel on.
        """
        self.counters.requests += 1
        started = time.perf_counter()
        url, body = self._root / request.path, request.body(self.model, self.omit, self.rename)
        try:
            # A redirected POST would become a GET, and the key would go wherever it points.
            async with self._session.post(url, data=body, timeout=limits, allow_redirects=False) as reply:
                content = await reply.read()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            if not isinstance(error, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError):
                self._count_prompt(request)
            return _connection_failure(error, limits)
        except asyncio.CancelledError:
            self._count_prompt(request)
            raise
        status = error_status(content, reply.status)
        if status == 200:
            result = read_reply(content, request, self.count_tokens)
            counted = result if isinstance(result, Completion) else result.counted
            if counted is None:
                self._count_prompt(request)
            else:
                self.counters.add(counted)
            seconds = time.perf_counter() - started
            return replace(result, seconds=seconds) if isinstance(result, Completion) else result
        reason = self._refusal(reply.status, content)
        wait = _wait_after(status, reply.headers.get("Retry-After"))
        return Failure(f"{reason}, asks to wait {wait:g} s" if wait else reason, wait)

    def _count_prompt(self, request: Request) -> None:
        """Count the prompt of an attempt that the server may have worked on, but whose tokens it will not report."""
        self.counters.prompt_tokens += self.count_tokens(request.prompt_text())

    def _refusal(self, status: int, content: bytes) -> str:
        """An error reply in one line: the status, the first 300 characters of the server's message, the fix."""
        text = error_message(content)
        if self.api_key:  # servers like to quote it
            text = text.replace(self.api_key, "***")
        fix = {401: ": check the API key", 403: ": check the API key", 404: ": check `url`, `model` and `mode`"}
        error = " with an error" if status == 200 else ""
        return f"HTTP {status}{error}{f' ({text[:300]})' if text else ''}{fix.get(status, '')}"


def _root_url(name: str, url: str) -> URL:
    """The server's root URL; one with a password or a query is refused, because recipes are copied into run folders."""
    try:
        base = URL(url.strip())
    except ValueError:
        base = URL()
    secrets = base.query_string or base.fragment or base.user or base.password
    if base.scheme not in ("http", "https") or not base.host or secrets:
        form = "http://HOST:PORT or https://HOST/v1, without a key in it"
        source = "(keys come from the environment variable that `api_key_env` names)"
        raise UsageError(f"model `{name}`: `url` must look like {form} {source}")
    return URL(str(base).rstrip("/").removesuffix("/v1").rstrip("/"))


def _limits(seconds: float) -> aiohttp.ClientTimeout:
    return aiohttp.ClientTimeout(total=seconds, sock_connect=_CONNECT_SECONDS)


def _connection_failure(error: Exception, limits: aiohttp.ClientTimeout) -> Failure:
    """Why there is no reply; another attempt is of no use only where TLS is not trusted."""
    if isinstance(error, aiohttp.ClientSSLError):
        return Failure(f"no trusted TLS connection ({one_line(str(error))})", wait=None)
    reason = getattr(error, "os_error", error)  # a connector's error wraps the system's
    reason = one_line(getattr(reason, "strerror", None) or str(reason)) or type(error).__name__
    if isinstance(error, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError):
        return Failure(f"cannot connect ({reason})")
    if isinstance(error, TimeoutError):
        return Failure(f"no answer within {limits.total:.0f} s")
    return Failure(f"the connection broke ({reason})")


def _advice(failure: Failure) -> str:
    """What to do about a server that is not ready."""
    if "; start the server" in failure.reason:
        return ""
    return "; fix that" if failure.wait is None else "; wait until it is ready"


def _wait_after(status: int, retry_after: str | None) -> float | None:
    """The least seconds until a refusal may have passed, None for one that will be the same again."""
    passes = status in (408, 425, 429) or (status >= 500 and status not in (501, 505))
    return _retry_after(retry_after) if passes else None


def _retry_after(value: str | None) -> float:
    """Seconds that a `Retry-After` header asks for (a number or an HTTP date), 0 without a readable one."""
    with suppress(ValueError):
        return max(0.0, float(value or 0))
    with suppress(ValueError, OverflowError):
        return max(0.0, parsedate_to_datetime(str(value)).timestamp() - time.time())
    return 0.0
