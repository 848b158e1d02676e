"""What a word, a sentence and a language are, in the scripts that the benchmarks use.

Invariant: nothing here depends on chance or the network. Words: a run of letters, digits and their combining marks; a
Han or kana character each is one, as Multi-IF counts them. Sentences: Punkt with the language's model where a period is
ambiguous, the script's own marks where it is not. Thai, in which no row of the benchmarks asks for lengths, is not cut.
"""

from __future__ import annotations

from collections import Counter
from functools import cache, lru_cache
from typing import Any

import regex

# The prolonged sound mark belongs to kana, though Unicode calls it common to several scripts.
CHARACTER_SCRIPTS = r"\p{Han}\p{Hiragana}\p{Katakana}ー"
_JOINED = r"\p{L}\p{M}\p{N}_\u200C\u200D"
WORD_CHARACTER = rf"[{_JOINED}]"
WORD = regex.compile(
    rf"[{CHARACTER_SCRIPTS}]\p{{M}}*|[[\p{{L}}\p{{N}}_]--[{CHARACTER_SCRIPTS}]][[{_JOINED}]--[{CHARACTER_SCRIPTS}]]*",
    regex.V1,
)
_SCRIPTS = regex.compile(
    rf"(?P<characters>[{CHARACTER_SCRIPTS}])|(?P<hi>\p{{Devanagari}})|(?P<ru>\p{{Cyrillic}})|(?P<rest>\p{{L}})"
)
_ENDS = {
    "characters": regex.compile(r"[^\n。！？!?．]*[。！？!?．]+[」』”’）》】\"']*|[^\n。！？!?．]+"),
    "danda": regex.compile(r"[^।॥!?]*[।॥!?]+[”’)\"']*|[^।॥!?]+"),
}
_PUNKT = {
    "en": "english", "es": "spanish", "fr": "french", "de": "german", "it": "italian", "pt": "portuguese",
    "ru": "russian",
}  # fmt: skip
_HAS_WORD = regex.compile(r"[\p{L}\p{N}]")
# The detector itself looks at its first 10,000 characters, once addresses are taken out.
_DETECTED = 30_000


def words(text: str) -> list[str]:
    """The words of a text in any mix of scripts."""
    found: list[str] = WORD.findall(text)
    return found


def sentences(text: str, language: str = "") -> list[str]:
    """The sentences of a text, in this language (by its script and then by detection, where none is given)."""
    language = language or _script(text) or detect(text) or "en"
    if language == "hi":
        # A few write Hindi with periods, and then throughout.
        language = "danda" if "।" in text else "en"
    ends = _ENDS.get("characters" if language in ("ja", "zh") else language)
    if ends is not None:
        return [part for part in ends.findall(text) if _HAS_WORD.search(part)]
    found: list[str] = _punkt(_PUNKT.get(language, "english"))(text)
    return found


def _script(text: str) -> str:
    """Which script most letters are in, where that decides how sentences end; empty where it does not."""
    counts = Counter(str(match.lastgroup) for match in _SCRIPTS.finditer(text[:_DETECTED]))
    script = max(counts, key=counts.__getitem__, default="rest")
    return "" if script == "rest" else script


@cache
def _punkt(model: str) -> Any:
    import punkt

    return punkt.tokenizer_for(model).tokenize


@cache
def _detector() -> Any:
    from langdetect.detector_factory import PROFILES_DIRECTORY, DetectorFactory

    # A factory of our own: the package's global one is drawn from by chance and filled while other threads look.
    factory = DetectorFactory()
    factory.load_profile(PROFILES_DIRECTORY)
    factory.seed = 0
    return factory


@lru_cache(maxsize=64)
def detect(text: str) -> str | None:
    """The language code as langdetect gives it (`en`, `zh-cn`), the same every time; None where it finds none."""
    if not _HAS_WORD.search(text):
        return None
    from langdetect.lang_detect_exception import LangDetectException

    detector = _detector().create()
    detector.append(text[:_DETECTED])
    try:
        return str(detector.detect())
    except LangDetectException:
        return None
