r"""`arithmetic` and `letters`: generated questions that a 135M model sometimes answers correctly, so that trees have
correct and wrong chains.

Invariant: a question is a pure function of its parameters, whose hash decides its split, so splits are disjoint. The
prompt gives the answer format: "Put the final answer in \boxed{}."
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from itertools import chain, islice

from cotree.tasks.base import Question, Split, Task, WorkedExample, split_of, user_prompt, without_question
from cotree.tasks.benchmark import shipped_examples
from cotree.tasks.loading import packaged_text

ANSWER_FORMAT = "Put the final answer in \\boxed{}."
_DRAWS = 20_000
_LETTER_COUNTS = (1, 2, 3)

# (question, sub_task, thinking, double_check, answer)
Exercise = tuple[str, str, str, str, int]


def _sum(rng: random.Random) -> Exercise:
    a, b = rng.randint(11, 50), rng.randint(11, 40)
    return f"What is {a} + {b}?", f"add {a} and {b}", f"{a} + {b} = {a + b}", f"{a + b} - {b} = {a}", a + b


def _difference(rng: random.Random) -> Exercise:
    b, c = rng.randint(2, 20), rng.randint(3, 30)
    a = b + c
    return f"What is {a} - {b}?", f"subtract {b} from {a}", f"{a} - {b} = {c}", f"{c} + {b} = {a}", c


def _product(rng: random.Random) -> Exercise:
    a, b = rng.randint(2, 19), rng.randint(2, 9)
    return f"What is {a} * {b}?", f"multiply {a} by {b}", f"{a} * {b} = {a * b}", f"{a * b} / {a} = {b}", a * b


def _largest(rng: random.Random) -> Exercise:
    numbers = rng.sample(range(10, 100), 3)
    question, answer = f"Which is the largest of these numbers: {', '.join(map(str, numbers))}?", max(numbers)
    return question, "compare the numbers", f"The largest is {answer}", f"No number is above {answer}", answer


_FAMILIES = {"sum": _sum, "difference": _difference, "product": _product, "largest": _largest}


class Arithmetic(Task):
    r"""Sums, differences and products of small numbers, and the largest of three, in equal parts.

    Prompt `arithmetic/boxed-1`: `What is 31 + 12? Put the final answer in \boxed{}.` Rule: `\boxed{43}` and "The answer
    is 43." are correct, `\boxed{42}` is wrong: the numbers must be equal.
    """

    name = "arithmetic"
    prompt_version = "arithmetic/boxed-1"
    answer_form = "number"
    waits = False
    description = "sums, differences, products, the largest of three numbers"

    def questions(self, split: Split | None = None, limit: int | None = None) -> list[Question]:
        """`limit` questions (by default as many as the smallest family allows), alternating between four families."""
        families = [islice(self._draw(family, split), limit) for family in _FAMILIES]
        return self._first(list(chain.from_iterable(zip(*families, strict=False))), split, limit)

    def worked_examples(self, question: Question) -> Sequence[WorkedExample]:
        """Three of the question's family, with other seeds."""
        examples = []
        for i in range(3):
            rng = random.Random(f"example-{question.family}-{i}")
            text, task, thought, check, answer = _FAMILIES[question.family](rng)
            checked = f"{check}, so {answer} is right."
            steps = {"sub_task": f"I {task}.", "thinking": f"{thought}.", "double_check": checked}
            examples.append(WorkedExample(f"{text} {ANSWER_FORMAT}", steps, str(answer)))
        return without_question(examples, question)

    def _draw(self, family: str, split: Split | None) -> Iterator[Question]:
        """Yield the distinct questions of a family in a split."""
        seen: set[str] = set()
        for i in range(_DRAWS):
            text, *_, answer = _FAMILIES[family](random.Random(f"{family}-{i}"))
            # Permuted numbers are nearly the same question, so they go to the same split.
            numbers = sorted(map(int, re.findall(r"\d+", text)))
            if text in seen or (split is not None and split_of(f"{family}/{numbers}") != split):
                continue
            seen.add(text)
            prompt = user_prompt(f"{text} {ANSWER_FORMAT}")
            yield Question(f"{family}-{i}", self.name, prompt, str(answer), family=family)


def _letter_question(word: str, letter: str) -> str:
    # Spelled out, because tokens hide their letters from the model.
    return f"How many times does the letter {letter} appear in {' '.join(word)}? {ANSWER_FORMAT}"


class Letters(Task):
    r"""Count a letter in a spelled-out English word of 4 to 8 letters, which small models famously get wrong.

    The golds 1, 2 and 3 come in turn, so that a constant answer earns a third; each word belongs to one split.

    Prompt `letters/boxed-1`: `How many times does the letter e appear in h e d g e? Put the final answer in \boxed{}.`
    Rule: as `arithmetic`; `\boxed{2}` is correct.
    """

    name = "letters"
    prompt_version = "letters/boxed-1"
    answer_form = "number"
    waits = False
    description = "count a letter in a spelled-out word, counts drawn balanced"

    def questions(self, split: Split | None = None, limit: int | None = None) -> list[Question]:
        """`limit` questions (by default as many as the words allow with balanced golds)."""
        usable = [word for word in packaged_text("words.txt").split() if split in (None, split_of(word))]
        by_count = []
        for n in _LETTER_COUNTS:
            pairs = [(word, letter) for word in usable for letter in sorted(set(word)) if word.count(letter) == n]
            random.Random(f"letters-{n}").shuffle(pairs)
            by_count.append(pairs)
        questions = []
        for word, letter in chain.from_iterable(zip(*by_count, strict=False)):
            prompt, gold = user_prompt(_letter_question(word, letter)), str(word.count(letter))
            questions.append(Question(f"{word}-{letter}", self.name, prompt, gold, family="count"))
        return self._first(questions, split, limit)

    def worked_examples(self, question: Question) -> Sequence[WorkedExample]:
        """One of each count; their words are in no split."""
        return shipped_examples("letters", f"{{question}} {ANSWER_FORMAT}")
