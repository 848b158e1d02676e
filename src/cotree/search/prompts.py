"""What a model is asked during search: worked examples, the question, the chain so far, a prefix.

Invariant: the prompt of a child begins with the prompt of its parent, so a server's prefix cache stays warm, and the
model continues the very words that it (or another model) wrote. The worked examples are for search only: the student
is trained and evaluated on the plain question.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from cotree.search.mcts import Node
from cotree.search.thoughts import PREFIXES, ThoughtType
from cotree.tasks.base import Message, Question, WorkedExample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# One thought is one line and does not answer before its turn; an answer is written into the box and ends with it.
THOUGHT_STOPS = ("\n", "The answer is")
ANSWER_STOPS = ("}", "\n")


def search_prompt(tokenizer: PreTrainedTokenizerBase, examples: Sequence[WorkedExample], question: Question) -> str:
    """Worked examples and question through the chat template, up to where the assistant begins."""
    return render(tokenizer, [*example_messages(examples), *question.messages])


def continuation(base: str, node: Node, prefix: str) -> str:
    """The prompt that continues `node`'s chain with a thought that begins with `prefix`."""
    return "".join([base, *(f"{step.text}\n" for step in node.chain()), prefix])


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> str:
    """A conversation as text, ending where the assistant's turn begins."""
    return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True))


def example_messages(examples: Sequence[WorkedExample]) -> list[Message]:
    """The examples as earlier turns: sub_task, thinking, answer, one thought a line.

    They are the same for every pattern, so that a family's trees share one beginning, which a server evaluates once;
    a type that they do not show is asked for by its prefix.
    """
    messages: list[Message] = []
    for example in examples:
        sub_task = f"{PREFIXES['sub_task'][0]} {example.steps['sub_task']}"
        answer = f"{PREFIXES['answer'][0]}{example.answer}}}"
        messages.append({"role": "user", "content": example.question})
        messages.append({"role": "assistant", "content": "\n".join([sub_task, example.steps["thinking"], answer])})
    return messages


def thought_text(kind: ThoughtType, prefix: str, written: str) -> str:
    """A thought as it stands in the chain: prefix and text in one line, an answer's box closed."""
    if kind == "answer":
        return f"{prefix}{written.strip()}}}"
    return f"{prefix}{written}".strip()
