"""Filters for chains, rows and questions of a dataset, applied before selection, and counts of what they left out."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from importlib.resources import files
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import yaml

from cotree.base.errors import UsageError
from cotree.base.rows import Row, read_rows
from cotree.data.annotations import ChainAnnotation, Key
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
# judge(tree, text): the verdict on a text as an answer to the tree's question.
TextJudge = Callable[[StoredTree, str], Verdict]
# row_judge(row, prompt, text): the verdict on the text of a file's row; None without a gold answer.
RowJudge = Callable[[Row, Messages, str], str | None]
# Letters in formulas are ignored.
_FORMULAS = ("GREEK", "MATHEMATICAL", "SUPERSCRIPT", "SUBSCRIPT", "MODIFIER", "DOUBLE-STRUCK", "SCRIPT")
_MAX_FOREIGN = 0.2


# {part of a row: column with its token count}; a pair's shared prefix is part of both sides.
_TOKENS = {"completion": "length_tokens"} | {part: f"{part}_tokens" for part in ("chosen", "rejected", "prefix")}
# {name: {clause: words after the number of chains or rows, remedy: how to let more of them in}}
REASONS: dict[str, dict[str, str]] = yaml.safe_load((files("cotree.data") / "reasons.yaml").read_text("utf-8"))


@dataclass
class DatasetCounts:
    """Counts of one dataset: rows written, and chains and rows left out.

    Every judged chain is in a row or in `chains_left_out`; every candidate row is written or in `rows_left_out`.

    Attributes:
        kind: sft, dpo, step_pairs or stepwise.
        rows: written. tasks: {task: rows}.
        verified: file rows whose completion, or chosen side, a task judged correct; None if no task judged them.
        shortened_prompts: rows whose earlier replies lose their reasoning in the student's chat template.
        trees, chains: read; a chain is a path to a judged leaf. Both are 0 for rows of a file.
        chains_left_out, rows_left_out: {reason: count} (`REASONS`).
        completion_tokens: of all rows; both sides of pairs.
        mean_tokens: per row, of `completion`, or of `chosen`, `rejected` and their shared `prefix`.
        annotated: with `annotations`, the number of annotated chains that were `accepted`, `rejected`, `fixed` (a
            corrected text was considered) or `not_used` (chain not considered, text changed since, or irrelevant
            verdict); None without.
        faults: of the first malformed rows of a file. template_faults: of the first rows that the student's chat
            template rejects or changes.
        columns_left_out: {column of a file that is not kept: rows that have it}.
    """

    kind: str
    rows: int = 0
    tasks: dict[str, int] = field(default_factory=dict)
    verified: int | None = None
    shortened_prompts: int = 0
    trees: int = 0
    chains: int = 0
    chains_left_out: dict[str, int] = field(default_factory=dict)
    rows_left_out: dict[str, int] = field(default_factory=dict)
    completion_tokens: int = 0
    mean_tokens: dict[str, float] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    template_faults: list[str] = field(default_factory=list)
    columns_left_out: dict[str, int] = field(default_factory=dict)
    annotated: dict[str, int] | None = None

    def use_annotation(self, what: str) -> None:
        """Count an annotated chain as `accepted`, `rejected` or `fixed`."""
        assert self.annotated is not None
        self.annotated[what] += 1
        self.annotated["not_used"] -= 1

    def leave_out(self, reason: str, *, chains: int = 0, rows: int = 0) -> None:
        """Count chains or candidate rows that are left out for a reason."""
        assert reason in REASONS
        for left_out, number in ((self.chains_left_out, chains), (self.rows_left_out, rows)):
            if number:
                left_out[reason] = left_out.get(reason, 0) + number

    def add_written(self, columns: Mapping[str, Sequence[Any]]) -> None:
        """Add the statistics of the written rows, given the columns of their file."""
        self.rows, self.tasks = len(columns["task"]), dict(sorted(Counter(columns["task"]).items()))
        tokens = {part: columns[name] for part, name in _TOKENS.items() if name in columns}
        self.mean_tokens = {part: fmean(numbers) for part, numbers in tokens.items()}
        self.completion_tokens = sum(sum(numbers) for part, numbers in tokens.items() if part != "prefix")

    def lines(self) -> list[str]:
        """Lines for the terminal: rows written and left out."""
        tasks = ", ".join(f"{task} {number}" for task, number in self.tasks.items())
        left_out = ", ".join(f"{reason} {number}" for reason, number in self._left_out())
        verified = "" if self.verified is None else f", {self.verified} of them verified"
        verified += " (the chosen side)" if verified and self.kind == "dpo" else ""
        lines = [f"{self.rows} {self.kind} rows ({tasks}){verified}", f"left out: {left_out or 'nothing'}"]
        lines += [f"the first malformed row: {fault}" for fault in self.faults[:1]]
        lines += [f"the first row that the chat template refuses or changes: {it}" for it in self.template_faults[:1]]
        if self.annotated is not None:
            lines.append(annotated_chains(self.annotated))
        if self.shortened_prompts:
            lines.append(shortened(self.shortened_prompts))
        if self.columns_left_out:
            columns = (f"{name} {number}" for name, number in sorted(self.columns_left_out.items()))
            lines.append(f"columns that are not kept, and how many rows have them: {', '.join(columns)}")
        return lines

    def why_empty(self) -> str:
        """One line that explains an empty dataset: counts by reason, and the most helpful remedy."""
        left_out = self._left_out()
        if not left_out:
            nothing = f"{self.trees} trees with no judged chain" if self.trees else "no tree and no row was read"
            return f"no rows, because there is nothing to choose from: {nothing}"
        source = f"of {self.chains} chains in {self.trees} trees" if self.trees else "of the file's rows"
        clauses = ", ".join(f"{number} {REASONS[reason]['clause']}" for reason, number in left_out)
        first = "".join(f" (the first: {fault})" for fault in (self.faults + self.template_faults)[:1])
        return f"no rows: {source}, {clauses}{first}; {REASONS[left_out[0][0]]['remedy']}"

    def _left_out(self) -> list[tuple[str, int]]:
        """(reason, count) of chains, then of rows, largest first."""
        return [*Counter(self.chains_left_out).most_common(), *Counter(self.rows_left_out).most_common()]


@dataclass(frozen=True)
class Rules:
    """All inputs that decide which rows a dataset has, and the counts of what was left out.

    Attributes:
        tokenizer: the student's. seed: of all draws. patterns: of the trees' search.
        judge: verifies chains again after `reflections: cut` and corrected texts; required for these.
        annotations: of the trees' chains; required if the settings use them.
        row_judge: verifies texts of a file; wrong and unanswered ones are left out, others get its reward.
        contaminated: (task, question id) of tree questions that overlap with an evaluation.
        held_out: evaluation questions that file rows must not repeat.
        size_of, questions_of: `train.parquet` of the datasets that the settings name.

    Raises:
        UsageError: an input that the settings require is missing.
    """

    settings: Dataset
    tokenizer: PreTrainedTokenizerBase
    seed: int = 0
    patterns: Mapping[str, Pattern] = field(default_factory=lambda: PATTERNS)
    judge: TextJudge | None = None
    row_judge: RowJudge | None = None
    contaminated: Collection[tuple[str, str]] = ()
    held_out: Sequence[Question] = ()
    size_of: Path | None = None
    questions_of: Path | None = None
    annotations: Mapping[Key, ChainAnnotation] | None = None

    def __post_init__(self) -> None:
        needed = {"judge": self.settings.judges_again, "annotations": self.settings.annotations}
        needed |= {name: getattr(self.settings, name) for name in ("size_of", "questions_of")}
        if missing := [name for name, needs in needed.items() if needs and getattr(self, name) is None]:
            raise UsageError(f"the settings of the dataset need {'= and '.join(missing)}=: pass it to Rules")

    @cached_property
    def counts(self) -> DatasetCounts:
        """The counts so far."""
        used = {"accepted": 0, "rejected": 0, "fixed": 0, "not_used": len(self.annotations or ())}
        return DatasetCounts(self.settings.rows, annotated=used if self.settings.annotations else None)

    @cached_property
    def _special(self) -> re.Pattern[str]:
        return special_words(self.tokenizer)

    @cached_property
    def _allowed_questions(self) -> set[str] | None:
        """`question_keys` of all questions in the `questions_of` dataset, or None."""
        if self.questions_of is None:
            return None
        rows = read_rows(self.questions_of)
        return set().union(*(question_keys(row["task"], row["question_id"], row["prompt"]) for row in rows))

    def allows_question(self, task: str, question_id: str, messages: Sequence[dict[str, str]]) -> bool:
        """Whether the `questions_of` dataset has this question; True without `questions_of`."""
        return self._allowed_questions is None or not question_keys(task, question_id, messages).isdisjoint(
            self._allowed_questions
        )

    def failed_gate(
        self, text: str, messages: Sequence[dict[str, str]], tokens: int, *, answered: bool = True
    ) -> str | None:
        """The first gate that a completion fails, or None.

        Args:
            tokens: of messages and completion.
            answered: False skips the loop gate, as unanswered texts serve as rejected ones.

        Returns:
            `too_long`, `special_tokens`, `loop` or `language`.
        """
        gates, prompt = self.settings.gates, text_of_messages(messages)
        if tokens > self.settings.max_tokens:
            return "too_long"
        # They would be tokenized as turn boundaries.
        if self._special.search(text) or self._special.search(prompt):
            return "special_tokens"
        # Short answered texts never count as loops.
        if gates.loops and answered and len(text) > LONG_TEXT and diagnose(text, answered=True).loop:
            return "loop"
        return "language" if gates.language and foreign_share(text, prompt) > _MAX_FOREIGN else None


def annotated_chains(counts: Mapping[str, int]) -> str:
    """A report line about the annotated chains of a dataset."""
    parts = ", ".join(f"{number} {kind.replace('_', ' ')}" for kind, number in counts.items() if number)
    return f"annotated chains: {parts or 'none'}"


def shortened(rows: int) -> str:
    """A report line about rows whose earlier replies the chat template shortens, in training as in evaluation."""
    return f"the chat template leaves the reasoning of earlier replies out of the prompt: {rows} row{'s' * (rows != 1)}"


def question_keys(task: str, question_id: str, prompt: str | Sequence[dict[str, str]]) -> set[str]:
    """Two keys that identify a question: task and id, and its words (for rows without an id)."""
    words = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    return {f"id {task}/{question_id}", f"words {' '.join(words.split())}"}


def text_of_messages(messages: Sequence[dict[str, str]]) -> str:
    """Join the texts of all messages with blank lines."""
    return "\n\n".join(message["content"] for message in messages)


def foreign_share(text: str, prompt: str) -> float:
    """The share of a text's letters in scripts that its prompt does not use (a proxy for foreign languages)."""
    if text.isascii() and prompt.isascii():
        return 0.0
    letters, asked = _scripts(text), _scripts(prompt)
    return sum(n for script, n in letters.items() if script not in asked) / max(letters.total(), 1)


def main_script(text: str) -> str:
    """The majority script of a text's first letters: "latin", "cjk", ...; "-" without letters."""
    found = _scripts(text[:2_000]).most_common(1)
    return found[0][0].lower() if found else "-"


def _scripts(text: Iterable[str]) -> Counter[str]:
    found = Counter(_script(character) for character in text)
    del found[""]
    return found


@lru_cache(maxsize=65_536)
def _script(character: str) -> str:
    """A letter's script, by the first word of its Unicode name: LATIN, CJK, ...; "" for a non-letter."""
    name = unicodedata.name(character, "").split(" ")[0] if character.isalpha() else ""
    return "" if name in _FORMULAS else {"HIRAGANA": "CJK", "KATAKANA": "CJK"}.get(name, name)
