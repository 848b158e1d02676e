"""The interface of a task: questions with a prompt, an answer extractor and a verifier.

Invariant: a verdict is one of four kinds that are never merged; extraction alone decides whether a completion has an
answer, before verification.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from cotree.base.errors import UsageError
from cotree.tasks.extract import ExtractionMode, extract_answer, free_text_answer
from cotree.tasks.loading import Source
from cotree.tasks.math_text import same_number

# Increase it when a change of extraction or verification changes verdicts: stored completions are judged again.
VERDICT_VERSION = 4

VerdictKind = Literal["correct", "wrong", "no_answer", "undecided"]
Split = Literal["train", "dev", "test"]
AnswerForm = Literal["boxed", "number", "text"]
Message = dict[str, str]


@dataclass(frozen=True, slots=True)
class Turn:
    """A later turn of a conversation: the user's text, the reference answer, and further data for the verifier."""

    text: str
    gold: str
    spec: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Question:
    """One item of a task.

    id: the source's own id. messages: the plain chat prompt, as in evaluation. gold: the human-readable reference
    answer. family: a subject, size or language to group results by. later: later turns of the conversation; turn:
    index of this one. spec: further data for the verifier, such as instructions or a planning problem.
    """

    id: str
    task: str
    messages: tuple[Message, ...]
    gold: str
    family: str = ""
    later: tuple[Turn, ...] = ()
    turn: int = 0
    spec: Mapping[str, Any] = field(default_factory=dict)

    def follow_up(self, reply: str) -> Question | None:
        """The next turn's question, given the assistant's `reply` (without thinking); None after the last turn."""
        if not self.later:
            return None
        following, *later = self.later
        messages = (*self.messages, {"role": "assistant", "content": reply}, *user_prompt(following.text))
        return replace(
            self, messages=messages, gold=following.gold, later=tuple(later), turn=self.turn + 1, spec=following.spec
        )


@dataclass(frozen=True, slots=True)
class Verdict:
    """The verifier's result.

    kind: `correct`, `wrong`, `no_answer`, or `undecided` if the answer could not be judged (stopped at a limit, or an
    unreadable gold), which is excluded from all rates and datasets. reward: in [0, 1]; 1 exactly for `correct`. answer:
    as extracted, or None. detail: a human-readable reason; may be empty.
    """

    kind: VerdictKind
    reward: float
    answer: str | None = None
    detail: str = ""

    @classmethod
    def of(cls, correct: bool | None, answer: str, detail: str = "") -> Verdict:
        """The verdict for an answer that is correct (reward 1), wrong (reward 0), or undecided (None)."""
        kind: VerdictKind = "undecided" if correct is None else "correct" if correct else "wrong"
        return cls(kind, float(correct or 0), answer, detail)


@dataclass(frozen=True, slots=True)
class WorkedExample:
    """A solved question for a search prompt: the user's question, {thought type: text}, and the answer.

    steps: `sub_task` and `thinking`, one line each; an optional `solution` replaces them if thoughts are paragraphs.
    """

    question: str
    steps: Mapping[str, str]
    answer: str


class Task(ABC):
    """A family of questions with a verifier. Subclass it for your own task (example in `docs/tasks.md`).

    name, description: for tables. prompt_version: change it with a prompt.
    verifier_version: change it when verdicts may change; shipped tasks use VERDICT_VERSION.
    source: a benchmark's published rows; None for a generated task, whose splits use disjoint parameters.
    generated: training questions come from templates, so only equal whole questions count as contamination.
    answer_form: `boxed`: a one-line answer in a box; `number`: the same without inner braces, so the first closing
        brace ends it; `text`: free text of several lines up to the end of the turn.
    comparable: answers can be compared for equality, so samples can vote; not for essays.
    waits: judging may take long or wait for another process, so it runs in a thread.
    """

    name: str
    description: str
    prompt_version: str
    verifier_version: str = ""
    source: Source | None = None
    generated: bool = True
    answer_form: AnswerForm = "boxed"
    comparable: bool = True
    waits: bool = True

    def __init__(self, data: str | Path | None = None) -> None:
        """data: source of a benchmark's rows (`loading.load_rows`); UsageError for a generated task."""
        if data is not None and self.source is None:
            raise UsageError(f"{self.name} is generated and takes no data; leave out data={data}")
        self.data = data

    @abstractmethod
    def questions(self, split: Split | None = None, limit: int | None = None) -> list[Question]:
        """The first `limit` questions of a split (all by default), in a fixed order."""

    @abstractmethod
    def worked_examples(self, question: Question) -> Sequence[WorkedExample]:
        """Solved questions for this question's search prompt, never itself. Evaluation uses none by default."""

    def extract(self, completion: str, finish_reason: str, mode: ExtractionMode) -> str | None:
        """Extract the final answer of a completion as written, or None."""
        if self.answer_form == "text":
            return free_text_answer(completion, finish_reason)
        return extract_answer(completion, finish_reason, mode)

    def verify(self, answer: str, question: Question) -> Verdict:
        """Judge an extracted answer as `correct` or `wrong`; by default by numeric equality with the gold."""
        return Verdict.of(same_number(answer, question.gold), answer)

    def _gold_problem(self, question: Question) -> str:
        """Why no answer to a question can be judged (a bad gold), or ""; for completions without an answer, as `verify`
        reports it for the others."""
        return ""

    def same_answer(self, left: str, right: str, question: Question) -> bool:
        """Whether two extracted answers mean the same. Never looks at the question's gold."""
        return left == right or self.verify(left, replace(question, gold=right)).kind == "correct"

    def judge(
        self, question: Question, completion: str, finish_reason: str = "stop", mode: ExtractionMode = "strict"
    ) -> Verdict:
        """Extract the answer of a completion, then verify it.

        finish_reason: from the server; a completion cut by `length` has an answer only in a closed form.
        mode: `lenient` also takes the last number of a text without an explicit answer.
        """
        answer = self.extract(completion, finish_reason, mode)
        if answer is None and (problem := self._gold_problem(question)):
            return Verdict("undecided", 0.0, None, problem)
        if answer is None:
            return Verdict("no_answer", 0.0, None, "cut by length" if finish_reason == "length" else "no closed answer")
        return self.verify(answer, question)

    async def judge_async(self, question: Question, completion: str, finish_reason: str = "stop") -> Verdict:
        """Run `judge`, in a thread if it may block (`waits`)."""
        if not self.waits:
            return self.judge(question, completion, finish_reason)
        return await asyncio.to_thread(self.judge, question, completion, finish_reason)

    def content_of(self, question: Question) -> dict[str, Any]:
        """All data of a question that affects its prompt and verdicts, as plain data for fingerprints."""
        versions = {"prompt": self.prompt_version, "verifier": self.verifier_version}
        return {**versions, "examples": [*map(asdict, self.worked_examples(question))], **asdict(question)}

    def _first(self, questions: list[Question], split: Split | None, limit: int | None) -> list[Question]:
        """The first `limit` of a split's questions; UsageError if there are fewer."""
        if limit is not None and limit > len(questions):
            n, there = len(questions), f"in split `{split}`" if split else "in all"
            fix = "lower the number"
            if not self.generated and (folder := os.environ.get("COTREE_DATA")):
                fix += f", or unset COTREE_DATA ({folder}) for the whole set of the hub"
            raise UsageError(f"{self.name} has {n} question{'s' * (n != 1)} {there}, not {limit}; {fix}")
        return questions[:limit]


# (task, question)
Asked = tuple[Task, Question]


def group_answers(task: Task, question: Question, answers: Sequence[str | None]) -> list[int | None]:
    """Group equivalent answers to one question for majority votes, without the gold answer.

    An answer joins the first group whose first member is equal by the task's verifier: `1/2` equals `0.5`. May wait for
    the math workers, so call it in a thread from an event loop.

    Returns:
        Each answer's group number, from 0 in order of appearance; None for no answer.

    Raises:
        ValueError: the task's answers cannot be compared.
    """
    if not task.comparable:
        raise ValueError(f"answers of {task.name} are free texts: no two say the same")
    firsts: list[str] = []
    group_of: dict[str | None, int | None] = {None: None}
    for answer in answers:
        if answer is not None and answer not in group_of:
            same = (i for i, first in enumerate(firsts) if task.same_answer(answer, first, question))
            group_of[answer] = next(same, len(firsts))
            if group_of[answer] == len(firsts):
                firsts.append(answer)
    return [group_of[answer] for answer in answers]


def user_prompt(text: str) -> tuple[Message, ...]:
    """A conversation with one user message."""
    return ({"role": "user", "content": text},)


def without_question(examples: Iterable[WorkedExample], question: Question) -> list[WorkedExample]:
    """The examples except the question itself, whose answer would leak."""
    return [example for example in examples if example.question != question.messages[-1]["content"]]


def hash_digit(key: str) -> int:
    """A digit from 0 to 9 from the hash of a question's id or parameters; the same on every machine."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4]) % 10


def split_of(key: str) -> Split:
    """The split of a question: 70% train, 10% dev, 20% test, by the hash of its key alone."""
    digit = hash_digit(key)
    return "train" if digit < 7 else "dev" if digit == 7 else "test"
