"""Checkers of what a response says: keywords, a letter, its language, how it starts and ends.

Semantics are those of google-research's instruction_following_eval (Apache-2.0), with Multi-IF's and M-IFEval's
additions; keywords are literal text here, never patterns. A word occurs where no letter touches it; in scripts without
spaces between words (Chinese, Japanese, Thai) it occurs wherever its characters do.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

import regex

from cotree.tasks.instructions.languages import CHARACTER_SCRIPTS, WORD_CHARACTER, detect
from cotree.tasks.instructions.registry import checks, count_fits

_UNSEGMENTED = regex.compile(rf"[{CHARACTER_SCRIPTS}\p{{Thai}}]")
# Opening and closing quotation marks by locale; the first entry is for all locales that have none of their own.
_QUOTES = {"": '"" “” 「」', "es": '""', "fr": "\"\" '' «»", "ja": "「」"}


def _fold(text: str) -> str:
    """Lower case, with one spelling for letters that Unicode can write in two ways."""
    return unicodedata.normalize("NFC", text).lower()


@checks("keywords:existence")
def _has_keywords(response: str, *, keywords: Sequence[str]) -> bool:
    text = _fold(response)
    return all(_fold(keyword) in text for keyword in keywords)


@checks("keywords:frequency")
def _keyword_frequency(response: str, *, keyword: str, frequency: int, relation: str) -> bool:
    return count_fits(_fold(response).count(_fold(keyword.strip())), relation, frequency)


@checks("keywords:forbidden_words")
def _no_forbidden_words(response: str, *, forbidden_words: Sequence[str]) -> bool:
    text = _fold(response)
    return not any(_has_word(text, _fold(word)) for word in forbidden_words)


def _has_word(text: str, word: str) -> bool:
    pattern = regex.escape(word)
    if not _UNSEGMENTED.search(word):
        pattern = rf"(?<!{WORD_CHARACTER}){pattern}(?!{WORD_CHARACTER})"
    return word in text and regex.search(pattern, text) is not None


@checks("keywords:letter_frequency")
def _letter_frequency(response: str, *, letter: str, let_frequency: int, let_relation: str, locale: str) -> bool:
    # Two IFEval prompts ask for `#` and `!`. For whatever is not a letter the original draws a random letter, so its
    # verdict is chance and mostly a pass; passing agrees with it more often than counting the sign does.
    if not any(c.isalpha() for c in letter):
        return True
    count = response.lower().count(letter.lower())
    if locale == "ja":
        # A hiragana letter also counts as katakana; the two Unicode blocks are 0x60 apart.
        count += response.count("".join(chr(ord(c) + 0x60) for c in letter))
    return count_fits(count, let_relation, let_frequency)


@checks("language:response_language")
def _in_language(response: str, *, language: str) -> bool:
    found = detect(response)
    return found is None or language in (found, found.partition("-")[0])


@checks("startend:quotation")
def _is_quoted(response: str, *, locale: str) -> bool:
    text = response.strip()
    return len(text) > 1 and text[0] + text[-1] in _QUOTES.get(locale, _QUOTES[""]).split()


@checks("startend:end_checker")
def _ends_with(response: str, *, end_phrase: str, locale: str) -> bool:
    text, phrase = response.strip().strip('"').lower(), end_phrase.strip().lower()
    if locale == "ja":
        text, phrase = text.rstrip("*_` \n").strip("」』"), phrase.strip("」』")
    return text.endswith(phrase) or (locale == "es" and text.removesuffix(".").endswith(phrase))


@checks("combination:repeat_prompt")
def _repeats_prompt(response: str, *, prompt_to_repeat: str) -> bool:
    return response.strip().lower().startswith(prompt_to_repeat.strip().lower())


@checks("detectable_content:postscript")
def _has_postscript(response: str, *, postscript_marker: str) -> bool:
    # In the response a space may follow each inner period of the marker.
    marker = re.escape(postscript_marker.strip().lower())
    return re.search(re.sub(r"\\\.(?=.)", r"\\.\\s?", marker), response.lower()) is not None
