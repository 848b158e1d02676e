r"""Whether an answer equals the gold one, as a number or as mathematics.

People and models write numbers in many ways: `\$1,204.`, `1204.0`, `1204 apples` and `\frac{2408}{2}` are all 1204. A
text that is one plain number is read here, in 10 µs; anything more, such as `2\pi`, is left to math-verify, which takes
10 ms (`math_worker`). A test holds that the library agrees with what is decided without it.

Invariant: a comparison takes at most `math_worker.LIMIT_SECONDS` and never fails the run, whatever the answer is. One
that was stopped counts as wrong, with a detail that says so: there was an answer, and nobody would accept it.
"""

from __future__ import annotations

import re
from fractions import Fraction
from functools import lru_cache

from cotree.tasks.math_worker import LIMIT_BYTES, LIMIT_SECONDS, compare

# Spacing, sizing and currency signs; a space between two letters or digits is kept, since it may mean a product.
_FORMATTING = re.compile(
    r"\\(?:left|right)(?![A-Za-z])|(?<=\\)[dt](?=frac)|(?<![0-9A-Za-z])\s+|\s+(?![0-9A-Za-z])"
    r"|(?<=[0-9])\\,(?=[0-9]{3}(?![0-9]))|\\?[$]|[€£¥₹]"
)
# `18 eggs`: math-verify knows few units, and takes the letters of others for variables.
_UNIT = re.compile(r"(\S*[0-9]) (?!(?:hundred|thousand|[a-z]+illion|dozen)\b)[A-Za-z]{3,}(?: [A-Za-z]{2,})*")
# `18 cm`: where a number is asked for it is no product of variables.
_SHORT_UNIT = re.compile(r"(?<=[0-9]) [A-Za-z]{1,2}$")
# Digits of other scripts, such as Devanagari or full-width ones.
_FOREIGN_DIGIT = re.compile(r"(?![0-9])\d")
_FRACTION = re.compile(r"^([+-]?)\\frac\{([0-9]+)\}\{([0-9]+)\}$")
# At most 40 digits: every gold has fewer, and Python's conversion stays fast.
_DIGITS = "[0-9]{1,40}"
_PLAIN = re.compile(
    rf"[+-]?(?:(?:{_DIGITS}|[0-9]{{1,3}}(?:,[0-9]{{3}}){{1,12}})(?:\.{_DIGITS})?|{_DIGITS}/(?=0*[1-9]){_DIGITS})"
)
_NUMBER_WITH_BASE = re.compile(r"([0-9A-F]+)_\{?([0-9]+)\}?")
# Golds have up to a hundred characters; what is longer than this comes from a loop.
_MAX_CHARACTERS = 1000


@lru_cache(1 << 14)
def check_math_answer(gold: str, answer: str) -> tuple[bool, str]:
    """Whether an answer equals the gold one, and why it was not compared ("" if it was).

    Raises:
        CotreeError: no worker can be started.
    """
    gold, answer = normalize_answer(gold), normalize_answer(answer)
    if answer == gold:
        return True, ""
    numbers = parse_number(gold), parse_number(answer)
    # Different decimals are left to the library, to which they are equal if they agree in six places.
    if None not in numbers and (numbers[0] == numbers[1] or "." not in gold + answer):
        return numbers[0] == numbers[1], ""
    if len(answer) > _MAX_CHARACTERS:
        return False, f"not checked: longer than {_MAX_CHARACTERS} characters"
    based = _NUMBER_WITH_BASE.fullmatch(gold), _NUMBER_WITH_BASE.fullmatch(answer)
    if based[0] and based[1]:
        # The library drops the base.
        return based[0].groups() == based[1].groups(), ""
    equal = compare(gold, answer)
    if equal is None:
        return False, f"not checked: stopped at {LIMIT_SECONDS:.0f} s or {LIMIT_BYTES >> 30} GiB"
    return equal, ""


def same_number(left: str, right: str) -> bool:
    """Whether two answers are the same number, or the same text once both are normalized."""
    left, right = (_SHORT_UNIT.sub("", normalize_answer(text)) for text in (left, right))
    return left == right or (parse_number(left) is not None and parse_number(left) == parse_number(right))


def normalize_answer(text: str) -> str:
    """An answer in ASCII digits, without dollar signs, spacing, a unit, or a dot at its end."""
    text = _FOREIGN_DIGIT.sub(lambda digit: str(int(digit[0])), text.strip())
    text = _FORMATTING.sub("", text).removesuffix(".")
    unit = _UNIT.fullmatch(text)
    return unit[1] if unit else text


def parse_number(text: str) -> Fraction | None:
    """The value of a normalized text that is one plain number (decimal or fraction), else None."""
    plain = _FRACTION.sub(r"\1\2/\3", text)
    return Fraction(plain.replace(",", "")) if _PLAIN.fullmatch(plain) else None
