r"""`arithmetic`: four generated families that a 135M model gets right now and then, so that trees hold both verdicts.

Invariant: a question is a pure function of its parameters, and the parameters' hash decides its split, so no question
of one split can appear in another. The plain prompt names the answer format: "Put the final answer in \boxed{}."
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from itertools import islice

from cotree.tasks.base import Question, Split, Task, WorkedExample, split_of

ANSWER_FORMAT = "Put the final answer in \\boxed{}."
_DRAWS = 20_000


# The question, what to do, the thought, its check, the answer.
Parts = tuple[str, str, str, str, int]


def _sum(rng: random.Random) -> Parts:
    a, b = rng.randint(11, 50), rng.randint(11, 40)
    return f"What is {a} + {b}?", f"add {a} and {b}", f"{a} + {b} = {a + b}", f"{a + b} - {b} = {a}", a + b


def _difference(rng: random.Random) -> Parts:
    b, c = rng.randint(2, 20), rng.randint(3, 30)
    a = b + c
    return f"What is {a} - {b}?", f"subtract {b} from {a}", f"{a} - {b} = {c}", f"{c} + {b} = {a}", c


def _product(rng: random.Random) -> Parts:
    a, b = rng.randint(2, 19), rng.randint(2, 9)
    return f"What is {a} * {b}?", f"multiply {a} by {b}", f"{a} * {b} = {a * b}", f"{a * b} / {a} = {b}", a * b


def _largest(rng: random.Random) -> Parts:
    numbers = rng.sample(range(10, 100), 3)
    asked, most = f"Which is the largest of these numbers: {', '.join(map(str, numbers))}?", max(numbers)
    return asked, "compare the numbers", f"The largest is {most}", f"No number is above {most}", most


_FAMILIES = {"sum": _sum, "difference": _difference, "product": _product, "largest": _largest}


class Arithmetic(Task):
    r"""Sums, differences and products of small numbers, and the largest of three, in equal parts.

    Prompt `arithmetic/boxed-1`: `What is 31 + 12? Put the final answer in \boxed{}.` Rule: `\boxed{43}` and "The answer
    is 43." are correct, `\boxed{42}` is wrong: the numbers must be equal.
    """

    name = "arithmetic"
    prompt_version = "arithmetic/boxed-1"
    answer_form = "number"
    description = "sums, differences, products, the largest of three numbers"

    def questions(self, split: Split | None = None, limit: int | None = None) -> list[Question]:
        """`limit` questions (all by default: as many as the smallest family gives), the four families in turn."""
        streams = [islice(self._stream(family, split), limit) for family in _FAMILIES]
        drawn = [question for row in zip(*streams, strict=False) for question in row]
        return self._first(drawn, split, limit)

    def worked_examples(self, question: Question) -> Sequence[WorkedExample]:
        """Three of the question's family, of another seed; one that is the question itself is left out."""
        examples = []
        for i in range(3):
            rng = random.Random(f"example-{question.family}-{i}")
            text, task, thought, check, answer = _FAMILIES[question.family](rng)
            checked = f"{check}, so {answer} is right."
            steps = {"sub_task": f"I {task}.", "thinking": f"{thought}.", "double_check": checked}
            examples.append(WorkedExample(f"{text} {ANSWER_FORMAT}", steps, str(answer)))
        return [example for example in examples if example.question != question.messages[-1]["content"]]

    def _stream(self, family: str, split: Split | None) -> Iterator[Question]:
        seen: set[str] = set()
        for i in range(_DRAWS):
            text, *_, answer = _FAMILIES[family](random.Random(f"{family}-{i}"))
            # The same numbers in another order are nearly the same question, so they go to the same split.
            numbers = sorted(map(int, re.findall(r"\d+", text)))
            if text in seen or (split is not None and split_of(f"{family}/{numbers}") != split):
                continue
            seen.add(text)
            message = {"role": "user", "content": f"{text} {ANSWER_FORMAT}"}
            yield Question(f"{family}-{i}", self.name, (message,), str(answer), family)
