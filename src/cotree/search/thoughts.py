"""Thought types, the words they start with, and the patterns that say which type may follow which.

Invariant: a prefix or a pattern is drawn by seed alone, and every pattern leads from the root to an `answer`.
Prefixes: the first of each type is the paper's (thought node table); the others are ours, for variety in the data.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Literal, get_args

ThoughtType = Literal["thinking", "sub_task", "reflection", "hypothesis", "double_check", "reclarify", "answer"]
THOUGHT_TYPES: tuple[ThoughtType, ...] = get_args(ThoughtType)

PREFIXES: Mapping[ThoughtType, tuple[str, ...]] = {
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

Row = Mapping[ThoughtType, int]
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


def prefix_of(kind: ThoughtType, seed: str) -> str:
    """The prefix of one thought."""
    variants = PREFIXES[kind]
    return variants[draw(f"prefix:{seed}", len(variants))]
