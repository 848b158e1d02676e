"""Instruction following: which of a question's verifiable instructions a response follows, and the scores of many.

A verdict depends on the response and the instruction alone. Strict judges the response as it is; loose accepts any of
IFEval's eight variants of it (without its first line, its last, both; each also without `*`). A completion without an
answer follows nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from operator import attrgetter
from statistics import fmean
from typing import Any

from cotree.tasks.base import Question
from cotree.tasks.extract import free_text_answer
from cotree.tasks.instructions.checkers import CHECKERS

# The paper's columns; Multi-IF names languages in English, IFEval has none.
_GROUPS: Mapping[str, str] = {"English": "IF(En)", "Chinese": "IF(Zh)"}
_GROUP_ORDER = ("IF(Zh)", "IF(En)", "IF(Other)")
_FRACTIONS = ("prompt_strict", "instruction_strict", "prompt_loose", "instruction_loose", "average")


@dataclass(frozen=True, slots=True)
class InstructionResults:
    """Which instructions of one turn a response follows, in the question's order.

    group: `IF(En)`, `IF(Zh)` or `IF(Other)`. turn: from 1.
    """

    group: str
    turn: int
    instructions: tuple[str, ...]
    strict: tuple[bool, ...]
    loose: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class IFScore:
    """Fractions of prompts and of instructions followed, strictly and loosely, by one group's answers to one turn.

    turn: from 1; None for the mean of the group's turns. average: of the four fractions, as Multi-IF reports it.
    """

    group: str
    turn: int | None
    prompts: int
    prompt_strict: float
    instruction_strict: float
    prompt_loose: float
    instruction_loose: float
    average: float


def follows_strictly(instruction: str, arguments: Mapping[str, Any], response: str) -> bool:
    """Whether the response as it is follows an instruction; an empty one follows none."""
    return bool(response.strip() and CHECKERS[instruction](response, **arguments))


def follows_loosely(instruction: str, arguments: Mapping[str, Any], response: str) -> bool:
    """Whether the response or one of its variants follows an instruction."""
    lines = response.split("\n")
    cut = [response, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    variants = dict.fromkeys([*cut, *(text.replace("*", "") for text in cut)])
    return any(follows_strictly(instruction, arguments, variant) for variant in variants)


def instruction_results(question: Question, completion: str, finish_reason: str = "stop") -> InstructionResults:
    """Check every instruction of the question's present turn, as `ifeval.instruction_spec` wrote them to its `spec`."""
    instructions = question.spec["instructions"]
    response = free_text_answer(completion, finish_reason) or ""
    return InstructionResults(
        group=_GROUPS.get(question.spec["language"], "IF(Other)"),
        turn=question.turn + 1,
        instructions=tuple(name for name, _ in instructions),
        strict=tuple(follows_strictly(name, arguments, response) for name, arguments in instructions),
        loose=tuple(follows_loosely(name, arguments, response) for name, arguments in instructions),
    )


def if_scores(results: Iterable[InstructionResults]) -> list[IFScore]:
    """A score for each group and turn, and after a group of several turns their mean; groups in the paper's order."""
    scores: list[IFScore] = []
    ordered = sorted(results, key=lambda result: (_GROUP_ORDER.index(result.group), result.turn))
    for group, of_group in groupby(ordered, key=attrgetter("group")):
        turns = [_score(list(of_turn)) for _, of_turn in groupby(of_group, key=attrgetter("turn"))]
        scores += turns
        if len(turns) > 1:
            means = {name: fmean(getattr(score, name) for score in turns) for name in _FRACTIONS}
            scores.append(IFScore(group, None, sum(score.prompts for score in turns), **means))
    return scores


def _score(results: Sequence[InstructionResults]) -> IFScore:
    """The score of all results of one group and turn."""
    strict, loose = [result.strict for result in results], [result.loose for result in results]
    fractions = [share for rows in (strict, loose) for share in (fmean(map(all, rows)), fmean(chain(*rows)))]
    named = dict(zip(_FRACTIONS, [*fractions, fmean(fractions)], strict=True))
    return IFScore(results[0].group, results[0].turn, len(results), **named)
