"""Thought types, the prefixes that they begin with, and the patterns that say which type may follow which.

Whatever is drawn (a prefix, a pattern, a request's seed) is drawn by a seed alone. Of a type's prefixes the first is
the paper's (its thought node table); the others are ours, for variety in the data.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from cotree.base.settings import nearest
from cotree.tasks.base import AnswerForm, Question
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
class AnswerFormat:
    """How an answer is written: its first words, the stop strings of its request, and what closes it afterwards."""

    prefix: str
    stops: tuple[str, ...]
    close: str


ANSWER_FORMATS: Mapping[AnswerForm, AnswerFormat] = {
    # LaTeX has braces of its own: which one ends the box is seen when the line has come (`prompts.boxed_part`).
    "boxed": AnswerFormat(PREFIXES["answer"][0], ("\n",), "}"),
    "number": AnswerFormat(PREFIXES["answer"][0], ("}", "\n"), "}"),
    "text": AnswerFormat(f"{ANSWER_TAG}\n", (), ""),
}

# {next type: number of children}, in the order in which the children are written.
NextTypes = Mapping[str, int]
Pattern = Mapping[str, NextTypes]

# A chain ends with `answer`; after a reflection thinking starts afresh. The paper names the first two patterns and says
# that there are four.
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
    """An integer in [0, options), uniform over seeds: a pure function of `seed`, the same on every machine."""
    return int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8]) % options


def check_pattern(name: str, pattern: Pattern, known: Sequence[str] = THOUGHT_TYPES) -> None:
    """Check that a pattern leads from the root to an answer on every path.

    Raises:
        ValueError: an unknown type, one without a way to `answer`, a row that nothing leads to; each with the fix.
    """
    where = f"pattern `{name}`"
    named = {following for row in pattern.values() for following in row}
    for kind in sorted(named.difference(known)):
        raise ValueError(f"{where}: unknown type `{kind}`; {nearest(kind, known)}")
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


def draw_prefix(kind: str, seed: str, prefixes: Mapping[str, Sequence[str]] = PREFIXES) -> str:
    """One of a thought type's prefixes, drawn by seed."""
    variants = prefixes[kind]
    return variants[draw(f"prefix:{seed}", len(variants))]


def draw_pattern(names: Iterable[str], seed: str) -> str:
    """One of the patterns' names, drawn by seed: the name with the highest hash, so that their order plays no part and
    a pattern that is added takes only its own share of the trees."""
    return max(names, key=lambda name: hashlib.sha256(f"pattern:{seed}/{name}".encode()).digest())


def question_name(question: Question) -> str:
    """What names a question in seeds and in the journal: task, id and turn; not its text, which is in every prompt."""
    return f"{question.task}/{question.id}/{question.turn}"
