r"""Verify mathematical answers: compare an answer with the gold, as numbers or with math-verify.

Single numbers are compared here, exactly and in about 10 µs (`math_text`); anything else, such as `2\pi`, goes to
math-verify, which takes 10 ms (`math_worker`).

Invariant: CPU time and memory of a comparison are bounded, and no answer can fail the run. A comparison stopped at a
limit is retried once, not cached, and undecided.
"""

from __future__ import annotations

import re
from functools import lru_cache

from cotree.tasks.math_text import differ_in_words, normalize_answer, parse_number, same_words
from cotree.tasks.math_worker import CPU_SECONDS, LIMIT_BYTES, compare

_NUMBER_WITH_BASE = re.compile(r"([0-9A-F]+)_\{?([0-9]+)\}?")
# A decimal comma, as in `2,75`, if the gold is a decimal fraction; with three places it is a thousands separator.
_DECIMAL_COMMA = re.compile(r"-?(?:0,[0-9]+|[0-9]+,(?:[0-9]{1,2}|[0-9]{4,}))")
# Malformed digit groups such as `12'34'5`; well-formed ones were parsed before.
_TORN_GROUPS = re.compile(r"-?[0-9]+(?:'[0-9]+)+")
# Golds have up to a hundred characters; longer answers come from loops.
_MAX_CHARACTERS = 1000
# Golds that are placeholders and cannot be compared: a word for none, or an object.
_NO_GOLD = re.compile(
    r"(?:\\text\{)?"
    r"(?:|pro(?:of|ve)\b.*|n/?a|none|null|nan|not applicable|no answer|see (?:the )?solution.*|[?.…—–-]+)\}?"
    r"|[\[{]\s*(?:['\"}\]]|object\b).*",
    re.IGNORECASE | re.DOTALL,
)
_STOPPED = f"not checked: stopped at {CPU_SECONDS:.0f} s of CPU time or {LIMIT_BYTES >> 30} GiB"


class _StoppedError(Exception):
    """A comparison was stopped at a limit; raised so that the cache does not store it."""


def gold_problem(gold: str) -> str:
    """Why a gold answer cannot be compared with; "" if it can."""
    gold = gold.strip()
    return f"the gold answer {gold[:40]!r} cannot be compared with" if _NO_GOLD.fullmatch(gold) else ""


def check_math_answer(gold: str, answer: str) -> tuple[bool | None, str]:
    """Whether an answer equals the gold (None: undecided), and the reason if it could not be compared, else "".

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
    """As `check_math_answer`, cached; raises for a stopped comparison, so that it is not cached."""
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
