"""Checkers of what a response says: keywords, letters, language, case, punctuation, how it starts and ends.

Semantics are those of google-research's instruction_following_eval (Apache-2.0), with Multi-IF's and M-IFEval's
additions; keywords are literal text here, never patterns. Where the originals overlook a script, it is named.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence

import regex

from cotree.tasks.instructions.registry import checker, holds
from cotree.tasks.instructions.scripts import CHARACTER_SCRIPTS, WORD_CHARACTER, detect

_UNSEGMENTED = regex.compile(rf"[{CHARACTER_SCRIPTS}\p{{Thai}}]")
# How nltk's word tokenizer cuts a text, as far as capital letters go: at spaces and punctuation, before a contraction.
_TOKEN = re.compile(r"[^\s()\[\]{}<>\"“”«»„`*;:,@#$%&?!¿¡…'’]+(?:['’][^\W\d_]*)?")
_COMMAS: Mapping[str, str] = {"ja": "、，"}
_QUOTES: Mapping[str, Sequence[str]] = {
    "": ('""', "“”", "「」"),
    "es": ('""',),
    "fr": ('""', "''", "«»"),
    "ja": ("「」",),
}
_TU = regex.compile(r"\b(?:tu|te|toi|ton|ta|tes)\b|\bt['’]", regex.IGNORECASE)


def _folded(text: str) -> str:
    """One spelling for letters that Unicode can write in two ways, in lower case."""
    return unicodedata.normalize("NFC", text).lower()


@checker("keywords:existence")
def has_keywords(response: str, *, keywords: Sequence[str]) -> bool:
    """All of them occur, also inside other words."""
    text = _folded(response)
    return all(_folded(keyword) in text for keyword in keywords)


@checker("keywords:frequency")
def keyword_frequency(response: str, *, keyword: str, frequency: int, relation: str) -> bool:
    """It occurs so often, also inside other words."""
    return holds(_folded(response).count(_folded(keyword.strip())), relation, frequency)


@checker("keywords:forbidden_words")
def no_forbidden_words(response: str, *, forbidden_words: Sequence[str]) -> bool:
    """None occurs as a word; in scripts without spaces between words (Chinese, Japanese, Thai), none at all."""
    text = _folded(response)
    return not any(_has_word(text, _folded(word)) for word in forbidden_words)


def _has_word(text: str, word: str) -> bool:
    pattern = regex.escape(word)
    if not _UNSEGMENTED.search(word):
        pattern = rf"(?<!{WORD_CHARACTER}){pattern}(?!{WORD_CHARACTER})"
    return word in text and regex.search(pattern, text) is not None


@checker("keywords:letter_frequency")
def letter_frequency(response: str, *, letter: str, let_frequency: int, let_relation: str, locale: str) -> bool:
    """A letter occurs so often in either case; a hiragana letter also counts as katakana.

    Anything but a letter (two IFEval prompts ask for `#` and `!`) passes: the original draws a letter in its place, so
    its verdict is chance and nearly always a pass, and counting the sign would agree with it less often.
    """
    if not any(c.isalpha() for c in letter):
        return True
    count = response.lower().count(letter.lower())
    if locale == "ja":
        # The two kana blocks stand at this distance.
        count += response.count("".join(chr(ord(c) + 0x60) for c in letter))
    return holds(count, let_relation, let_frequency)


@checker("language:response_language")
def in_language(response: str, *, language: str) -> bool:
    """Detected as that language; a text without a detectable one passes, as in the original."""
    found = detect(response)
    return found is None or language in (found, found.partition("-")[0])


@checker("change_case:english_capital")
def english_capital(response: str) -> bool:
    """English without a small letter."""
    return response.isupper() and detect(response) in ("en", None)


@checker("change_case:english_lowercase")
def english_lowercase(response: str) -> bool:
    """English without a capital."""
    return response.islower() and detect(response) in ("en", None)


@checker("change_case:spanish_capital", "es")
@checker("change_case:french_capital", "fr")
def all_capital(response: str, *, locale: str) -> bool:
    """The locale's language without a small letter."""
    return response.isupper() and detect(response.lower()) in (locale, None)


@checker("change_case:spanish_lowercase", "es")
@checker("change_case:french_lowercase", "fr")
def all_lowercase(response: str, *, locale: str) -> bool:
    """The locale's language without a capital."""
    return response.islower() and detect(response) in (locale, None)


@checker("change_case:capital_word_frequency")
def capital_words(response: str, *, capital_frequency: int, capital_relation: str) -> bool:
    """So many words have capital letters only."""
    return holds(sum(token.isupper() for token in _TOKEN.findall(response)), capital_relation, capital_frequency)


@checker("punctuation:no_comma")
def no_comma(response: str, *, locale: str) -> bool:
    """No comma of any script (the originals know the ASCII one, and in Japanese the ideographic one)."""
    return not any(comma in response for comma in _COMMAS.get(locale, ",，،"))


@checker("punctuation:no_period", "ja")
def no_period(response: str) -> bool:
    """No ideographic full stop."""
    return "。" not in response


@checker("punctuation:question_marks", "es")
def asks(response: str) -> bool:
    """A question between its two marks."""
    return any(inside.strip() for inside in re.findall(r"¿([^¿?]*)\?", response))


@checker("punctuation:exclamation_marks", "es")
def exclaims(response: str) -> bool:
    """An exclamation between its two marks."""
    return any(inside.strip() for inside in re.findall("¡([^¡!]*)!", response))


@checker("startend:quotation")
def is_quoted(response: str, *, locale: str) -> bool:
    """The whole response in double quotation marks of its language."""
    text = response.strip()
    pairs = _QUOTES.get(locale, _QUOTES[""])
    return len(text) > 1 and text[0] + text[-1] in pairs


@checker("startend:end_checker")
def ends_with(response: str, *, end_phrase: str, locale: str) -> bool:
    """Ends with the phrase, quotation marks left out; in Spanish a period may follow, in Japanese emphasis marks."""
    text, phrase = response.strip().strip('"').lower(), end_phrase.strip().lower()
    if locale == "ja":
        text, phrase = text.rstrip("*_` \n").strip("」』"), phrase.strip("」』")
    return text.endswith(phrase) or (locale == "es" and text.removesuffix(".").endswith(phrase))


@checker("combination:repeat_prompt")
def repeats_prompt(response: str, *, prompt_to_repeat: str) -> bool:
    """Begins with the prompt, word for word."""
    return response.strip().lower().startswith(prompt_to_repeat.strip().lower())


@checker("detectable_content:postscript")
def has_postscript(response: str, *, postscript_marker: str) -> bool:
    """The marker occurs; a space may follow each of its inner periods."""
    marker = re.escape(postscript_marker.strip().lower())
    return re.search(re.sub(r"\\\.(?=.)", r"\\.\\s?", marker), response.lower()) is not None


@checker("detectable_content:informal_address", "fr")
def says_tu(response: str) -> bool:
    """Addresses its reader as `tu`."""
    return _TU.search(response) is not None


@checker("detectable_content:no_digits", "fr")
@checker("letters:kansuuji", "ja")
def no_digits(response: str) -> bool:
    """Numbers are in words or in Chinese numerals: no digit."""
    return re.search(r"\d", response) is None
