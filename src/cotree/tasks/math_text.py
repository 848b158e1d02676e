r"""Normalize mathematical answers: `\$1,204.`, `1\,204.0`, `1204 apples` and `\frac{2408}{2}` are all 1204.

`normalize_answer` converts an answer to plain LaTeX with ASCII digits. `parse_number` parses single numbers; anything
else, such as `2\pi`, is left to math-verify.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from cotree.tasks.loading import packaged_yaml

_SYMBOLS = str.maketrans(packaged_yaml("math_symbols.yaml"))
# Unicode fractions, powers and indices: `⅝`, `10⁻⁷`, `x₁`.
_FRACTION_SIGN = re.compile("[¼-¾⅐-⅞]")
_RAISED = re.compile("(?P<power>[⁰¹²³⁴-⁹⁺⁻ⁿ]+)|(?P<index>[₀-₉]+)")
# Digits of other scripts, such as Devanagari.
_FOREIGN_DIGIT = re.compile(r"(?![0-9])\d")
# LaTeX spaces become spaces, negative ones nothing; the second half of `\\` starts no command.
_SPACING = re.compile(r"(\\\\)|\\!\s*|\\(?:[ ,;:>]|q?quad|thinspace|enspace|hspace\*?\{[^{}]*\})|~")
# Sizes, colours and weights.
_LOOKS = re.compile(
    r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|textstyle|limits)(?![A-Za-z])|(?<=\\)[dtc](?=frac)"
    r"|\\(?:text)?color\s*\{[^{}]*\}|\\(?:boldsymbol|mathbf|bm|underline)(?=\s*\{)"
)
# Words that multiply the number before them: `12 million`, `3 halves`; but `3 third graders` are three.
_NAMES = "third quarter fourth fifth sixth seventh eighth ninth tenth"
_PARTS = dict(zip(_NAMES.split(), (3, 4, *range(4, 11)), strict=True))
_SCALES: dict[str, Fraction | int] = {
    **{"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12},
    **dict.fromkeys(("half", "halves"), Fraction(1, 2)),
    **{part + end: Fraction(1, low) for part, low in _PARTS.items() for end in ("", "s")},
}
SCALE = "|".join(rf"{scale}(?![ ][A-Za-z])" if scale in _PARTS else scale for scale in _SCALES)
# Words that are not units: they change the number's value, or say that there are several.
_CHANGES_VALUE = (
    rf"(?<![\\A-Za-z])(?:(?<![A-Za-z][ ])(?:squared|cubed|factorial|pi|{SCALE})"
    r"|(?<!rounded )to(?! the nearest)|plus|minus|times (?:an?|one|two|three|four|five|six|seven|eight|nine|ten)"
    r"|or|and|than|not|if|when|unless|choose)(?![A-Za-z])"
)
_WORD = r"\\(?:text(?:rm|bf|it)?|mbox)\{\s*+,?\s*+"
_FUNCTION = r"(?:ln|log|exp|(?:arc)?(?:sin|cos|tan)|sec|csc|cot|max|min|gcd)"
_SPELLINGS = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"\\(le|ge)(?:qslant|q)(?![A-Za-z])", r"\\\1 "),
        (r"\\neq(?![A-Za-z])", r"\\ne "),
        (r"\\varnothing", r"\\emptyset "),
        (r"√(\[\d\])?\s*(\d+|[A-Za-z])", r"\\sqrt\1{\2}"),
        (r"(?:√(\[\d\])?\s*|(?<![A-Za-z\\])sqrt)\(([^()]*)\)", r"\\sqrt\1{\2}"),
        # sympy treats a power with a decimal fraction as a rounded number.
        (r"\^(?:\{(-?\d*)\.(\d)\}|(\d*)\.(\d)(?!\d))", r"^{\\frac{\1\2\3\4}{10}}"),
        (r"\^\{(-?\d*)\.(\d\d)\}", r"^{\\frac{\1\2}{100}}"),
        (rf"{_WORD}pi\s*\}}", " pi"),
        (r"(?<![A-Za-z\\])(pi|infty)(?![A-Za-z])", r"\\\1 "),
        (r"(?<![A-Za-z\\])(?:infinity|inf)(?![A-Za-z])", r"\\infty "),
        # Roman constants are the constants, and i(2-i) is a product.
        (r"\\(?:mathrm|text|rm|operatorname)\s*(?:\{\s*([ei])\s*\}|([ei])(?![A-Za-z]))", r"\1\2"),
        (rf"\\(?:mathrm|text|operatorname)\s*\{{\s*({_FUNCTION})\s*\}}", r"\\\1 "),
        (r"\\log_(?:e|\{e\})", r"\\ln "),
        (r"(?<![A-Za-z\\])i\(", r"i\\cdot("),
        (r"(?<=\d)\s*x\s*(?=10\^)", r"\\times "),
        (rf"(?<=[0-9])\s*(?:{_WORD})?\band a half\b\s*\}}?", r"\\frac{{1}}{{2}}"),
        (rf"{_WORD}or\s*\}}|(?<=[\s\d}})])\bor\b(?=[\s\d\\({{A-Za-z])(?!\s*[A-Za-z]{{2}})", r"\\lor "),
        (rf",?\s*{_WORD}and\s*\}}|(?<=[\s\d}})]),?\s*\band\b(?=\s)(?!\s*[A-Za-z]{{2}})", r", "),
        (rf"^\s*{_WORD}([^{{}}]*[0-9][^{{}}]*)\}}\s*$", r"\1"),
        (r"(?i)^\s*(?:\\text\{[^{}0-9]*\b(?:answer|result)s?\b[^{}0-9]*\}|(?:the )?(?:final )?answer(?: is|:))", ""),
        (r"(\^\{?\\circ\s*\}?)\s*(?:[CF]|\\(?:text|mathrm)\{\s*[CF]\s*\})(?=[\s.]*$)", r"\1"),
        (r"(?<=[0-9\s{}])(?:percentage|pct)\b", "percent"),
        (rf"{_WORD}((?:{SCALE}|[a-z]+illion|percent)\b[^{{}}]*)\}}", r" \1"),
        (r"\{,\}", ","),
        (r"^\(([0-9A-F]+)\)_", r"\1_"),
        (r"(?<!\\)\\[()]|\\?\$|[€£¥₹]", ""),
    ]
]
# A space is kept only between two letters or digits, where it may mean a product, and in `100, 200`: two numbers.
_NEEDLESS_SPACE = re.compile(
    r"(?<![0-9A-Za-z])\s+(?!(?<=[0-9],\s)[0-9]{3}(?![0-9]))|\s+(?![0-9A-Za-z])",
)
# `18 eggs`: math-verify knows few units, and takes the letters of others for variables.
_UNIT_WORDS = re.compile(
    rf"(\S*[0-9]) (?!(?:{SCALE}|[a-z]+illion|percent)\b|.*{_CHANGES_VALUE})[A-Za-z]{{3,}}(?:[ /][A-Za-z]{{2,}})*"
)
_UNIT = r"(?:[mcdk]?m|[mk]?g|[md]?[lL]|in|ft|yd|mi|[mk]ph|s|sec|min|h|hrs?|lbs?|oz|k?(?:N|J|W|Pa|V|Hz)|mol|K|rpm|k?Ω)"
_UNIT_POWER = rf"{_UNIT}(?:\^\{{?[0-9]\}}?)?"
# A bare unit needs a space before it, else `2m` may be a product; before that a number, possibly with roots.
_UNITS_AT_END = re.compile(
    rf"(?:(?<=[0-9A-Za-z}}]) {_UNIT_POWER}"
    rf"|(?<=[0-9A-Za-z}}]) ?\\(?:text|mathrm|textrm|mbox)\{{(?![^{{}}]*{_CHANGES_VALUE})[^{{}}]*\}}"
    r"(?:\^\{?[0-9]\}?)?)"
    rf"(?:/{_UNIT_POWER})?$"
)
# Text that makes an answer more than one number with a unit: such a word, or a second number after words.
_MORE_THAN_A_NUMBER = re.compile(rf"{_CHANGES_VALUE}|[0-9}}]\\(?:text|mathrm|textrm|mbox)\{{[^{{}}]*\}}[ (]*[0-9]")
# The characters and commands of a number with roots, fractions and pi.
_CONSTANT = re.compile(r"\\(?:sqrt|frac|pi|cdot|times)(?![A-Za-z])|[0-9{}()^+*/., -]")

_WRAPPERS = re.compile(r"\\(?:text|textbf|textit|mathrm|mbox)(?![A-Za-z])|[\s{}]")
# A choice, alone or with its text: `(B) 12`.
_CHOICE = re.compile(r"(?:(?i:option|choice|answer):?)?\(?([A-Z])[.):]?")
_CHOICE_AND_TEXT = re.compile(r"(?:\(([A-Z])\)|([A-Z])[.):])(?!.*\([A-Z]\))[^,;&].*", re.DOTALL)
_WORDS_ONLY = re.compile(r"(?:[^\W\d_]{2,}[\d.,;:'-]*)+")

_PLAIN = re.compile("[0-9]+")
# A decimal fraction with at least this many places counts as an approximation.
_APPROXIMATE_PLACES = 3
_NUMBER = re.compile(
    rf"(?:.*\\approx)?\s*(?P<sign>[+-]?)(?P<unsigned>.*?)(?: ?(?P<scale>{SCALE})(?: [A-Za-z ]+)?)?"
    r"(?P<percent> ?(?:\\?%|\\?percent|\\text\{ ?percent\}))?",
    re.DOTALL,
)
# Every gold has fewer than 40 digits, and Python's conversion stays fast.
_DIGITS = "[0-9]{1,40}"
_DECIMAL = rf"(?:{_DIGITS}|[1-9][0-9]{{0,2}}(?:[,' _][0-9]{{3}}){{1,12}})?(?:\.(?:{_DIGITS})?)?"
_FRACTION = rf"\\frac ?(?:\{{(-?{_DIGITS})\}}|([0-9])) ?(?:\{{({_DIGITS})\}}|([0-9]))"
_TEN_TO = r"10\^(?:\{(-?[0-9]{1,3})\}|([0-9]))"


@dataclass(frozen=True, slots=True)
class Number:
    r"""One number. value: as written, of `25\%` it is 25. places: digits after its decimal point, if that is the form.

    approximate: it says so (`\approx`), or is a decimal fraction of three places or more.
    """

    value: Fraction
    percent: bool
    places: int
    approximate: bool

    def accepts(self, answer: Number) -> bool:
        r"""Whether an answer equals this gold number.

        Exact numbers compare exactly; to an approximation the answer must round. `25\%` is 25 and 0.25, but an integer
        above 1 is no hundredth of a percentage: 10 is not `1000\%`.
        """
        golds, answers = {self.value}, {answer.value}
        if self.percent and not answer.percent:
            golds.add(self.value / 100)
        if answer.percent and not self.percent and (self.value <= 1 or self.value.denominator > 1):
            answers.add(answer.value / 100)
        within = Fraction(1, 2 * 10**self.places) if self.approximate else 0
        return any(abs(one - other) <= within for one in golds for other in answers)


def normalize_answer(text: str) -> str:
    """Convert an answer to plain LaTeX with ASCII digits, without currency, sizing, extra spaces, unit or final dot."""
    if _PLAIN.fullmatch(text):  # most answers need no change
        return text
    text = _FRACTION_SIGN.sub(_latex_fraction, _RAISED.sub(_latex_raised, text))
    text = unicodedata.normalize("NFKC", text).translate(_SYMBOLS)
    text = _FOREIGN_DIGIT.sub(lambda digit: str(int(digit[0])), text)
    text = _SPACING.sub(lambda space: space[1] or ("" if space[0].startswith(r"\!") else " "), text)
    text = re.sub(r"\s+", " ", _LOOKS.sub("", text))  # first, since patterns with spaces on both sides are not linear
    for pattern, replacement in _SPELLINGS:
        text = pattern.sub(replacement, text)
    text = text.strip()
    while text.endswith((".", r"\\", " ")):
        text = text.removesuffix(r"\\").rstrip(". ")
    text = re.sub(r"\s+", " ", text)
    unit = _UNITS_AT_END.search(text)
    if unit and not _CONSTANT.sub("", text[: unit.start()]):
        text = text[: unit.start()]
    text = _NEEDLESS_SPACE.sub("", text)
    words = _UNIT_WORDS.fullmatch(text)
    return words[1] if words else text


def parse_number(text: str) -> Number | None:
    """Parse a normalized text that is a single number, else None."""
    parts = _NUMBER.fullmatch(text)
    if parts is None or not any(sign.isdigit() for sign in parts["unsigned"][:60]):
        return None
    for form, value_of in _FORMS:
        if found := form.fullmatch(parts["unsigned"]):
            try:
                value = value_of(*found.groups()) * _SCALES.get(parts["scale"], 1)
            except ZeroDivisionError:
                return None
            places = len(parts["unsigned"].partition(".")[2]) if value_of is _decimal else 0
            approximate = r"\approx" in text or places >= _APPROXIMATE_PLACES
            return Number(-value if parts["sign"] == "-" else value, parts["percent"] is not None, places, approximate)
    return None


def same_number(left: str, right: str) -> bool:
    """Whether two answers are the same number, or the same text once both are normalized."""
    if left == right:
        return True
    if _PLAIN.fullmatch(left) and _PLAIN.fullmatch(right):
        return left.lstrip("0") == right.lstrip("0")
    left, right = normalize_answer(left), normalize_answer(right)
    gold, answer = parse_number(left), parse_number(right)
    return left == right or (gold is not None and answer is not None and gold.accepts(answer))


def differ_in_words(left: str, right: str) -> bool:
    r"""Whether words change the value of exactly one of two normalized answers, as in `5 or more` or
    `5\text{ feet }3`."""
    return bool(_MORE_THAN_A_NUMBER.search(left)) != bool(_MORE_THAN_A_NUMBER.search(right))


def same_words(left: str, right: str) -> bool:
    r"""Whether two normalized answers are the same choice, `A)` and `(A)`, or the same words, `\text{June 20}` and
    `June 20`."""
    left, right = (_WRAPPERS.sub("", text) for text in (left, right))
    choices = _CHOICE.fullmatch(left), _CHOICE.fullmatch(right)
    texts = _CHOICE_AND_TEXT.fullmatch(left), _CHOICE_AND_TEXT.fullmatch(right)
    for one, other in (choices, (choices[0], texts[1]), (texts[0], choices[1])):
        if one and other:
            return one[one.lastindex or 0] == other[other.lastindex or 0]
    return left.casefold() == right.casefold() and _WORDS_ONLY.fullmatch(left) is not None


def _latex_fraction(sign: re.Match[str]) -> str:
    top, _, low = unicodedata.normalize("NFKC", sign[0]).partition("\u2044")
    return rf"\frac{{{top}}}{{{low}}}"


def _latex_raised(run: re.Match[str]) -> str:
    return ("^" if run["power"] else "_") + "{" + unicodedata.normalize("NFKC", run[0]) + "}"


def _decimal(text: str) -> Fraction:
    return Fraction(re.sub("[,' _]", "", text).removesuffix(".") or "0")


def _mixed(whole: str | None, *digits: str | None) -> Fraction:
    r"""The value of `4 4/9`, `1\frac{1}{2}` or `\frac12`; one group of each pair has matched."""
    top, low = (int(each) for each in digits if each is not None)
    return int(whole or 0) + Fraction(top, low)


def _scientific(decimal: str | None, *powers: str | None) -> Fraction:
    r"""The value of `3e8`, `3\times10^8` or `10^{-7}`."""
    power = next(int(each) for each in powers if each is not None)
    return _decimal(decimal or "1") * Fraction(10) ** power


def _repeating(whole: str, fixed: str, *digits: str | None) -> Fraction:
    r"""The value of `33.\overline{3}` or `33.(3)`."""
    again = next(each for each in digits if each)
    return _decimal(f"{whole}.{fixed}0") + Fraction(int(again), 10 ** len(fixed) * (10 ** len(again) - 1))


# (pattern of an unsigned number, function from its groups to the value)
_FORMS: list[tuple[re.Pattern[str], Callable[..., Fraction]]] = [
    (re.compile(rf"({_DECIMAL})"), _decimal),
    (re.compile(rf"({_DECIMAL})/({_DIGITS})"), lambda top, low: _decimal(top) / int(low)),
    (re.compile(rf"({_DIGITS}) ({_DIGITS})/({_DIGITS})"), _mixed),
    (re.compile(rf"({_DIGITS})? ?{_FRACTION}"), _mixed),
    (re.compile(rf"({_DECIMAL})[eE]([+-]?[0-9]{{1,3}})"), _scientific),
    (re.compile(rf"(?:({_DECIMAL})(?: ?\\times ?| ?\\cdot ?|\*))?{_TEN_TO}"), _scientific),
    (
        re.compile(r"([0-9]{0,20})\.([0-9]{0,20})(?:\\(?:overline|bar|dot) ?\{?([0-9]{1,20})\}?|\(([0-9]{1,20})\))"),
        _repeating,
    ),
]
