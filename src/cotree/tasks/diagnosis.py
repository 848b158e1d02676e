"""Formalistic thinking in a text: does it loop, question itself without end, or never answer (paper, Core Problem).

Invariant: any text gets a diagnosis and none raises; the rules only count, no model is asked, and 150 kB of UTF-8
take less than 20 ms. Each threshold below was measured on worked solutions and on real long chains: no false alarm on
more than 2,000 good texts, and at least 47 of the 71 wrong long chains that give no boxed answer are loops.
"""

from __future__ import annotations

import re
import zlib
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cotree.tasks.extract import after_thinking, extract_answer

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# A token is a word, or one character of a script that puts no space between words (Thai, Lao, Myanmar, Khmer, Japanese,
# Chinese). A run without spaces is read in pieces, so that "aaaa" without end has a period too.
_UNSEGMENTED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
_TOKEN = re.compile(rf"[{_UNSEGMENTED}]|[^\s{_UNSEGMENTED}]{{1,20}}")
_MULTIPLIER = 0x9E3779B97F4A7C15

# Content repetition. Real chains that loop have new 8-grams below 0.1 at their end; good texts never went below 0.5.
LONG_TEXT = 1_500  # characters; a shorter text repeats itself by chance
TAIL_TOKENS = 400
MIN_NEW_8GRAMS = 0.10
# Solutions had at most 0.30 and right long chains 0.39, those full of formulas included.
MAX_DUPLICATE_4GRAMS = 0.50
# A short text that was cut while it said the same words again and again.
MIN_TAIL_REPEATS = 4
MIN_REPEATED_CHARACTERS = 20  # "= 10000" is no loop
# Loops compress: prose and mathematics stay below 4.2. Stated as support, never a flag by itself.
ZLIB_SUPPORT = 6.0

# Over-reflection. A right chain reflects as well (up to 17 in 1,000 tokens), so it counts only where no answer came.
MIN_MARKER_DENSITY = 0.010  # markers a token
MIN_MARKERS = 5
MARKERS: Mapping[str, tuple[str, ...]] = {
    "en": ("wait", "alternatively", "hmm", "hold on", "on second thought", "let me double-check", "let me re-check"),
    "de": ("warte", "moment mal", "alternativ", "andererseits"),
    "es": ("espera", "un momento", "alternativamente"),
    "fr": ("attends", "attendez", "alternativement"),
    "it": ("aspetta", "un attimo", "in alternativa"),
    "pt": ("espere", "espera aí", "alternativamente"),
    "ru": ("подожди", "подождите", "постой", "стоп"),
    "hi": ("रुको", "रुकिए", "ठहरो"),
    "ko": ("잠깐", "잠깐만", "아니면"),
    "zh": ("等等", "等一下", "不对", "或者说", "再想想", "重新检查", "換個思路", "换个思路"),
    "ja": ("待って", "待てよ", "もう一度考え", "あるいは", "うーん"),
    "th": ("เดี๋ยวก่อน", "รอเดี๋ยว", "หรือว่า", "ลองคิดใหม่"),
}
# A final answer stands at the end; looking for it in all of a long text takes half of the time.
FINAL_CHARACTERS = 20_000
# Single words are looked up among the tokens, phrases and scripts without spaces in the text.
_ALL_MARKERS = sorted({marker for markers in MARKERS.values() for marker in markers})
_PHRASES = [marker for marker in _ALL_MARKERS if " " in marker or _TOKEN.sub("", marker, count=1)]
_WORDS = frozenset(_ALL_MARKERS).difference(_PHRASES)
_PUNCTUATION = "\"'“”‘’«»¡¿.,:;!?…()[]*_-–—।"


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What is formalistic about a text; `evidence` has the numbers that the flags come from.

    loop: it says the same again. over_reflection: it doubts itself densely and gives no answer. instruction_failure: no
    final answer, or thinking that was never closed. no_answer: no final answer.
    """

    loop: bool
    over_reflection: bool
    instruction_failure: bool
    no_answer: bool
    evidence: Mapping[str, Any]


def diagnose(text: str, *, finish_reason: str = "stop", answered: bool | None = None) -> Diagnosis:
    """Diagnose one completion by the paper's three kinds of formalistic thinking.

    answered: whether a judge found an answer. By default an explicit answer (a box, "####", "the answer is 4") counts,
        and of a text that ended by itself what follows its thinking does, unless it loops or is dense with doubts: a
        plain reply is its own answer.
    finish_reason: `length` for a text cut by its token limit.
    """
    import numpy as np

    lower, cut, is_long = text.lower(), finish_reason == "length", len(text) > LONG_TEXT
    ids, known = _token_ids(lower)
    numbers = np.array(ids, dtype=np.uint64)
    new_8grams, duplicate_4grams = _repetition(numbers)
    repeats = cut and not is_long and _tail_repeats(text)
    loop = repeats or (is_long and (new_8grams < MIN_NEW_8GRAMS or duplicate_4grams > MAX_DUPLICATE_4GRAMS))
    markers = _count_markers(lower, numbers, known)
    density = markers / max(len(ids), 1)
    dense = markers >= MIN_MARKERS and density >= MIN_MARKER_DENSITY
    final = after_thinking(text)
    if answered is None:
        plain = not (cut or loop or dense) and bool(final and final.strip())
        answered = plain or (final is not None and extract_answer(final[-FINAL_CHARACTERS:], finish_reason) is not None)
    encoded = text.encode("utf-8", "replace")
    ratio = len(encoded) / len(zlib.compress(encoded, 1))
    evidence = {
        "characters": len(text),
        "tokens": len(ids),
        "new_8grams": new_8grams,
        "duplicate_4grams": duplicate_4grams,
        "repeats_at_its_end": repeats,
        "zlib_ratio": ratio,
        "compresses_like_a_loop": ratio > ZLIB_SUPPORT,
        "reflection_markers": markers,
        "reflection_density": density,
        "thinking_closed": final is not None,
        "cut": cut,
    }
    return Diagnosis(loop, dense and not answered, not answered or final is None, not answered, evidence)


def _token_ids(lower: str) -> tuple[list[int], dict[str, int]]:
    """The text's tokens as numbers, and the number of each distinct token."""
    known: defaultdict[str, int] = defaultdict()
    known.default_factory = known.__len__
    return [known[token] for token in _TOKEN.findall(lower)], known


def _repetition(ids: NDArray[np.uint64]) -> tuple[float, float]:
    """The share of 8-grams among the last 400 tokens that come for the first time, and of 4-grams seen before."""
    import numpy as np

    if len(ids) < 8:
        return 1.0, 0.0
    # Hashes of n ids in 64 bits: the odds that two of 50,000 are equal by chance are one in ten billion.
    one, two, four = (np.uint64(pow(_MULTIPLIER, n, 2**64)) for n in (1, 2, 4))
    twos = ids[:-1] * one + ids[1:]
    fours = twos[:-2] * two + twos[2:]
    eights = fours[:-4] * four + fours[4:]
    start = max(len(eights) - TAIL_TOKENS, 0)
    before, tail = eights[:start], np.unique(eights[start:])
    new = len(tail) - len(np.unique(before[np.isin(before, tail)]))
    # Sorting and counting the steps is four times as fast as `unique` where most are distinct.
    duplicates = int((np.diff(np.sort(fours)) == 0).sum())
    return new / (len(eights) - start), duplicates / len(fours)


def _tail_repeats(text: str) -> bool:
    """Whether the text's end has a period that comes at least 4 times; its last round may be cut anywhere."""
    for period in range(1, len(text) // MIN_TAIL_REPEATS + 1):
        stretch = max(period * MIN_TAIL_REPEATS, MIN_REPEATED_CHARACTERS)
        if len(text) >= stretch and text.endswith(text[-stretch:-period]):
            return True
    return False


def _count_markers(lower: str, ids: NDArray[np.uint64], known: Mapping[str, int]) -> int:
    import numpy as np

    words = [number for token, number in known.items() if token.strip(_PUNCTUATION) in _WORDS]
    return int(np.isin(ids, np.array(words, dtype=np.uint64)).sum()) + sum(map(lower.count, _PHRASES))
