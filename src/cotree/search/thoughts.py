"""Thought types, the prefixes that they begin with, the patterns that say which type may follow which, and the texts of
a search: what a model continues (worked examples, the question, the chain so far, a prefix), and what it writes.

The shipped types and patterns are in `thoughts.yaml`. Whatever is drawn (a prefix, a pattern, a request's seed) is a
pure function of a seed text, the same on every machine.

Invariant: the prompt of a child begins with the prompt of its parent, so a server's prefix cache stays warm, and the
model continues the very words that it (or another model) wrote. The worked examples are for search only: the student
is trained and evaluated on the plain question.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from importlib.resources import files
from typing import NamedTuple

import yaml

from cotree.base.settings import require_known
from cotree.search.store import StoredNode
from cotree.tasks.base import AnswerForm, Message, Question, Task, WorkedExample
from cotree.tasks.extract import ANSWER_TAG

# {thought type or `root`: {next type: number of children}}
Pattern = Mapping[str, Mapping[str, int]]

_SHIPPED = yaml.safe_load((files("cotree.search") / "thoughts.yaml").read_text("utf-8"))
PREFIXES: dict[str, list[str]] = _SHIPPED["prefixes"]
PATTERNS: dict[str, dict[str, dict[str, int]]] = _SHIPPED["patterns"]
DEFAULT_PATTERNS: dict[str, list[str]] = _SHIPPED["default_patterns"]
THOUGHT_TYPES = tuple(PREFIXES)

# The stop strings of a thought, by where it ends. A line does not answer before its turn; the others may.
THOUGHT_STOPS: Mapping[str, tuple[str, ...]] = {
    "line": ("\n", "The answer is"),
    "tokens": ("\n", "The answer is"),
    "paragraph": ("\n\n",),
    "open": (),
}
# Blank lines after which a new step begins; a step is not over at a colon.
_BLANK_LINES = re.compile(r"(?<![:\s])(?<!:\*\*)[ \t]*\n(?:[ \t]*\n)+(?=\S)")
# Escaped ones are signs, not braces: `\left\{x\right.` opens nothing.
_BRACES = re.compile(r"\\\\(?=[{}])|\\?[{}]")


class AnswerFormat(NamedTuple):
    """How an answer is written: its first words, the stop strings of its request, and what closes it afterwards."""

    prefix: str
    stops: tuple[str, ...]
    close: str


ANSWER_FORMATS: Mapping[AnswerForm, AnswerFormat] = {
    # LaTeX has braces of its own: which one ends the box is seen when the line has come (`read_box`).
    "boxed": AnswerFormat(PREFIXES["answer"][0], ("\n",), "}"),
    "number": AnswerFormat(PREFIXES["answer"][0], ("}", "\n"), "}"),
    "text": AnswerFormat(f"{ANSWER_TAG}\n", (), ""),
}


def check_pattern(
    name: str, pattern: Pattern, known: Sequence[str] = THOUGHT_TYPES, answering: Sequence[str] = ()
) -> None:
    """Check that a pattern leads from the root to an answer on every path.

    answering: types in which the model answers by itself; each still needs a row that says how it goes on.

    Raises:
        ValueError: an unknown type, one without a way to `answer`, a row that nothing leads to; each with the fix.
    """
    where = f"pattern `{name}`"
    named = {following for row in pattern.values() for following in row}
    require_known(f"{where}: unknown type", sorted(named), known)
    if "answer" in pattern:
        raise ValueError(f"{where}: nothing comes after an answer; delete its row `answer`")
    ending = {"answer", *(kind for kind in answering if kind in pattern)}
    while more := [kind for kind, row in pattern.items() if kind not in ending and ending & row.keys()]:
        ending.update(more)
    for kind in sorted({"root", *named, *pattern} - ending, key=lambda kind: (kind in pattern, kind)):
        raise ValueError(f"{where}: from `{kind}` no answer can be reached; let it lead to one: {kind}: {{answer: 1}}")
    # A wrong answer adds a reflection by itself, so its row needs nobody to lead to it.
    reached = {"root", "reflection"}
    while more := [kind for before in reached for kind in pattern.get(before, ()) if kind not in reached]:
        reached.update(more)
    for kind in sorted(pattern.keys() - reached):
        raise ValueError(f"{where}: nothing leads to `{kind}`; name it in another row, or delete its own")


def draw(seed: str, options: int) -> int:
    """An integer in [0, options), uniform over seeds."""
    return int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8]) % options


def draw_prefix(prefixes: Sequence[str], seed: str) -> str:
    """One of a thought type's prefixes, drawn by seed."""
    return prefixes[draw(f"prefix:{seed}", len(prefixes))]


def draw_pattern(names: Iterable[str], seed: str) -> str:
    """One of the patterns' names, drawn by seed: the one with the highest hash.

    So their order plays no part, and a pattern that is added takes over only its own share of the trees.
    """
    return max(names, key=lambda name: hashlib.sha256(f"pattern:{seed}/{name}".encode()).digest())


def question_name(question: Question) -> str:
    """The name of a question in seeds and in the journal: "task/id/turn"; not its text, which is in every prompt."""
    return f"{question.task}/{question.id}/{question.turn}"


def names_of_turns(question: Question) -> list[str]:
    """The names of a question and of all later turns of its conversation."""
    turns = range(question.turn, question.turn + 1 + len(question.later))
    return [question_name(replace(question, turn=turn)) for turn in turns]


def examples_shown(given: int | None, kind: str) -> int:
    """How many worked examples a search shows to a thinker of a kind (`Endpoint.kind`), by default by the kind."""
    return (0 if kind == "reasoning" else 3) if given is None else given


def search_messages(task: Task, question: Question, *, shown: int = 3, ends: str = "line") -> list[Message]:
    """The conversation that a search continues: so many worked examples, whose thoughts end so, then the question."""
    examples = task.worked_examples(question)[:shown]
    return [*example_messages(examples, task.answer_form, ends=ends), *question.messages]


def example_messages(examples: Sequence[WorkedExample], form: AnswerForm, *, ends: str = "line") -> list[Message]:
    """The examples as earlier turns: sub_task, thinking, answer, a line each; or their solutions in paragraphs.

    They are the same for every pattern, so that a family's trees share one beginning, which a server evaluates once;
    a type that they do not show is asked for by its prefix.
    """
    messages: list[Message] = []
    for example in examples:
        answer = f"{ANSWER_FORMATS[form].prefix}{example.answer}{ANSWER_FORMATS[form].close}"
        sub_task, thinking = example.steps["sub_task"], example.steps["thinking"]
        if ends == "line":
            text = f"{PREFIXES['sub_task'][0]} {sub_task}\n{thinking}\n{answer}"
        else:
            solution = example.steps.get("solution") or f"{sub_task}\n\n{thinking}"
            text = f"{solution}\n\n{answer}"
        messages += [{"role": "user", "content": example.question}, {"role": "assistant", "content": text}]
    return messages


def chain_text(thoughts: Iterable[StoredNode]) -> str:
    """The text of a chain: a line a thought; a paragraph has its own blank line before it, and a mini-step that ended
    inside a line is continued in that line."""
    text, is_open = "", False
    for thought in thoughts:
        goes_on = text.endswith("\n") or thought.text.startswith("\n") or (is_open and not thought.prefix)
        if not text:  # a paragraph, where the thoughts before it were left out
            text = thought.text.lstrip("\n")
        else:
            text += thought.text if goes_on else f"\n{thought.text}"
        is_open = thought.is_open
    return text


def split_paragraphs(text: str, most: int) -> list[str]:
    """A text cut before its blank lines into at most so many steps, which joined are the text.

    A heading, a line that ends in a colon and a block of code go on behind a blank line.
    """
    cuts = [0]
    for blank in _BLANK_LINES.finditer(text):
        in_code = text.count("```", 0, blank.start()) % 2 == 1
        after_heading = text[: blank.start()].rpartition("\n")[2].startswith("#")
        if blank.start() and len(cuts) < most and not in_code and not after_heading:
            cuts.append(blank.start())
    return [text[start:end] for start, end in zip(cuts, [*cuts[1:], len(text)], strict=True)]


def read_box(written: str) -> tuple[str, bool]:
    """The content of a box, from what follows its `\\boxed{`, and whether a brace closes it; if none does, all."""
    depth = 1
    for brace in _BRACES.finditer(written):
        depth += {"{": 1, "}": -1}.get(brace.group(), 0)
        if depth == 0:
            return written[: brace.start()], True
    return written, False


def thought_text(
    thought_type: str, prefix: str, written: str, form: AnswerForm, *, in_line: bool = False, is_open: bool = False
) -> str:
    """The text of a thought from its prefix and what the model wrote; "" where it wrote nothing.

    A thought is one line; a boxed answer gets its closing brace, a free one stays as it is. A prefix alone is no
    thought: a check that checks nothing is the formalistic thinking that the data should be free of.

    Args:
        in_line: the thought continues an open line, so its first space counts.
        is_open: its own line goes on, so its last space counts.
    """
    if thought_type == "answer":
        kept = read_box(written)[0] if form == "boxed" else written
        return f"{prefix}{kept.strip()}{ANSWER_FORMATS[form].close}"
    if not written.strip():
        # The end of an open line is a step of its own, though it has no words.
        return "\n" if in_line else ""
    text = f"{prefix}{written}"
    text = text if in_line or prefix.startswith("\n") else text.lstrip()
    return text if is_open else text.rstrip()
