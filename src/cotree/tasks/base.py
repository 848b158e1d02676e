"""What a task is: questions with a prompt, an answer extractor and a verifier.

Invariant: a verdict has one of three kinds that are never folded into each other, and whether there was an answer is
decided by extraction alone, before the verifier looks.
"""

from __future__ import annotations

import asyncio
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from cotree.base.errors import UsageError
from cotree.tasks.extract import Mode, answer_text, extract_answer
from cotree.tasks.loading import Source
from cotree.tasks.numbers import same_number

VerdictKind = Literal["correct", "wrong", "no_answer"]
Split = Literal["train", "dev", "test"]
AnswerForm = Literal["boxed", "number", "text"]
Message = dict[str, str]


@dataclass(frozen=True, slots=True)
class Turn:
    """A later turn of a conversation: what the user says, and what is right to answer."""

    text: str
    gold: str
    spec: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Question:
    """One item of a task. `id` is the source's own id; `messages` is the plain prompt that also evaluates.

    `gold` is the reference answer as people read it; `spec` is what else a verifier needs (instructions, a planning
    problem). A conversation has its later turns in `later`; `turn` counts those that are already part of `messages`.
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
        """The next turn's question, after the assistant said `reply` (its thinking left out); None after the last."""
        if not self.later:
            return None
        asked = ({"role": "assistant", "content": reply}, {"role": "user", "content": self.later[0].text})
        return replace(
            self,
            messages=(*self.messages, *asked),
            gold=self.later[0].gold,
            later=self.later[1:],
            turn=self.turn + 1,
            spec=self.later[0].spec,
        )


@dataclass(frozen=True, slots=True)
class Verdict:
    """The verifier's result: `correct` means reward 1; `answer` is what was extracted, None when there was none."""

    kind: VerdictKind
    reward: float
    answer: str | None = None
    detail: str = ""


@dataclass(frozen=True, slots=True)
class WorkedExample:
    """A solved question, as a user would ask it, with its steps by thought type."""

    question: str
    steps: Mapping[str, str]
    answer: str


class Task(ABC):
    """A family of questions. A generated task draws its splits from disjoint parameters; a benchmark has a `source`.

    data: where a benchmark's rows are (see `loading.load_rows`). `prompt_version` changes whenever a prompt does.
    `generated`: its training questions come from templates, so only a whole one repeats an evaluation question.
    `answer_form`: an answer is written in a box on one line (`number`: has no brace of its own, so the first one ends
    it), or as free text of several lines up to the end of the turn, of which all that follows the answer tag is judged.
    `comparable`: two answers can say the same, so that they can vote; two essays cannot.
    """

    name: str
    description: str
    prompt_version: str
    source: Source | None = None
    generated: bool = True
    answer_form: AnswerForm = "boxed"
    comparable: bool = True

    def __init__(self, data: str | Path | None = None) -> None:
        if data is not None and self.source is None:
            raise UsageError(f"{self.name} is generated and takes no data; leave out data={data}")
        self.data = data

    @abstractmethod
    def questions(self, split: Split | None = None, limit: int | None = None) -> list[Question]:
        """The first `limit` questions of a split (all by default), always the same in the same order."""

    def _first(self, questions: list[Question], split: Split | None, limit: int | None) -> list[Question]:
        """The first `limit` of a split's questions; UsageError where there are fewer."""
        if limit is not None and limit > len(questions):
            n, there = len(questions), f"in split `{split}`" if split else "in all"
            raise UsageError(f"{self.name} has {n} question{'s' * (n != 1)} {there}, not {limit}; lower the number")
        return questions[:limit]

    @abstractmethod
    def worked_examples(self, question: Question) -> Sequence[WorkedExample]:
        """Worked examples for the search prompt of this question; never used by plain evaluation."""

    def extract(self, completion: str, finish_reason: str, mode: Mode) -> str | None:
        """The final answer in a completion as written, None when there is none."""
        if self.answer_form == "text":
            return answer_text(completion, finish_reason)
        return extract_answer(completion, finish_reason, mode)

    def verify(self, answer: str, question: Question) -> Verdict:
        """The verdict on an extracted answer: `correct` or `wrong`."""
        correct = same_number(answer, question.gold)
        return Verdict("correct" if correct else "wrong", float(correct), answer)

    def same_answer(self, left: str, right: str, question: Question) -> bool:
        """Whether two extracted answers say the same. Never looks at the question's gold."""
        return left == right or self.verify(left, replace(question, gold=right)).kind == "correct"

    def judge(self, question: Question, completion: str, finish_reason: str = "stop", mode: Mode = "strict") -> Verdict:
        """Extract, then verify. A completion cut by length has an answer only if it closed one."""
        answer = self.extract(completion, finish_reason, mode)
        if answer is None:
            return Verdict("no_answer", 0.0, None, "cut by length" if finish_reason == "length" else "no closed answer")
        return self.verify(answer, question)

    async def judge_async(self, question: Question, completion: str, finish_reason: str = "stop") -> Verdict:
        """`judge` that does not hold up the event loop: some verdicts wait for a process, others take milliseconds."""
        return await asyncio.to_thread(self.judge, question, completion, finish_reason)


def tenth(key: str) -> int:
    """A number from 0 to 9 that a question's id or parameters decide, the same on every machine."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4]) % 10


def split_of(key: str) -> Split:
    """Which split a question belongs to: 70% train, 10% dev, 20% test, fixed by the hash of its key alone."""
    part = tenth(key)
    return "train" if part < 7 else "dev" if part == 7 else "test"
