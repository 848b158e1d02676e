r"""Numbers as people and models write them: `\$1,204.`, `1204.0`, `1204 apples` and `\frac{2408}{2}` are all 1204.

Only a text that is one plain number is read here; anything more, such as `2\pi`, is left to math-verify.
"""

from __future__ import annotations

import re
from fractions import Fraction

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


def normalize(text: str) -> str:
    """An answer in ASCII digits, without dollar signs, spacing, a unit, or a dot at its end."""
    text = _FOREIGN_DIGIT.sub(lambda digit: str(int(digit[0])), text.strip())
    text = _FORMATTING.sub("", text).removesuffix(".")
    unit = _UNIT.fullmatch(text)
    return unit[1] if unit else text


def parse_number(text: str) -> Fraction | None:
    """The value of a normalized text that is one plain number (decimal or fraction), else None."""
    plain = _FRACTION.sub(r"\1\2/\3", text)
    return Fraction(plain.replace(",", "")) if _PLAIN.fullmatch(plain) else None


def same_number(left: str, right: str) -> bool:
    """Whether two answers are the same number, or the same text once both are normalized."""
    left, right = (_SHORT_UNIT.sub("", normalize(text)) for text in (left, right))
    return left == right or (parse_number(left) is not None and parse_number(left) == parse_number(right))
