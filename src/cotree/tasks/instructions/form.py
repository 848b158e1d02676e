"""Checkers of how a response is laid out: lengths, paragraphs, lists, sections, titles, JSON.

Semantics are those of google-research's instruction_following_eval (Apache-2.0), with M-IFEval's marks for Spanish,
French and Japanese. Lines end at newlines only.
"""

from __future__ import annotations

import json
import re
import string

from cotree.tasks.instructions.languages import sentences, words
from cotree.tasks.instructions.registry import checks, count_fits

# By locale; the first entry is for all locales that have none of their own.
_BULLET = {"": r"\*(?!\*)|-", "es": r"\*(?!\*)", "ja": r"・|\*(?!\*)|-\s"}
_TITLE = {"": ("<<", ">>"), "fr": ("##", "##"), "ja": ("『", "』")}
_NUMBERED = re.compile(r"\d+\.(?:\s|$)")
_LIST_MARK = re.compile(r"^[^\S\n]*(?:\d+\.|[-*])[^\S\n]*", re.MULTILINE)
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
# Marks that may stand before a paragraph's first word in Japanese: quotes, headings, lists, emphasis, brackets.
_JAPANESE_OPENING = re.compile(r"(?:[\s\u3000>#*_`・「『（(《〈-]|\d+[.)]\s)+")


def _countable(text: str, locale: str) -> str:
    """The text in which words and sentences are counted: M-IFEval leaves the marks of Spanish lists out."""
    return _LIST_MARK.sub("", text) if locale == "es" else text


@checks("length_constraints:number_sentences")
def _number_sentences(response: str, *, num_sentences: int, relation: str, locale: str) -> bool:
    language = locale if locale in ("es", "fr", "ja") else ""
    return count_fits(len(sentences(_countable(response, locale), language)), relation, num_sentences)


@checks("length_constraints:number_words")
def _number_words(response: str, *, num_words: int, relation: str, locale: str) -> bool:
    return count_fits(len(words(_countable(response, locale))), relation, num_words)


@checks("length_constraints:number_letters", "ja")
def _number_letters(response: str, *, num_letters: int, relation: str) -> bool:
    return count_fits(len(response), relation, num_letters)


@checks("length_constraints:number_paragraphs")
def _number_paragraphs(response: str, *, num_paragraphs: int) -> bool:
    return _parts_between(response, "***", num_paragraphs) is not None


@checks("combination:two_responses")
def _two_responses(response: str) -> bool:
    parts = _parts_between(response, "******", 2)
    return parts is not None and parts[0] != parts[1]


def _parts_between(response: str, mark: str, n: int) -> list[str] | None:
    """The parts of a response between marks, None if there are not n or an inner one is empty.

    An empty text before the first mark or after the last is no part.
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


@checks("detectable_content:number_placeholders")
def _number_placeholders(response: str, *, num_placeholders: int, relation: str = "at least") -> bool:
    return count_fits(len(re.findall(r"\[[^\[\]\n]*\]", response)), relation, num_placeholders)


@checks("detectable_format:number_bullet_lists")
def _number_bullets(response: str, *, num_bullets: int, locale: str) -> bool:
    bullet = _BULLET.get(locale, _BULLET[""])
    return sum(re.match(bullet, line.lstrip() + "\n") is not None for line in response.split("\n")) == num_bullets


@checks("detectable_format:number_numbered_lists", "ja")
def _number_numbered(response: str, *, num_items: int) -> bool:
    return sum(_NUMBERED.match(line.lstrip()) is not None for line in response.split("\n")) == num_items


@checks("detectable_format:number_highlighted_sections")
def _number_highlights(response: str, *, num_highlights: int, locale: str, relation: str = "at least") -> bool:
    if locale == "ja":
        found = re.findall(r"《([^\n《》]*)》", response)
    else:
        found = re.findall(r"\*([^\n*]*)\*", response) + re.findall(r"\*\*([^\n*]*)\*\*", response)
    return count_fits(sum(bool(part.strip()) for part in found), relation, num_highlights)


@checks("detectable_format:multiple_sections")
def _number_sections(
    response: str, *, section_spliter: str, num_sections: int, locale: str, relation: str = "at least"
) -> bool:
    word = re.escape(section_spliter.strip())
    pattern = rf"第\d+{word}" if locale == "ja" else rf"{word}\s?\d+"
    return count_fits(len(re.findall(pattern, response)), relation, num_sections)


@checks("detectable_format:title")
def _has_title(response: str, *, locale: str) -> bool:
    opening, closing = _TITLE.get(locale, _TITLE[""])
    for line in response.split("\n"):
        start, end = line.find(opening), line.rfind(closing)
        if 0 <= start < end and line[start:end].strip(f"{opening}{closing} \t"):
            return True
    return False


@checks("detectable_format:json_format")
def _is_json(response: str) -> bool:
    try:
        json.loads(re.sub(r"\A```(?:json|Json|JSON)?|```\Z", "", response.strip()).strip())
    except (ValueError, RecursionError):
        return False
    return True
