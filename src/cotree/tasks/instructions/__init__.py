"""Instruction following: check which of a question's verifiable instructions a response follows.

Strict judges the response as it is; loose accepts any of IFEval's eight variants of it (without its first line, its
last, both; each also without `*`). A completion without an answer follows nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cotree.tasks.base import Question
from cotree.tasks.extract import free_text_answer
from cotree.tasks.instructions.checkers import CHECKERS

# The paper's columns, in its order; Multi-IF names languages in English, IFEval has none.
_GROUPS: Mapping[str, str] = {"English": "IF(En)", "Chinese": "IF(Zh)"}
GROUPS = ("IF(Zh)", "IF(En)", "IF(Other)")


@dataclass(frozen=True, slots=True)
class InstructionResults:
    """The results of a turn's instructions for a response, in the question's order.

    group: one of `GROUPS`. turn: from 1. answered: whether the completion has an answer.
    """

    group: str
    turn: int
    answered: bool
    instructions: tuple[str, ...]
    strict: tuple[bool, ...]
    loose: tuple[bool, ...]


def follows_strictly(instruction: str, arguments: Mapping[str, Any], response: str) -> bool:
    """Whether the unchanged response follows an instruction; an empty one follows none."""
    return bool(response.strip() and CHECKERS[instruction](response, **arguments))


def follows_loosely(instruction: str, arguments: Mapping[str, Any], response: str) -> bool:
    """Whether the response or one of its variants follows an instruction."""
    lines = response.split("\n")
    cut = [response, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    variants = dict.fromkeys([*cut, *(text.replace("*", "") for text in cut)])
    return any(follows_strictly(instruction, arguments, variant) for variant in variants)


def instruction_results(question: Question, completion: str, finish_reason: str = "stop") -> InstructionResults:
    """Check every instruction of the question's current turn (in its `spec`, from `ifeval.instruction_spec`)."""
    instructions = question.spec["instructions"]
    response = free_text_answer(completion, finish_reason) or ""
    return InstructionResults(
        group=_GROUPS.get(question.spec["language"], "IF(Other)"),
        turn=question.turn + 1,
        answered=bool(response),
        instructions=tuple(name for name, _ in instructions),
        strict=tuple(follows_strictly(name, arguments, response) for name, arguments in instructions),
        loose=tuple(follows_loosely(name, arguments, response) for name, arguments in instructions),
    )
