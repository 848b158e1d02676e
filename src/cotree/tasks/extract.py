r"""Find the final answer in a completion, before anything judges it.

Invariants: `strict` accepts closed forms only (a balanced `\boxed{}`, `#### x`, "the answer is x" in Multi-IF's eight
languages), so a text that was cut or never commits has no answer; `lenient` adds the last number in the text. Only what
follows the last thinking close tag counts, and a thinking tag that was opened and never closed means no answer.
Time grows linearly with the text, whatever is in it: models that loop write 150 kB of anything.
"""

from __future__ import annotations

import re
from typing import Literal

Mode = Literal["strict", "lenient"]

# The line after which a free text is the answer. Thoughts never hold these words, so its first place is the tag.
ANSWER_TAG = "The answer is:"

# What opens thinking, and what closes it; an answer tag closes it too.
_OPENINGS = ("<think>", "<thinking>", "<|begin_of_thought|>", "<Thought>", "[THINK]")
_CLOSINGS = (
    "</think>", "</thinking>", "<|end_of_thought|>", "<|begin_of_solution|>", "</Thought>", "<Output>", "[/THINK]",
)  # fmt: skip
_TEXT_TAG = re.compile(rf"^{ANSWER_TAG}[ \t]*+\n", re.MULTILINE)
_ANSWER_TAGS = re.compile(r"<\|(?:begin|end)_of_solution\|>|</?(?:Output|answer)>")
_BRACES = re.compile(r"\\(?:boxed|fbox|framebox)\s*+\{|\\[{}]|[{}]")
# `\boxed 5$`, as the MATH authors' own extractor takes it.
_UNBRACED_BOX = re.compile(r"\\boxed ([^${}\n]{1,100})\$")

_NUMBER = r"-?[$€£¥₹]?\d++(?:,\d{3})*+(?:\.\d++)?+(?:/\d++)?+"
_LAST_NUMBER = re.compile(_NUMBER)
_HASHES = re.compile(r"####[ \t]*+([^\n]++)")
# A heading of the fourth level is no answer: `#### Step 2`, `#### 1. Add the numbers`.
_HEADING = re.compile(r"\d++[.)][ \t]|[*_]*+[^\W\d_]{2}")

# "The answer is" in English, Chinese, Spanish, French, Hindi, Italian, Portuguese, Russian.
_ANSWER_IS = re.compile(
    r"""(?: answer\**+\s*+(?:is|:|：|=)(?:\s++(?:indeed|clearly|simply|thus|therefore|then)\b)?+
          | 答案\**+\s*+(?:应该是|应为|就是|是|为|:|：)
          | respuesta(?:\s(?:final|correcta))?+\**+\s*+(?:es\b|:)
          | réponse(?:\s(?:finale|correcte))?+\**+\s*+(?:est\b|:)
          | (?:उत्तर|जवाब)\**+\s*+(?:है|:|=)?+
          | risposta(?:\s(?:finale|corretta|esatta))?+\**+\s*+(?:è|:)
          | resposta(?:\s(?:final|correta|certa))?+\**+\s*+(?:é|:)
          | ответ(?:ом)?+\**+\s*+(?:является|равен|будет|это|[:—–-])
        )[\s:：*]*+""",
    re.IGNORECASE | re.VERBOSE,
)
_MATHS = (
    r"\\(?:text|textbf|mathrm|mathbf|operatorname)\{[^{}\n]{0,80}\}|\\[A-Za-z]++|\\.|(?<![A-Za-z])[A-Za-z](?![A-Za-z])"
)
_SIGNS = r"[\d+*/=×·÷^_(){}\[\]|!<>,.;:'% -]"
# What may stand after it: a number, delimited maths, bold words, or maths without delimiters.
_VALUE = re.compile(
    rf"""  \$\$?(?P<dollars>(?!\s)(?:\\\$|[^$\n]){{1,300}}(?<!\s))\$(?!\d)
         | \\\(\s*+(?P<inline>[^\n]{{1,300}}?)\s*\\\)
         | \\\[\s*+(?P<display>.{{1,300}}?)\s*\\\]
         | (?P<number>{_NUMBER})(?:\\?%)?+\**+(?![_^\\({{[]|[A-Za-z](?![A-Za-z])|[ ]*+[-+*/=×·÷]|,?+[ ]*+-?\d)
         | (?P<maths>(?=[-+({{\[|\\A-Za-z\d])(?:{_MATHS}|{_SIGNS}){{1,300}}+)
    """,
    re.VERBOSE | re.DOTALL,
)
_COMPUTATION = re.compile(r"[\d\s.,+*/=×·÷-]*\d\s*[-+*/=×·÷]\s*\d[\d\s.,+*/=×·÷-]*")
_LETTER = re.compile(r"\(?[A-Za-z]\)?")


def extract_answer(completion: str, finish_reason: str = "stop", mode: Mode = "strict") -> str | None:
    r"""The final answer as written, or None. Order: `\boxed{}`, `####`, "answer is"; `lenient`: the last number.

    A text cut by length (`finish_reason` "length") has an answer only in a form that was closed: a balanced box, or
    one of the others followed by more text.
    """
    text = after_thinking(completion)
    if text is None:
        return None
    boxed = last_boxed(text)
    if boxed is not None:
        return boxed.strip() or None
    text = text.rstrip()
    cut = finish_reason == "length"
    for found in (_hashed(text), _stated(text)):
        if found is not None and not (cut and found[1] == len(text)):
            return found[0]
    if mode == "lenient" and not cut:
        numbers = _LAST_NUMBER.findall(text)
        if numbers:
            return str(numbers[-1])
    return None


def answer_text(completion: str, finish_reason: str = "stop") -> str | None:
    """The answer that is a free text, or None where it is empty, cut by length, or thinking was never closed."""
    return None if finish_reason == "length" else spoken(completion) or None


def spoken(completion: str) -> str:
    """What the user is told: the text after thinking and after the answer tag, if there is one; it may be empty."""
    text = after_thinking(completion) or ""
    tag = _TEXT_TAG.search(text)
    return text[tag.end() if tag else 0 :].strip()


def after_thinking(completion: str) -> str | None:
    """The text after the last thinking close tag, tags around the answer left out; None when thinking is unclosed."""
    ends = [at + len(closing) for closing in _CLOSINGS if (at := completion.rfind(closing)) >= 0]
    text = completion[max(ends, default=0) :]
    return None if any(opening in text for opening in _OPENINGS) else _ANSWER_TAGS.sub("", text)


def last_boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{...}` (`\fbox`, `\framebox`) whose braces balance, or None."""
    # Where the content of each open box begins; -1 for other braces.
    opened: list[int] = []
    start = end = -1
    for match in _BRACES.finditer(text):
        brace = match.group()
        if brace == "}":
            if opened and (begun := opened.pop()) > start:
                start, end = begun, match.start()
        elif brace not in ("\\{", "\\}"):
            opened.append(match.end() if len(brace) > 1 else -1)
    if start >= 0:
        return text[start:end]
    unbraced = _UNBRACED_BOX.findall(text)
    return str(unbraced[-1]) if unbraced else None


def _hashed(text: str) -> tuple[str, int] | None:
    """The last `#### answer` and where it ends."""
    found = [match for match in _HASHES.finditer(text) if not _HEADING.match(match[1])]
    return (found[-1][1].strip(" \t*"), found[-1].end()) if found else None


def _stated(text: str) -> tuple[str, int] | None:
    """The last "answer is" that a number or maths follows, and where that ends."""
    found = None
    for marker in _ANSWER_IS.finditer(text):
        match = _VALUE.match(text, marker.end())
        if match is None or match.lastgroup is None:
            continue
        answer = match[match.lastgroup].strip()
        if match.lastgroup == "maths":
            answer = re.split(r"[.;](?:\s|$)", answer)[0].strip(" ,.;:*!'")
            follows = text[match.start("maths") + len(answer) :][:1]
            lone = _LETTER.fullmatch(answer) and follows not in ("", *".,;:!*\n。，；！।")
            if lone or _COMPUTATION.fullmatch(answer) or answer.count("{") != answer.count("}"):
                continue
        if any(c.isalnum() for c in answer):
            found = (answer, match.end())
    return found
