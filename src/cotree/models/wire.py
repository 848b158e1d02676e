"""What goes to an OpenAI-compatible server and what comes back: requests, completions, their JSON. No I/O.

Invariant: a `Request` holds everything that decides the text, so its key names its completion in a journal. A reply is
read into n whole choices or into a failure; a malformed one is never half used.
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
# `finish_reason` as servers give it. A text with any other ("eos", "end_turn") is whole.
_CUT_OFF = ("length", "content_filter", "max_tokens", "model_length")
_BROKE_OFF = ("abort", "error", "cancelled", "insufficient_system_resource")
_TOOL_CALLS = ("tool_calls", "function_call")
# An error's `code` or `type`, or a word of its message, where an account is empty: HTTP 429, but no wait helps.
_NO_CREDIT = ("insufficient_quota", "billing_hard_limit_reached", "billing_not_active")

# A token has at most so many characters: long runs of spaces are one token.
_MOST_CHARACTERS = 128
_IMPOSSIBLE = -1


@dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation up to where the assistant's turn begins.

    Invariant: its text and what the assistant has written so far is exactly what the model reads and continues.

    text: the rendered template, "" where the server renders it.
    messages: (role, content) pairs for the server to render, () where `text` is rendered.
    opened: the beginning of the assistant's turn that the template itself writes (`<think>`), which is not in `text`.
    """

    text: str
    messages: tuple[tuple[str, str], ...] = ()
    opened: str = ""


@dataclass(frozen=True, slots=True)
class Request:
    """A request for n samples that continue `prompt`, each up to `max_tokens` or a stop string.

    messages: (role, content) pairs that the server renders; `prompt` is then what the assistant has written so far.
    scores: the steps of the conversation are to be scored, nothing is written; the one choice's text is the JSON list
        of the scores.
    logprobs: asks for the log-probability of each token.
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
        """The sha256 of the fields and the model's identity: equal requests to equal models have equal keys."""
        # 1 and 1.0, 0.0 and -0.0 are the same number and must not be two keys.
        numbers = (int(self.n), int(self.max_tokens), float(self.temperature) + 0.0, float(self.top_p) + 0.0)
        named = [model, *numbers, int(self.seed), self.stop, self.messages, self.scores]
        # One more field would change the key of every completion in every journal.
        head = json.dumps([*named, "logprobs"] if self.logprobs else named, allow_nan=False)
        # The prompt is the long part, so it is not escaped: there is no line end in the JSON before it.
        return hashlib.sha256(f"{head}\n{self.prompt}".encode("utf-8", "surrogatepass")).digest()

    @property
    def path(self) -> str:
        """Where a server takes such requests, relative to its root URL."""
        return "pooling" if self.scores else "v1/chat/completions" if self.messages else "v1/completions"

    def body(self, model: str, omit: Sequence[str] = (), rename: Mapping[str, str] | None = None) -> bytes:
        """The JSON to post to `path`.

        Args:
            model: the model's name at the server.
            omit: parameters that are not sent.
            rename: other names of parameters.
        """
        names = rename or {}
        body = {names.get(name, name): value for name, value in self._parameters(model).items() if name not in omit}
        return json.dumps(body).encode()

    def _parameters(self, model: str) -> dict[str, Any]:
        body: dict[str, Any] = {"model": model}
        if self.messages:
            turns = [{"role": role, "content": content} for role, content in self.messages]
            if self.prompt:
                turns.append({"role": "assistant", "content": self.prompt})
                # vLLM, SGLang and llama.cpp refuse or ignore the one flag without the other.
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
        """The text that the model reads, without what a server's chat template adds: for counting tokens."""
        return "\n".join([*(content for _, content in self.messages), self.prompt]) if self.messages else self.prompt


@dataclass(frozen=True, slots=True)
class Choice:
    """One sample.

    text: without the stop string. tokens: generated ones, the stop token included.
    logprob: mean of the tokens' log-probabilities in nats (some servers leave the stop token out), None if not asked.
    """

    text: str
    finish_reason: FinishReason
    tokens: int
    logprob: float | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """The answer to a `Request`: n choices in the server's order.

    prompt_tokens: the prompt counted once. cached_tokens: the part of it that was in the server's cache.
    completion_tokens: generated for all choices, at least the sum of theirs.
    seconds: wall time of the attempt that succeeded, without waiting for a free slot or earlier attempts.
    misreported: the server's counts could not be true, so these are our own; not in the journal.
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
        return json.dumps(line, ensure_ascii=False, separators=(",", ":"))

    @classmethod
    def from_json(cls, line: str) -> Completion:
        """The inverse of `to_json`."""
        found = json.loads(line)
        found["choices"] = tuple(Choice(*choice) for choice in found["choices"])
        return cls(**found)


@dataclass(slots=True)
class Counters:
    """Requests to a server and their tokens.

    requests: attempts sent, repeated ones included.
    prompt_tokens, cached_tokens, completion_tokens: as the server reported them, those of unusable replies included.
        `prompt_tokens` has those of attempts, too, on which the server may have worked without a readable reply
        (timeout, reset, cancelled, garbage); what these generated is unknown.
    repeats: attempts that repeated a failed one. misreported: replies with counts that could not be true.
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
        """What the tokens cost, in the price's currency, without what attempts generated that were never answered."""
        cached = price.prompt if price.cached is None else price.cached
        spent = (self.prompt_tokens - self.cached_tokens) * price.prompt
        return (spent + self.cached_tokens * cached + self.completion_tokens * price.completion) / 1e6


@dataclass(frozen=True, slots=True)
class Failure:
    """Why an attempt gave no usable completion.

    reason: for the error message. wait: the least seconds before another attempt, None if another would fail too.
    counted: what the server's reply says of tokens and choices, None where it says nothing that can be read.
    unreached: there was no connection, so the server was asked nothing.
    refused: the server's words about what is wrong with the request itself.
    """

    reason: str
    wait: float | None = 0.0
    counted: Completion | None = None
    unreached: bool = False
    refused: str = ""


def read_reply(
    content: bytes, request: Request, count_tokens: Callable[[str], int], seconds: float = 0.0
) -> Completion | Failure:
    """Check a reply with HTTP 200, which took so long, and count its tokens, with `count_tokens` where the server
    reports none that can be true."""
    payload, asked = _json_object(content), request.prompt_text()
    usage = _mapping(payload.get("usage"))
    # A chat template adds to the prompt, and some servers count a token more for each choice.
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
    # llama.cpp reports only the first of several choices, so the report is used per choice only when n = 1.
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
    """One choice of a reply; `reported` is its number of tokens where the server gives it, else 0."""
    message = _mapping(entry.get("message"))
    text = message.get("content") if request.messages else entry.get("text")
    thinking = _reasoning_apart(message, text) if request.messages else ""
    reason = entry.get("finish_reason")
    reason = str(reason or "").casefold()
    if reason in _BROKE_OFF or (text == "" and not reason):
        words = f": {error_message(json.dumps(entry))[:300]}" if entry.get("error") else ""
        return Failure(f"a choice of the reply broke off ({reason or 'empty, without finish_reason'}{words})")
    if reason in _TOOL_CALLS:
        return Failure("the model calls a tool instead of writing; start the server without a tool parser", None)
    if thinking and (not text or request.prompt):  # what begins with its thinking continues no text
        return Failure("the server keeps the reasoning apart from the text; start it without a reasoning parser", None)
    if not isinstance(text, str):
        return Failure("a choice of the reply has no text; does `mode` fit the server?", None)
    if request.messages:  # some servers repeat the assistant's words that they were given
        text = thinking + text.removeprefix(request.prompt)
    if len(text) > _MOST_CHARACTERS * request.max_tokens + 2**10:
        fault = f"a choice has {len(text):,} characters, more than max_tokens={request.max_tokens} can hold"
        return Failure(f"{fault}; does the server know it? The recipe's `rename` gives it another name", None)
    if not text.isascii():  # half of a surrogate pair is valid JSON, but no file or database takes it
        text = text.encode("utf-8", "replace").decode()
    # Where no reason is given, a text of as many tokens as were allowed was cut.
    stopped = reason not in _CUT_OFF if reason else (reported or count_tokens(text)) < request.max_tokens
    tokens = reported or count_tokens(text) + stopped
    choice = Choice(text, "stop" if stopped else "length", tokens)
    if not request.logprobs:
        return choice
    logprobs = _logprobs(entry)
    # llama.cpp gives none for the last tokens, as many as the stop string has: one ".\n" may be the whole text.
    without = max(1, *map(count_tokens, request.stop)) if stopped and request.stop else 0
    if logprobs is None and count_tokens(text) > without:
        return Failure("the server gives no log-probabilities; use another value than likelihood", None)
    return replace(choice, logprob=sum(logprobs or ()) / max(len(logprobs or ()), 1))


def _reasoning_apart(message: dict[str, Any], text: object) -> str:
    """The reasoning that a server tells in a field of its own, between think tags; "" where the text has it, too."""
    fields = (message.get("reasoning_content"), message.get("reasoning"))
    reasoning = next((field.strip() for field in fields if isinstance(field, str) and field.strip()), "")
    told = isinstance(text, str) and reasoning in text.rpartition("</think>")[0]
    return f"<think>\n{reasoning}\n</think>\n\n" if reasoning and not told else ""


def _read_scores(payload: dict[str, Any], unread: Completion) -> Completion | Failure:
    """vLLM's pooling reply: a row for each step, a probability or the probabilities of (bad, good)."""
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
    """Each token's log-probability: from a list (vLLM's completions) or one entry a token (chat, and llama.cpp)."""
    try:
        given = entry["logprobs"]
        found = given.get("token_logprobs")
        return [float(p) for p in (found or (token["logprob"] for token in given["content"]))]
    except (TypeError, ValueError, LookupError, AttributeError):
        return None


def _count(mapping: dict[str, Any], key: str, most: int) -> int | None:
    """A count of a server, None where it gives none, `_IMPOSSIBLE` for what is no number from 0 to `most`."""
    value = mapping.get(key)
    return value if value is None or (type(value) is int and 0 <= value <= most) else _IMPOSSIBLE


def most_bytes(request: Request) -> int:
    """The most bytes that a whole reply can have, escapes, log-probabilities and a repeated prompt included."""
    each = 4 * _MOST_CHARACTERS * (4 if request.logprobs else 1)
    return 2**20 + (64 + 12 * request.n) * len(request.prompt_text()) + each * request.n * request.max_tokens


def begins_as_json(content: bytes) -> bool:
    """Whether a reply is a JSON object or list, whole or broken; any other was not written by a model server."""
    return content.lstrip()[:1] in (b"{", b"[") or bool(_json_object(content))


def model_names(content: bytes) -> list[str]:
    """The ids of a `/v1/models` reply, empty for anything else."""
    entries = _json_object(content).get("data")
    return [str(e["id"]) for e in map(_mapping, entries) if "id" in e] if isinstance(entries, list) else []


def error_status(content: bytes, status: int) -> int:
    """The HTTP status that a reply means: some servers send an error with status 200, or an empty account as 429.

    An error with status 200 means the status in its `code`, 400 without one.
    """
    payload = _json_object(content)
    error = payload.get("error")
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


@lru_cache(maxsize=1)  # of one reply the status, the form and the choices are read; nobody changes it
def _json_object(content: bytes | str) -> dict[str, Any]:
    """The JSON object of a reply, an empty one for anything else (endless brackets included)."""
    try:
        return _mapping(json.loads(content))
    except (ValueError, RecursionError):
        return {}


def _mapping(value: object) -> dict[str, Any]:
    """The value if it is a JSON object, an empty one for anything else."""
    return value if isinstance(value, dict) else {}
