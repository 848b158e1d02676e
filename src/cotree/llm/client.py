"""The client of one model endpoint: `/v1/completions` of an OpenAI-compatible server.

Invariant: `complete` returns n whole choices or raises; a failed, cut or malformed reply is never half used. A
`Request` holds everything that decides the text, so its key names the completion in the journal. Every token that a
server reports is counted, those of discarded replies too. The API key is sent and nothing else: no message, repr or
exception holds it.
"""

from __future__ import annotations

import asyncio
import email.utils
import hashlib
import json
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self

import aiohttp
from yarl import URL

from cotree.errors import CotreeError, UsageError

# What servers say about a choice's end. Anything else ("abort", null) is a reply that broke off.
_FINISH: dict[str, Literal["stop", "length"]] = {
    "stop": "stop",
    "eos_token": "stop",
    "stop_sequence": "stop",
    "length": "length",
    "content_filter": "length",
}
_CONNECT_SECONDS = 10.0
_LONGEST_BACKOFF = 15.0


@dataclass(frozen=True, slots=True)
class Request:
    """Everything that decides the text: n samples that continue `prompt`, each up to `max_tokens` or a stop string."""

    prompt: str
    n: int
    max_tokens: int
    temperature: float
    top_p: float
    seed: int
    stop: tuple[str, ...]

    def key(self, model: str) -> str:
        """The sha256 (hex) of the fields and the model's name: equal requests to equal models have equal keys."""
        fields = {
            "model": model,
            "prompt": self.prompt,
            "n": int(self.n),
            "max_tokens": int(self.max_tokens),
            # 1 and 1.0, 0.0 and -0.0 are the same number and must not be two keys.
            "temperature": float(self.temperature) + 0.0,
            "top_p": float(self.top_p) + 0.0,
            "seed": int(self.seed),
            "stop": self.stop,
        }
        canonical = json.dumps(fields, ensure_ascii=False, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(canonical.encode("utf-8", "surrogatepass")).hexdigest()


@dataclass(frozen=True, slots=True)
class Choice:
    """One sample. `text` is without the stop string; `tokens` counts what was generated, the stop token included."""

    text: str
    finish_reason: Literal["stop", "length"]
    tokens: int


@dataclass(frozen=True, slots=True)
class Completion:
    """The answer to a `Request`: n choices in the server's order.

    `prompt_tokens` counts the prompt once, `cached_tokens` is the part of it that the server had warm.
    `completion_tokens` is what was generated for all choices, at least the sum of theirs. `seconds` is the wall time
    of the attempt that succeeded, without the wait for a free slot or for earlier attempts.
    """

    choices: tuple[Choice, ...]
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    seconds: float

    def to_json(self) -> str:
        """One line for the journal."""
        fields = {
            "choices": [[c.text, c.finish_reason, c.tokens] for c in self.choices],
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "completion_tokens": self.completion_tokens,
            "seconds": self.seconds,
        }
        return json.dumps(fields, ensure_ascii=False, separators=(",", ":"))

    @classmethod
    def from_json(cls, line: str) -> Completion:
        """The inverse of `to_json`."""
        fields = json.loads(line)
        fields["choices"] = tuple(Choice(*choice) for choice in fields["choices"])
        return cls(**fields)


@dataclass(frozen=True, slots=True)
class _Failure:
    """An attempt that brought nothing: a value, so that no exception of aiohttp (they hold the headers) travels on.

    `wait`: the least seconds before another attempt, None if another attempt cannot help.
    """

    what: str
    wait: float | None = 0.0


class Client:
    """One endpoint and its counters. An async context manager: `async with Client(...) as client`.

    name, url, model: the recipe's name, the server's base URL (with or without `/v1`), the model's name at the server.
    max_in_flight: requests under way at once; a request that waits to be repeated keeps its place, so a failing server
        is asked less.
    count_tokens: length of a text in the model's tokens; stands in where the server does not report it.
    timeout, seconds_per_token: an attempt gets `timeout + seconds_per_token * max_tokens * n` seconds.
    attempts, patience: no new attempt after this many, or this many seconds after the first failure.
    backoff: seconds; the k-th repetition waits uniform(0, min(15, backoff * 2**(k-1))), or what `Retry-After` asks.

    requests and retries count attempts sent, abandoned those whose reply never arrived whole (their tokens are
    unknown); the token counters sum what the server reported.
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
        attempts: int = 20,
        patience: float = 300.0,
        backoff: float = 0.5,
    ) -> None:
        base = _base_url(name, url)
        api_key = (api_key or "").strip()
        if not (api_key.isascii() and api_key.isprintable()):
            raise UsageError(f"model `{name}`: its API key has characters that no HTTP header can carry; set it again")
        self.name, self.url, self.model = name, str(base), model
        self.requests = self.retries = self.abandoned = 0
        self.prompt_tokens = self.cached_tokens = self.completion_tokens = 0
        self._completions, self._models, self._health = base / "v1/completions", base / "v1/models", base / "health"
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

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()

    def __repr__(self) -> str:
        return f"Client({self.name!r}, {self.url!r}, {self.model!r})"

    def __str__(self) -> str:
        return f"model `{self.name}` ({self.model}) at {self.url}"

    async def complete(self, request: Request) -> Completion:
        """Generate `request.n` samples. Cancelling closes the connection and frees the slot.

        Raises CotreeError when the server refuses the request (4xx other than 429) or the retry budget is spent.
        """
        body = json.dumps(
            {
                "model": self.model,
                "prompt": request.prompt,
                "n": request.n,
                "max_tokens": request.max_tokens,
                "temperature": request.temperature,
                "top_p": request.top_p,
                "seed": request.seed,
                "stop": request.stop or None,  # some servers refuse an empty list
            }
        ).encode()
        limit = self._timeout + self._seconds_per_token * request.max_tokens * request.n
        limits = aiohttp.ClientTimeout(total=limit, sock_connect=_CONNECT_SECONDS)
        attempts, deadline = 0, math.inf
        async with self._slots:
            while True:
                result = await self._attempt(body, limits, request)
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
                self.retries += 1
        tried = "1 attempt" if attempts == 1 else f"{attempts} attempts"
        raise CotreeError(f"{self}: {result.what} ({tried}); fix that, then re-run the same command to resume")

    async def ready(self) -> None:
        """Ask the server whether it is there and serves the model, before work starts.

        Raises UsageError with one line that names the model, the URL and the fix. Costs no tokens unless the server
        does not list the model: some (llama.cpp, Ollama) answer to other names too, so one token is asked for.
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
        served = _model_names(content)
        if served and self.model not in served:
            probe = json.dumps({"model": self.model, "prompt": "Hi", "max_tokens": 1}).encode()
            result = await self._attempt(probe, limits, Request("Hi", 1, 1, 1.0, 1.0, 0, ()))
            if isinstance(result, _Failure):
                raise UsageError(f"{self}: {result.what}; the server lists {', '.join(served[:8])}: set `model` to one")

    async def _attempt(self, body: bytes, limits: aiohttp.ClientTimeout, request: Request) -> Completion | _Failure:
        """Send once. Only being cancelled raises."""
        self.requests += 1
        started = time.perf_counter()
        try:
            # A redirected POST would become a GET, and the key would go wherever it points.
            async with self._session.post(self._completions, data=body, timeout=limits, allow_redirects=False) as reply:
                content = await reply.read()
        except aiohttp.ClientSSLError as error:
            return _Failure(_connection_failure(error, limits.total), wait=None)
        except aiohttp.ClientConnectorError as error:
            return _Failure(_connection_failure(error, limits.total))
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            self.abandoned += 1
            return _Failure(_connection_failure(error, limits.total))
        except asyncio.CancelledError:
            self.abandoned += 1
            raise
        if reply.status == 200:
            return self._read(content, request, time.perf_counter() - started)
        what = self._refusal(reply.status, content)
        if reply.status != 429 and reply.status < 500:
            return _Failure(what, wait=None)
        wait = _retry_after(reply.headers.get("Retry-After"))
        return _Failure(f"{what}, asks to wait {wait:g} s" if wait else what, wait)

    def _read(self, content: bytes, request: Request, seconds: float) -> Completion | _Failure:
        """Check a reply and count its tokens."""
        payload = _json(content)
        if not isinstance(payload, dict) or not isinstance(payload.get("choices"), list):
            return _Failure("the reply is not JSON with choices")
        usage = payload.get("usage")
        prompt_tokens = _count(usage, "prompt_tokens")
        if prompt_tokens is None:
            prompt_tokens = self._count_tokens(request.prompt)
        details = usage.get("prompt_tokens_details") if isinstance(usage, dict) else None
        cached_tokens = _count(details, "cached_tokens") or 0
        reported = _count(usage, "completion_tokens") or 0

        choices: list[Choice] = []
        problem = ""
        for entry in payload["choices"][: request.n]:
            entry = entry if isinstance(entry, dict) else {}
            text, finish = entry.get("text"), _FINISH.get(str(entry.get("finish_reason")))
            if not isinstance(text, str) or finish is None:
                problem = "a choice of the reply has no text or did not finish"
                break
            if not text.isascii():  # half of a surrogate pair is valid JSON, but no file or database takes it
                text = text.encode("utf-8", "replace").decode()
            # llama.cpp reports only the first of several choices, so the report is used per choice only when n = 1.
            tokens = reported if request.n == 1 else 0
            choices.append(Choice(text, finish, tokens or self._count_tokens(text) + (finish == "stop")))
        if not problem and len(choices) < request.n:
            problem = f"{len(choices)} choices came back for n={request.n}"

        completion_tokens = max(reported, sum(choice.tokens for choice in choices))
        self.prompt_tokens += prompt_tokens
        self.cached_tokens += cached_tokens
        self.completion_tokens += completion_tokens
        if problem:
            return _Failure(problem)
        return Completion(tuple(choices), prompt_tokens, cached_tokens, completion_tokens, seconds)

    def _refusal(self, status: int, content: bytes) -> str:
        """An error reply in one line: the status and the first 300 characters of the server's message."""
        message = payload = _json(content)
        if isinstance(payload, dict):
            message = payload.get("error", payload)
        if isinstance(message, dict):
            message = message.get("message") or message.get("detail") or message
        text = _one_line(str(message or content.decode("utf-8", "replace")))
        if self._api_key:  # servers like to quote it
            text = text.replace(self._api_key, "***")
        fix = {401: ": check the API key", 403: ": check the API key", 404: ": check `url` and `model`"}.get(status, "")
        return f"HTTP {status}{f' ({text[:300]})' if text else ''}{fix}"


def _base_url(name: str, url: str) -> URL:
    """The server's root. A URL with a password or a query is refused: recipes are copied into run folders."""
    try:
        base = URL(url.strip())
        good = base.scheme in ("http", "https") and base.host and not base.query_string and not base.fragment
        if good and base.user is None and base.password is None:
            return URL(str(base).rstrip("/").removesuffix("/v1").rstrip("/"))
    except ValueError:
        pass
    raise UsageError(
        f"model `{name}`: `url` must look like http://HOST:PORT or https://HOST/v1, without a key in it "
        "(keys come from the environment variable that `api_key_env` names)"
    )


def _connection_failure(error: Exception, limit: float | None) -> str:
    if isinstance(error, aiohttp.ClientSSLError):
        return f"no trusted TLS connection ({_one_line(str(error))})"
    reason = getattr(error, "os_error", error)  # a connector's error wraps the system's
    reason = _one_line(getattr(reason, "strerror", None) or str(reason)) or type(error).__name__
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


def _count(mapping: object, key: str) -> int | None:
    value = mapping.get(key) if isinstance(mapping, dict) else None
    return value if isinstance(value, int) and value >= 0 else None


def _model_names(content: bytes) -> list[str]:
    """The ids of a `/v1/models` reply, empty for anything else."""
    payload = _json(content)
    entries = payload.get("data") if isinstance(payload, dict) else None
    return [str(e["id"]) for e in entries if isinstance(e, dict) and "id" in e] if isinstance(entries, list) else []


def _json(content: bytes) -> Any:
    """The parsed content, None for garbage (endless brackets included)."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


def _one_line(text: str) -> str:
    """Printable characters only: what a server says must not drive the terminal."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())
