r"""`ifeval`, `multi_if`, `m_ifeval`: verifiable instructions, in one or three turns, in many languages.

Invariant: invalid arguments of instructions are detected when rows are read, before any text is judged.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from cotree.base.errors import UsageError
from cotree.base.rows import Row
from cotree.tasks.base import Question, Turn, Verdict, WorkedExample, user_prompt
from cotree.tasks.benchmark import Benchmark, shipped_examples
from cotree.tasks.instructions import follows_strictly
from cotree.tasks.instructions.checkers import check_arguments
from cotree.tasks.loading import Source, field_value


def instruction_spec(
    names: Sequence[str], arguments: Sequence[Mapping[str, Any] | None], language: str
) -> dict[str, Any]:
    """Build a turn's `Question.spec`: `instructions`, pairs of an id and its arguments, and `language`.

    Falsy arguments are dropped, because the hub's rows have nulls for the arguments of all other instructions.

    Raises:
        UsageError: an unknown instruction (suggests the nearest), or invalid arguments.
    """
    if not names or len(names) != len(arguments):
        wanted = "name one or more, with kwargs for each"
        raise UsageError(f"instructions: {len(names)} ({', '.join(names)}), kwargs: {len(arguments)}; {wanted}")
    instructions = []
    for name, given in zip(names, arguments, strict=True):
        kept = {key: value for key, value in (given or {}).items() if value}
        check_arguments(name, kept)
        instructions.append((name, kept))
    return {"instructions": tuple(instructions), "language": language}


class IFEval(Benchmark):
    """IFEval (Zhou et al. 2023): 25 kinds of instruction, one to three of them in a prompt.

    The prompt (`ifeval/row-1`) is the row's own text and nothing else, as in google-research's code. An invented item:

        Describe a harbour at night. Do not use any commas. Highlight at least 2 sections with markdown, for example
        *highlighted section*.

    is judged by `punctuation:no_comma` and `detectable_format:number_highlighted_sections` with `num_highlights: 2`:
    `correct` if the answer (after thinking and the answer tag) follows all instructions strictly. The reward is the
    fraction followed, so 1 for `correct` alone.
    """

    name = "ifeval"
    description = "verifiable instructions, English (IFEval)"
    source = Source("ifeval.jsonl", "google/IFEval", "Apache-2.0", 541)
    prompt_version = "ifeval/row-1"
    answer_form = "text"
    comparable = False

    def question(self, row: Row) -> Question:
        """The question of a row with `key` or `id`, `prompt`, `instruction_id_list`, `kwargs`, perhaps `language`."""
        return self._conversation(row, [row], row.get("language", "English"))

    def _conversation(self, row: Row, turns: Sequence[Row], language: str) -> Question:
        """The first turn's question, with the later ones; each turn has the fields of an IFEval row."""
        first, *later = [_read_turn(turn, language) for turn in turns]
        id_, prompt = str(field_value(row, "key", "id")), user_prompt(first.text)
        return Question(id_, self.name, prompt, first.gold, family=language, later=tuple(later), spec=first.spec)

    def worked_examples(self, question: Question) -> Sequence[WorkedExample]:
        """Two invented prompts, the same for all questions, so that servers' prefix caches hit."""
        return shipped_examples("instructions")

    def verify(self, answer: str, question: Question) -> Verdict:
        """`correct` if all instructions are followed strictly; the reward is the fraction, `detail` names the rest."""
        instructions = question.spec["instructions"]
        missed = [name for name, arguments in instructions if not follows_strictly(name, arguments, answer)]
        if not missed:
            return Verdict("correct", 1.0, answer)
        return Verdict("wrong", 1 - len(missed) / len(instructions), answer, f"not followed: {', '.join(missed)}")


class MIFEval(IFEval):
    """M-IFEval (Dussolle et al. 2025): Spanish, French, Japanese, new kinds too. Prompt and rule: those of `ifeval`."""

    name = "m_ifeval"
    description = "verifiable instructions, Spanish, French, Japanese (M-IFEval; rows on GitHub, not on the hub)"
    prompt_version = "m_ifeval/row-1"
    source = Source("mifeval_es_fr_ja.jsonl", "lightblue-tech/M-IFEval", "Apache-2.0", 522)

    def question(self, row: Row) -> Question:
        """As IFEval's; the language is the prefix of the instruction ids."""
        return super().question({**row, "language": field_value(row, "instruction_id_list")[0].partition(":")[0]})


class MultiIF(IFEval):
    """Multi-IF (He et al. 2024): conversations of three turns in eight languages.

    Prompt and rule of a turn are those of `ifeval`. A turn asks for all that the turns before it asked, and sees the
    model's own earlier replies without their thinking.
    """

    name = "multi_if"
    description = "verifiable instructions over three turns, eight languages (Multi-IF)"
    prompt_version = "multi_if/row-1"
    source = Source("multi_if_en.jsonl", "facebook/Multi-IF", "CC-BY-NC-2.0", 4501)

    def question(self, row: Row) -> Question:
        """The conversation of a row with `turns`, or with the hub's columns `turn_1_prompt` ..., JSON within JSON."""
        turns = _hub_turns(row) if "turn_1_prompt" in row else field_value(row, "turns")
        return self._conversation(row, turns, field_value(row, "language"))


def _read_turn(row: Row, language: str) -> Turn:
    """The turn of a row with `prompt`, `instruction_id_list` and `kwargs`; its gold names the instructions."""
    names = field_value(row, "instruction_id_list")
    spec = instruction_spec(names, field_value(row, "kwargs"), language)
    return Turn(field_value(row, "prompt"), ", ".join(names), spec)


def _hub_turns(row: Row) -> list[Row]:
    """The two or three turns of a row of the hub, each like an IFEval row."""
    turns = []
    for n in (1, 2, 3):
        prompt, names, kwargs = (row[f"turn_{n}_{column}"] for column in ("prompt", "instruction_id_list", "kwargs"))
        # In a conversation of two turns, the third is the word None.
        if prompt and prompt != "None":
            turn = {"prompt": json.loads(prompt)["content"], "instruction_id_list": json.loads(names)}
            turns.append(turn | {"kwargs": [json.loads(arguments) for arguments in json.loads(kwargs)]})
    return turns
