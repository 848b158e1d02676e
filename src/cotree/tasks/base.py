"""What a task is: questions with a prompt, an answer extractor and a verifier.

Invariant: a verdict has one of three kinds that are never folded into each other, and whether there was an answer is
decided by extraction alone, before the verifier looks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from cotree.tasks.extract import Mode, extract_answer

VerdictKind = Literal["correct", "wrong", "no_answer"]
Split = Literal["train", "dev", "test"]
Message = dict[str, str]


@dataclass(frozen=True, slots=True)
class Question:
    """One item of a task. `id` is the source's own id; `messages` is the plain prompt that also evaluates."""

    id: str
    task: str
    messages: tuple[Message, ...]
    gold: str
    family: str = ""


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
    """A family of questions. A generated task draws its splits from disjoint parameters."""

    name: str
    description: str

    @abstractmethod
    def questions(self, split: Split | None = None, limit: int | None = None) -> list[Question]:
        """The first `limit` questions of a split (all by default), always the same in the same order."""

    @abstractmethod
    def worked_examples(self, question: Question) -> Sequence[WorkedExample]:
        """Worked examples for the search prompt of this question; never used by plain evaluation."""

    def verify(self, answer: str, gold: str) -> bool:
        """Whether an extracted answer equals the gold one."""
        return answer == gold

    def judge(self, question: Question, completion: str, finish_reason: str = "stop", mode: Mode = "strict") -> Verdict:
        """Extract, then verify. A completion cut by length has an answer only if it closed one."""
        answer = extract_answer(completion, finish_reason, mode)
        if answer is None:
            return Verdict("no_answer", 0.0, None, "cut by length" if finish_reason == "length" else "no closed answer")
        correct = self.verify(normalise_number(answer), normalise_number(question.gold))
        return Verdict("correct" if correct else "wrong", float(correct), answer)


def normalise_number(text: str) -> str:
    r"""`\$1,204.` and `1204` name the same number: drop spaces, dollar signs, digit commas, a trailing dot.

    Also drops a unit after a leading number (`12 apples`) and `+`/leading zeros, as integers print them.
    """
    kept = text.strip().strip("$").replace("\\$", "").replace("\\,", "").replace(",", "").rstrip(".").strip()
    head = kept.split(" ")[0] if kept else kept
    number = head.lstrip("$")
    sign, digits = ("-", number[1:]) if number.startswith("-") else ("", number)
    return sign + str(int(digits)) if digits.isascii() and digits.isdigit() else kept
