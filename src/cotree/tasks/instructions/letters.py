"""Checkers of which letters a response uses: Spanish and French accents, and the Japanese scripts (all M-IFEval)."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping

from cotree.tasks.instructions.registry import checker, holds
from cotree.tasks.instructions.scripts import words

_QUOTED = re.compile("「[^「」\n]*」|『[^『』\n]*』")
# Nouns that are written in hiragana and close a clause. A sentence that ends in any other hiragana ends in a verb, an
# adjective or a particle; M-IFEval asks a morphological dictionary.
_HIRAGANA_NOUNS = (
    "こと", "もの", "とき", "ところ", "ため", "わけ", "はず", "つもり", "よう", "ほう", "まま", "うち", "あと", "そこ", "ここ",
    "これ", "それ", "みんな", "おかげ", "ひとつ", "すべて", "さ",
)  # fmt: skip


def _count(response: str, letters: str) -> int:
    return sum(any(letter in letters for letter in word) for word in words(unicodedata.normalize("NFC", response)))


@checker("special_character:enie", "es")
def words_with_enie(response: str, *, let_frequency: int) -> bool:
    """Exactly so many words with ñ."""
    return _count(response, "ñÑ") == let_frequency


@checker("special_character:dieresis", "es")
def words_with_dieresis(response: str, *, let_frequency: int) -> bool:
    """Exactly so many words with ü."""
    return _count(response, "üÜ") == let_frequency


@checker("special_character:tildes", "es")
def words_with_accent(response: str, *, num_words: int, relation: str) -> bool:
    """So many words with an accented vowel."""
    return holds(_count(response, "áéíóúÁÉÍÓÚ"), relation, num_words)


@checker("special_character:ethel_or_cedilla", "fr")
def without_character(response: str, *, forbidden_char: str) -> bool:
    """The character occurs in neither case."""
    return forbidden_char.lower() not in response.lower()


@checker("special_character:no_accents", "fr")
def no_accents(response: str) -> bool:
    """No letter carries a mark."""
    return _bare(response) == unicodedata.normalize("NFD", response)


@checker("special_character:accents", "fr")
def accents_restored(response: str, *, word_to_accentuate: Mapping[str, str]) -> bool:
    """Each of the words, wherever it occurs, carries its accents."""
    found = words(unicodedata.normalize("NFC", response).lower())
    return all(word == word_to_accentuate.get(_bare(word), word) for word in found)


def _bare(text: str) -> str:
    return "".join(c for c in unicodedata.normalize("NFD", text) if not unicodedata.combining(c))


@checker("letters:furigana", "ja")
def has_furigana(response: str) -> bool:
    """Every run of kanji is followed by its reading in hiragana and full-width brackets."""
    return all(re.findall("[\u4e00-\u9faf]+(（[ぁ-ん]+）)?", response))


@checker("letters:kanji", "ja")
def number_kanji(response: str, *, kanji_limit: int, relation: str) -> bool:
    """So many kanji."""
    return holds(len(re.findall("[\u4e00-\u9faf]", response)), relation, kanji_limit)


@checker("letters:hiragana_only", "ja")
def hiragana_only(response: str) -> bool:
    """No letter of another script."""
    return _letters_match(response, "[ぁ-んー]")


@checker("letters:katakana_only", "ja")
def katakana_only(response: str) -> bool:
    """No letter of another script; half-width katakana count."""
    return _letters_match(response, "[ァ-ンー・ｦ-ﾟ]")


def _letters_match(response: str, script: str) -> bool:
    others = re.sub(script, "", response)
    return not any(unicodedata.category(c).startswith("L") for c in others)


@checker("letters:no_hiragana", "ja")
def no_hiragana(response: str) -> bool:
    """No hiragana."""
    return re.search("[ぁ-ゖ]", response) is None


@checker("letters:no_katakana", "ja")
def no_katakana(response: str) -> bool:
    """No katakana, half-width ones included."""
    return re.search("[ァ-ヺｦ-ﾟ]", response) is None


@checker("startend:sentence_unified_end", "ja")
def unified_end(response: str, *, ending: str) -> bool:
    """Every sentence outside quotation marks has this ending."""
    parts = [part.strip() for part in re.split("[。！？]", _QUOTED.sub("", response))]
    return all(part.endswith(ending) for part in parts if part)


@checker("detectable_format:nominal_ending", "ja")
def nominal_endings(response: str, *, count: int) -> bool:
    """At least so many sentences outside quotation marks end in a noun."""
    ends = re.findall(r"(\S{1,4})[。！？]", _QUOTED.sub("", response))
    nouns = sum(re.search("[\u4e00-\u9fff々ァ-ヺー\\w]$", end) is not None and not _ends_in_kana(end) for end in ends)
    return nouns >= count


def _ends_in_kana(end: str) -> bool:
    return "ぁ" <= end[-1] <= "ゖ" and not end.endswith(_HIRAGANA_NOUNS)
