"""What decides which texts and questions may become rows of a dataset, before any selection, and why others may not."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from cotree.base.rows import Row
from cotree.data.counts import DatasetCounts
from cotree.data.settings import Dataset
from cotree.models.encode import special_words
from cotree.search.store import StoredTree
from cotree.search.thoughts import PATTERNS, Pattern
from cotree.tasks.base import Question, Verdict
from cotree.tasks.diagnosis import LONG_TEXT, diagnose

if TYPE_CHECKING:
    import re

    from transformers import PreTrainedTokenizerBase

Messages = list[dict[str, str]]
# Judges a text as the answer to the question that a tree was grown for.
TextJudge = Callable[[StoredTree, str], Verdict]
# The verdict on the text of a file's row (the row, its prompt, its text), None where no gold answer is known.
RowJudge = Callable[[Row, Messages, str], str | None]
# Letters of formulas belong to no language.
_FORMULAS = ("GREEK", "MATHEMATICAL", "SUPERSCRIPT", "SUBSCRIPT", "MODIFIER", "DOUBLE-STRUCK", "SCRIPT")
_MAX_FOREIGN = 0.2


@dataclass(frozen=True)
class Rules:
    """What decides the rows of one dataset, and the counts of what it left out.

    Attributes:
        tokenizer: the student's. seed: what all draws fall by. patterns: by which the trees were grown.
        judge: needed for `reflections: cut`, whose chains are judged again: their answer may no longer follow.
        row_judge: leaves out a file's texts that it finds wrong or without an answer; writes the reward of the others.
        contaminated: (task, question id) of the trees' questions that repeat an evaluation question.
        wanted: the only questions that may give rows (`questions_of`), by `question_keys`; None: all.
        held_out: evaluation questions that no row of a file may repeat.
        size_of: the file of another dataset, whose size is the limit.
    """

    settings: Dataset
    tokenizer: PreTrainedTokenizerBase
    seed: int = 0
    patterns: Mapping[str, Pattern] = field(default_factory=lambda: PATTERNS)
    judge: TextJudge | None = None
    row_judge: RowJudge | None = None
    contaminated: Collection[tuple[str, str]] = ()
    wanted: Collection[str] | None = None
    held_out: Sequence[Question] = ()
    size_of: Path | None = None

    @cached_property
    def counts(self) -> DatasetCounts:
        """What became of the chains and rows so far."""
        return DatasetCounts(self.settings.rows)

    @cached_property
    def _special(self) -> re.Pattern[str]:
        return special_words(self.tokenizer)

    def wants(self, task: str, question_id: str, messages: Sequence[dict[str, str]]) -> bool:
        """Whether a question may give rows as far as `questions_of` says."""
        return self.wanted is None or not question_keys(task, question_id, messages).isdisjoint(self.wanted)

    def failed_gate(self, text: str, messages: Sequence[dict[str, str]], *, answered: bool = True) -> str | None:
        """The first gate that a completion of these messages fails (`special_tokens`, `loop` or `language`), or None.

        answered: a text without an answer is there to be rejected, so it may be a loop.
        """
        gates, prompt = self.settings.gates, joined(messages)
        # They would open turns that nobody took.
        if self._special.search(text) or self._special.search(prompt):
            return "special_tokens"
        # A short text with an answer is no loop by any rule.
        if gates.loops and answered and len(text) > LONG_TEXT and diagnose(text, answered=True).loop:
            return "loop"
        return "language" if gates.language and foreign_share(text, prompt) > _MAX_FOREIGN else None


def question_keys(task: str, question_id: str, prompt: str | Sequence[dict[str, str]]) -> set[str]:
    """The two names that a question is known by: its task's id, and its words, for rows that have no such id."""
    words = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    return {f"id {task}/{question_id}", f"words {' '.join(words.split())}"}


def joined(messages: Sequence[dict[str, str]]) -> str:
    """The texts of all messages, with an empty line between them."""
    return "\n\n".join(message["content"] for message in messages)


def foreign_share(text: str, prompt: str) -> float:
    """The share of a text's letters in scripts that its prompt does not use; two languages of one script look alike."""
    if text.isascii() and prompt.isascii():
        return 0.0
    letters, asked = _scripts(text), _scripts(prompt)
    return sum(n for script, n in letters.items() if script not in asked) / max(letters.total(), 1)


def main_script(text: str) -> str:
    """The script of most of a text's first letters: "latin", "cjk", ...; "-" where it has none."""
    found = _scripts(text[:2_000]).most_common(1)
    return found[0][0].lower() if found else "-"


def _scripts(text: Iterable[str]) -> Counter[str]:
    found = Counter(_script(character) for character in text)
    del found[""]
    return found


@lru_cache(maxsize=65_536)
def _script(character: str) -> str:
    """LATIN, CJK, CYRILLIC, ...: the first word of a letter's name in Unicode; "" for what is no letter."""
    name = unicodedata.name(character, "").split(" ")[0] if character.isalpha() else ""
    return "" if name in _FORMULAS else {"HIRAGANA": "CJK", "KATAKANA": "CJK"}.get(name, name)
