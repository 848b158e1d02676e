"""OpenAI's HTTP protocol as the decoding server takes and gives it: request bodies, refusals, replies. No I/O.

Every parameter that is taken changes the outcome, any other is refused unless its value asks for nothing. The reported
usage is what was really generated and read.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from aiohttp import web
from pydantic import BaseModel, BeforeValidator, Field, ValidationError, field_validator

from cotree.decode.answer import Decoding
from cotree.decode.strategies import Decoded
from cotree.search.settings import Search, Thought
from cotree.tasks.base import Message
from cotree.tasks.extract import visible_text

# Values by which clients ask for nothing.
_NO_EFFECT = {"frequency_penalty": 0, "presence_penalty": 0, "logprobs": False, "echo": False, "store": False}


class Refusal(Exception):  # noqa: N818 - not every refusal is an error
    """A refusal in OpenAI's form: HTTP `status` and JSON `body`."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        kind = "invalid_request_error" if status < 429 else "rate_limit_error" if status == 429 else "server_error"
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


class _TextPart(BaseModel, extra="forbid"):
    type: Literal["text"]
    text: str


class _ChatMessage(BaseModel, extra="forbid"):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[_TextPart]
    # Clients send an answer of this server back with the next turn; the thinking in it is left out.
    reasoning_content: str | None = None

    def as_message(self) -> Message:
        text = self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class _StreamOptions(BaseModel, extra="forbid"):
    include_usage: bool = False


def _as_list(value: Any) -> Any:
    """One text as the list that holds it."""
    return [value] if isinstance(value, str) else value


class _Body(BaseModel, extra="forbid"):
    """What both addresses take.

    max_tokens: bounds the answer that is returned, without the reasoning before it.
    max_completion_tokens: the search's budget; it bounds all that is generated, the reasoning included.
    """

    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    n: int = Field(1, ge=1, le=8)
    seed: int | None = None
    stop: Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=4), BeforeValidator(_as_list)] = []
    stream: bool = False
    stream_options: _StreamOptions = _StreamOptions()


class ChatBody(_Body):
    """A body of `/v1/chat/completions`."""

    messages: list[_ChatMessage] = Field(min_length=1)

    @field_validator("messages")
    @classmethod
    def _user_comes_last(cls, messages: list[_ChatMessage]) -> list[_ChatMessage]:
        if messages[-1].role != "user":
            raise ValueError("the last message must be the user's")
        return messages

    def conversation(self) -> list[Message]:
        """The messages as text."""
        return [message.as_message() for message in self.messages]


class TextBody(_Body):
    """A body of `/v1/completions`."""

    prompt: str = Field(min_length=1)

    def conversation(self) -> list[Message]:
        """The prompt as the user's message."""
        return [{"role": "user", "content": self.prompt}]


Body = ChatBody | TextBody


async def read_body(request: web.Request, kind: type[Body]) -> Body:
    """The body of a request.

    Raises:
        Refusal: it is no JSON object, or a parameter is not supported or has a wrong value.
    """
    try:
        raw = await request.json()
        given = {k: v for k, v in raw.items() if v is not None and _NO_EFFECT.get(k, _NO_EFFECT) != v}
        if isinstance(given.get("messages"), list):
            given["messages"] = [{k: v for k, v in one.items() if v is not None} for one in given["messages"]]
        return kind.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        param = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            what = f"`{param}`: is not supported where answers are decoded with search; leave it out"
            raise Refusal(400, what, param, "unsupported_parameter") from None
        raise Refusal(400, f"`{param}`: {first['msg'].removeprefix('Value error, ')}", param) from None
    except (ValueError, AttributeError, RecursionError, LookupError):
        raise Refusal(400, "the body is no JSON object") from None


def settings_for_request(settings: Decoding, body: Body) -> Search:
    """The server's search settings with a request's own; its budget can be lowered, not raised."""
    changes: dict[str, Any] = body.model_dump(include={"temperature", "top_p"}, exclude_none=True)
    if body.max_tokens is not None:
        answer = settings.thoughts.get("answer", Thought()).model_copy(update={"max_tokens": body.max_tokens})
        changes["thoughts"] = {**settings.thoughts, "answer": answer}
    if body.max_completion_tokens is not None:
        least = min(body.max_completion_tokens, settings.stop.tokens or body.max_completion_tokens)
        changes["stop"] = settings.stop.model_copy(update={"tokens": least})
    return settings.model_copy(update=changes)


def reply_json(body: Body, found: Sequence[Decoded], *, boxed: bool) -> dict[str, Any]:
    """The whole reply: an answer for each search, and what all of them generated and read.

    boxed: an answer's text is the line with its box; of a free text it is what follows the answer tag.
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
    """An answer, up to the first stop string, and what is not OpenAI's: the votes and why the search stopped."""
    text = best.answer_text if boxed else visible_text(best.answer_text)
    text = text[: min((text.index(stop) for stop in body.stop if stop in text), default=len(text))]
    content: dict[str, Any] = {"text": text, "reasoning": best.reasoning, "logprobs": None}
    if isinstance(body, ChatBody):
        message = {"role": "assistant", "content": text, "reasoning_content": best.reasoning}
        content = {"delta" if body.stream else "message": message}
    about = {"votes": best.votes, "chains": best.chains, "stopped": best.stopped}
    return {**content, "finish_reason": "length" if best.cut_off else "stop", "search": about}
