"""Conversations as prompts: rendered by a model's chat template here, or as messages that its server renders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cotree.base.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation up to where the assistant's turn begins.

    Invariant: its text and what the assistant has written so far is exactly what the model reads and continues.

    text: the rendered template, "" where the server renders it.
    messages: (role, content) pairs for the server to render, () where `text` is rendered.
    """

    text: str
    messages: tuple[tuple[str, str], ...] = ()


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]]) -> str:
    """Render a conversation as text that ends where the assistant's turn begins.

    A begin-of-sequence token that the server will add by itself is left out: two of them would be another prompt. A
    base model, whose tokenizer has no chat template, reads plain turns:

        Question: What is 1 + 2?
        Answer:
        1 + 2 = 3.

        Question: What is 3 + 4?
        Answer:

    Raises:
        UsageError: the chat template refuses the conversation.
    """
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        return _plain_turns(messages)
    try:
        text = tokenizer.apply_chat_template([dict(m) for m in messages], tokenize=False, add_generation_prompt=True)
    except (TemplateError, ValueError) as error:
        raise UsageError(f"the chat template refuses the conversation: {error}; use another `tokenizer`") from None
    bos = getattr(tokenizer, "bos_token", None)
    if bos and text.startswith(bos) and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]:
        text = text.removeprefix(bos)
    return str(text)


def _plain_turns(messages: Sequence[Mapping[str, str]]) -> str:
    """Questions and answers; an answer begins on a line of its own, as every thought does."""
    turns = ((message["role"], message["content"].strip()) for message in messages)
    return "".join(f"Question: {text}\nAnswer:\n" if role == "user" else f"{text}\n\n" for role, text in turns)
