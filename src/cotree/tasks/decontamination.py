"""Find training questions that overlap with evaluation questions (contamination).

Published questions are compared by 13-grams of words, as in GPT-3 (Brown et al. 2020, appendix C), and as a whole,
which also finds shorter ones. The common start and end of all questions of a task, its prompt, is ignored. Generated
questions share n-grams of their template, so they are compared only as a whole; their splits have disjoint parameters.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from itertools import takewhile

import regex

from cotree.tasks.base import Question
from cotree.tasks.instructions.languages import WORD

# Whole questions include operators: `7 - 2` is not `7 + 2`. N-grams have words only, as in the literature; in Chinese
# and Japanese each character is a word.
_OPERATORS = "-+*/^<>="
_WORD = regex.compile(rf"{WORD.pattern}|[{_OPERATORS}]", regex.V1)
Words = tuple[str, ...]


def contaminated(
    training: Sequence[Question], evaluation: Sequence[Question], n: int = 13, generated: Collection[str] = ()
) -> dict[str, str]:
    """{training id: evaluation id} of training questions that overlap with an evaluation question.

    Args:
        training: the questions to check.
        evaluation: the questions that must not be trained on.
        n: length of a common n-gram of words. Common phrases of a subject give a few false positives.
        generated: names of tasks with template questions, which are compared only as a whole.
    """
    by_words: dict[Words, str] = {}
    by_body: dict[Words, str] = {}
    by_gram: dict[int, str] = {}
    for question, words, body in _split_words(evaluation):
        by_words.setdefault(words, question.id)
        by_body.setdefault(body, question.id)
        for gram in _ngrams(body, n):
            by_gram.setdefault(gram, question.id)
    found = {}
    for question, words, body in _split_words(training):
        repeated = by_words.get(words)
        if repeated is None and question.task not in generated:
            repeated = by_body.get(body) or next((by_gram[gram] for gram in _ngrams(words, n) if gram in by_gram), None)
        if repeated is not None:
            found[question.id] = repeated
    return found


def _split_words(questions: Sequence[Question]) -> Iterable[tuple[Question, Words, Words]]:
    """Yield each question with its words (lower case, no punctuation), and the same without its task's prompt."""
    by_task: dict[str, list[tuple[Question, Words]]] = {}
    for question in questions:
        text = " ".join(message["content"] for message in question.messages if message["role"] == "user")
        by_task.setdefault(question.task, []).append((question, tuple(_WORD.findall(text.casefold()))))
    for asked in by_task.values():
        texts = {words for _, words in asked}
        # A single text does not show which part is the prompt.
        start = _common_start(texts) if len(texts) > 1 else 0
        end = _common_start({words[start:][::-1] for words in texts}) if len(texts) > 1 else 0
        yield from ((question, words, words[start : len(words) - end]) for question, words in asked)


def _common_start(texts: Collection[Words]) -> int:
    """The length in words of the texts' common prefix."""
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*texts, strict=False)))


def _ngrams(words: Words, n: int) -> Iterable[int]:
    """The hashes of all n-grams of words, without operators."""
    words = tuple(word for word in words if word not in _OPERATORS)
    # Hashes, because a tuple for each position of 10,000 questions would take gigabytes.
    return (hash(words[start : start + n]) for start in range(len(words) - n + 1))
