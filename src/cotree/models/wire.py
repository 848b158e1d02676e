"""Requests to OpenAI-compatible servers, their completions, and the JSON of both. No I/O.

Invariant: a `Request` holds everything that affects the text, so its hash is the completion's key in the journal. A
reply is parsed into n whole choices or a failure; a malformed one is never used in part.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Literal

from cotree.base.progress import one_line
from cotree.models.settings import Price

FinishReason = Literal["stop", "length"]
# Values of `finish_reason` from various servers. With any other ("eos", "end_turn") the text is complete.
_CUT_OFF = ("length", "content_filter", "max_tokens", "model_length")
_BROKE_OFF = ("abort", "error", "cancelled", "insufficient_system_resource")
_TOOL_CALLS = ("tool_calls", "function_call")
# `code`, `type` or words in the message of an error for an empty account: HTTP 429, but retries are pointless.
_NO_CREDIT = ("insufficient_quota", "billing_hard_limit_reached", "billing_not_active")

# Maximum characters per token; long runs of spaces can be one token.
_MOST_CHARACTERS = 128
_IMPOSSIBLE = -1
# `json.dumps` makes a new encoder for each call with options.
_compact_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
_cached_json = lru_cache(maxsize=64)(json.dumps)


@dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation rendered up to the start of the assistant's turn.

    Invariant: `text` plus the assistant's text so far is exactly the model's input.

    text: the rendered template; "" if the server renders it.
    messages: (role, content) pairs for the server to render; () if `text` is rendered.
    opened: start of the assistant's turn that the template adds (`<think>`); not in `text`.
    """

    text: str
    messages: tuple[tuple[str, str], ...] = ()
    opened: str = ""


@dataclass(frozen=True, slots=True)
class Request:
    """A request for n samples that continue `prompt`, each up to `max_tokens` or a stop string.

    messages: (role, content) pairs for the server to render; `prompt` is then the assistant's text so far.
    scores: score the steps of the conversation instead of generating; the only choice's text is the JSON list of
        scores.
    logprobs: request token logprobs.
    """

    prompt: str
    n: int = 1
    max_tokens: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    messages: tuple[tuple[str, str], ...] = ()
    scores: bool = False
    logprobs: bool = False

    def key(self, model: str) -> bytes:
        """SHA-256 of the fields and the model's identity: equal requests to equal models have equal keys."""
        # 1 and 1.0, 0.0 and -0.0 are the same number and must not be two keys.
        numbers = (int(self.n), int(self.max_tokens), float(self.temperature) + 0.0, float(self.top_p) + 0.0)
        # The JSON of a list, whose strings are the same in most requests.
        head = f"[{_cached_json(model)}, {', '.join(map(repr, numbers))}, {int(self.seed)}, {_cached_json(self.stop)}, "
        head += f"{_cached_json(self.messages)}, {'true' if self.scores else 'false'}"
        # One more field would change the key of every completion in every journal.
        head += ', "logprobs"]' if self.logprobs else "]"
        # The prompt is the long part, so it is not escaped: there is no line end in the JSON before it.
        return hashlib.sha256(f"{head}\n{self.prompt}".encode("utf-8", "surrogatepass")).digest()

    @property
    def path(self) -> str:
        """The API path of this request, relative to the server's root URL."""
        return "pooling" if self.scores else "v1/chat/completions" if self.messages else "v1/completions"

    def body(self, model: str, omit: Sequence[str] = (), rename: Mapping[str, str] | None = None) -> bytes:
        """The JSON to post to `path`.

        Args:
            model: the model's name at the server.
            omit: parameters not to send.
            rename: the server's names for parameters.
        """
        body, names = self._parameters(model), rename or {}
        if omit or names:
            body = {names.get(name, name): value for name, value in body.items() if name not in omit}
        return json.dumps(body).encode()

    def _parameters(self, model: str) -> dict[str, Any]:
        body: dict[str, Any] = {"model": model}
        if self.messages:
            turns = [{"role": role, "content": content} for role, content in self.messages]
            if self.prompt:
                turns.append({"role": "assistant", "content": self.prompt})
                # vLLM, SGLang and llama.cpp reject or ignore one flag without the other.
                body |= {"add_generation_prompt": False, "continue_final_message": True}
            body["messages"] = turns
        else:
            body["prompt"] = self.prompt
        if self.scores:
            return body
        for name in ("n", "max_tokens", "temperature", "top_p", "seed"):
            body[name] = getattr(self, name)
        body["stop"] = self.stop or None  # some servers refuse an empty list
        if self.logprobs:
            body |= {"logprobs": True, "top_logprobs": 1} if self.messages else {"logprobs": 1}
        return body

    def prompt_text(self) -> str:
        """The prompt's text for token counts, without what a server's chat template adds."""
        return "\n".join([*(content for _, content in self.messages), self.prompt]) if self.messages else self.prompt


@dataclass(frozen=True, slots=True)
class Choice:
    """One sample.

    text: without the stop string. tokens: generated, including the stop token.
    logprob: mean token logprob in nats (some servers leave out the stop token); None if not requested.
    """

    text: str
    finish_reason: FinishReason
    tokens: int
    logprob: float | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """The reply to a `Request`: n choices in the server's order.

    prompt_tokens: the prompt counted once. cached_tokens: those in the server's prefix cache.
    completion_tokens: generated for all choices, at least the sum of theirs.
    seconds: wall time of the successful attempt, without queueing and earlier attempts.
    misreported: the server's token counts were impossible and replaced by local ones; not in the journal.
    """

    choices: tuple[Choice, ...]
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    seconds: float = 0.0
    misreported: bool = field(default=False, compare=False)

    def to_json(self) -> str:
        """One line for the journal."""
        # Field by field, because `asdict` copies each value and costs more than the rest.
        choices = [(choice.text, choice.finish_reason, choice.tokens, choice.logprob) for choice in self.choices]
        line = {
            "choices": [choice if choice[-1] is not None else choice[:-1] for choice in choices],
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "completion_tokens": self.completion_tokens,
            "seconds": self.seconds,
        }
        return _compact_json(line)

    @classmethod
    def from_json(cls, line: str) -> Completion:
        """The inverse of `to_json`."""
        found = json.loads(line)
        found["choices"] = tuple(Choice(*choice) for choice in found["choices"])
        return cls(**found)


@dataclass(slots=True)
class Counters:
    """Counts of requests to a server and of their tokens.

    requests: attempts sent, including retries.
    prompt_tokens, cached_tokens, completion_tokens: as the server reported them, including unusable replies.
        `prompt_tokens` also has those of attempts that the server may have processed without a readable reply (timeout,
        reset, cancelled, garbage); what these generated is unknown.
    repeats: retries. misreported: replies with impossible counts.
    """

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    repeats: int = 0
    misreported: int = 0

    def add(self, completion: Completion) -> None:
        """Count the tokens of a reply."""
        self.prompt_tokens += completion.prompt_tokens
        self.cached_tokens += completion.cached_tokens
        self.completion_tokens += completion.completion_tokens
        self.misreported += completion.misreported

    def cost(self, price: Price) -> float:
        """The cost of the counted tokens, in the price's currency; tokens generated for unanswered attempts are not."""
        cached = price.prompt if price.cached is None else price.cached
        spent = (self.prompt_tokens - self.cached_tokens) * price.prompt
        return (spent + self.cached_tokens * cached + self.completion_tokens * price.completion) / 1e6


@dataclass(frozen=True, slots=True)
class Failure:
    """Why an attempt gave no usable completion.

    reason: for the error message. wait: minimum seconds before a retry; None if a retry is pointless.
    counted: the token counts and choices in the reply; None if unreadable.
    unreached: the connection failed, so the server got no request.
    refused: the server's message about an invalid request.
    """

    reason: str
    wait: float | None = 0.0
    counted: Completion | None = None
    unreached: bool = False
    refused: str = ""


def read_reply(
    content: bytes, request: Request, count_tokens: Callable[[str], int], seconds: float = 0.0
) -> Completion | Failure:
    """Parse and check a reply with HTTP 200; tokens are counted with `count_tokens` if the server's usage is missing or
    impossible."""
    payload, asked = _json_object(content), request.prompt_text()
    usage = _mapping(payload.get("usage"))
    # Tolerances: a chat template adds to the prompt, and some servers count an extra token per choice.
    longest = 4 * len(asked) + 2**16
    prompt_tokens = _count(usage, "prompt_tokens", longest)
    reported = _count(usage, "completion_tokens", request.n * (request.max_tokens + 1))
    cached_tokens = _count(_mapping(usage.get("prompt_tokens_details")), "cached_tokens", longest)
    misreported = _IMPOSSIBLE in (prompt_tokens, reported, cached_tokens)
    if prompt_tokens in (None, _IMPOSSIBLE):
        prompt_tokens = count_tokens(asked)
    reported = max(reported or 0, 0)
    if request.scores or not isinstance(payload.get("choices"), list):
        unread = Completion((), prompt_tokens, 0, 0, seconds, misreported)
        no_choices = Failure("the reply is not JSON with choices", counted=unread)
        return _read_scores(payload, unread) if request.scores else no_choices
    # llama.cpp reports only the first of several choices, so usage counts per choice only if n = 1.
    each = reported if request.n == 1 else 0
    read = [_read_choice(_mapping(entry), request, count_tokens, each) for entry in payload["choices"][: request.n]]
    choices = tuple(choice for choice in read if isinstance(choice, Choice))
    failure = next((choice for choice in read if isinstance(choice, Failure)), None)
    if failure is None and len(choices) < request.n:
        failure = Failure(f"{len(choices)} choices came back for n={request.n}")
    cached_tokens = min(max(cached_tokens or 0, 0), prompt_tokens)
    completion_tokens = max(reported, sum(choice.tokens for choice in choices))
    completion = Completion(choices, prompt_tokens, cached_tokens, completion_tokens, seconds, misreported)
    return completion if failure is None else replace(failure, counted=completion)


def _read_choice(
    entry: dict[str, Any], request: Request, count_tokens: Callable[[str], int], reported: int
) -> Choice | Failure:
    """Parse one choice of a reply; `reported` is its token count from the server, or 0."""
    message = _mapping(entry.get("message"))
    text = message.get("content") if request.messages else entry.get("text")
    thinking = _separate_reasoning(message, text) if request.messages else ""
    reason = entry.get("finish_reason")
    reason = str(reason or "").casefold()
    if reason in _BROKE_OFF or (text == "" and not reason):
        words = f": {error_message(json.dumps(entry))[:300]}" if entry.get("error") else ""
        return Failure(f"a choice of the reply broke off ({reason or 'empty, without finish_reason'}{words})")
    if reason in _TOOL_CALLS:
        return Failure("the model calls a tool instead of writing; start the server without a tool parser", None)
    if thinking and (not text or request.prompt):  # with reasoning it did not continue the text
        return Failure("the server keeps the reasoning apart from the text; start it without a reasoning parser", None)
    if not isinstance(text, str):
        return Failure("a choice of the reply has no text; does `mode` fit the server?", None)
    if request.messages:  # some servers repeat the prefilled assistant text
        text = thinking + text.removeprefix(request.prompt)
    if len(text) > _MOST_CHARACTERS * request.max_tokens + 2**10:
        fault = f"a choice has {len(text):,} characters, more than max_tokens={request.max_tokens} can hold"
        return Failure(f"{fault}; does the server know it? The recipe's `rename` gives it another name", None)
    if not text.isascii():  # lone surrogates are valid JSON, but files and databases reject them
        text = text.encode("utf-8", "replace").decode()
    # Without a finish_reason, a text of max_tokens tokens was cut.
    stopped = reason not in _CUT_OFF if reason else (reported or count_tokens(text)) < request.max_tokens
    tokens = reported or count_tokens(text) + stopped
    choice = Choice(text, "stop" if stopped else "length", tokens)
    if not request.logprobs:
        return choice
    logprobs = _logprobs(entry)
    # llama.cpp returns no logprobs for the stop string's tokens: one ".\n" may be the whole text.
    without = max(1, *map(count_tokens, request.stop)) if stopped and request.stop else 0
    if logprobs is None and count_tokens(text) > without:
        return Failure("the server gives no log-probabilities; use another value than likelihood", None)
    return replace(choice, logprob=sum(logprobs or ()) / max(len(logprobs or ()), 1))


def _separate_reasoning(message: dict[str, Any], text: object) -> str:
    """A separate reasoning field in think tags; "" if there is none or the text contains it too."""
    fields = (message.get("reasoning_content"), message.get("reasoning"))
    reasoning = next((field.strip() for field in fields if isinstance(field, str) and field.strip()), "")
    told = isinstance(text, str) and reasoning in text.rpartition("</think>")[0]
    return f"<think>\n{reasoning}\n</think>\n\n" if reasoning and not told else ""


def _read_scores(payload: dict[str, Any], unread: Completion) -> Completion | Failure:
    """Parse vLLM's pooling reply: a row per step with one probability, or the probabilities of (bad, good)."""
    try:
        rows = payload["data"][0]["data"]
        scores = [float(row[-1] if isinstance(row, list) else row) for row in rows]
    except (TypeError, ValueError, LookupError):
        return Failure("the reply is not JSON with pooled data", counted=unread)
    completion = replace(unread, choices=(Choice(json.dumps(scores), "stop", 0),))
    if all(0.0 <= score <= 1.0 for score in scores):
        return completion
    reason = "the scores are no probabilities; serve a process reward model with its own pooler"
    return Failure(reason, None, completion)


def _logprobs(entry: dict[str, Any]) -> list[float] | None:
    """Token logprobs, from a list (vLLM completions) or from one object per token (chat, and llama.cpp)."""
    try:
        given = entry["logprobs"]
        found = given.get("token_logprobs")
        return [float(p) for p in (found or (token["logprob"] for token in given["content"]))]
    except (TypeError, ValueError, LookupError, AttributeError):
        return None


def _count(mapping: dict[str, Any], key: str, most: int) -> int | None:
    """A token count from a server: None if missing, `_IMPOSSIBLE` if not an integer from 0 to `most`."""
    value = mapping.get(key)
    return value if value is None or (type(value) is int and 0 <= value <= most) else _IMPOSSIBLE


def most_bytes(request: Request) -> int:
    """An upper bound on a reply's bytes, with JSON escapes, logprobs and an echoed prompt."""
    each = 4 * _MOST_CHARACTERS * (4 if request.logprobs else 1)
    return 2**20 + (64 + 12 * request.n) * len(request.prompt_text()) + each * request.n * request.max_tokens


def begins_as_json(content: bytes) -> bool:
    """Whether a reply starts as a JSON object or list, even if truncated; others do not come from a model server."""
    return content.lstrip()[:1] in (b"{", b"[") or bool(_json_object(content))


def model_names(content: bytes) -> list[str]:
    """The model ids of a `/v1/models` reply; empty for anything else."""
    entries = _json_object(content).get("data")
    return [str(e["id"]) for e in map(_mapping, entries) if "id" in e] if isinstance(entries, list) else []


def error_status(content: bytes, status: int) -> int:
    """Correct the HTTP status of a reply: some servers send errors with status 200, or an empty account as 429.

    An error with status 200 gets the status in its `code`, or 400.
    """
    payload = _json_object(content)
    error = payload.get("error")
    if status == 200 and not error and "choices" in payload and payload.get("object") != "error":
        return status
    details = _mapping(error)
    said = error_message(content) if error or status == 429 else ""
    if any(word in (details.get("code"), details.get("type")) or word in said for word in _NO_CREDIT):
        return 402
    told = payload.get("object") == "error" or ("choices" not in payload and {"detail", "message"} & payload.keys())
    if status != 200 or not (error or told):
        return status
    code = str(details.get("code"))
    return int(code) if code in ("408", "425", "429") or (code.isdecimal() and 500 <= int(code[:4]) < 600) else 400


def error_message(content: bytes | str) -> str:
    """The message of an error reply, in one line."""
    payload = _json_object(content)
    message = payload.get("error") or payload
    if isinstance(message, dict):
        message = message.get("message") or message.get("detail") or message
    return one_line(str(message or (content if isinstance(content, str) else content.decode("utf-8", "replace"))))


@lru_cache(maxsize=1)  # each reply is parsed several times; the result must not be modified
def _json_object(content: bytes | str) -> dict[str, Any]:
    """Parse a reply as a JSON object; {} for anything else (also too deeply nested)."""
    try:
        return _mapping(json.loads(content))
    except (ValueError, RecursionError):
        return {}


def _mapping(value: object) -> dict[str, Any]:
    """The value if it is a JSON object, else {}."""
    return value if isinstance(value, dict) else {}
