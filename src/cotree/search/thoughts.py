"""Thought types, their prefixes, patterns (which type may follow which), and how prompts and thoughts are put together.

The shipped types and patterns are in `thoughts.yaml`. Every random draw (a prefix, a pattern, a request's seed) is a
hash of a seed string, the same on every machine.

Invariant: a child's prompt starts with its parent's prompt, so a server's prefix cache hits and the model continues
the exact text so far. Worked examples are for search only: students are trained and evaluated on the plain question.
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

# The stop strings of a thought, by `ends`. A line may not contain the answer; paragraphs and open thoughts may.
THOUGHT_STOPS: Mapping[str, tuple[str, ...]] = {
    "line": ("\n", "The answer is"),
    "tokens": ("\n", "The answer is"),
    "paragraph": ("\n\n",),
    "open": (),
}
# Blank lines that separate steps; text that ends in a colon continues.
_BLANK_LINES = re.compile(r"(?<![:\s])(?<!:\*\*)[ \t]*\n(?:[ \t]*\n)+(?=\S)")
# Escaped braces do not count: `\left\{x\right.` opens nothing.
_BRACES = re.compile(r"\\\\(?=[{}])|\\?[{}]")


class AnswerFormat(NamedTuple):
    """How an answer is generated: its prefix, the stop strings of its request, and the text appended afterwards."""

    prefix: str
    stops: tuple[str, ...]
    close: str


ANSWER_FORMATS: Mapping[AnswerForm, AnswerFormat] = {
    # LaTeX contains braces, so `read_box` finds the closing one after the whole line is generated.
    "boxed": AnswerFormat(PREFIXES["answer"][0], ("\n",), "}"),
    "number": AnswerFormat(PREFIXES["answer"][0], ("}", "\n"), "}"),
    "text": AnswerFormat(f"{ANSWER_TAG}\n", (), ""),
}


def check_pattern(
    name: str, pattern: Pattern, known: Sequence[str] = THOUGHT_TYPES, answering: Sequence[str] = ()
) -> None:
    """Check that a pattern leads from the root to an answer on every path.

    answering: types in which the model may answer unprompted; each still needs a row for when it does not.

    Raises:
        ValueError: an unknown type, a type that cannot reach `answer`, or an unreachable row; each with the fix.
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
    # Wrong answers add reflections, so their row is always reachable.
    reached = {"root", "reflection"}
    while more := [kind for before in reached for kind in pattern.get(before, ()) if kind not in reached]:
        reached.update(more)
    for kind in sorted(pattern.keys() - reached):
        raise ValueError(f"{where}: nothing leads to `{kind}`; name it in another row, or delete its own")


def draw(seed: str, options: int) -> int:
    """A pseudo-random integer in [0, options), from the hash of a seed string."""
    return int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8]) % options if options > 1 else 0


def draw_prefix(prefixes: Sequence[str], seed: str) -> str:
    """Draw one of a thought type's prefixes by seed."""
    return prefixes[draw(f"prefix:{seed}", len(prefixes))]


def draw_pattern(names: Iterable[str], seed: str) -> str:
    """Draw a pattern name by seed: the one with the highest hash (rendezvous hashing).

    So order does not matter, and adding a pattern changes only the trees that now draw it.
    """
    return max(names, key=lambda name: hashlib.sha256(f"pattern:{seed}/{name}".encode()).digest())


def question_name(question: Question) -> str:
    """The question's key in seeds and in the journal: "task/id/turn"."""
    return f"{question.task}/{question.id}/{question.turn}"


def names_of_turns(question: Question) -> list[str]:
    """The names (`question_name`) of a question and of all later turns of its conversation."""
    turns = range(question.turn, question.turn + 1 + len(question.later))
    return [question_name(replace(question, turn=turn)) for turn in turns]


def examples_shown(given: int | None, kind: str) -> int:
    """The number of worked examples in the prompt: as given, else 0 for a reasoning model (`Endpoint.kind`), else 3."""
    return (0 if kind == "reasoning" else 3) if given is None else given


def search_messages(task: Task, question: Question, *, shown: int = 3, ends: str = "line") -> list[Message]:
    """The messages of a search prompt: `shown` worked examples with thoughts that end at `ends`, then the question."""
    examples = task.worked_examples(question)[:shown]
    return [*example_messages(examples, task.answer_form, ends=ends), *question.messages]


def example_messages(examples: Sequence[WorkedExample], form: AnswerForm, *, ends: str = "line") -> list[Message]:
    """Worked examples as earlier turns: sub_task, thinking and answer on a line each, or solutions in paragraphs.

    They are the same for every pattern, so all trees of a family share one cached prompt prefix; thought types that
    they do not show are elicited by their prefixes.
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
    """Join thoughts to the chain's text: one line per thought; paragraphs bring their blank line along, and the
    thought after an unfinished line (a mini-step) continues that line."""
    text, is_open = "", False
    for thought in thoughts:
        goes_on = text.endswith("\n") or thought.text.startswith("\n") or (is_open and not thought.prefix)
        if not text:  # drop the blank line before a first paragraph
            text = thought.text.lstrip("\n")
        else:
            text += thought.text if goes_on else f"\n{thought.text}"
        is_open = thought.is_open
    return text


def split_paragraphs(text: str, most: int) -> list[str]:
    """Split a text at its blank lines into at most `most` steps; joined they give the text again.

    No split after a heading or a line that ends in a colon, or inside a code block.
    """
    cuts = [0]
    for blank in _BLANK_LINES.finditer(text):
        in_code = text.count("```", 0, blank.start()) % 2 == 1
        after_heading = text[: blank.start()].rpartition("\n")[2].startswith("#")
        if blank.start() and len(cuts) < most and not in_code and not after_heading:
            cuts.append(blank.start())
    return [text[start:end] for start, end in zip(cuts, [*cuts[1:], len(text)], strict=True)]


def read_box(written: str) -> tuple[str, bool]:
    """The content of a box, given the text after its `\\boxed{`, and whether it is closed; unclosed: the whole text."""
    depth = 1
    for brace in _BRACES.finditer(written):
        depth += {"{": 1, "}": -1}.get(brace.group(), 0)
        if depth == 0:
            return written[: brace.start()], True
    return written, False


def thought_text(
    thought_type: str, prefix: str, written: str, form: AnswerForm, *, in_line: bool = False, is_open: bool = False
) -> str:
    """A thought's text: prefix plus completion, stripped, a boxed answer closed; "" if the completion is blank.

    A prefix alone is dropped: a check that checks nothing is the formalistic thinking that the data must not teach.

    Args:
        in_line: the thought continues an unfinished line: keep its leading space.
        is_open: the thought leaves its line unfinished: keep its trailing space.
    """
    if thought_type == "answer":
        kept = read_box(written)[0] if form == "boxed" else written
        return f"{prefix}{kept.strip()}{ANSWER_FORMATS[form].close}"
    if not written.strip():
        # The newline that ends an unfinished line is a step by itself.
        return "\n" if in_line else ""
    text = f"{prefix}{written}"
    text = text if in_line or prefix.startswith("\n") else text.lstrip()
    return text if is_open else text.rstrip()
