"""OpenAI's HTTP protocol for the decoding server: request bodies, errors, replies. No I/O.

Every accepted parameter has an effect; others are refused unless their value is a no-op or labels a request. Usage
reports all tokens that were read and generated.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from aiohttp import web
from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, StrictBool, ValidationError, model_validator
from pydantic_core import from_json

from cotree.decode.answer import Decoding
from cotree.decode.strategies import Decoded
from cotree.search.settings import Search, Thought
from cotree.tasks.base import Message
from cotree.tasks.extract import visible_text

# No-op values of parameters in a body, a message or stream_options.
_NO_EFFECT: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("frequency_penalty", "presence_penalty", "top_logprobs", "min_p", "min_tokens", "mirostat"), (0,)),
    **dict.fromkeys(("logprobs", "echo", "store", "ignore_eos", "include_obfuscation"), (False,)),
    **dict.fromkeys(("best_of", "repetition_penalty", "repeat_penalty", "typical_p"), (1,)),
    **dict.fromkeys(("tools", "functions", "tool_calls", "annotations"), ([],)),
    **dict.fromkeys(("tool_choice", "function_call"), ("none", "auto")),
    **dict.fromkeys(("logit_bias", "chat_template_kwargs"), ({},)),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "service_tier": ("auto", "default"),
    "suffix": ("",),
    "top_k": (-1, 0),
}
# Parameters that label a request, a message or a cache entry, without effect on the answer.
_LABELS = {"metadata", "user", "safety_identifier", "prompt_cache_key", "cache_control", "name"}


def _has_effect(key: str, value: Any) -> bool:
    """Whether a parameter's value is not a no-op; distinguishes 0 from False."""
    neutral = _NO_EFFECT.get(key, ())
    if value is None or key in _LABELS:
        return False
    return value not in neutral or isinstance(value, bool) != isinstance(neutral[0], bool)


def _shortened(text: str) -> str:
    """Shorten a text in the middle, because a client's names can be arbitrarily long."""
    return text if len(text) <= 600 else f"{text[:300]} ... {text[-300:]}"


def _object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object; refuse duplicate keys, because parsers disagree about them."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise Refusal(400, f"`{twice}` stands twice in one JSON object; send it once", twice)
    return found


class Refusal(Exception):  # noqa: N818 - not every refusal is an error
    """An error in OpenAI's format: HTTP `status` and JSON `body`."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        message, param = _shortened(message), param and _shortened(param)
        kind = "invalid_request_error" if status < 429 else "rate_limit_error" if status == 429 else "server_error"
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _check_text(text: str) -> str:
    if "\0" in text:
        raise ValueError("must hold no NUL characters")
    return text


def _check_number(value: Any) -> Any:
    if isinstance(value, bool | str):
        raise ValueError("must be a number")
    return value


def _stop_strings(value: Any) -> Any:
    stops = [value] if isinstance(value, str) else value
    if isinstance(stops, list) and len(stops) > 4:
        raise ValueError(f"at most 4 stop strings, not {len(stops)}")
    return stops


def _only_prompt(prompt: Any) -> Any:
    if isinstance(prompt, list) and (len(prompt) != 1 or not isinstance(prompt[0], str)):
        raise ValueError("one prompt a request, and text only")
    return prompt[0] if isinstance(prompt, list) else prompt


def _text_parts(content: Any) -> Any:
    if not isinstance(content, str | list):
        raise ValueError("text only: a string or a list of text parts")
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _check_part(kind: str) -> str:
    if kind != "text":
        raise ValueError(f"text only, no part of type `{kind[:80]}`")
    return kind


_Text = Annotated[str, AfterValidator(_check_text)]
_Count = Annotated[int, Field(ge=1, lt=2**31), BeforeValidator(_check_number)]
_Float = Annotated[float, BeforeValidator(_check_number)]


class _Parameters(BaseModel, extra="forbid"):
    """Request parameters; those with no-op values are dropped."""

    @model_validator(mode="before")
    @classmethod
    def _leave_out(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            raise ValueError("must be a JSON object")
        return {k: v for k, v in given.items() if _has_effect(k, v)}


class _TextPart(_Parameters):
    type: Annotated[str, AfterValidator(_check_part)]
    text: _Text


class _ChatMessage(_Parameters):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[_TextPart], BeforeValidator(_text_parts)]
    # Clients send an earlier answer back with the next turn; its thinking is dropped.
    reasoning_content: str | None = None

    def as_message(self) -> Message:
        text = "\n".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class _StreamOptions(_Parameters):
    include_usage: StrictBool = False


class _Body(_Parameters):
    """Parameters of both endpoints.

    max_tokens: limits the returned answer, without the reasoning before it.
    max_completion_tokens: the search's budget; limits all generated tokens, including reasoning.
    """

    model: str
    max_tokens: _Count | None = None
    temperature: Annotated[_Float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[_Float, Field(gt=0, le=1)] | None = None
    max_completion_tokens: _Count | None = None
    n: Annotated[_Count, Field(le=8)] = 1
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63), BeforeValidator(_check_number)] | None = None
    stop: Annotated[list[Annotated[str, Field(min_length=1)]], BeforeValidator(_stop_strings)] = []
    stream: StrictBool = False
    stream_options: _StreamOptions = _StreamOptions()


def _user_comes_last(messages: list[_ChatMessage]) -> list[_ChatMessage]:
    if messages[-1].role != "user":
        raise ValueError("the last message must be the user's")
    return messages


class ChatBody(_Body):
    """A body of `/v1/chat/completions`."""

    messages: Annotated[list[_ChatMessage], Field(min_length=1), AfterValidator(_user_comes_last)]

    def conversation(self) -> list[Message]:
        """The messages as text."""
        return [message.as_message() for message in self.messages]


class TextBody(_Body):
    """A body of `/v1/completions`."""

    prompt: Annotated[_Text, Field(min_length=1), BeforeValidator(_only_prompt)]

    def conversation(self) -> list[Message]:
        """The prompt as the user's message."""
        return [{"role": "user", "content": self.prompt}]


Body = ChatBody | TextBody


async def read_body(request: web.Request, kind: type[Body]) -> Body:
    """Parse a request's body.

    Raises:
        Refusal: not a JSON object, or an unsupported or invalid parameter.
    """
    try:
        data = await request.read()
        # A missing content type reads as octet-stream.
        if not request.content_type.endswith(("json", "octet-stream")):
            raise Refusal(400, f"the body must be application/json, not {request.content_type}")
        # pydantic's parser refuses lone surrogates, NaN and deep nesting; only Python's parser detects duplicate keys.
        from_json(data, allow_inf_nan=False)
        return kind.model_validate(json.loads(data, object_pairs_hook=_object_of))
    except ValidationError as error:
        first = error.errors()[0]
        param = ".".join(map(str, first["loc"])) or None
        if first["type"] == "extra_forbidden":
            what = f"`{param}`: is not supported where answers are decoded with search; leave it out"
            raise Refusal(400, what, param, "unsupported_parameter") from None
        raise Refusal(400, f"`{param or 'body'}`: {first['msg'].removeprefix('Value error, ')}", param) from None
    except (ValueError, web.RequestPayloadError) as error:
        raise Refusal(400, f"the body is not JSON: {error}") from None


def settings_for_request(settings: Decoding, body: Body) -> Search:
    """Merge a request's parameters into the server's search settings; the budget can only be lowered."""
    changes: dict[str, Any] = body.model_dump(include={"temperature", "top_p"}, exclude_none=True)
    if body.max_tokens is not None:
        answer = settings.thoughts.get("answer", Thought()).model_copy(update={"max_tokens": body.max_tokens})
        changes["thoughts"] = {**settings.thoughts, "answer": answer}
    if body.max_completion_tokens is not None:
        least = min(body.max_completion_tokens, settings.stop.tokens or body.max_completion_tokens)
        changes["stop"] = settings.stop.model_copy(update={"tokens": least})
        limits = ("max_thought_tokens", "max_chain_tokens")
        changes |= {name: min(getattr(settings, name), least) for name in limits}
    return settings.model_copy(update=changes)


def reply_json(body: Body, found: Sequence[Decoded], *, boxed: bool) -> dict[str, Any]:
    """The reply's JSON: one choice per search, and the usage of all.

    boxed: the answer's text is the line with the box; else the text after the answer tag.
    """
    prefix, kind = "cmpl", "text_completion"
    if isinstance(body, ChatBody):
        prefix, kind = "chatcmpl", "chat.completion.chunk" if body.stream else "chat.completion"
    read = sum(best.spent.prompt_tokens for best in found)
    written = sum(best.spent.completion_tokens for best in found)
    not_returned = written - sum(best.answer_tokens for best in found)
    return {
        "id": f"{prefix}-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": body.model,
        "choices": [{"index": index, **_choice(body, best, boxed)} for index, best in enumerate(found)],
        "usage": {
            "prompt_tokens": read,
            "completion_tokens": written,
            "total_tokens": read + written,
            "prompt_tokens_details": {"cached_tokens": sum(best.spent.cached_tokens for best in found)},
            "completion_tokens_details": {"reasoning_tokens": max(not_returned, 0)},
        },
    }


def _choice(body: Body, best: Decoded, boxed: bool) -> dict[str, Any]:
    """A choice with the answer up to the first stop string, and extra fields: the votes and the stop reason."""
    text = best.answer_text if boxed else visible_text(best.answer_text)
    text = text[: min((text.index(stop) for stop in body.stop if stop in text), default=len(text))]
    content: dict[str, Any] = {"text": text, "reasoning": best.reasoning, "logprobs": None}
    if isinstance(body, ChatBody):
        message = {"role": "assistant", "content": text, "reasoning_content": best.reasoning}
        content = {"delta" if body.stream else "message": message}
    about = {"votes": best.votes, "chains": best.chains, "stopped": best.stopped}
    return {**content, "finish_reason": "length" if best.cut_off else "stop", "search": about}
