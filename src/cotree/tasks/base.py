"""What a task is: questions with a prompt, an answer extractor and a verifier.

Invariant: a verdict is one of four kinds that are never merged, and extraction alone decides whether a completion has
an answer, before the verifier sees it.
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

# Raise it when a change of extraction or of a verifier changes a verdict: kept completions are then judged again.
VERDICT_VERSION = 4

VerdictKind = Literal["correct", "wrong", "no_answer", "undecided"]
Split = Literal["train", "dev", "test"]
AnswerForm = Literal["boxed", "number", "text"]
Message = dict[str, str]


@dataclass(frozen=True, slots=True)
class Turn:
    """A later turn of a conversation: the user's text, the reference answer, and what else the verifier needs."""

    text: str
    gold: str
    spec: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Question:
    """One item of a task.

    id: the source's own id. messages: the plain chat prompt, as evaluation sends it. gold: the reference answer as
    people read it. family: a subject, size or language to group results by. later: the turns of a conversation that
    are still to come; turn: how many are already part of `messages`, the present one not counted. spec: what else the
    verifier needs, such as instructions or a planning problem.
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
        """The next turn's question after the assistant's `reply` (without its thinking); None after the last turn."""
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

    kind: `correct`, `wrong`, `no_answer`, or `undecided` where an answer could not be judged (stopped at a limit, or
    the gold cannot be read): that is in no rate and no dataset. reward: in [0, 1]; 1 exactly for `correct`. answer:
    what was extracted, None when there was none. detail: why, for people; may be empty.
    """

    kind: VerdictKind
    reward: float
    answer: str | None = None
    detail: str = ""

    @classmethod
    def of(cls, correct: bool | None, answer: str, detail: str = "") -> Verdict:
        """The verdict on an answer that is right (reward 1), wrong (reward 0), or could not be judged (None)."""
        kind: VerdictKind = "undecided" if correct is None else "correct" if correct else "wrong"
        return cls(kind, float(correct or 0), answer, detail)


@dataclass(frozen=True, slots=True)
class WorkedExample:
    """A solved question for a search prompt: the question as a user asks it, thought type -> text, the answer.

    steps: `sub_task` and `thinking`, a line each; `solution`, if it is there, is shown instead where thoughts are
        paragraphs.
    """

    question: str
    steps: Mapping[str, str]
    answer: str


class Task(ABC):
    """A family of questions that can be judged. Subclass it for a task of your own (`docs/tasks.md` has an example).

    name, description: for tables. prompt_version: changes whenever a prompt does.
    verifier_version: changes whenever a verdict may; of the shipped tasks VERDICT_VERSION does.
    source: a benchmark's published rows; None for a generated task, whose splits use disjoint parameters.
    generated: its training questions come from templates, so only a whole one repeats an evaluation question.
    answer_form: `boxed`: an answer on one line in a box; `number`: the same, but it has no brace of its own, so the
        first brace ends it; `text`: free text of several lines up to the end of the turn.
    comparable: two answers can mean the same, so samples can vote; essays cannot.
    waits: a verdict may take long or wait for another process, so it is given in a thread.
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
        """data: where a benchmark's rows are (`loading.load_rows`); UsageError for a generated task, which has none."""
        if data is not None and self.source is None:
            raise UsageError(f"{self.name} is generated and takes no data; leave out data={data}")
        self.data = data

    @abstractmethod
    def questions(self, split: Split | None = None, limit: int | None = None) -> list[Question]:
        """The first `limit` questions of a split (all by default), always the same in the same order."""

    @abstractmethod
    def worked_examples(self, question: Question) -> Sequence[WorkedExample]:
        """Solved questions for this question's search prompt, itself never among them. Evaluation shows none."""

    def extract(self, completion: str, finish_reason: str, mode: ExtractionMode) -> str | None:
        """The final answer in a completion, as written; None when there is none."""
        if self.answer_form == "text":
            return free_text_answer(completion, finish_reason)
        return extract_answer(completion, finish_reason, mode)

    def verify(self, answer: str, question: Question) -> Verdict:
        """The verdict on an extracted answer, `correct` or `wrong`; by default it must be the gold number."""
        return Verdict.of(same_number(answer, question.gold), answer)

    def _gold_problem(self, question: Question) -> str:
        """Why no answer to a question can be judged; "" if it can. `verify` sees to it where there is an answer."""
        return ""

    def same_answer(self, left: str, right: str, question: Question) -> bool:
        """Whether two extracted answers mean the same. Never looks at the question's gold."""
        return left == right or self.verify(left, replace(question, gold=right)).kind == "correct"

    def judge(
        self, question: Question, completion: str, finish_reason: str = "stop", mode: ExtractionMode = "strict"
    ) -> Verdict:
        """Extract the answer of a completion, then verify it.

        finish_reason: as servers give it; a completion cut by `length` has an answer only if it closed one.
        mode: `lenient` also takes the last number of a text that states no answer.
        """
        answer = self.extract(completion, finish_reason, mode)
        if answer is None and (problem := self._gold_problem(question)):
            return Verdict("undecided", 0.0, None, problem)
        if answer is None:
            return Verdict("no_answer", 0.0, None, "cut by length" if finish_reason == "length" else "no closed answer")
        return self.verify(answer, question)

    async def judge_async(self, question: Question, completion: str, finish_reason: str = "stop") -> Verdict:
        """Run `judge`, in a thread where the verdict may wait, which must not block the event loop."""
        if not self.waits:
            return self.judge(question, completion, finish_reason)
        return await asyncio.to_thread(self.judge, question, completion, finish_reason)

    def content_of(self, question: Question) -> dict[str, Any]:
        """All that decides what is asked for a question and how replies are judged, as plain data."""
        versions = {"prompt": self.prompt_version, "verifier": self.verifier_version}
        return {**versions, "examples": [*map(asdict, self.worked_examples(question))], **asdict(question)}

    def _first(self, questions: list[Question], split: Split | None, limit: int | None) -> list[Question]:
        """The first `limit` of a split's questions; UsageError where there are fewer."""
        if limit is not None and limit > len(questions):
            n, there = len(questions), f"in split `{split}`" if split else "in all"
            fix = "lower the number"
            if not self.generated and (folder := os.environ.get("COTREE_DATA")):
                fix += f", or unset COTREE_DATA ({folder}) for the whole set of the hub"
            raise UsageError(f"{self.name} has {n} question{'s' * (n != 1)} {there}, not {limit}; {fix}")
        return questions[:limit]


# A question with the task that asks and judges it.
Asked = tuple[Task, Question]


def group_answers(task: Task, question: Question, answers: Sequence[str | None]) -> list[int | None]:
    """Group answers to one question by meaning, so that samples can vote. The gold answer is never read.

    An answer joins the first group whose first member means the same by the task's verifier: `1/2` and `0.5` are one.
    May wait for the math workers, so call it in a thread from an event loop.

    Returns:
        The group number of each answer, from 0 in order of appearance; None where there is no answer.

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
    """A conversation that begins with one message of the user."""
    return ({"role": "user", "content": text},)


def without_question(examples: Iterable[WorkedExample], question: Question) -> list[WorkedExample]:
    """The examples without the question itself, whose answer they would give away."""
    return [example for example in examples if example.question != question.messages[-1]["content"]]


def hash_digit(key: str) -> int:
    """A digit from 0 to 9, made from a question's id or parameters; the same on every machine."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4]) % 10


def split_of(key: str) -> Split:
    """The split of a question: 70% train, 10% dev, 20% test, by the hash of its key alone."""
    digit = hash_digit(key)
    return "train" if digit < 7 else "dev" if digit == 7 else "test"
