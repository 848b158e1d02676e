"""The checkers of verifiable instructions: a registry filled by the functions below and by `patterns.yaml`.

Semantics are those of google-research's instruction_following_eval (Apache-2.0), with Multi-IF's and M-IFEval's
additions. Keywords are literal text, never patterns; lines end at newlines only. A word occurs where no letter touches
it; in scripts without spaces between words (Chinese, Japanese, Thai) it occurs wherever its characters do.

Invariant: a checker is `(response, **arguments) -> bool`; it is pure, raises for no text, and takes nearly linear time.
An instruction's id is `family:name` (IFEval, Multi-IF), with an optional locale in front (`fr:family:name`, M-IFEval).
"""

from __future__ import annotations

import difflib
import inspect
import json
import operator
import re
import string
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import regex

from cotree.base.errors import UsageError
from cotree.tasks.instructions.languages import CHARACTER_SCRIPTS, WORD_CHARACTER, detect_language, sentences, words
from cotree.tasks.loading import packaged_yaml

Checker = Callable[..., int]  # returns whether a response follows, or a count
LOCALES = ("", "en", "es", "fr", "ja")
CHECKERS: dict[str, Checker] = {}

_RELATIONS: Mapping[str, str] = packaged_yaml("languages.yaml")["relations"]
# Opening and closing quotation marks by locale; the first entry is for all locales that have none of their own.
_QUOTES = {"": '"" “” 「」', "es": '""', "fr": "\"\" '' «»", "ja": "「」"}
_UNSEGMENTED = regex.compile(rf"[{CHARACTER_SCRIPTS}\p{{Thai}}]")
_LIST_MARK = re.compile(r"^[^\S\n]*(?:\d+\.|[-*])[^\S\n]*", re.MULTILINE)
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
# Marks that may stand before a paragraph's first word in Japanese: quotes, headings, lists, emphasis, brackets.
_JAPANESE_OPENING = re.compile(r"(?:[\s\u3000>#*_`・「『（(《〈-]|\d+[.)]\s)+")
_QUOTED = regex.compile("「[^「」\n]*」|『[^『』\n]*』")
# A sentence that ends in a noun; with other hiragana at its end it ends in a verb, an adjective or a particle. This
# replaces the morphological dictionary that M-IFEval uses.
_NOUN_END = regex.compile(
    r"(?:[\p{Han}\p{Katakana}ー\p{Latin}\p{N}]|こと|もの|とき|ところ|ため|わけ|はず|つもり|ほう|まま|うち|あと"
    r"|そこ|ここ|これ|それ|みんな|おかげ|すべて)[。！？]"
)
# Tokens as nltk's word tokenizer makes them, as far as capital letters go: split at spaces and punctuation.
_TOKEN = regex.compile(r"[^\s()\[\]{}<>\"“”«»„`*;:,@#$%&?!¿¡…'’]+(?:['’]\p{L}*)?")


def check_arguments(instruction: str, arguments: Mapping[str, Any]) -> None:
    """Run an instruction's checker on an empty text; UsageError if it does not exist or rejects the arguments."""
    if instruction not in CHECKERS:
        near = difflib.get_close_matches(instruction, CHECKERS, n=1, cutoff=0.0)
        raise UsageError(f"unknown instruction `{instruction}`; the nearest known is `{near[0]}`")
    try:
        CHECKERS[instruction]("", **arguments)
    except (TypeError, AttributeError, KeyError) as error:
        raise UsageError(f"instruction `{instruction}` does not take {dict(arguments)}: {error}") from None


def checks(
    name: str, *locales: str, number: str = "", relation: str = "relation", default: str = ""
) -> Callable[[Checker], Checker]:
    """Register the decorated function as the checker of an instruction.

    It takes the response, the instruction's arguments by name, and optionally `locale`.

    Args:
        name: the instruction's id without a locale.
        locales: supported locales, all by default.
        number: for an instruction about a count, the argument with the number; the function then returns the count and
            does not take this argument and the next.
        relation: the argument with the comparison: "at least", "less than", ...
        default: the relation if the argument is missing.
    """

    def register(function: Checker) -> Checker:
        takes_locale = "locale" in inspect.signature(function).parameters
        for locale in locales or LOCALES:
            checker = partial(function, locale=locale) if takes_locale else function
            if number:
                checker = _count_checker(checker, number, relation, default)
            CHECKERS[f"{locale}:{name}" if locale else name] = checker
        return function

    return register


def _count_checker(count: Checker, number: str, relation: str, default: str) -> Checker:
    """Make a checker from a counting function; compares the count by the arguments `number` and `relation`."""

    def checker(response: str, **arguments: Any) -> bool:
        threshold, wanted = arguments.pop(number), arguments.pop(relation, default)
        return _holds(count(response, **arguments), wanted, threshold)

    return checker


def _holds(count: int, relation: str, threshold: int) -> bool:
    """Whether a count is "at least", "less than", ... a threshold; UsageError for an unknown relation."""
    if relation not in _RELATIONS:
        raise UsageError(f"unknown relation `{relation}`; known: {', '.join(_RELATIONS)}")
    return bool(getattr(operator, _RELATIONS[relation])(count, threshold))


def _contains(response: str, *, pattern: regex.Pattern[str], wanted: bool) -> bool:
    return (pattern.search(response) is not None) == wanted


def _count_matches(response: str, *, patterns: Sequence[regex.Pattern[str]]) -> int:
    return sum(bool(found.strip()) for pattern in patterns for found in pattern.findall(response))


def _register_patterns() -> None:
    """Register the instructions of `patterns.yaml`."""
    tables = packaged_yaml("instructions/patterns.yaml")
    for kind in ("required", "forbidden"):
        for name, locales, pattern in tables[kind]:
            compiled = regex.compile(pattern, regex.V1)
            checks(name, *locales)(partial(_contains, pattern=compiled, wanted=kind == "required"))
    for name, locales, patterns, number, relation in tables["counted"]:
        counted = [regex.compile(pattern, regex.V1) for pattern in patterns]
        checks(name, *locales, number=number, default=relation)(partial(_count_matches, patterns=counted))


_register_patterns()


# What a response says: keywords, letters, its language.
def _normalize_case(text: str) -> str:
    """Lower case, with one spelling for letters that Unicode can write in two ways."""
    return unicodedata.normalize("NFC", text).lower()


@checks("keywords:existence")
def _has_keywords(response: str, *, keywords: Sequence[str]) -> bool:
    text = _normalize_case(response)
    return all(_normalize_case(keyword) in text for keyword in keywords)


@checks("keywords:frequency", number="frequency")
def _count_keyword(response: str, *, keyword: str) -> int:
    return _normalize_case(response).count(_normalize_case(keyword.strip()))


@checks("keywords:forbidden_words")
def _no_forbidden_words(response: str, *, forbidden_words: Sequence[str]) -> bool:
    text = _normalize_case(response)
    return not any(_has_word(text, _normalize_case(word)) for word in forbidden_words)


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
    return _holds(count, let_relation, let_frequency)


@checks("language:response_language")
def _in_language(response: str, *, language: str) -> bool:
    found = detect_language(response)
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


# How a response is laid out: lengths, paragraphs, sections, titles, JSON.
def _without_list_marks(text: str, locale: str) -> str:
    """The text for counts of words and sentences: M-IFEval removes the markers of Spanish lists."""
    return _LIST_MARK.sub("", text) if locale == "es" else text


@checks("length_constraints:number_sentences", number="num_sentences")
def _count_sentences(response: str, *, locale: str) -> int:
    return len(sentences(_without_list_marks(response, locale), locale if locale != "en" else ""))


@checks("length_constraints:number_words", number="num_words")
def _count_words(response: str, *, locale: str) -> int:
    return len(words(_without_list_marks(response, locale)))


checks("length_constraints:number_letters", "ja", number="num_letters")(len)


@checks("length_constraints:number_paragraphs")
def _number_paragraphs(response: str, *, num_paragraphs: int) -> bool:
    return _parts_between(response, "***", num_paragraphs) is not None


@checks("combination:two_responses")
def _two_responses(response: str) -> bool:
    parts = _parts_between(response, "******", 2)
    return parts is not None and parts[0] != parts[1]


def _parts_between(response: str, mark: str, n: int) -> list[str] | None:
    """Split a response at marks; None if there are not n parts or an inner one is empty.

    Ignores an empty text before the first mark or after the last.
    """
    parts = [part.strip() for part in response.split(mark)]
    filled = [part for part in parts if part]
    return filled if len(filled) == n and all(parts[1:-1]) else None


@checks("length_constraints:nth_paragraph_first_word")
def _nth_paragraph_first_word(
    response: str, *, num_paragraphs: int, nth_paragraph: int, first_word: str, locale: str
) -> bool:
    parts = response.split("\n\n")
    wanted = first_word.lower()
    if sum(bool(part.strip()) for part in parts) != num_paragraphs or nth_paragraph > num_paragraphs:
        return False
    paragraph = parts[nth_paragraph - 1].strip().lower()
    if locale == "ja":
        return bool(paragraph) and _JAPANESE_OPENING.sub("", paragraph, count=1).startswith(wanted)
    found = paragraph.split()
    if locale == "es":
        # M-IFEval gives Spanish first words of several words.
        bare = [word.translate(_NO_PUNCTUATION) for word in found]
        return bare[: len(wanted.split())] == wanted.split()
    return bool(found) and re.split(r"[.,?!'\"]", found[0].lstrip("'").lstrip('"'))[0] == wanted


@checks("detectable_format:multiple_sections", number="num_sections", default="at least")
def _count_sections(response: str, *, section_spliter: str, locale: str) -> int:
    word = re.escape(section_spliter.strip())
    return len(re.findall(rf"第\d+{word}" if locale == "ja" else rf"{word}\s?\d+", response))


@checks("detectable_format:json_format")
def _is_json(response: str) -> bool:
    try:
        json.loads(re.sub(r"\A```(?:json|Json|JSON)?|```\Z", "", response.strip()).strip())
    except (ValueError, RecursionError):
        return False
    return True


# Which characters a response has: case, accents (Spanish, French), the endings of Japanese sentences.
def _in_case(response: str, *, language: str, in_case: Callable[[str], bool]) -> bool:
    # M-IFEval detects the language of small letters, IFEval that of the text as it is.
    text = response if language == "en" else response.lower()
    return in_case(response) and detect_language(text) in (language, None)


for _name, _language, _locales in (("english", "en", LOCALES), ("spanish", "es", ("es",)), ("french", "fr", ("fr",))):
    checks(f"change_case:{_name}_capital", *_locales)(partial(_in_case, language=_language, in_case=str.isupper))
    checks(f"change_case:{_name}_lowercase", *_locales)(partial(_in_case, language=_language, in_case=str.islower))


@checks("change_case:capital_word_frequency", number="capital_frequency", relation="capital_relation")
def _count_capital_words(response: str) -> int:
    return sum(token.isupper() for token in _TOKEN.findall(response))


def _count_words_with(response: str, *, letters: str) -> int:
    return sum(any(letter in letters for letter in word) for word in words(unicodedata.normalize("NFC", response)))


for _name, _letters, _number, _relation in (
    ("special_character:enie", "ñÑ", "let_frequency", "exactly"),
    ("special_character:dieresis", "üÜ", "let_frequency", "exactly"),
    ("special_character:tildes", "áéíóúÁÉÍÓÚ", "num_words", ""),
):
    checks(_name, "es", number=_number, default=_relation)(partial(_count_words_with, letters=_letters))


@checks("special_character:ethel_or_cedilla", "fr")
def _without_character(response: str, *, forbidden_char: str) -> bool:
    return forbidden_char.lower() not in response.lower()


@checks("special_character:no_accents", "fr")
def _no_accents(response: str) -> bool:
    return _strip_accents(response) == unicodedata.normalize("NFD", response)


@checks("special_character:accents", "fr")
def _accents_restored(response: str, *, word_to_accentuate: Mapping[str, str]) -> bool:
    return all(word == word_to_accentuate.get(_strip_accents(word), word) for word in words(_normalize_case(response)))


def _strip_accents(text: str) -> str:
    return "".join(c for c in unicodedata.normalize("NFD", text) if not unicodedata.combining(c))


@checks("startend:sentence_unified_end", "ja")
def _unified_end(response: str, *, ending: str) -> bool:
    parts = [part.strip() for part in regex.split("[。！？]", _QUOTED.sub("", response))]
    return all(part.endswith(ending) for part in parts if part)


@checks("detectable_format:nominal_ending", "ja", number="count", default="at least")
def _count_nominal_endings(response: str) -> int:
    return len(_NOUN_END.findall(_QUOTED.sub("", response)))
