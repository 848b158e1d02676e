"""The HTTP client of one OpenAI-compatible model server, with retries and token counters.

Invariant: `complete` returns n whole choices or raises; a failed, cut or malformed reply is never half used. Every
token that a server reports is counted, those of discarded replies too, and so is every attempt whose tokens are
unknown. The API key is in the requests and nowhere else: no message, repr or exception holds it.
"""

from __future__ import annotations

import asyncio
import email.utils
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Self

import aiohttp
from yarl import URL

from cotree.base.errors import CotreeError, UsageError
from cotree.models.settings import Mode
from cotree.models.wire import Choice, Completion, Counters, Request, error_message, model_names, one_line, read_reply

__all__ = ["Choice", "Client", "Completion", "Counters", "Request"]

ATTEMPTS = 40
_CONNECT_SECONDS = 10.0
_LONGEST_BACKOFF = 15.0


@dataclass(frozen=True, slots=True)
class _Failure:
    """A failed attempt: a value, because the exceptions of aiohttp hold the headers and must not travel on.

    reason: for the error message. wait: the least seconds before another attempt, None if another cannot help.
    """

    reason: str
    wait: float | None = 0.0


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

    def __init__(
        self,
        name: str,
        url: str,
        model: str,
        *,
        max_in_flight: int,
        count_tokens: Callable[[str], int],
        api_key: str | None = None,
        timeout: float = 60.0,
        seconds_per_token: float = 0.5,
        attempts: int = ATTEMPTS,
        patience: float = 300.0,
        backoff: float = 0.5,
    ) -> None:
        base = _base_url(name, url)
        api_key = (api_key or "").strip()
        if not (api_key.isascii() and api_key.isprintable()):
            raise UsageError(f"model `{name}`: its API key has characters that no HTTP header can carry; set it again")
        self.name, self.url, self.model = name, str(base), model
        self.counters = Counters()
        self._completions, self._chat = base / "v1/completions", base / "v1/chat/completions"
        self._pooling = base / "pooling"
        self._models, self._health = base / "v1/models", base / "health"
        self._count_tokens = count_tokens
        self._api_key = api_key
        self._timeout, self._seconds_per_token = timeout, seconds_per_token
        self._attempts, self._patience, self._backoff = attempts, patience, backoff
        self._slots = asyncio.Semaphore(max_in_flight)
        self._jitter = random.Random()  # its own, so that nobody's seeded global generator moves
        self._session: aiohttp.ClientSession

    async def __aenter__(self) -> Self:
        headers = {"Content-Type": "application/json"}
        if self._api_key:
            headers["Authorization"] = f"Bearer {self._api_key}"
        # The semaphore limits requests in flight; a second limit in the connector would only hide the queue from it.
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0), cookie_jar=aiohttp.DummyCookieJar(), headers=headers
        )
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
        limit = self._timeout + self._seconds_per_token * request.max_tokens * request.n
        limits = aiohttp.ClientTimeout(total=limit, sock_connect=_CONNECT_SECONDS)
        attempts, deadline = 0, math.inf
        async with self._slots:
            while True:
                result = await self._attempt(request, limits)
                if isinstance(result, Completion):
                    return result
                attempts += 1
                now = time.monotonic()
                deadline = min(deadline, now + self._patience)
                longest = min(_LONGEST_BACKOFF, self._backoff * 2 ** min(attempts - 1, 20))
                wait = (result.wait or 0.0) + self._jitter.uniform(0.0, longest)
                if result.wait is None or attempts >= self._attempts or now + wait > deadline:
                    break
                await asyncio.sleep(wait)
                self.counters.retries += 1
        tried = "1 attempt" if attempts == 1 else f"{attempts} attempts"
        raise CotreeError(f"{self}: {result.reason} ({tried}); fix that, then re-run the same command to resume")

    async def ready(self, mode: Mode = "completions") -> None:
        """Check before work starts that the server is there and serves the model.

        Costs no tokens unless the server does not list the model: some (llama.cpp, Ollama) answer to other names too,
        so one token is asked for.

        Args:
            mode: how the model will be asked.

        Raises:
            UsageError: names the model, the URL and the fix.
        """
        limits = aiohttp.ClientTimeout(total=2 * _CONNECT_SECONDS, sock_connect=_CONNECT_SECONDS)
        status, content = 0, b""
        try:
            for address in (self._models, self._health):
                async with self._session.get(address, timeout=limits, allow_redirects=False) as reply:
                    status, content = reply.status, await reply.read()
                if status not in (404, 405, 501):
                    break
            problem = "" if status == 200 else self._refusal(status, content)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            problem = _connection_failure(error, 2 * _CONNECT_SECONDS)
        if problem:
            fix = "fix that" if status else "start the server or correct the recipe's `url`"
            raise UsageError(f"{self}: {problem}; {fix}, then run the same command again")
        served = model_names(content)
        if served and self.model not in served:
            rendered = mode == "completions"
            request = Request(
                prompt="Hi" if rendered else "",
                n=1,
                max_tokens=1,
                temperature=1.0,
                top_p=1.0,
                seed=0,
                stop=(),
                messages=() if rendered else (("user", "Hi"),),
                scores=mode == "pooling",
            )
            result = await self._attempt(request, limits)
            if isinstance(result, _Failure):
                raise UsageError(
                    f"{self}: {result.reason}; the server lists {', '.join(served[:8])}: set `model` to one"
                )

    async def _attempt(self, request: Request, limits: aiohttp.ClientTimeout) -> Completion | _Failure:
        """Send the request once; raises only when cancelled."""
        self.counters.requests += 1
        started = time.perf_counter()
        url = self._pooling if request.scores else self._chat if request.messages else self._completions
        body = request.body(self.model)
        try:
            # A redirected POST would become a GET, and the key would go wherever it points.
            async with self._session.post(url, data=body, timeout=limits, allow_redirects=False) as reply:
                content = await reply.read()
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            wait = None if isinstance(error, aiohttp.ClientSSLError) else 0.0
            return _Failure(_connection_failure(error, limits.total), wait)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            self._count_abandoned(request)
            return _Failure(_connection_failure(error, limits.total))
        except asyncio.CancelledError:
            self._count_abandoned(request)
            raise
        if reply.status == 200:
            return self._read(content, request, time.perf_counter() - started)
        reason = self._refusal(reply.status, content)
        if reply.status != 429 and reply.status < 500:
            return _Failure(reason, wait=None)
        wait = _retry_after(reply.headers.get("Retry-After"))
        return _Failure(f"{reason}, asks to wait {wait:g} s" if wait else reason, wait)

    def _read(self, content: bytes, request: Request, seconds: float) -> Completion | _Failure:
        """Count the tokens of a reply with HTTP 200, and return its choices if they are whole."""
        reply = read_reply(content, request, self._count_tokens)
        if reply.completion is None:
            self._count_abandoned(request)
            return _Failure(reply.problem)
        self.counters.add(reply.completion)
        if reply.problem:
            return _Failure(reply.problem, wait=None if reply.permanent else 0.0)
        return replace(reply.completion, seconds=seconds)

    def _count_abandoned(self, request: Request) -> None:
        """Count an attempt that the server may have worked on, but whose tokens it will not report."""
        tokens = self._count_tokens(request.prompt_text())
        self.counters.abandoned += 1
        self.counters.abandoned_tokens += tokens
        self.counters.prompt_tokens += tokens

    def _refusal(self, status: int, content: bytes) -> str:
        """An error reply in one line: the status, the first 300 characters of the server's message, the fix."""
        text = error_message(content)
        if self._api_key:  # servers like to quote it
            text = text.replace(self._api_key, "***")
        fix = {401: ": check the API key", 403: ": check the API key", 404: ": check `url`, `model` and `mode`"}
        return f"HTTP {status}{f' ({text[:300]})' if text else ''}{fix.get(status, '')}"


def _base_url(name: str, url: str) -> URL:
    """The server's root URL; one with a password or a query is refused, because recipes are copied into run folders."""
    try:
        base = URL(url.strip())
    except ValueError:
        base = URL()
    secrets = base.query_string or base.fragment or base.user or base.password
    if base.scheme not in ("http", "https") or not base.host or secrets:
        raise UsageError(
            f"model `{name}`: `url` must look like http://HOST:PORT or https://HOST/v1, without a key in it "
            "(keys come from the environment variable that `api_key_env` names)"
        )
    return URL(str(base).rstrip("/").removesuffix("/v1").rstrip("/"))


def _connection_failure(error: Exception, limit: float | None) -> str:
    if isinstance(error, aiohttp.ClientSSLError):
        return f"no trusted TLS connection ({one_line(str(error))})"
    reason = getattr(error, "os_error", error)  # a connector's error wraps the system's
    reason = one_line(getattr(reason, "strerror", None) or str(reason)) or type(error).__name__
    if isinstance(error, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError):
        return f"cannot connect ({reason})"
    if isinstance(error, TimeoutError):
        return f"no answer within {limit:.0f} s"
    return f"the connection broke ({reason})"


def _retry_after(value: str | None) -> float:
    """Seconds that a `Retry-After` header asks for (a number or an HTTP date), 0 without a readable one."""
    try:
        return max(0.0, float(value or 0))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(str(value)).timestamp() - time.time())
    except (ValueError, OverflowError):
        return 0.0
