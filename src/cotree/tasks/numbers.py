r"""Numbers as people and models write them: `\$1,204.`, `1204.0`, `1204 apples` and `\frac{2408}{2}` are the same one.

Invariant: a text that is no single plain number is nobody's number; whoever needs more asks math-verify.
"""

from __future__ import annotations

import re
from fractions import Fraction

# What changes the look and not the meaning; a space between two letters or digits may be a product.
_LOOKS = re.compile(
    r"\\(?:left|right)(?![A-Za-z])|(?<=\\)[dt](?=frac)|(?<![0-9A-Za-z])\s+|\s+(?![0-9A-Za-z])"
    r"|(?<=[0-9])\\,(?=[0-9]{3}(?![0-9]))|\\?[$]|[€£¥₹]"
)
# `18 eggs`: math-verify knows few units, and takes the letters of others for variables.
_UNIT = re.compile(r"(\S*[0-9]) (?!(?:hundred|thousand|[a-z]+illion|dozen)\b)[A-Za-z]{3,}(?: [A-Za-z]{2,})*")
# `18 cm` is no product where a number is asked for.
_SHORT_UNIT = re.compile(r"(?<=[0-9]) [A-Za-z]{1,2}$")
# Digits of other scripts: Devanagari's, full-width ones.
_DIGIT = re.compile(r"(?![0-9])\d")
_FRACTION = re.compile(r"^([+-]?)\\frac\{([0-9]+)\}\{([0-9]+)\}$")
# Long enough for every gold, short enough for Python.
_DIGITS = "[0-9]{1,40}"
_PLAIN = re.compile(
    rf"[+-]?(?:(?:{_DIGITS}|[0-9]{{1,3}}(?:,[0-9]{{3}}){{1,12}})(?:\.{_DIGITS})?|{_DIGITS}/(?=0*[1-9]){_DIGITS})"
)


def tidy(text: str) -> str:
    """ASCII digits, no dollars, no dot or unit at the end, nothing that only changes the look."""
    text = _DIGIT.sub(lambda digit: str(int(digit[0])), text.strip())
    text = _LOOKS.sub("", text).removesuffix(".")
    unit = _UNIT.fullmatch(text)
    return unit[1] if unit else text


def number(text: str) -> Fraction | None:
    """The number that a tidy text is, None where it is more or something else."""
    plain = _FRACTION.sub(r"\1\2/\3", text)
    return Fraction(plain.replace(",", "")) if _PLAIN.fullmatch(plain) else None


def same_number(left: str, right: str) -> bool:
    """Whether two texts are the same number, or say the same."""
    left, right = (_SHORT_UNIT.sub("", tidy(text)) for text in (left, right))
    return left == right or (number(left) is not None and number(left) == number(right))
