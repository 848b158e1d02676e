"""Instruction following is scored from the stored samples, by language group and turn."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cotree.eval.journal import EvalSample
from cotree.eval.metrics import instruction_scores, scores_by_group
from cotree.tasks import task
from cotree.tasks.instructions import InstructionResults

WORDS = "we all went to the market in the morning and bought some bread for the children"
LOWER, NO_COMMA = "change_case:english_lowercase", "punctuation:no_comma"


def conversation(key: str, language: str) -> dict[str, object]:
    """One invented conversation of two turns."""
    first, second = [LOWER], [LOWER, NO_COMMA]
    turns = [
        {"prompt": "Greet me in lower case.", "instruction_id_list": first, "kwargs": [{}]},
        {"prompt": "Now without commas.", "instruction_id_list": second, "kwargs": [{}, {}]},
    ]
    return {"id": key, "language": language, "turns": turns}


def test_scores_by_group_and_turn(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    rows = [conversation("1:1:en", "English"), conversation("2:1:en", "English"), conversation("3:1:fr", "French")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    multi_if = task("multi_if", path)
    questions = [(multi_if, question) for question in multi_if.questions()]
    said = {
        "1:1:en": (WORDS, "today " + WORDS.replace(" and", ", and")),
        "2:1:en": (WORDS.title(), WORDS),
        "3:1:fr": ("bonjour", "Bonjour, toi"),
    }
    samples = []
    for _, first in questions:
        question = first
        for turn, reply in enumerate(said[first.id]):
            verdict = multi_if.judge(question, reply)
            samples.append(EvalSample("multi_if", first.id, reply, "stop", 3, 9, verdict.kind, reply, "", turn))
            question = question.follow_up(reply) or question
    scores = {(row.group, row.turn): row for row in instruction_scores(questions, samples)}
    english = [scores["IF(En)", turn] for turn in (1, 2, None)]
    assert [row.prompts for row in english] == [2, 2, 4]
    assert [row.prompt_strict for row in english] == [0.5, 0.5, 0.5]
    assert [row.instruction_strict for row in english] == [0.5, 0.75, 0.625]
    assert scores["IF(Other)", 2].instruction_strict == 0.0
    for turn in (0, 1):
        verdicts = [s.verdict for s in samples if s.turn == turn and s.id.endswith("en")]
        assert verdicts.count("correct") / 2 == scores["IF(En)", turn + 1].prompt_strict, "a verdict is prompt-strict"


def test_scores_are_shares_by_group_and_turn() -> None:
    def one(group: str, turn: int, strictly: str, loosely: str) -> InstructionResults:
        def followed(marks: str) -> tuple[bool, ...]:
            return tuple(mark == "+" for mark in marks)

        return InstructionResults(group, turn, True, ("x",) * len(strictly), followed(strictly), followed(loosely))

    english = [one("IF(En)", 1, "+", "+"), one("IF(En)", 1, "+--", "+++"), one("IF(En)", 2, "--", "+-")]
    scores = scores_by_group("multi_if", [*english, one("IF(Zh)", 1, "+", "+")])
    assert [(s.group, s.turn, s.prompts) for s in scores] == [
        ("IF(Zh)", 1, 1),
        ("IF(En)", 1, 2),
        ("IF(En)", 2, 1),
        ("IF(En)", None, 3),
    ]
    first, second, mean = scores[1:]
    assert (first.prompt_strict, first.instruction_strict) == (0.5, 0.5)
    assert (first.prompt_loose, first.instruction_loose) == (1.0, 1.0)
    assert first.average == 0.75
    assert second.average == pytest.approx((0 + 0 + 0 + 0.5) / 4)
    assert mean.average == pytest.approx((first.average + second.average) / 2)


def test_tasks_without_instructions_have_no_scores() -> None:
    letters = task("letters")
    (question,) = letters.questions("test", 1)
    sample = EvalSample("letters", question.id, "x", "stop", 3, 9, "wrong", "2", "3")
    assert instruction_scores([(letters, question)], [sample]) == []
    with pytest.raises(KeyError):
        instruction_scores([], [sample])
