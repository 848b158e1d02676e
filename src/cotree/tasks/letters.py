r"""`letters`: how often a letter stands in a word, the question that small models famously get wrong.

Invariant: the gold counts 1, 2 and 3 are drawn in equal parts, so a constant answer earns a third and no more; a word
belongs to one split. The word is spelled out, because a token hides its letters from the model.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from importlib.resources import files
from itertools import chain

from cotree.tasks.arithmetic import ANSWER_FORMAT
from cotree.tasks.base import Question, Split, Task, WorkedExample, split_of

_COUNTS = (1, 2, 3)


def _question(word: str, letter: str) -> str:
    return f"How many times does the letter {letter} appear in {' '.join(word)}?"


def _example(word: str, letter: str) -> WorkedExample:
    n = word.count(letter)
    return WorkedExample(
        f"{_question(word, letter)} {ANSWER_FORMAT}",
        {
            "sub_task": f"I number each {letter} that I find.",
            "thinking": ", ".join(f"{i + 1} {letter}" for i in range(n)) + ".",
            "double_check": f"The other letters are not {letter}, so {n} is right.",
        },
        str(n),
    )


class Letters(Task):
    r"""Count a letter in an English word of 4 to 8 letters; golds 1, 2, 3 in turn.

    Prompt `letters/boxed-1`: `How many times does the letter e appear in h e d g e? Put the final answer in \boxed{}.`
    Rule: as `arithmetic`; `\boxed{2}` is correct.
    """

    name = "letters"
    prompt_version = "letters/boxed-1"
    answer_form = "number"
    description = "count a letter in a spelled-out word, counts drawn balanced"

    def questions(self, split: Split | None = None, limit: int | None = None) -> list[Question]:
        """`limit` questions (all by default: as many as the words give with balanced golds)."""
        words = files("cotree.tasks").joinpath("words.txt").read_text(encoding="utf-8").split()
        usable = [word for word in words if split in (None, split_of(word))]
        pools = []
        for n in _COUNTS:
            pools.append([(w, letter) for w in usable for letter in sorted(set(w)) if w.count(letter) == n])
            random.Random(f"letters-{n}").shuffle(pools[-1])
        asked = []
        for word, letter in chain.from_iterable(zip(*pools, strict=False)):
            message = {"role": "user", "content": f"{_question(word, letter)} {ANSWER_FORMAT}"}
            asked.append(Question(f"{word}-{letter}", self.name, (message,), str(word.count(letter)), "count"))
        return self._first(asked, split, limit)

    def worked_examples(self, question: Question) -> Sequence[WorkedExample]:
        """One of each count; the words are in no split."""
        return _example("pineapple", "p"), _example("garden", "r"), _example("kitten", "t")
