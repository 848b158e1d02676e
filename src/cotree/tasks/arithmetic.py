r"""`arithmetic`: four generated families that a 135M model gets right now and then, so that trees hold both verdicts.

Invariant: a question is a pure function of its parameters, and the parameters' hash decides its split, so no question
of one split can appear in another. The plain prompt names the answer format: "Put the final answer in \boxed{}."
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from itertools import islice

from cotree.errors import UsageError
from cotree.tasks.base import Question, Split, Task, WorkedExample

ANSWER_FORMAT = "Put the final answer in \\boxed{}."
_DRAWS = 20_000
_NAMES = ("Tom", "Anna", "Ben", "Mia", "Sam", "Lily", "Max", "Zoe", "Paul", "Emma")
_THINGS = ("apples", "books", "coins", "cards", "shells", "stamps", "pens", "eggs", "marbles", "cookies")


def split_of(key: str) -> Split:
    """Which split a parameter key belongs to: 70% train, 10% dev, 20% test, fixed by its hash alone."""
    bucket = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4]) % 10
    return "train" if bucket < 7 else "dev" if bucket == 7 else "test"


def _one_step(rng: random.Random) -> tuple[str, str]:
    name, thing, a, b = rng.choice(_NAMES), rng.choice(_THINGS), rng.randint(6, 30), rng.randint(2, 20)
    if rng.random() < 0.5 or b >= a:
        return f"{name} has {a} {thing} and buys {b} more. How many {thing} does {name} have now?", str(a + b)
    return f"{name} has {a} {thing} and gives away {b}. How many {thing} does {name} have left?", str(a - b)


def _two_step(rng: random.Random) -> tuple[str, str]:
    name, thing = rng.choice(_NAMES), rng.choice(_THINGS)
    a, b, c = rng.randint(2, 9), rng.randint(2, 9), rng.randint(1, 9)
    text = f"{name} has {a} boxes with {b} {thing} each and {c} {thing} more. How many {thing} does {name} have?"
    return text, str(a * b + c)


def _sum(rng: random.Random) -> tuple[str, str]:
    a, b = rng.randint(11, 60), rng.randint(11, 39)
    return f"What is {a} + {b}?", str(a + b)


def _largest(rng: random.Random) -> tuple[str, str]:
    numbers = rng.sample(range(10, 100), 5)
    return f"Which is the largest of these numbers: {', '.join(map(str, numbers))}?", str(max(numbers))


_FAMILIES: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "one_step": _one_step,
    "two_step": _two_step,
    "sum": _sum,
    "largest": _largest,
}

_EXAMPLES: dict[str, tuple[WorkedExample, ...]] = {
    "one_step": (
        WorkedExample(
            "Kate has 14 plums and buys 5 more. How many plums does Kate have now? " + ANSWER_FORMAT,
            {
                "reclarify": "Kate has 14 plums and gets 5 more.",
                "sub_task": "I add 14 and 5.",
                "hypothesis": "The result is more than 14.",
                "thinking": "14 + 5 = 19.",
                "double_check": "19 - 5 = 14, so 19 is right.",
            },
            "19",
        ),
        WorkedExample(
            "Dan has 23 nuts and gives away 8. How many nuts does Dan have left? " + ANSWER_FORMAT,
            {
                "reclarify": "Dan has 23 nuts and 8 of them go away.",
                "sub_task": "I subtract 8 from 23.",
                "hypothesis": "The result is less than 23.",
                "thinking": "23 - 8 = 15.",
                "double_check": "15 + 8 = 23, so 15 is right.",
            },
            "15",
        ),
        WorkedExample(
            "Lea has 9 cups and buys 12 more. How many cups does Lea have now? " + ANSWER_FORMAT,
            {
                "reclarify": "Lea has 9 cups and gets 12 more.",
                "sub_task": "I add 9 and 12.",
                "hypothesis": "The result is more than 12.",
                "thinking": "9 + 12 = 21.",
                "double_check": "21 - 12 = 9, so 21 is right.",
            },
            "21",
        ),
    ),
    "two_step": (
        WorkedExample(
            "Kate has 3 boxes with 4 plums each and 5 plums more. How many plums does Kate have? " + ANSWER_FORMAT,
            {
                "reclarify": "There are 3 boxes with 4 plums each, and 5 more plums.",
                "sub_task": "I multiply 3 by 4, then add 5.",
                "hypothesis": "The result is more than 12.",
                "thinking": "3 * 4 = 12, 12 + 5 = 17.",
                "double_check": "17 - 5 = 12 = 3 * 4, so 17 is right.",
            },
            "17",
        ),
        WorkedExample(
            "Dan has 6 boxes with 5 nuts each and 2 nuts more. How many nuts does Dan have? " + ANSWER_FORMAT,
            {
                "reclarify": "There are 6 boxes with 5 nuts each, and 2 more nuts.",
                "sub_task": "I multiply 6 by 5, then add 2.",
                "hypothesis": "The result is more than 30.",
                "thinking": "6 * 5 = 30, 30 + 2 = 32.",
                "double_check": "32 - 2 = 30 = 6 * 5, so 32 is right.",
            },
            "32",
        ),
        WorkedExample(
            "Lea has 2 boxes with 8 cups each and 7 cups more. How many cups does Lea have? " + ANSWER_FORMAT,
            {
                "reclarify": "There are 2 boxes with 8 cups each, and 7 more cups.",
                "sub_task": "I multiply 2 by 8, then add 7.",
                "hypothesis": "The result is more than 16.",
                "thinking": "2 * 8 = 16, 16 + 7 = 23.",
                "double_check": "23 - 7 = 16 = 2 * 8, so 23 is right.",
            },
            "23",
        ),
    ),
    "sum": (
        WorkedExample(
            "What is 47 + 35? " + ANSWER_FORMAT,
            {
                "reclarify": "I need the sum of 47 and 35.",
                "sub_task": "I add the tens, then the ones.",
                "hypothesis": "The sum is near 80.",
                "thinking": "40 + 30 = 70, 7 + 5 = 12, 70 + 12 = 82.",
                "double_check": "82 - 35 = 47, so 82 is right.",
            },
            "82",
        ),
        WorkedExample(
            "What is 21 + 16? " + ANSWER_FORMAT,
            {
                "reclarify": "I need the sum of 21 and 16.",
                "sub_task": "I add the tens, then the ones.",
                "hypothesis": "The sum is near 40.",
                "thinking": "20 + 10 = 30, 1 + 6 = 7, 30 + 7 = 37.",
                "double_check": "37 - 16 = 21, so 37 is right.",
            },
            "37",
        ),
        WorkedExample(
            "What is 58 + 24? " + ANSWER_FORMAT,
            {
                "reclarify": "I need the sum of 58 and 24.",
                "sub_task": "I add the tens, then the ones.",
                "hypothesis": "The sum is near 80.",
                "thinking": "50 + 20 = 70, 8 + 4 = 12, 70 + 12 = 82.",
                "double_check": "82 - 24 = 58, so 82 is right.",
            },
            "82",
        ),
    ),
    "largest": (
        WorkedExample(
            "Which is the largest of these numbers: 31, 78, 12, 65, 40? " + ANSWER_FORMAT,
            {
                "reclarify": "I need the largest of the five numbers.",
                "sub_task": "I compare the tens of the numbers.",
                "hypothesis": "The largest number begins with 7.",
                "thinking": "78 has 7 tens, the most of all.",
                "double_check": "No other number is above 78.",
            },
            "78",
        ),
        WorkedExample(
            "Which is the largest of these numbers: 94, 27, 55, 81, 16? " + ANSWER_FORMAT,
            {
                "reclarify": "I need the largest of the five numbers.",
                "sub_task": "I compare the tens of the numbers.",
                "hypothesis": "The largest number begins with 9.",
                "thinking": "94 has 9 tens, the most of all.",
                "double_check": "No other number is above 94.",
            },
            "94",
        ),
        WorkedExample(
            "Which is the largest of these numbers: 20, 33, 47, 19, 62? " + ANSWER_FORMAT,
            {
                "reclarify": "I need the largest of the five numbers.",
                "sub_task": "I compare the tens of the numbers.",
                "hypothesis": "The largest number begins with 6.",
                "thinking": "62 has 6 tens, the most of all.",
                "double_check": "No other number is above 62.",
            },
            "62",
        ),
    ),
}


class Arithmetic(Task):
    """Word problems of one and two steps, two-digit sums, and the largest of five numbers, in equal parts."""

    name = "arithmetic"
    description = "generated: one- and two-step word problems, two-digit sums, largest of five"

    def questions(self, split: Split | None = None, limit: int | None = None) -> list[Question]:
        """`limit` questions (400 by default), the four families in turn."""
        wanted = 400 if limit is None else limit
        streams = [self._stream(family, split) for family in _FAMILIES]
        drawn = [
            question for row in zip(*(islice(s, -(-wanted // 4)) for s in streams), strict=False) for question in row
        ]
        if len(drawn) < wanted:
            raise UsageError(
                f"arithmetic has {len(drawn)} questions in split `{split}`, not {wanted}; lower the number"
            )
        return drawn[:wanted]

    def worked_examples(self, question: Question) -> Sequence[WorkedExample]:
        """Three of the question's own family."""
        return _EXAMPLES[question.family]

    def _stream(self, family: str, split: Split | None) -> Iterator[Question]:
        seen: set[str] = set()
        for i in range(_DRAWS):
            text, gold = _FAMILIES[family](random.Random(f"{family}-{i}"))
            if text in seen or (split is not None and split_of(text) != split):
                continue
            seen.add(text)
            message = {"role": "user", "content": f"{text} {ANSWER_FORMAT}"}
            yield Question(f"{family}-{i}", self.name, (message,), gold, family)
