"""What a model is asked during search: worked examples that show the pattern, the question, the chain so far, a prefix.

Invariant: the prompt of a child begins with the prompt of its parent, so a server's prefix cache stays warm, and the
model continues the very words that it (or another model) wrote. The worked examples are for search only: the student
is trained and evaluated on the plain question.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from cotree.search.mcts import Node
from cotree.search.thoughts import PREFIXES, Pattern, ThoughtType
from cotree.tasks.base import Message, Question, WorkedExample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# One thought is one line; an answer is written into the box and ends with it.
STOPS: dict[bool, tuple[str, ...]] = {False: ("\n",), True: ("}", "\n")}


def search_prompt(
    tokenizer: PreTrainedTokenizerBase, question: Question, examples: Sequence[WorkedExample], pattern: Pattern
) -> str:
    """Worked examples and question through the chat template, up to where the assistant begins."""
    return render(tokenizer, [*example_messages(examples, pattern), *question.messages])


def continuation(base: str, node: Node, prefix: str) -> str:
    """The prompt that continues `node`'s chain with a thought that begins with `prefix`."""
    return "".join([base, *(f"{step.text}\n" for step in node.chain()), prefix])


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> str:
    """A conversation as text, ending where the assistant's turn begins."""
    return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True))


def example_messages(examples: Sequence[WorkedExample], pattern: Pattern) -> list[Message]:
    """The examples as earlier turns, each assistant turn one thought a line along the pattern's main line."""
    messages: list[Message] = []
    for example in examples:
        steps = {**example.steps, "answer": f"{example.answer}}}"}
        turn = [thought_line(kind, PREFIXES[kind][0], steps[kind]) for kind in pattern_path(pattern)]
        messages.append({"role": "user", "content": example.question})
        messages.append({"role": "assistant", "content": "\n".join(turn)})
    return messages


def thought_line(kind: ThoughtType, prefix: str, text: str) -> str:
    """Prefix and text as one line: a box takes its content directly, words are parted by a space."""
    return f"{prefix}{text}" if kind == "answer" or not prefix else f"{prefix} {text}"


def pattern_path(pattern: Pattern) -> list[ThoughtType]:
    """The pattern's main line from the root to an answer: the first type of each row that is not a repetition."""
    path: list[ThoughtType] = []
    kind: str = "root"
    while kind != "answer":
        following = next(k for k in pattern[kind] if k != kind)
        path.append(following)
        kind = following
    return path


def thought_text(kind: ThoughtType, prefix: str, written: str) -> str:
    """A thought as it stands in the chain: prefix and text in one line, an answer's box closed."""
    if kind == "answer":
        return f"{prefix}{written.strip()}}}"
    return f"{prefix}{written}".strip()
