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
        ValueError: an unknown type, a dead end, a type without a way to `answer`, a row that nothing leads to, a count
            below 1; each with the fix.
    """
    where = f"pattern `{name}`"
    if not pattern.get("root"):
        raise ValueError(f"{where}: the row `root` is missing; say what comes first, e.g. root: {{sub_task: 1}}")
    for kind, row in pattern.items():
        for following, count in row.items():
            if following not in THOUGHT_TYPES:
                near = difflib.get_close_matches(following, THOUGHT_TYPES, n=1)
                hint = f"did you mean `{near[0]}`?" if near else f"types are {', '.join(THOUGHT_TYPES)}"
                raise ValueError(f"{where}: row `{kind}` leads to the unknown type `{following}`; {hint}")
            if count < 1:
                raise ValueError(f"{where}: row `{kind}`: {following}: {count}; a count is at least 1, or left out")
            if following != "answer" and not pattern.get(following):
                raise ValueError(
                    f"{where}: `{following}` is a dead end; add a row for it, e.g. {following}: {{answer: 1}}"
                )
    if "answer" in pattern:
        raise ValueError(f"{where}: nothing comes after an answer; delete its row `answer`")
    # A wrong answer adds a reflection by itself, so its row needs nobody to lead to it.
    reached, new = {"root", "reflection"}, ["root", "reflection"]
    while new:
        following_kinds = [kind for kind in pattern.get(new.pop(), {}) if kind not in reached]
        reached.update(following_kinds)
        new.extend(following_kinds)
    for kind in pattern:
        if kind not in reached:
            raise ValueError(f"{where}: nothing leads to `{kind}`; name it in another row, or delete its own")
    ending = {"answer"}
    while more := [kind for kind, row in pattern.items() if kind not in ending and ending & row.keys()]:
        ending.update(more)
    for kind in pattern:
        if kind not in ending:
            raise ValueError(f"{where}: from `{kind}` no answer can be reached; add `answer: 1` to a row after it")


def prefix_of(kind: str, seed: str, prefixes: Mapping[str, Sequence[str]] = PREFIXES) -> str:
    """The prefix of one thought."""
    variants = prefixes[kind]
    return variants[draw(f"prefix:{seed}", len(variants))]
