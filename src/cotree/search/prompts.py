"""The prompts of a search (worked examples, the question, the chain so far, a prefix), and the texts that come back.

Invariant: the prompt of a child begins with the prompt of its parent, so a server's prefix cache stays warm, and the
model continues the very words that it (or another model) wrote. The worked examples are for search only: the student
is trained and evaluated on the plain question.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from cotree.search.mcts import Node
from cotree.search.store import StoredNode
from cotree.search.thoughts import ANSWER_FORMATS, PREFIXES
from cotree.tasks.base import AnswerForm, Message, Question, Task, WorkedExample

# One thought is one line and does not answer before its turn.
THOUGHT_STOPS = ("\n", "The answer is")
# Escaped ones are signs, not braces: `\left\{x\right.` opens nothing.
_BRACES = re.compile(r"\\?[{}]")


def search_messages(task: Task, question: Question) -> list[Message]:
    """Worked examples, then the question, up to where the assistant begins."""
    return [*example_messages(task.worked_examples(question), task.answer_form), *question.messages]


def chain_text(thoughts: Iterable[Node | StoredNode]) -> str:
    """The text of a chain, a thought a line; a mini-step that ended inside a line is continued in that line."""
    text, is_open = "", False
    for thought in thoughts:
        goes_on = not text or text.endswith("\n") or (is_open and not thought.prefix)
        text += thought.text if goes_on else f"\n{thought.text}"
        is_open = thought.is_open
    return text


def continuation(node: Node, prefix: str) -> str:
    """The text of the chain down to `node` and then `prefix`: what the next thought continues."""
    return chain_text([*node.chain(), Node(node, None, prefix, "", depth=0, prefix=prefix)])


def example_messages(examples: Sequence[WorkedExample], form: AnswerForm) -> list[Message]:
    """The examples as earlier turns: sub_task, thinking, answer, one thought a line.

    They are the same for every pattern, so that a family's trees share one beginning, which a server evaluates once;
    a type that they do not show is asked for by its prefix.
    """
    messages: list[Message] = []
    for example in examples:
        sub_task = f"{PREFIXES['sub_task'][0]} {example.steps['sub_task']}"
        answer = f"{ANSWER_FORMATS[form].prefix}{example.answer}{ANSWER_FORMATS[form].close}"
        messages.append({"role": "user", "content": example.question})
        messages.append({"role": "assistant", "content": "\n".join([sub_task, example.steps["thinking"], answer])})
    return messages


def boxed_part(written: str) -> tuple[str, bool]:
    """The content of a box in which the text begins, and whether a brace closes it; all of the text if none does."""
    depth = 1
    for brace in _BRACES.finditer(written):
        depth += {"{": 1, "}": -1}.get(brace.group(), 0)
        if depth == 0:
            return written[: brace.start()], True
    return written, False


def thought_text(
    kind: str, prefix: str, written: str, form: AnswerForm, *, in_line: bool = False, is_open: bool = False
) -> str:
    """The text of a thought from its prefix and what the model wrote; "" where it wrote nothing.

    A thought is one line; a boxed answer gets its closing brace, a free one stays as it is. A prefix alone is no
    thought: a check that checks nothing is the formalistic thinking that the data should be free of.
    in_line: it continues an open line, so its first space counts. is_open: its own line goes on, so its last one does.
    """
    if kind == "answer":
        kept = boxed_part(written)[0] if form == "boxed" else written
        return f"{prefix}{kept.strip()}{ANSWER_FORMATS[form].close}"
    if not written.strip():
        # The end of an open line is a step of its own, though it has no words.
        return "\n" if in_line else ""
    text = f"{prefix}{written}"
    text = text if in_line else text.lstrip()
    return text if is_open else text.rstrip()
