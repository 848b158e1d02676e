"""HTTP client of one OpenAI-compatible model server, with retries, failover to other servers, and token counters.

Invariant: `complete` returns n whole choices or raises; failed, truncated and malformed replies are never used in part,
and no reply is read beyond the size that its request allows. All tokens that a server reports are counted, including
those of discarded replies, and so is the prompt of each attempt with unknown usage. The API key appears in requests
only, never in a message, repr or exception.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import math
import random
import time
import urllib.request
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import KW_ONLY, dataclass, field, replace
from email.utils import parsedate_to_datetime
from functools import partial
from typing import NamedTuple, Self, TypeVar

import aiohttp
from yarl import URL

from cotree.base.errors import CotreeError, RefusedError, UsageError
from cotree.base.progress import one_line
from cotree.models.settings import RequestMode
from cotree.models.wire import (
    Choice,
    Completion,
    Counters,
    Failure,
    Request,
    begins_as_json,
    error_message,
    error_status,
    model_names,
    most_bytes,
    read_reply,
)

__all__ = ["Choice", "Client", "Completion", "Counters", "Request"]

ATTEMPTS = 40
# Attempts for replies that cost tokens but are unusable: too few choices, or a broken-off one.
_PAID_ATTEMPTS = 5
_CONNECT_SECONDS = 10.0
_LONGEST_BACKOFF = 15.0
_LISTING_BYTES = 2**24  # of `/v1/models`
_TOLD_AGAIN_SECONDS = 60.0
T = TypeVar("T")


@dataclass(eq=False)
class Client:
    """One model at one server; an async context manager: `async with Client(...) as client`.

    name, url, model: the recipe's name, the server's base URL (with or without `/v1`), the model's name at the server.
    max_in_flight: concurrent requests; a request that waits for a retry keeps its slot, so that a failing server gets
        fewer requests.
    count_tokens: counts a text's tokens if the server does not report usage.
    omit, rename: parameters that are not sent, or sent under another name.
    timeout, seconds_per_token, longest: an attempt times out after `timeout + seconds_per_token * max_tokens * n`
        seconds, at most `longest`.
    silence: an attempt also ends after this many seconds without any reply of the server to any request.
    attempts, patience: no retry after this many attempts, or this many seconds after the first failure.
    backoff: seconds; the k-th retry waits uniform(0, min(15, backoff * 2**(k-1))), or as `Retry-After` says.
    takeover: a server that is unreachable, or has only failed for this many seconds, is lost: its requests go to other
        servers of the model, and one request per as many seconds tests whether it is back.
    ended: returns why the server has ended for good, "" while it runs; such a server is lost at once.
    on_problem: called with one line when requests fail and are retried, at once and then every minute; by default logs
        a warning.

    `counters` has the requests, retries and tokens so far, `problem` the server's last failure.
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
    longest: float = math.inf
    silence: float | None = None
    attempts: int = ATTEMPTS
    patience: float = 300.0
    backoff: float = 0.5
    takeover: float = 30.0
    ended: Callable[[], str] = lambda: ""
    on_problem: Callable[[str], None] = logging.getLogger(__name__).warning

    def __post_init__(self) -> None:
        self._root = _root_url(self.name, self.url)
        self.url, self._urls = str(self._root), dict[str, URL]()
        self.api_key = (self.api_key or "").strip()
        if not (self.api_key.isascii() and self.api_key.isprintable()):
            fault = "its API key has characters that no HTTP header can carry; set it again"
            raise UsageError(f"model `{self.name}`: {fault}")
        self._proxy = _proxy_of(self.name, self._root)
        self.counters, self.problem = Counters(), ""
        self._failing_since: float | None = None
        self._heard = self._trial = 0.0  # time of the last good reply; time of the next test of a lost server
        self._warned = -math.inf  # time of the last `on_problem`
        self._since: dict[asyncio.Timeout, float] = {}  # start of each attempt that `silence` may end
        self._silence_timer: asyncio.TimerHandle | None = None
        self._slots = asyncio.Semaphore(self.max_in_flight)
        self._jitter = random.Random()  # does not touch the global generator's state
        self._session: aiohttp.ClientSession

    async def __aenter__(self) -> Self:
        # No limit in the connector: the semaphore already limits requests in flight.
        connector, cookies = aiohttp.TCPConnector(limit=0), aiohttp.DummyCookieJar()
        connecting = aiohttp.ClientTimeout(sock_connect=_CONNECT_SECONDS)
        self._session = aiohttp.ClientSession(connector=connector, cookie_jar=cookies, timeout=connecting)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._silence_timer is not None:
            self._silence_timer.cancel()
        await self._session.close()

    def __str__(self) -> str:
        proxy = "" if self._proxy is None else f" through the proxy {self._proxy.origin()}"
        return f"model `{self.name}` ({self.model}) at {self.url}{proxy}"

    @property
    def lost(self) -> bool:
        """Whether the server is lost (see `takeover`) and not due for a test."""
        since, now = self._failing_since, time.monotonic()
        return since is not None and now - since >= self.takeover and now < self._trial

    async def complete(self, request: Request, others: Sequence[Client] = ()) -> Completion:
        """Generate `request.n` samples, with retries. Cancelling closes the connection and frees the slot.

        Args:
            others: more servers of the model, in order of preference, used while this one is lost or has no free slot.

        Raises:
            CotreeError: the server refuses the request, a retry is pointless, or no attempt is left.
        """
        servers, tries = (self, *others), _Tries(self.attempts, self.patience)
        while True:
            server = self
            if others:
                ready = [s for s in servers if not s.lost] or [min(servers, key=lambda s: s._trial)]
                server = next((s for s in ready if not s._slots.locked()), ready[0])
            async with server._slots:
                if server.lost and not all(s.lost for s in servers):
                    continue  # it was lost while this request waited for a slot
                server.counters.repeats += tries.made > 0
                seconds = server.timeout + server.seconds_per_token * request.max_tokens * request.n
                attempt = partial(server._attempt, request, min(seconds, server.longest))
                result = await server._retry(attempt, tries, servers)
            if isinstance(result, Completion):
                return result
            if tries.over:
                message = f"{server}: {result.reason}; fix that, then re-run the same command to resume"
                raise RefusedError(message, result.refused) if result.refused else CotreeError(message)

    async def _retry(
        self, attempt: Callable[[], Awaitable[T | Failure]], tries: _Tries, servers: Sequence[Client] = ()
    ) -> T | Failure:
        """Retry until a result other than a failure, and return it.

        Returns the last failure if `tries` are used up (with their number), or if another of `servers` should try next.
        """
        tries.asked.add(self)
        while True:
            started = time.monotonic()
            if self._failing_since is not None:
                self._trial = started + (self.silence or self.takeover)
            result = await attempt()
            if isinstance(result, Failure) and (ended := self.ended()):
                result = replace(result, reason=ended, wait=math.inf, counted=None)
            self._update_health(result, started)
            if not isinstance(result, Failure):
                return result
            longest = min(_LONGEST_BACKOFF, self.backoff * 2 ** min(tries.made, 20))
            wait = (result.wait or 0.0) + self._jitter.uniform(0.0, longest)
            lost = self.lost and len(servers) > 1
            if lost and any(not server.lost and server not in tries.asked for server in servers):
                wait = -math.inf  # another server has not failed yet
            tries.count(result, wait)
            if tries.over:
                return replace(result, reason=f"{result.reason} ({tries})")
            if time.monotonic() - self._warned >= _TOLD_AGAIN_SECONDS:
                self._warned = time.monotonic()
                self.on_problem(f"{self}: {result.reason}; the request is repeated for {tries.patience:g} s at most")
            await asyncio.sleep(max(wait, 0.0))
            if lost:
                return result
            self.counters.repeats += 1

    def _update_health(self, result: object, started: float) -> None:
        """Update the server's health after an attempt."""
        now = time.monotonic()
        if not isinstance(result, Failure):
            self._failing_since, self._heard = None, now
        elif result.wait is not None and result.counted is None:
            self.problem, self._trial = result.reason, now + max(self.takeover, result.wait)
            if self._failing_since is None:
                self._failing_since = max(started, self._heard)
            if result.wait > self.takeover or result.unreached:  # a long Retry-After, or unreachable
                self._failing_since = -math.inf

    async def find_problem(self, mode: RequestMode = "completions") -> str:
        """Check that the server is reachable and serves the model; returns the fault and its fix in one line, or "".

        If the server does not list the model, one token is requested, because some (llama.cpp, Ollama) accept other
        names and some list none. Waits for a busy or loading server as a request would, but not for one that refuses
        connections. After a fault that may be temporary the server counts as `lost`.

        Args:
            mode: request mode of the model.
        """
        seconds, served = 2 * _CONNECT_SECONDS, list[str]()
        tries = _Tries(self.attempts, self.patience)
        result: object = await self._retry(partial(self._listed_models, seconds), tries)
        if isinstance(result, list):
            served = result
            if self.model in served:
                return ""
            rendered = mode == "completions"
            messages = () if rendered else (("user", "Hi"),)
            request = Request("Hi" if rendered else "", messages=messages, scores=mode == "pooling")
            tries = _Tries(self.attempts, self.patience)
            result = await self._retry(partial(self._attempt, request, seconds), tries)
        if not isinstance(result, Failure):
            return ""
        if result.unreached or result.wait is not None:
            self.problem = result.reason
            self._failing_since, self._trial = -math.inf, time.monotonic() + self.takeover
        elif served:
            names = one_line(", ".join(served[:8]))[:300]
            return f"{self}: {result.reason}; the server lists {names}: set `model` to one"
        advice = "fix that" if result.wait is None else "wait until it is ready"
        if result.unreached:
            advice = "start the server or correct the recipe's `url`"
        return f"{self}: {result.reason}; {advice}, then run the same command again"

    async def _listed_models(self, seconds: float) -> list[str] | Failure:
        """The model names from `/v1/models`; empty if the server has no such page."""
        reply = await self._exchange("v1/models", seconds, _LISTING_BYTES)
        if isinstance(reply, Failure):
            return replace(reply, wait=None) if reply.unreached else reply
        if reply.status in (200, 404, 405, 501):
            return model_names(reply.content)
        return self._refusal(reply, reply.status)

    async def _attempt(self, request: Request, seconds: float) -> Completion | Failure:
        """Send the request once and count its tokens; raises only if cancelled."""
        self.counters.requests += 1
        started = time.perf_counter()
        body = request.body(self.model, self.omit, self.rename)
        try:
            reply = await self._exchange(request.path, seconds, most_bytes(request), body)
        except asyncio.CancelledError:
            self._count_prompt(request)
            raise
        if isinstance(reply, Failure):
            if not reply.unreached:
                self._count_prompt(request)
            return reply
        status = error_status(reply.content, reply.status)
        if status != 200:
            return self._refusal(reply, status)
        if not begins_as_json(reply.content):
            self._count_prompt(request)
            fix = "check `url`, and that no login page or proxy answers in the server's place"
            return Failure(f"the reply is not JSON ({self._excerpt(reply) or 'it is empty'}): {fix}", None)
        result = read_reply(reply.content, request, self.count_tokens, time.perf_counter() - started)
        counted = result if isinstance(result, Completion) else result.counted
        if counted is None:
            self._count_prompt(request)
        else:
            self.counters.add(counted)
        return result

    async def _exchange(self, path: str, seconds: float, most: int, body: bytes | None = None) -> _Reply | Failure:
        """Send a POST with `body`, or a GET; reads at most `most` bytes within `seconds`.

        Returns failures as values, because aiohttp's exceptions contain the headers with the key.
        """
        # Headers per request, because aiohttp sends the session's to a proxy too.
        headers = {"Content-Type": "application/json"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        url = self._urls.get(path) or self._urls.setdefault(path, self._root / path)
        send = partial(self._session.request, "GET" if body is None else "POST", url, data=body)
        # One timer per attempt: aiohttp's own costs more, and cannot be ended early.
        limit = asyncio.timeout(seconds)
        try:
            async with limit:
                self._end_if_silent(limit)
                # No redirects: POST would become GET, and the key would be sent to the target.
                async with send(headers=headers, proxy=self._proxy, allow_redirects=False) as reply:
                    try:
                        await reply.content.readexactly(most + 1)
                    except asyncio.IncompleteReadError as whole:
                        return _Reply(reply.status, whole.partial, reply.headers.get("Retry-After"))
                    return Failure(f"the reply is longer than the {most:,} bytes that it can need", None)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            if not limit.expired():
                return _connection_failure(error)
            if self.silence is not None and limit not in self._since:
                return Failure(f"no answer to any request for {self.silence:g} s")
            hint = "; raise the model's `timeout` if it is only slow" if seconds == self.longest else ""
            return Failure(f"no answer within {seconds:.0f} s{hint}")
        finally:
            self._since.pop(limit, None)

    def _end_if_silent(self, attempt: asyncio.Timeout) -> None:
        """End the attempt after `silence` seconds without any reply of the server."""
        if self.silence is not None:
            self._since[attempt] = time.monotonic()
            if self._silence_timer is None:
                self._end_silent_attempts()

    def _end_silent_attempts(self) -> None:
        """End attempts older than `silence` if no reply came since, and schedule the next check.

        One timer per server: rescheduling a timer per attempt at every reply would cost more than the reply.
        """
        assert self.silence is not None
        now, self._silence_timer = time.monotonic(), None
        for attempt in [each for each, since in self._since.items() if max(since, self._heard) + self.silence <= now]:
            del self._since[attempt]
            if not attempt.expired():
                attempt.reschedule(0.0)
        if self._since:
            wait = max(next(iter(self._since.values())), self._heard) + self.silence - now
            self._silence_timer = asyncio.get_running_loop().call_later(wait, self._end_silent_attempts)

    def _count_prompt(self, request: Request) -> None:
        """Count the prompt tokens of an attempt that the server may have processed without reporting usage."""
        self.counters.prompt_tokens += self.count_tokens(request.prompt_text())

    def _excerpt(self, reply: _Reply) -> str:
        """The first 300 characters of an error reply in one line, with the key masked."""
        text = error_message(reply.content)
        return (text.replace(self.api_key, "***") if self.api_key else text)[:300]  # some servers quote it

    def _refusal(self, reply: _Reply, status: int) -> Failure:
        """A failure from an error reply: status, the server's message and the fix in one line.

        Args:
            status: from `error_status`; decides about a retry.
        """
        text = self._excerpt(reply)
        fix = {401: ": check the API key", 403: ": check the API key", 404: ": check `url`, `model` and `mode`"}
        error = " with an error" if reply.status == 200 else ""
        reason = f"HTTP {reply.status}{error}{f' ({text})' if text else ''}{fix.get(reply.status, '')}"
        wait = _wait_after(status, reply.retry_after)
        refused = text if status in (400, 413, 422) else ""
        return Failure(f"{reason}, asks to wait {wait:g} s" if wait else reason, wait, refused=refused)


class _Reply(NamedTuple):
    """A server's HTTP reply. retry_after: the header."""

    status: int
    content: bytes
    retry_after: str | None


@dataclass
class _Tries:
    """The retry budget of one request over all its servers.

    attempts, patience: as in `Client`. made: failed attempts. paid: those that cost tokens. asked: servers tried.
    """

    attempts: int
    patience: float
    made: int = 0
    paid: int = 0
    over: bool = False
    deadline: float = math.inf
    asked: set[Client] = field(default_factory=set)

    def count(self, failure: Failure, wait: float) -> None:
        """Count a failed attempt; the next one would start after `wait` seconds."""
        now = time.monotonic()
        self.made, self.paid = self.made + 1, self.paid + (failure.counted is not None)
        self.deadline = min(self.deadline, now + self.patience)
        spent = self.made >= self.attempts or self.paid >= _PAID_ATTEMPTS or now + wait > self.deadline
        self.over = failure.wait is None or spent

    def __str__(self) -> str:
        where = f" at {len(self.asked)} servers" if len(self.asked) > 1 else ""
        return f"{self.made} attempt{'s' * (self.made > 1)}{where}"


def _proxy_of(name: str, root: URL) -> URL | None:
    """The proxy for a server from the usual environment variables; None for localhost.

    aiohttp's `trust_env` is not used, because it also reads passwords from ~/.netrc.
    """
    host = (root.host or "").rstrip(".")
    with suppress(ValueError):
        address = ipaddress.ip_address(host)
        if address.is_loopback or address.is_unspecified:
            return None
    if host == "localhost" or host.endswith(".localhost") or urllib.request.proxy_bypass(f"{host}:{root.port}"):
        return None
    found = urllib.request.getproxies()
    value = found.get(root.scheme) or found.get("all")
    if not value:
        return None
    with suppress(ValueError):
        proxy = URL(value if "://" in value else f"http://{value}")
        if proxy.scheme in ("http", "https") and proxy.host:
            return proxy
    fix = "set it so, or name the server in `no_proxy`"
    raise UsageError(f"model `{name}`: the proxy in `{root.scheme}_proxy` must look like http://HOST:PORT; {fix}")


def _root_url(name: str, url: str) -> URL:
    """Parse a server's root URL; UsageError for a password or query, because recipes are copied into run folders."""
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


def _connection_failure(error: Exception) -> Failure:
    """The failure of a connection error; no retry for an untrusted TLS certificate or a proxy's permanent refusal."""
    if isinstance(error, aiohttp.ClientSSLError):
        return Failure(f"no trusted TLS connection ({one_line(str(error))})", wait=None)
    if isinstance(error, aiohttp.ClientHttpProxyError):
        return Failure(f"the proxy refuses (HTTP {error.status})", _wait_after(error.status, None), unreached=True)
    reason = getattr(error, "os_error", error)  # a connector's error wraps the system's
    reason = one_line(getattr(reason, "strerror", None) or str(reason)) or type(error).__name__
    if isinstance(error, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError):
        return Failure(f"cannot connect ({reason})", unreached=True)
    return Failure(f"the connection broke ({reason})")


def _wait_after(status: int, retry_after: str | None) -> float | None:
    """Minimum seconds before retrying an HTTP error; None if a retry is pointless."""
    passes = status in (408, 425, 429) or (status >= 500 and status not in (501, 505))
    return _retry_after(retry_after) if passes else None


def _retry_after(value: str | None) -> float:
    """Seconds from a `Retry-After` header (a number or an HTTP date); 0 if missing or invalid."""
    with suppress(ValueError):
        return max(0.0, float(value or 0))
    with suppress(ValueError, OverflowError):
        return max(0.0, parsedate_to_datetime(str(value)).timestamp() - time.time())
    return 0.0
