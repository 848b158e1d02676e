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
from collections.abc import Callable
from contextlib import suppress
from dataclasses import KW_ONLY, dataclass, field, replace
from email.utils import parsedate_to_datetime
from typing import Self

import aiohttp
from yarl import URL

from cotree.base.errors import CotreeError, UsageError
from cotree.base.progress import one_line
from cotree.models.settings import RequestMode
from cotree.models.wire import Choice, Completion, Counters, Failure, Request, error_message, model_names, read_reply

__all__ = ["Choice", "Client", "Completion", "Counters", "Request"]

ATTEMPTS = 40
_CONNECT_SECONDS = 10.0
_LONGEST_BACKOFF = 15.0


@dataclass(eq=False)
class Client:
    """One model at one server; an async context manager: `async with Client(...) as client`.

    name, url, model: the recipe's name, the server's base URL (with or without `/v1`), the model's name at the server.
    max_in_flight: requests at once; a request that waits to be repeated keeps its place, so that a failing server is
        asked less.
    count_tokens: length of a text in the model's tokens, where the server does not report it.
    timeout, seconds_per_token: an attempt may take `timeout + seconds_per_token * max_tokens * n` seconds.
    attempts, patience: no new attempt after this many, or this many seconds after the first failure.
    backoff: seconds; the k-th repetition waits uniform(0, min(15, backoff * 2**(k-1))), or what `Retry-After` asks.

    `counters` has the requests and tokens so far.
    """

    name: str
    url: str
    model: str
    _: KW_ONLY
    max_in_flight: int
    count_tokens: Callable[[str], int]
    api_key: str | None = field(default=None, repr=False)
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
            CotreeError: the server refuses the request (4xx other than 429), or no attempt is left.
        """
        limits = _limits(self.timeout + self.seconds_per_token * request.max_tokens * request.n)
        attempts, deadline = 0, math.inf
        async with self._slots:
            while True:
                result = await self._attempt(request, limits)
                if isinstance(result, Completion):
                    return result
                attempts += 1
                now = time.monotonic()
                deadline = min(deadline, now + self.patience)
                longest = min(_LONGEST_BACKOFF, self.backoff * 2 ** min(attempts - 1, 20))
                wait = (result.wait or 0.0) + self._jitter.uniform(0.0, longest)
                if result.wait is None or attempts >= self.attempts or now + wait > deadline:
                    break
                await asyncio.sleep(wait)
        tried = "1 attempt" if attempts == 1 else f"{attempts} attempts"
        raise CotreeError(f"{self}: {result.reason} ({tried}); fix that, then re-run the same command to resume")

    async def find_problem(self, mode: RequestMode = "completions") -> str:
        """Why the server cannot be asked, and the fix, in one line; "" if it is there and serves the model.

        Costs no tokens unless the server does not list the model: some (llama.cpp, Ollama) answer to other names too,
        and some list none, so one token is asked for.

        Args:
            mode: how the model will be asked.
        """
        limits = _limits(2 * _CONNECT_SECONDS)
        status, content = 0, b""
        try:
            async with self._session.get(self._root / "v1/models", timeout=limits, allow_redirects=False) as reply:
                status, content = reply.status, await reply.read()
            problem = "" if status in (200, 404, 405, 501) else self._refusal(status, content)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            problem = _connection_failure(error, limits).reason
        if problem:
            fix = "fix that" if status else "start the server or correct the recipe's `url`"
            return f"{self}: {problem}; {fix}, then run the same command again"
        served = model_names(content)
        if self.model in served:
            return ""
        rendered = mode == "completions"
        messages = () if rendered else (("user", "Hi"),)
        request = Request("Hi" if rendered else "", messages=messages, scores=mode == "pooling")
        result = await self._attempt(request, limits)
        if isinstance(result, Completion):
            return ""
        listed = f"the server lists {', '.join(served[:8])}: set `model` to one" if served else "fix that"
        return f"{self}: {result.reason}; {listed}"

    async def _attempt(self, request: Request, limits: aiohttp.ClientTimeout) -> Completion | Failure:
        """Send the request once and count its tokens; raises only when cancelled.

        A failure is a value because the exceptions of aiohttp hold the headers and must not travel on.
        """
        self.counters.requests += 1
        started = time.perf_counter()
        url, body = self._root / request.path, request.body(self.model)
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
        if reply.status == 200:
            result = read_reply(content, request, self.count_tokens)
            counted = result if isinstance(result, Completion) else result.counted
            if counted is None:
                self._count_prompt(request)
            else:
                self.counters.add(counted)
            seconds = time.perf_counter() - started
            return replace(result, seconds=seconds) if isinstance(result, Completion) else result
        reason = self._refusal(reply.status, content)
        if reply.status != 429 and reply.status < 500:
            return Failure(reason, wait=None)
        wait = _retry_after(reply.headers.get("Retry-After"))
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
        return f"HTTP {status}{f' ({text[:300]})' if text else ''}{fix.get(status, '')}"


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


def _retry_after(value: str | None) -> float:
    """Seconds that a `Retry-After` header asks for (a number or an HTTP date), 0 without a readable one."""
    with suppress(ValueError):
        return max(0.0, float(value or 0))
    with suppress(ValueError, OverflowError):
        return max(0.0, parsedate_to_datetime(str(value)).timestamp() - time.time())
    return 0.0
