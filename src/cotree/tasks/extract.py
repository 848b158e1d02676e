r"""Find the final answer in a completion, before anything judges it.

Invariant: `strict` accepts closed forms only (a balanced `\boxed{}`, `#### x`, "the answer is x."), so a text that was
cut or never commits has no answer; `lenient` adds the last number in the text. Only what follows the last thinking
close tag counts, and a thinking tag that was opened and never closed means no answer.
"""

from __future__ import annotations

import re
from typing import Literal

Mode = Literal["strict", "lenient"]

# The line after which a free text is the answer. Thoughts never hold these words, so its first place is the tag.
ANSWER_TAG = "The answer is:"

_THINKING_TAGS = (
    ("<think>", "</think>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<Thought>", "</Thought>"),
)
_NUMBER = r"-?\$?\d+(?:,\d{3})*(?:\.\d+)?(?:/\d+)?"
_TEXT_TAG = re.compile(rf"^{ANSWER_TAG}[ \t]*\n", re.MULTILINE)
_HASHES = re.compile(r"####[ \t]*([^\n]+)")
_ANSWER_IS = re.compile(rf"answer\s*(?:is|:)\s*:?\s*\**\s*({_NUMBER})\**(?!\s*[-+*/=\d])", re.IGNORECASE)
_LAST_NUMBER = re.compile(_NUMBER)


def extract_answer(completion: str, finish_reason: str = "stop", mode: Mode = "strict") -> str | None:
    r"""The final answer as written, or None. Order: `\boxed{}`, `####`, "answer is"; `lenient`: the last number.

    A text cut by length (`finish_reason` "length") has an answer only in a form that was closed: a balanced box, or
    one of the others followed by more text.
    """
    text = after_thinking(completion)
    if text is None:
        return None
    boxed = last_boxed(text)
    if boxed is not None:
        return boxed.strip() or None
    cut = finish_reason == "length"
    for pattern in (_HASHES, _ANSWER_IS):
        matches = list(pattern.finditer(text))
        if matches and not (cut and matches[-1].end() == len(text.rstrip())):
            return matches[-1].group(1).strip()
    if mode == "lenient" and not cut:
        numbers = _LAST_NUMBER.findall(text)
        if numbers:
            return str(numbers[-1])
    return None


def answer_text(completion: str, finish_reason: str = "stop") -> str | None:
    """The answer that is a free text, or None where it is empty, cut by length, or thinking was never closed."""
    return None if finish_reason == "length" else spoken(completion) or None


def spoken(completion: str) -> str:
    """What the user is told: the text after thinking and after the answer tag, if there is one; it may be empty."""
    text = after_thinking(completion) or ""
    tag = _TEXT_TAG.search(text)
    return text[tag.end() if tag else 0 :].strip()


def after_thinking(completion: str) -> str | None:
    """The text after the last thinking close tag; None when thinking was opened and never closed."""
    for opened, closed in _THINKING_TAGS:
        end = completion.rfind(closed)
        if end >= 0:
            return completion[end + len(closed) :]
        if opened in completion:
            return None
    return completion


def last_boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{...}` whose braces balance, or None."""
    for start in reversed([match.end() for match in re.finditer(r"\\boxed\s*\{", text)]):
        depth = 1
        for position in range(start, len(text)):
            depth += {"{": 1, "}": -1}.get(text[position], 0)
            if depth == 0:
                return text[start:position]
    return None
