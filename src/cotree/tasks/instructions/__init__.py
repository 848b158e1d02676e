"""Instruction following: which of a question's verifiable instructions a response follows.

Invariant: a verdict depends on the response and the instruction alone. `strict` judges the response as it is; `loose`
is satisfied by any of IFEval's eight variants of it (without its first line, its last, both; each also without `*`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cotree.tasks.instructions import content, form, letters
from cotree.tasks.instructions.registry import CHECKERS, check_arguments


def strict(instruction: str, arguments: Mapping[str, Any], response: str) -> bool:
    """Whether the response follows an instruction; an empty one follows none."""
    return bool(response.strip()) and CHECKERS[instruction](response, **arguments)


def loose(instruction: str, arguments: Mapping[str, Any], response: str) -> bool:
    """Whether the response or one of its variants does."""
    return any(strict(instruction, arguments, variant) for variant in _variants(response))


def _variants(response: str) -> Sequence[str]:
    lines = response.split("\n")
    cut = [response, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    return list(dict.fromkeys([*cut, *(text.replace("*", "") for text in cut)]))


__all__ = ["CHECKERS", "check_arguments", "content", "form", "letters", "loose", "strict"]
