r"""Find the final answer in a completion, before a verifier sees it.

`strict` accepts closed forms only: a balanced `\boxed{}`, `#### x`, "the answer is x" in Multi-IF's eight languages; so
a text that was cut off or has no explicit answer has none. `lenient` adds the last number in the text. Only text after
the last thinking close tag counts; unclosed thinking means no answer.

Invariant: linear time in the length of any text, because looping models write 150 kB of anything.
"""

from __future__ import annotations

import re
from typing import Literal

from cotree.tasks.loading import packaged_yaml
from cotree.tasks.math_text import SCALE

ExtractionMode = Literal["strict", "lenient"]

# The line before a free-text answer. Thoughts never contain these words, so the first such line is the tag.
ANSWER_TAG = "The answer is:"
_ANSWER_TAG_LINE = re.compile(rf"^{ANSWER_TAG}[ \t]*+\n", re.MULTILINE)
# Tags of thinking and of answers; one that opens an answer also closes thinking.
_THINKING_OPENS = ("<think>", "<thinking>", "<|begin_of_thought|>", "<Thought>", "[THINK]")
_THINKING_CLOSES = ("</think>", "</thinking>", "<|end_of_thought|>", "</Thought>", "[/THINK]")
_ANSWER_OPENS = ("<|begin_of_solution|>", "<Output>")
_ANSWER_MARKUP = re.compile(r"<\|(?:begin|end)_of_solution\|>|</?(?:Output|answer)>")
# Special tokens that leak into a text after the end of a turn.
_END_OF_TURN = re.compile(
    r"<\|(?:im_end|im_start|eot_id|eom_id|start_header_id|end_of_text|endoftext|end_of_turn|end|return|user)\|>|</s>"
    r"|<(?:end|start)_of_turn>|<\|END_OF_TURN_TOKEN\|>|<｜(?:end▁of▁sentence|User)｜>|\[\|endofturn\|\]|\[INST\]"
)
_BRACES = re.compile(r"\\(?:boxed|fbox|framebox)\s*+\{|\\\\(?=[{}])|\\[{}]|[{}]")
# Text that joins two boxes to one answer: `\boxed{1}$ and $x = \boxed{2}`, `\boxed{3} apples and \boxed{4}`.
_GAP = r"(?:[\s$~]|\\(?:[()\[\] ,;:!]|q?quad))*"
_JOIN = re.compile(
    rf"{_GAP}(?:[,;、，]{_GAP})?(?:[,;、，]|(?:[a-z]+\s+)?(?:\\text\{{\s*)?(?:and|or|和|或)\b(?:\s*\}})?)"
    rf"{_GAP}(?:[A-Za-z]\w{{0,2}}\s*=\s*)?"
)
_LONGEST_JOIN = 60
# `\boxed 5$`, as the MATH authors' own extractor takes it.
_UNBRACED_BOX = re.compile(r"\\boxed ([^${}\n]{1,100})\$")

_NUMBER = r"[-−]?[$€£¥₹]?(?:\d++(?:,\d{3})*+(?:\.\d++)?+|\.\d++)(?:/\d++)?+"
_HASHES = re.compile(r"####[ \t]*+([^\n]++)")
# Fourth-level headings are not answers: `#### Step 2`, `#### 1. Add the numbers`.
_HEADING = re.compile(r"\d++[.)][ \t]|[*_]*+[^\W\d_]{2}")

_ANSWER_IS = "|".join(packaged_yaml("languages.yaml")["answer_is"].values())
_ANSWER_MARKER = re.compile(rf"(?:{_ANSWER_IS})[\s:：*]*+", re.IGNORECASE)
_MATHS = (
    r"\\(?:text|textbf|mathrm|mathbf|operatorname)\{[^{}\n]{0,80}\}|\\[A-Za-z]++|\\.|(?<![A-Za-z])[A-Za-z](?![A-Za-z])"
)
_SIGNS = r"[\d+*/=×·÷^_(){}\[\]|!<>,、.;:∶'’% \u00a0\u2009\u202f−–±~π√∛∜∞≤≥≠≈¼-¾⅐-⅞²³¹⁰⁴-⁹⁺⁻₀-₉-]|[$€£¥₹](?=[\d.])"
# Words that make the number before them part of a longer value: `5 million`, `3 or 4`, `6 feet 3 inches`.
_S = r"[^\S\n]"
_MORE = r"[$€£¥₹(]?[-−–]?(?:\.?\d|\\(?!text)|[√π])"
_OR_MORE = rf"or{_S}++(?:more|less|fewer|greater|higher|lower)\b|and{_S}++(?:a|one)[ -]half\b"
_CHANGED_BY_WORDS = rf"""{_S}*+(?:(?:{SCALE}|squared|cubed|pi|factorial|mod|modulo|choose)\b|{_OR_MORE}
      |(?:or|and|plus|minus|times|to(?!{_S}\d++{_S}(?:decimal|significant))|或者?|和|到|至|o|u|y|ou|et?|a|à|или|и|до|या|और)
       {_S}*+{_MORE}
      |(?:years?|months?|weeks?|days?|h(?:ou)?rs?|h|min(?:ute)?s?|miles?|yards?|f(?:ee|oo)?t|m(?:eters?)?|pounds?|lbs?|kg
       |dollars?|degrees?),?{_S}++(?:and{_S}++)?\d)"""
_GOES_ON = rf"""[_^({{[$²³¹⁰⁴-⁹⁺⁻₀-₉]|[:∶：~'’]\d|[A-Za-z](?![A-Za-z])
      |{_S}*+(?:[π√∛∜∞¼-¾⅐-⅞≤≥≠≈±]|\\(?![])\\])|[,、;]?+{_S}*+[-−–]?\d|[:∶~]{_S}++\d|[xX]{_S}*+\d
       |(?:[-+*/=×·÷−–]|[<>]=?)(?={_S}*+(?:{_MORE}|[A-Za-z](?![A-Za-z>]))))
      |{_CHANGED_BY_WORDS}"""
_WORDS_INSIDE = rf"(?<=\d[ ])(?:{SCALE}|squared|cubed|pi)\b|(?:or|and|to|或者?|和){_S}*+(?={_MORE})|{_OR_MORE}"
# Accepted after "answer is": a number, delimited maths, bold words, or maths without delimiters.
_VALUE = re.compile(
    rf"""  \$\$?(?P<dollars>(?!\s)(?:\\\$|[^$\n]){{1,300}}(?<!\s))\$(?!\d|{_CHANGED_BY_WORDS})
         | \\\(\s*+(?P<inline>[^\n]{{1,300}}?)\s*\\\)(?!{_CHANGED_BY_WORDS})
         | \\\[\s*+(?P<display>.{{1,300}}?)\s*\\\](?!{_CHANGED_BY_WORDS})
         | (?P<number>–?{_NUMBER}(?:\\?%)?+)(?!!)\**+(?!{_GOES_ON})
         | (?P<maths>(?=[-−–+({{\[|\\A-Za-z\d√∛∜π∞±≈¼-¾⅐-⅞$€£¥₹])
             (?:{_MATHS}|{_SIGNS})(?:{_MATHS}|{_SIGNS}|{_WORDS_INSIDE}){{0,299}}+)
    """,
    re.VERBOSE | re.DOTALL,
)
# A computation, but not a mixed number.
_COMPUTATION = re.compile(r"(?![-−–]?\d+\s\d+/\d+$)[\d\s.,+*/=×·÷−–-]*\d\s*[-+*/=×·÷−–]\s*\d[\d\s.,+*/=×·÷−–-]*")
_LETTER = re.compile(r"\(?[A-Za-z]\)?")


def extract_answer(completion: str, finish_reason: str = "stop", mode: ExtractionMode = "strict") -> str | None:
    r"""The final answer of a completion as written, or None.

    The first match of: the last `\boxed{}`, the last `####`, the last "answer is", and, if `lenient`, the last number.
    In a text cut by its token limit (`finish_reason` "length") only closed forms count: a balanced box, or one of the
    others followed by more text.
    """
    text = after_thinking(completion)
    if text is None:
        return None
    boxed = last_boxed(text)
    if boxed is not None:
        return boxed.strip() or None
    text = text.rstrip()
    cut = finish_reason == "length"
    for found in (_last_after_hashes(text), _last_after_answer_is(text)):
        if found is not None and not (cut and found[1] == len(text)):
            return found[0]
    numbers = re.findall(_NUMBER, text) if mode == "lenient" and not cut else ()
    return str(numbers[-1]) if numbers else None


def free_text_answer(completion: str, finish_reason: str = "stop") -> str | None:
    """The free-text answer of a completion; None if it is empty, cut off, or thinking is unclosed."""
    return None if finish_reason == "length" else visible_text(completion) or None


def visible_text(completion: str) -> str:
    """The part of a completion shown to the user: after thinking, and after the answer tag if any; or ""."""
    text = after_thinking(completion) or ""
    tag = _ANSWER_TAG_LINE.search(text)
    return text[tag.end() if tag else 0 :].strip()


def opened_thinking(prompt: str) -> str:
    """The tag with which a prompt opens the assistant's thinking, with following white space; or ""."""
    stripped = prompt.rstrip()
    tag = next((tag for tag in _THINKING_OPENS if stripped.endswith(tag)), "")
    return prompt[len(stripped) - len(tag) :] if tag else ""


def has_answer_tag(text: str) -> bool:
    """Whether a line is the tag before a free-text answer."""
    return _ANSWER_TAG_LINE.search(text) is not None


def after_thinking(completion: str) -> str | None:
    """The text after the last thinking close tag, without answer tags; None if thinking is unclosed.

    Ignores text after the end of the model's turn.
    """
    if "<" not in completion and "[" not in completion:  # every tag has one of them, and most texts have neither
        return completion
    completion = _END_OF_TURN.split(completion, maxsplit=1)[0]
    closes = (*_THINKING_CLOSES, *_ANSWER_OPENS)
    ends = [at + len(tag) for tag in closes if (at := completion.rfind(tag)) >= 0]
    text = completion[max(ends, default=0) :]
    return None if any(tag in text for tag in _THINKING_OPENS) else _ANSWER_MARKUP.sub("", text)


def last_boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{...}` (`\fbox`, `\framebox`) whose braces balance, or None.

    Earlier boxes joined to it by a comma, "and" or "or" belong to the same answer: "1, 2".
    """
    if "box" not in text:
        return None
    # A stack of open braces: (start of the box, start of its content), None for other braces.
    opened: list[tuple[int, int] | None] = []
    boxes: list[tuple[int, int, int]] = []
    for match in _BRACES.finditer(text):
        brace = match.group()
        if brace == "}":
            if opened and (begun := opened.pop()):
                boxes.append((*begun, match.start()))
        elif brace not in ("\\{", "\\}", "\\\\"):
            opened.append(match.span() if len(brace) > 1 else None)
    if not boxes:
        unbraced = _UNBRACED_BOX.findall(text)
        return str(unbraced[-1]) if unbraced else None
    boxes.sort()
    begin, start, end = boxes.pop()
    contents = [text[start:end]]
    while boxes:
        begin_before, start, end = boxes.pop()
        if end > begin:
            continue  # it contains the later one
        if begin - end > _LONGEST_JOIN or not _JOIN.fullmatch(text, end + 1, begin):
            break
        begin, contents = begin_before, [text[start:end], *contents]
    return ", ".join(dict.fromkeys(contents))


def _last_after_hashes(text: str) -> tuple[str, int] | None:
    """The answer of the last `#### answer`, and the index where it ends."""
    found = [match for match in _HASHES.finditer(text) if not _HEADING.match(match[1])]
    return (found[-1][1].strip(" \t*"), found[-1].end()) if found else None


def _last_after_answer_is(text: str) -> tuple[str, int] | None:
    """The number or maths after the last "answer is" that has one, and the index where it ends."""
    found = None
    for marker in _ANSWER_MARKER.finditer(text):
        match = _VALUE.match(text, marker.end())
        if match is None or match.lastgroup is None:
            continue
        answer = match[match.lastgroup].strip()
        if match.lastgroup == "maths":
            # Only up to the end of the sentence; words like "a", half computations and cut LaTeX are rejected below.
            answer = re.split(r"[.;](?:\s|$)", answer)[0].strip(" ,、.;:*'")
            follows = text[match.start("maths") + len(answer) :][:1]
            part = re.fullmatch(_NUMBER, answer)  # of a value that cannot be read as a whole
            lone = _LETTER.fullmatch(answer) and follows not in ("", *".,;:!*\n。，；！।")
            if _COMPUTATION.fullmatch(answer):  # 1 + 11 = 12
                answer = answer.rpartition("=")[2].strip()
            if part or lone or _COMPUTATION.fullmatch(answer) or answer.count("{") != answer.count("}"):
                continue
        if any(c.isalnum() for c in answer):
            found = (answer, match.end())
    return found
