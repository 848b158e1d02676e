"""Which training questions are evaluation questions in disguise.

Invariant: a pure function of the texts. Published questions are compared by 13-grams of words, as since GPT-3 (Brown et
al. 2020, appendix C), and as a whole, which is all that a shorter one has; what all questions of a task begin and end
with is its prompt and no part of them. Generated questions share their template's n-grams, so of them only the same
whole text counts; beyond that their generators keep the parameters of splits apart.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from itertools import takewhile

import regex

from cotree.tasks.base import Question
from cotree.tasks.instructions.scripts import WORD

# In whole questions operators count: `7 - 2` is not `7 + 2`. An n-gram has words only, as in the literature; what
# is written without spaces, Chinese and Japanese, has a word a character.
_WORD = regex.compile(rf"{WORD.pattern}|[-+*/^<>=]", regex.V1)
Words = tuple[str, ...]


def contaminated(
    training: Sequence[Question], evaluation: Sequence[Question], n: int = 13, generated: Collection[str] = ()
) -> dict[str, str]:
    """{training id: evaluation id} for each training question that repeats an evaluation question.

    Args:
        n: words in a row that make a repetition; common phrases of a subject make a few, so this errs on the safe side.
        generated: names of tasks whose training questions come from templates; they repeat only as a whole.
    """
    same: dict[Words, str] = {}
    bodies: dict[Words, str] = {}
    grams: dict[int, str] = {}
    for question, words, body in _words(evaluation):
        same.setdefault(words, question.id)
        bodies.setdefault(body, question.id)
        for gram in _grams(body, n):
            grams.setdefault(gram, question.id)
    found = {}
    for question, words, body in _words(training):
        hit = same.get(words)
        if hit is None and question.task not in generated:
            hit = bodies.get(body) or next((grams[gram] for gram in _grams(words, n) if gram in grams), None)
        if hit is not None:
            found[question.id] = hit
    return found


def _words(questions: Sequence[Question]) -> Iterable[tuple[Question, Words, Words]]:
    """Each question with its words, lower case and without punctuation, and those of them that are not the prompt."""
    by_task: dict[str, list[tuple[Question, Words]]] = {}
    for question in questions:
        said = " ".join(message["content"] for message in question.messages if message["role"] == "user")
        by_task.setdefault(question.task, []).append((question, tuple(_WORD.findall(said.casefold()))))
    for asked in by_task.values():
        texts = {words for _, words in asked}
        # Of one text alone nobody knows which part is the prompt.
        start = _shared(texts) if len(texts) > 1 else 0
        end = _shared({words[start:][::-1] for words in texts}) if len(texts) > 1 else 0
        yield from ((question, words, words[start : len(words) - end]) for question, words in asked)


def _shared(texts: Collection[Words]) -> int:
    """How many words all texts begin with."""
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*texts, strict=False)))


def _grams(words: Words, n: int) -> Iterable[int]:
    words = tuple(word for word in words if word not in "-+*/^<>=")
    # Hashes, because a tuple for each position of 10,000 questions would take gigabytes.
    return (hash(words[start : start + n]) for start in range(len(words) - n + 1))
