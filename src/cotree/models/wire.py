"""What goes to an OpenAI-compatible server and what comes back: requests, completions, their JSON. No I/O.

Invariant: a `Request` holds everything that decides the text, so its key names its completion in a journal. A reply is
read into n whole choices or into a problem; a malformed one is never half used.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal

from cotree.models.settings import Price

# `finish_reason` as servers give it. Anything else ("abort", "tool_calls", null) is a reply that broke off.
_FINISH: dict[str, Literal["stop", "length"]] = {
    "stop": "stop",
    "eos_token": "stop",
    "stop_sequence": "stop",
    "length": "length",
    "content_filter": "length",
}


@dataclass(frozen=True, slots=True)
class Request:
    """A request for n samples that continue `prompt`, each up to `max_tokens` or a stop string.

    messages: (role, content) pairs that the server renders; `prompt` is then what the assistant has written so far.
    scores: the steps of the conversation are to be scored, nothing is written; the one choice's text is the JSON list
        of the scores.
    logprobs: asks for the log-probability of each token.
    """

    prompt: str
    n: int
    max_tokens: int
    temperature: float
    top_p: float
    seed: int
    stop: tuple[str, ...]
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

    def body(self, model: str) -> bytes:
        """The JSON to post: for scores to `/pooling`, with messages to `/v1/chat/completions`, else to
        `/v1/completions`."""
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
            return json.dumps(body).encode()
        body |= {
            "n": self.n,
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "seed": self.seed,
            "stop": self.stop or None,  # some servers refuse an empty list
        }
        if self.logprobs:
            body |= {"logprobs": True, "top_logprobs": 1} if self.messages else {"logprobs": 1}
        return json.dumps(body).encode()

    def prompt_text(self) -> str:
        """The text that the model reads, without what a server's chat template adds: for counting tokens."""
        return "\n".join([*(content for _, content in self.messages), self.prompt])


@dataclass(frozen=True, slots=True)
class Choice:
    """One sample.

    text: without the stop string. tokens: generated ones, the stop token included.
    logprob: mean of the tokens' log-probabilities in nats (some servers leave the stop token out), None if not asked.
    """

    text: str
    finish_reason: Literal["stop", "length"]
    tokens: int
    logprob: float | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """The answer to a `Request`: n choices in the server's order.

    prompt_tokens: the prompt counted once. cached_tokens: the part of it that was in the server's cache.
    completion_tokens: generated for all choices, at least the sum of theirs.
    seconds: wall time of the attempt that succeeded, without waiting for a free slot or earlier attempts.
    """

    choices: tuple[Choice, ...]
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    seconds: float = 0.0

    def to_json(self) -> str:
        """One line for the journal."""
        line = {field.name: getattr(self, field.name) for field in fields(self)}
        line["choices"] = [
            [v for v in (c.text, c.finish_reason, c.tokens, c.logprob) if v is not None] for c in self.choices
        ]
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

    requests: attempts sent. retries: those that repeated a failed one. abandoned: those that the server may have worked
        on without a readable reply (timeout, reset, cancelled, garbage): what they generated is unknown.
    prompt_tokens, cached_tokens, completion_tokens: as the server reported them, those of unusable replies included.
    abandoned_tokens: of the prompts of abandoned attempts, which are in `prompt_tokens` too.
    """

    requests: int = 0
    retries: int = 0
    abandoned: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    abandoned_tokens: int = 0

    def add(self, completion: Completion) -> None:
        """Count the tokens of a reply."""
        self.prompt_tokens += completion.prompt_tokens
        self.cached_tokens += completion.cached_tokens
        self.completion_tokens += completion.completion_tokens

    def __add__(self, other: Counters) -> Counters:
        return Counters(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Counters)))

    def cost(self, price: Price) -> float:
        """What the tokens cost, in the price's currency, without what abandoned attempts generated."""
        cached = price.prompt if price.cached is None else price.cached
        spent = (self.prompt_tokens - self.cached_tokens) * price.prompt
        return (spent + self.cached_tokens * cached + self.completion_tokens * price.completion) / 1e6


@dataclass(frozen=True, slots=True)
class ServerReply:
    """A reply with HTTP 200, checked.

    completion: None where the reply was not readable enough to count its tokens.
    problem: why it cannot be used, "" when its choices are whole. permanent: another attempt would have it too.
    """

    completion: Completion | None
    problem: str = ""
    permanent: bool = False


def read_reply(content: bytes, request: Request, count_tokens: Callable[[str], int]) -> ServerReply:
    """Check a reply and count its tokens, with `count_tokens` where the server does not report them."""
    payload = _mapping(parse_json(content))
    usage = _mapping(payload.get("usage"))
    prompt_tokens = _count(usage, "prompt_tokens")
    if prompt_tokens is None:
        prompt_tokens = count_tokens(request.prompt_text())
    if request.scores:
        return _read_scores(payload, prompt_tokens)
    if not isinstance(payload.get("choices"), list):
        return ServerReply(None, "the reply is not JSON with choices")
    reported = _count(usage, "completion_tokens") or 0
    choices: list[Choice] = []
    problem = None
    for entry in map(_mapping, payload["choices"][: request.n]):
        # llama.cpp reports only the first of several choices, so the report is used per choice only when n = 1.
        choice = _read_choice(entry, request, count_tokens, reported=reported if request.n == 1 else 0)
        if isinstance(choice, _Problem):
            problem = choice
            break
        choices.append(choice)
    if problem is None and len(choices) < request.n:
        problem = _Problem(f"{len(choices)} choices came back for n={request.n}")
    cached_tokens = min(_count(_mapping(usage.get("prompt_tokens_details")), "cached_tokens") or 0, prompt_tokens)
    completion_tokens = max(reported, sum(choice.tokens for choice in choices))
    completion = Completion(tuple(choices), prompt_tokens, cached_tokens, completion_tokens)
    return ServerReply(completion) if problem is None else ServerReply(completion, problem.text, problem.permanent)


@dataclass(frozen=True, slots=True)
class _Problem:
    """Why a choice cannot be used."""

    text: str
    permanent: bool = False


def _read_choice(
    entry: dict[str, Any], request: Request, count_tokens: Callable[[str], int], *, reported: int
) -> Choice | _Problem:
    """One choice of a reply; `reported` is its number of tokens where the server gives it, else 0."""
    message = _mapping(entry.get("message"))
    text = message.get("content") if request.messages else entry.get("text")
    finish = _FINISH.get(str(entry.get("finish_reason")))
    if not isinstance(text, str) or finish is None:
        return _Problem("a choice of the reply has no text or did not finish")
    if request.messages:  # some servers repeat the assistant's words that they were given
        text = text.removeprefix(request.prompt)
    if not text and (message.get("reasoning_content") or message.get("reasoning")):
        problem = "the server keeps the reasoning apart from the text; start it without a reasoning parser"
        return _Problem(problem, permanent=True)
    if not text.isascii():  # half of a surrogate pair is valid JSON, but no file or database takes it
        text = text.encode("utf-8", "replace").decode()
    tokens = reported or count_tokens(text) + (finish == "stop")
    if not request.logprobs:
        return Choice(text, finish, tokens)
    logprobs = _logprobs(entry)
    # llama.cpp gives none for the last tokens, as many as the stop string has: one ".\n" may be the whole text.
    without = max(1, *map(count_tokens, request.stop)) if finish == "stop" and request.stop else 0
    if logprobs is None and count_tokens(text) > without:
        problem = "the server gives no log-probabilities; use another value than likelihood"
        return _Problem(problem, permanent=True)
    return Choice(text, finish, tokens, sum(logprobs or ()) / max(len(logprobs or ()), 1))


def _read_scores(payload: dict[str, Any], prompt_tokens: int) -> ServerReply:
    """vLLM's pooling reply: a row for each step, a probability or the probabilities of (bad, good)."""
    try:
        rows = payload["data"][0]["data"]
        scores = [float(row[-1] if isinstance(row, list) else row) for row in rows]
    except (TypeError, ValueError, LookupError):
        return ServerReply(None, "the reply is not JSON with pooled data")
    completion = Completion((Choice(json.dumps(scores), "stop", 0),), prompt_tokens, 0, 0)
    if not all(0.0 <= score <= 1.0 for score in scores):
        problem = "the scores are no probabilities; serve a process reward model with its own pooler"
        return ServerReply(completion, problem, permanent=True)
    return ServerReply(completion)


def _logprobs(entry: dict[str, Any]) -> list[float] | None:
    """Each token's log-probability: from a list (vLLM's completions) or one entry a token (chat, and llama.cpp)."""
    try:
        given = entry["logprobs"]
        found = given.get("token_logprobs")
        return [float(p) for p in (found or (token["logprob"] for token in given["content"]))]
    except (TypeError, ValueError, LookupError, AttributeError):
        return None


def _count(mapping: dict[str, Any], key: str) -> int | None:
    value = mapping.get(key)
    # More is no count of tokens, and fits no database column.
    return value if isinstance(value, int) and 0 <= value < 2**48 else None


def model_names(content: bytes) -> list[str]:
    """The ids of a `/v1/models` reply, empty for anything else."""
    entries = _mapping(parse_json(content)).get("data")
    return [str(e["id"]) for e in map(_mapping, entries) if "id" in e] if isinstance(entries, list) else []


def error_message(content: bytes) -> str:
    """The message of an error reply, in one line."""
    message = payload = parse_json(content)
    if isinstance(payload, dict):
        message = payload.get("error", payload)
    if isinstance(message, dict):
        message = message.get("message") or message.get("detail") or message
    return one_line(str(message or content.decode("utf-8", "replace")))


def parse_json(content: bytes) -> Any:
    """The parsed content, None for garbage (endless brackets included)."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


def _mapping(value: object) -> dict[str, Any]:
    """The value if it is a JSON object, an empty one for anything else."""
    return value if isinstance(value, dict) else {}


def one_line(text: str) -> str:
    """The text on one line, without characters that could control a terminal."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())
