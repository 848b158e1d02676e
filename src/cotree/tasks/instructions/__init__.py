"""Instruction following: which of a question's verifiable instructions a response follows, and the scores of many.

Invariant: a verdict depends on the response and the instruction alone. Strict judges the response as it is; loose is
satisfied by any of IFEval's eight variants of it (without its first line, its last, both; each also without `*`). A
completion without an answer follows nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from statistics import fmean
from typing import Any

from cotree.tasks.base import Question
from cotree.tasks.extract import answer_text
from cotree.tasks.instructions import content, form, letters
from cotree.tasks.instructions.registry import CHECKERS, check_arguments

# The paper's columns; Multi-IF names languages in English, IFEval has none.
_GROUPS: Mapping[str, str] = {"English": "IF(En)", "Chinese": "IF(Zh)"}
_SHARES = ("prompt_strict", "instruction_strict", "prompt_loose", "instruction_loose", "average")


@dataclass(frozen=True, slots=True)
class Followed:
    """Which instructions of one turn were followed, in the question's order. `group` is IF(En), IF(Zh) or IF(Other)."""

    group: str
    turn: int
    instructions: tuple[str, ...]
    strict: tuple[bool, ...]
    loose: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class IFScore:
    """Shares of prompts and of instructions followed, strictly and loosely, by one group's answers to one turn.

    turn: from 1; None for the mean of the group's turns. average: of the four shares, as Multi-IF reports it.
    """

    group: str
    turn: int | None
    prompts: int
    prompt_strict: float
    instruction_strict: float
    prompt_loose: float
    instruction_loose: float
    average: float


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


def instruction_results(question: Question, completion: str, finish_reason: str = "stop") -> Followed:
    """Every instruction of the question's present turn, strictly and loosely. `spec` as `ifeval.spec_of` makes it."""
    asked = question.spec["instructions"]
    response = answer_text(completion, finish_reason) or ""
    return Followed(
        group=_GROUPS.get(question.spec["language"], "IF(Other)"),
        turn=question.turn + 1,
        instructions=tuple(name for name, _ in asked),
        strict=tuple(strict(name, arguments, response) for name, arguments in asked),
        loose=tuple(loose(name, arguments, response) for name, arguments in asked),
    )


def if_scores(results: Iterable[Followed]) -> list[IFScore]:
    """A row for each group and turn that occurs, then the group's mean over its turns; groups in the paper's order."""
    rows: dict[str, dict[int, list[Followed]]] = {}
    for result in results:
        rows.setdefault(result.group, {}).setdefault(result.turn, []).append(result)
    scores: list[IFScore] = []
    for group in sorted(rows, key=["IF(Zh)", "IF(En)", "IF(Other)"].index):
        turns = [_score(group, turn, found) for turn, found in sorted(rows[group].items())]
        scores += turns
        if len(turns) > 1:
            means = {name: fmean(getattr(score, name) for score in turns) for name in _SHARES}
            scores.append(IFScore(group, None, sum(score.prompts for score in turns), **means))
    return scores


def _score(group: str, turn: int, found: Sequence[Followed]) -> IFScore:
    shares = []
    for verdicts in ([result.strict for result in found], [result.loose for result in found]):
        shares += [fmean(map(all, verdicts)), fmean(chain.from_iterable(verdicts))]
    average = fmean(shares)
    return IFScore(group, turn, len(found), *[*shares, average])


__all__ = [
    "CHECKERS", "Followed", "IFScore", "check_arguments", "content", "form", "if_scores", "instruction_results",
    "letters", "loose", "strict",
]  # fmt: skip
