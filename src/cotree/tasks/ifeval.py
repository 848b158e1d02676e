r"""`ifeval`, `multi_if`, `m_ifeval`: instructions that a program can check, in one turn or three, in many languages.

Invariant: each instruction is checked alone, and arguments that no checker takes are found before any text is judged.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from cotree.base.errors import UsageError
from cotree.tasks.base import Question, Turn, Verdict, WorkedExample
from cotree.tasks.benchmark import Benchmark
from cotree.tasks.instructions import check_arguments, strict
from cotree.tasks.loading import Row, Source, value

_EXAMPLES = (
    WorkedExample(
        "List three colours of a sunset as bullet points, each beginning with *. Do not use any commas.",
        {
            "sub_task": "I need three bullet points and no comma.",
            "thinking": "Each colour gets its own line after an asterisk, and no line needs a comma.",
        },
        "* orange\n* pink\n* violet",
    ),
    WorkedExample(
        "Explain in less than 20 words why ice floats. Wrap your entire response in double quotation marks.",
        {
            "sub_task": "I need one short sentence, and quotation marks around all of it.",
            "thinking": "Ice is less dense than water, which takes a few words to say.",
        },
        '"Ice floats because it is less dense than the water around it."',
    ),
)


def spec_of(names: Sequence[str], arguments: Sequence[Mapping[str, Any] | None], language: str) -> dict[str, Any]:
    """A turn's instructions for its verifier: `instructions`, pairs of id and arguments, and `language`.

    Falsy arguments are dropped: the hub's rows hold a null for each argument of every other instruction.

    Raises:
        UsageError: an instruction that nobody checks, with the nearest known; arguments that it does not take.
    """
    if not names or len(names) != len(arguments):
        wanted = "name one or more, with kwargs for each"
        raise UsageError(f"instructions: {len(names)} ({', '.join(names)}), kwargs: {len(arguments)}; {wanted}")
    asked = []
    for name, given in zip(names, arguments, strict=True):
        kept = {key: told for key, told in (given or {}).items() if told}
        check_arguments(name, kept)
        asked.append((name, kept))
    return {"instructions": tuple(asked), "language": language}


class IFEval(Benchmark):
    """IFEval (Zhou et al. 2023): 25 kinds of instruction, one to three of them in a prompt.

    The prompt (`ifeval/row-1`) is the row's own text and nothing else, as in google-research's code. An invented item:

        Describe a harbour at night. Do not use any commas. Highlight at least 2 sections with markdown, for example
        *highlighted section*.

    is judged by `punctuation:no_comma` and `detectable_format:number_highlighted_sections` with `num_highlights: 2`:
    `correct` if the answer (after thinking and the answer tag) follows all instructions strictly. The reward is the
    share followed, so 1 for `correct` alone.
    """

    name = "ifeval"
    description = "verifiable instructions, English (IFEval)"
    source = Source("ifeval.jsonl", "google/IFEval", "Apache-2.0", 541)
    prompt_version = "ifeval/row-1"
    answer_form = "text"
    comparable = False

    def question(self, row: Row) -> Question:
        """`key` or `id`, `prompt`, `instruction_id_list`, `kwargs`; `language` where there is one."""
        names = value(row, "instruction_id_list")
        language = row.get("language", "English")
        spec = spec_of(names, value(row, "kwargs"), language)
        message = {"role": "user", "content": value(row, "prompt")}
        return Question(str(value(row, "key", "id")), self.name, (message,), ", ".join(names), language, spec=spec)

    def worked_examples(self, question: Question) -> Sequence[WorkedExample]:
        """Two invented prompts; the same for all, so that their beginning stays warm in a server's cache."""
        return _EXAMPLES

    def verify(self, answer: str, question: Question) -> Verdict:
        """`correct` if all instructions are followed strictly; the reward is the share; `detail` names the others."""
        asked = question.spec["instructions"]
        missed = [name for name, arguments in asked if not strict(name, arguments, answer)]
        if not missed:
            return Verdict("correct", 1.0, answer)
        return Verdict("wrong", 1 - len(missed) / len(asked), answer, f"not followed: {', '.join(missed)}")


class MIFEval(IFEval):
    """M-IFEval (Dussolle et al. 2025): Spanish, French, Japanese, new kinds too. Prompt and rule: those of `ifeval`."""

    name = "m_ifeval"
    description = "verifiable instructions, Spanish, French, Japanese (M-IFEval; rows on GitHub, not on the hub)"
    prompt_version = "m_ifeval/row-1"
    source = Source("mifeval_es_fr_ja.jsonl", "lightblue-tech/M-IFEval", "Apache-2.0", 522)

    def question(self, row: Row) -> Question:
        """As IFEval's; the language is the prefix of the instruction ids."""
        return super().question({**row, "language": value(row, "instruction_id_list")[0].partition(":")[0]})


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
        """`id`, `language` and `turns`, or the hub's flat columns `turn_1_prompt` ... that hold JSON in JSON."""
        language = value(row, "language")
        turns = []
        for turn in _flat_turns(row) if "turn_1_prompt" in row else value(row, "turns"):
            names = turn["instruction_id_list"]
            turns.append(Turn(turn["prompt"], ", ".join(names), spec_of(names, turn["kwargs"], language)))
        first = turns[0]
        message = {"role": "user", "content": first.text}
        id_ = str(value(row, "key", "id"))
        return Question(id_, self.name, (message,), first.gold, language, tuple(turns[1:]), spec=first.spec)


def _flat_turns(row: Row) -> list[dict[str, Any]]:
    turns = []
    for n in (1, 2, 3):
        prompt, names, kwargs = (row[f"turn_{n}_{column}"] for column in ("prompt", "instruction_id_list", "kwargs"))
        # A conversation of two turns has the word None in the third's place.
        if prompt and prompt != "None":
            turns.append(
                {
                    "prompt": json.loads(prompt)["content"],
                    "instruction_id_list": json.loads(names),
                    "kwargs": [json.loads(given) for given in json.loads(kwargs)],
                }
            )
    return turns
