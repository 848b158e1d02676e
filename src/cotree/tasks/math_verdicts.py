r"""Whether an answer equals the gold one, as a number or as mathematics.

A text that is one number is compared here, exactly and in some 10 µs (`math_text`); anything more, such as `2\pi`, is
left to math-verify, which takes 10 ms (`math_worker`).

Invariant: a comparison is bounded in CPU time and memory and never fails the run, whatever the answer is. One that was
stopped is tried once more and never remembered, and is undecided.
"""

from __future__ import annotations

import re
from functools import lru_cache

from cotree.tasks.math_text import differ_in_words, normalize_answer, parse_number, same_words
from cotree.tasks.math_worker import CPU_SECONDS, LIMIT_BYTES, compare

_NUMBER_WITH_BASE = re.compile(r"([0-9A-F]+)_\{?([0-9]+)\}?")
# `2,75` where the gold is a decimal fraction; with three places it is 2750 and no such number.
_DECIMAL_COMMA = re.compile(r"-?(?:0,[0-9]+|[0-9]+,(?:[0-9]{1,2}|[0-9]{4,}))")
# `12'34'5` is no number; well-formed groups were read before.
_TORN_GROUPS = re.compile(r"-?[0-9]+(?:'[0-9]+)+")
# Golds have up to a hundred characters; what is longer than this comes from a loop.
_MAX_CHARACTERS = 1000
# What stands in the place of an answer that nobody can compare with: a word for none, or an object.
_NO_GOLD = re.compile(
    r"(?:\\text\{)?"
    r"(?:|pro(?:of|ve)\b.*|n/?a|none|null|nan|not applicable|no answer|see (?:the )?solution.*|[?.…—–-]+)\}?"
    r"|[\[{]\s*(?:['\"}\]]|object\b).*",
    re.IGNORECASE | re.DOTALL,
)
_STOPPED = f"not checked: stopped at {CPU_SECONDS:.0f} s of CPU time or {LIMIT_BYTES >> 30} GiB"


class _StoppedError(Exception):
    """A comparison that was stopped at a limit: an exception, because a cache keeps none."""


def gold_problem(gold: str) -> str:
    """Why no answer can be compared with a gold one; "" if it can."""
    gold = gold.strip()
    return f"the gold answer {gold[:40]!r} cannot be compared with" if _NO_GOLD.fullmatch(gold) else ""


def check_math_answer(gold: str, answer: str) -> tuple[bool | None, str]:
    """Whether an answer equals the gold one (None: not known), and why it was not compared ("" if it was).

    Raises:
        CotreeError: no worker can be started.
    """
    if problem := gold_problem(gold):
        return None, problem
    try:
        return compare_cached(gold, answer)
    except _StoppedError:
        return None, _STOPPED


@lru_cache(1 << 14)
def compare_cached(gold: str, answer: str) -> tuple[bool, str]:
    """As `check_math_answer`, but a comparison that was stopped raises, so that it is not kept."""
    gold, answer = normalize_answer(gold), normalize_answer(answer)
    if answer.replace(", ", ",") == gold.replace(", ", ",") or same_words(gold, answer):
        return True, ""
    numbers = parse_number(gold), parse_number(answer)
    if numbers[0] is not None and numbers[0].places and _DECIMAL_COMMA.fullmatch(answer):
        numbers = numbers[0], parse_number(answer.replace(",", "."))
    if numbers[0] is not None and numbers[1] is not None:
        return numbers[0].accepts(numbers[1]), ""
    if _TORN_GROUPS.fullmatch(answer) or differ_in_words(gold, answer):
        return False, ""
    if len(answer) > _MAX_CHARACTERS:
        return False, f"not checked: longer than {_MAX_CHARACTERS} characters"
    based = _NUMBER_WITH_BASE.fullmatch(gold), _NUMBER_WITH_BASE.fullmatch(answer)
    if based[0] and based[1]:
        # The library drops the base.
        return based[0].groups() == based[1].groups(), ""
    equal = compare(gold, answer)
    if equal is None:
        equal = compare(gold, answer)
    if equal is None:
        raise _StoppedError
    return equal, ""
