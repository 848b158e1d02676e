"""Conversations as models take them: text through the chat template, or messages that the server renders.

Invariant: a `Prompt` stands where the assistant's turn begins; its text and whatever the assistant has said so far is
exactly what the model reads and continues.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cotree.base.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Prompt:
    """Where a conversation stands before the assistant writes.

    text: the rendered template, "" where the server renders it.
    messages: (role, content) pairs for the server to render, () where `text` is rendered.
    """

    text: str
    messages: tuple[tuple[str, str], ...] = ()


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]]) -> str:
    """A conversation as text, ending where the assistant's turn begins.

    A token of beginning that the server will add by itself is left out: two of them are another prompt. A base model,
    whose tokenizer has no chat template, reads the conversation as a text of plain turns:

        Question: What is 1 + 2?
        Answer:
        1 + 2 = 3.

        Question: What is 3 + 4?
        Answer:

    An answer begins in a line of its own, as every thought does.

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
    """Questions and answers, a blank line after each answer; what others say stands as it is."""
    turns = ((message["role"], message["content"].strip()) for message in messages)
    return "".join(f"Question: {said}\nAnswer:\n" if role == "user" else f"{said}\n\n" for role, said in turns)
