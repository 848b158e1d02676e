"""Split text into words and sentences, and detect its language, in the scripts of the benchmarks.

Invariant: deterministic and offline.

A word is a run of letters, digits and their combining marks; each Han or kana character is one, as Multi-IF counts
them. Sentences are split by Punkt with the language's model where a period is ambiguous, at the script's own marks
where it is not. Thai, in which no row of the benchmarks asks for lengths, is not split.
"""

from __future__ import annotations

from collections import Counter
from functools import cache, lru_cache
from typing import Any

import regex

# Han and kana; of the prolonged sound mark Unicode says that it is common to several scripts.
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
_SENTENCE = {
    "characters": regex.compile(r"[^\n。！？!?．]*[。！？!?．]+[」』”’）》】\"']*|[^\n。！？!?．]+"),
    "danda": regex.compile(r"[^।॥!?]*[।॥!?]+[”’)\"']*|[^।॥!?]+"),
}
_PUNKT_MODELS = {"de": "german", "es": "spanish", "fr": "french", "it": "italian", "pt": "portuguese", "ru": "russian"}
_HAS_WORD = regex.compile(r"[\p{L}\p{N}]")
# Characters given to langdetect, which itself reads the first 10,000 after removing addresses.
_MAX_DETECTED = 30_000


def words(text: str) -> list[str]:
    """The words of a text in any mix of scripts."""
    return list(WORD.findall(text))


def sentences(text: str, language: str = "") -> list[str]:
    """The sentences of a text in a language; by default detected by script, then by langdetect."""
    language = language or _script(text) or detect_language(text) or "en"
    if language == "hi":
        # Few texts write Hindi with periods, and those do so throughout.
        language = "danda" if "।" in text else "en"
    pattern = _SENTENCE.get("characters" if language in ("ja", "zh") else language)
    if pattern is not None:
        return [part for part in pattern.findall(text) if _HAS_WORD.search(part)]
    return list(_punkt(_PUNKT_MODELS.get(language, "english"))(text))


def _script(text: str) -> str:
    """The majority script, as a language name for `sentences`; "" if the script does not decide how sentences end."""
    counts = Counter(str(match.lastgroup) for match in _SCRIPTS.finditer(text[:_MAX_DETECTED]))
    script = max(counts, key=counts.__getitem__, default="rest")
    return "" if script == "rest" else script


@cache
def _punkt(model: str) -> Any:
    import punkt

    return punkt.tokenizer_for(model).tokenize


@cache
def _detector() -> Any:
    from langdetect.detector_factory import PROFILES_DIRECTORY, DetectorFactory

    # Not the package's global factory, which is randomly seeded and not thread-safe while loading.
    factory = DetectorFactory()
    factory.load_profile(PROFILES_DIRECTORY)
    factory.seed = 0
    return factory


@lru_cache(maxsize=64)
def detect_language(text: str) -> str | None:
    """The language code of a text by langdetect (`en`, `zh-cn`), deterministic; None if it finds none."""
    if not _HAS_WORD.search(text):
        return None
    from langdetect.lang_detect_exception import LangDetectException

    detector = _detector().create()
    detector.append(text[:_MAX_DETECTED])
    try:
        return str(detector.detect())
    except LangDetectException:
        return None
