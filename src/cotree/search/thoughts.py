"""Thought types, the words they start with, and the patterns that say which type may follow which.

Invariant: a prefix or a pattern is drawn by seed alone, and every pattern leads from the root to an `answer`.
Prefixes: the first of each type is the paper's (thought node table); the others are ours, for variety in the data.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from cotree.tasks.base import AnswerForm
from cotree.tasks.extract import ANSWER_TAG

ThoughtType = Literal["thinking", "sub_task", "reflection", "hypothesis", "double_check", "reclarify", "answer"]
THOUGHT_TYPES: tuple[ThoughtType, ...] = get_args(ThoughtType)

PREFIXES: Mapping[str, tuple[str, ...]] = {
    "thinking": ("",),
    "sub_task": (
        "Firstly, I need to break down this task.",
        "First, I need to break down this task.",
        "I need to break down this task.",
    ),
    "reflection": (
        "Let's check the result. Wait! something is wrong...",
        "Wait! something is wrong...",
        "Let me check the result. Something is wrong...",
    ),
    "hypothesis": (
        "I propose the following hypothesis:",
        "I propose this hypothesis:",
        "My hypothesis:",
    ),
    "double_check": (
        "Now, I need to check whether all requirements are met.",
        "Now I check whether all requirements are met.",
        "I need to check the result.",
    ),
    "reclarify": (
        "To ensure clarity, let me restate...",
        "Let me restate...",
        "To be clear:",
    ),
    "answer": ("The answer is: \\boxed{",),
}


@dataclass(frozen=True, slots=True)
class Answer:
    """How an answer is written: what it begins with, what stops its writer, what is then put after it."""

    prefix: str
    stops: tuple[str, ...]
    close: str


ANSWERS: Mapping[AnswerForm, Answer] = {
    # LaTeX has braces of its own: which one ends the box is seen when the line has come (`prompts.in_box`).
    "boxed": Answer(PREFIXES["answer"][0], ("\n",), "}"),
    "number": Answer(PREFIXES["answer"][0], ("}", "\n"), "}"),
    "text": Answer(f"{ANSWER_TAG}\n", (), ""),
}

# A row is read as {next type: how many}; the types are checked once, when the recipe loads.
Row = Mapping[str, int]
Pattern = Mapping[str, Row]

# A row's order is the order in which a node's children are written, and a node's chain ends with `answer`. After a
# reflection thinking starts afresh. The paper names the first two patterns and says that there are four.
PATTERNS: Mapping[str, Pattern] = {
    "plain": {
        "root": {"sub_task": 2},
        "sub_task": {"thinking": 4},
        "thinking": {"answer": 1},
        "reflection": {"thinking": 1},
    },
    "hypothesis": {
        "root": {"sub_task": 1},
        "sub_task": {"hypothesis": 2},
        "hypothesis": {"thinking": 4},
        "thinking": {"answer": 1},
        "reflection": {"thinking": 1},
    },
    "double_check": {
        "root": {"sub_task": 1},
        "sub_task": {"thinking": 4},
        "thinking": {"double_check": 1, "answer": 1},
        "double_check": {"answer": 1},
        "reflection": {"thinking": 1},
    },
    "reclarify": {
        "root": {"reclarify": 1},
        "reclarify": {"sub_task": 1},
        "sub_task": {"thinking": 4},
        "thinking": {"double_check": 1, "thinking": 1},
        "double_check": {"answer": 1},
        "reflection": {"thinking": 1},
    },
}


def draw(seed: str, options: int) -> int:
    """A number in [0, options) that is a pure function of `seed`, the same on every machine."""
    return int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8]) % options


def check_pattern(name: str, pattern: Pattern) -> None:
    """That a pattern leads from the root to an answer whatever happens on the way.

    Raises:
        ValueError: an unknown type, one without a way to `answer`, a row that nothing leads to; each with the fix.
    """
    where = f"pattern `{name}`"
    named = {following for row in pattern.values() for following in row}
    for kind in sorted(named.difference(THOUGHT_TYPES)):
        near = difflib.get_close_matches(kind, THOUGHT_TYPES, n=1)
        hint = f"did you mean `{near[0]}`?" if near else f"types are {', '.join(THOUGHT_TYPES)}"
        raise ValueError(f"{where}: unknown type `{kind}`; {hint}")
    if "answer" in pattern:
        raise ValueError(f"{where}: nothing comes after an answer; delete its row `answer`")
    ending = {"answer"}
    while more := [kind for kind, row in pattern.items() if kind not in ending and ending & row.keys()]:
        ending.update(more)
    for kind in sorted({"root", *named, *pattern} - ending, key=lambda kind: (kind in pattern, kind)):
        raise ValueError(f"{where}: from `{kind}` no answer can be reached; let it lead to one: {kind}: {{answer: 1}}")
    # A wrong answer adds a reflection by itself, so its row needs nobody to lead to it.
    reached = {"root", "reflection"}
    while more := [kind for known in reached for kind in pattern.get(known, ()) if kind not in reached]:
        reached.update(more)
    for kind in sorted(pattern.keys() - reached):
        raise ValueError(f"{where}: nothing leads to `{kind}`; name it in another row, or delete its own")


def prefix_of(kind: str, seed: str, prefixes: Mapping[str, Sequence[str]] = PREFIXES) -> str:
    """The prefix of one thought."""
    variants = prefixes[kind]
    return variants[draw(f"prefix:{seed}", len(variants))]
