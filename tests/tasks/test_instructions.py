"""Instruction checkers: each against texts that follow it and that do not, and all against any text."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cotree.base.errors import UsageError
from cotree.tasks.instructions import follows_loosely, follows_strictly
from cotree.tasks.instructions.checkers import CHECKERS, check_arguments
from cotree.tasks.instructions.languages import detect_language, sentences, words

ENGLISH = "The harbour is quiet at night and the boats lie still in the dark water."
AT_LEAST, LESS = "at least", "less than"
# (instruction, arguments, a text that follows it, one that does not)
CASES: list[tuple[str, dict[str, Any], str, str]] = [
    ("keywords:existence", {"keywords": ["Boat", "c++"]}, "boats in C++", "boats in C"),
    ("keywords:existence", {"keywords": ["पढ़ना"]}, "मुझे पढ\u093cना है", "मुझे लिखना है"),
    ("keywords:frequency", {"keyword": "sea", "frequency": 2, "relation": AT_LEAST}, "Sea and seaside", "a sea"),
    ("keywords:frequency", {"keyword": "sea", "frequency": 2, "relation": LESS}, "a sea", "sea, sea"),
    ("keywords:forbidden_words", {"forbidden_words": ["sea"]}, "seaside", "the SEA."),
    ("keywords:forbidden_words", {"forbidden_words": ["海"]}, "山が好き", "深い海が好き"),
    ("keywords:forbidden_words", {"forbidden_words": ["नदी"]}, "नदीतट पर", "एक नदी बहती है"),
    ("keywords:letter_frequency", {"letter": "O", "let_frequency": 2, "let_relation": AT_LEAST}, "Oboe o", "obe"),
    ("keywords:letter_frequency", {"letter": "о", "let_frequency": 2, "let_relation": AT_LEAST}, "Окно", "oкo но"),
    ("ja:keywords:letter_frequency", {"letter": "か", "let_frequency": 2, "let_relation": "以上"}, "かカ", "か"),
    ("language:response_language", {"language": "en"}, ENGLISH, "Der Hafen ist nachts ganz still und dunkel."),
    ("language:response_language", {"language": "zh"}, "这个港口在夜里很安静。", ENGLISH),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 2, "relation": AT_LEAST},
        "Dr. Li came. He sat.",
        "Dr. Li",
    ),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "***\na\n***\nb", "a\n***\n***\nb"),
    ("length_constraints:number_words", {"num_words": 3, "relation": LESS}, "it's", "it is so"),
    (
        "es:length_constraints:number_words",
        {"num_words": 2, "relation": "como máximo"},
        "1. uno\n2. dos",
        "1. uno dos tres",
    ),
    ("ja:length_constraints:number_letters", {"num_letters": 3, "relation": "未満"}, "あい", "あいう"),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "Boats"},
        "a\n\n'boats', b",
        "boats\n\na",
    ),
    (
        "es:length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 1, "nth_paragraph": 1, "first_word": "En mi opinión"},
        "En mi opinión, sí",
        "En opinión",
    ),
    (
        "ja:length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "海"},
        "山\n\n- **海は広い**",
        "海\n\n山",
    ),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[a] [b [c]", "[a] [b"),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, "bye\np. p.s: x", "P.S. x"),
    ("fr:detectable_content:postscript", {"postscript_marker": "P.-S."}, "p.-s. oui", "ps oui"),
    ("fr:detectable_content:informal_address", {}, "Je t’aime", "Il attend"),
    ("fr:detectable_content:no_digits", {}, "dix", "10"),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* a\n - b\n**c**", "* a\n** b"),
    ("es:detectable_format:number_bullet_lists", {"num_bullets": 1}, "* a\n- b", "* a\n* b"),
    ("ja:detectable_format:number_bullet_lists", {"num_bullets": 3}, "・あ\n* い\n- う\n-え", "・あ"),
    ("ja:detectable_format:number_numbered_lists", {"num_items": 2}, "1. あ\n2. い", "1.あ\n2. い"),
    ("detectable_format:constrained_response", {}, "I think. My answer is no.", "No."),
    ("ja:detectable_format:constrained_response", {}, "はい、そうです。", "はい。"),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*a* and **b**", "*a* and ** **"),
    ("ja:detectable_format:number_highlighted_sections", {"num_highlights": 1}, "《海》", "《 》*海*"),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "Day", "num_sections": 2},
        "Day 1\nDay 2",
        "Day 1\nDay",
    ),
    ("ja:detectable_format:multiple_sections", {"section_spliter": "章", "num_sections": 2}, "第1章 第２章", "1章 2章"),
    ("detectable_format:json_format", {}, '```json\n{"a": 1}\n```', "{a: 1}"),
    ("detectable_format:title", {}, "<<Night>>\ntext", "<< >>\n<<a\n>>"),
    ("fr:detectable_format:title", {}, "##Nuit##", "## Nuit"),
    ("ja:detectable_format:title", {}, "『夜』", "『』<<夜>>"),
    ("combination:two_responses", {}, "a\n******\nb", "a\n******\na"),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say it."}, "say it. Done", "I say it."),
    ("startend:end_checker", {"end_phrase": "The end."}, 'so "the end."', "the end. Or not"),
    ("es:startend:end_checker", {"end_phrase": "Un saludo"}, "Un saludo.", "Un saludo, Ana"),
    ("ja:startend:end_checker", {"end_phrase": "終わり。"}, "**「終わり。」**", "終わり"),
    ("startend:quotation", {}, ' "a" ', '"a'),
    ("startend:quotation", {}, "“a”", "”a“"),
    ("fr:startend:quotation", {}, "« a »", "“a”"),
    ("ja:startend:quotation", {}, "「あ」", '"あ"'),
    ("ja:startend:sentence_unified_end", {"ending": "です"}, "海です。「行く。」山です。\n", "海です。山だ。"),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": AT_LEAST},
        "A **BOLD** x",
        "Bold A",
    ),
    ("change_case:english_capital", {}, ENGLISH.upper(), ENGLISH),
    ("change_case:english_lowercase", {}, ENGLISH.lower(), ENGLISH),
    ("es:change_case:spanish_capital", {}, "EL PUERTO ESTÁ MUY TRANQUILO POR LA NOCHE", "EL PUERTO está tranquilo"),
    ("es:change_case:spanish_lowercase", {}, "el puerto está muy tranquilo por la noche", "El puerto está tranquilo"),
    ("fr:change_case:french_capital", {}, "LE PORT EST TRÈS CALME PENDANT LA NUIT", "LE PORT est très calme"),
    ("fr:change_case:french_lowercase", {}, "le port est très calme pendant la nuit", "Le port est très calme"),
    ("punctuation:no_comma", {}, "a b", "a, b"),
    ("punctuation:no_comma", {}, "山、海", "山，海"),
    ("ja:punctuation:no_comma", {}, "山と海", "山、海"),
    ("ja:punctuation:no_period", {}, "山", "山。"),
    ("es:punctuation:question_marks", {}, "¿Qué?", "Qué? ¿ ?"),
    ("es:punctuation:exclamation_marks", {}, "¡Sí!", "¡! Sí!"),
    ("es:special_character:enie", {"let_frequency": 2}, "El niño y la NIÑA", "niño ñoño ñu"),
    ("es:special_character:dieresis", {"let_frequency": 1}, "pingu\u0308ino", "pinguino"),
    ("es:special_character:tildes", {"num_words": 1, "relation": "como máximo"}, "él va", "sí más"),
    ("fr:special_character:ethel_or_cedilla", {"forbidden_char": "ç"}, "ca", "ÇA"),
    ("fr:special_character:no_accents", {}, "cur ❤️", "cœur été"),
    ("fr:special_character:accents", {"word_to_accentuate": {"ete": "été"}}, "Un ÉTÉ, étés", "un ete"),
    ("ja:letters:furigana", {}, "海（うみ）が", "海（うみ）と山"),
    ("ja:letters:kanji", {"kanji_limit": 2, "relation": "以上"}, "海と山", "うみと山"),
    ("ja:letters:kansuuji", {}, "三月", "3月"),
    ("ja:letters:hiragana_only", {}, "うみ、だー！", "うみと山"),
    ("ja:letters:katakana_only", {}, "ウミ・ﾔﾏ。", "ウみ"),
    ("ja:letters:no_hiragana", {}, "海", "海が"),
    ("ja:letters:no_katakana", {}, "海が", "海ﾉ"),
    ("ja:detectable_format:nominal_ending", {"count": 2}, "静かな海。大切なこと！行く。", "海。行く。「山。」"),
]


@pytest.mark.parametrize(("name", "arguments", "follows", "fails"), CASES)
def test_a_text_that_follows_and_one_that_does_not(
    name: str, arguments: dict[str, Any], follows: str, fails: str
) -> None:
    check_arguments(name, arguments)
    assert follows_strictly(name, arguments, follows)
    assert not follows_strictly(name, arguments, fails)


def test_every_instruction_has_a_case_in_some_language() -> None:
    def bare(name: str) -> str:
        return ":".join(name.split(":")[-2:])

    assert {bare(name) for name in CHECKERS} == {bare(case[0]) for case in CASES}
    assert len([name for name in CHECKERS if name.count(":") == 1]) == 25


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("Don't stop_it 3.5", 5),  # as nltk's \w+
        ("我喜欢Python和2024年。", 7),  # a character each; a foreign word and a number are one
        ("ジェイソンさん、Jason", 8),  # the prolonged sound mark is in the word's count of kana
        ("か\u3099き", 2),  # a combining sound mark belongs to its kana
        ("मैं हिन्दी पढ़ता हूँ।", 4),  # vowel signs, virama and nukta are parts of words
        ("क्\u200dष का", 2),  # a joiner too
        ("Съешь ещё мягких булок-то", 5),
        ("й и\u0306", 2),
        ("❤️ 👍🏽 — …", 0),
        ("", 0),
    ],
)
def test_words_by_the_rules_of_the_script(text: str, count: int) -> None:
    assert len(words(text)) == count


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("Mr. Smith paid $3.50. He left.", 2),
        ("今天很好。你呢？我很好！", 3),
        ("他说：“好！！”\n圆周率是3.14。", 2),
        ("今日は晴れ。明日は？！\n題名\n\n雨", 4),
        ("मैं घर गया। डॉ. शर्मा आए॥ कब?", 3),
        ("मैं घर गया. वह आया.", 2),
        ("Это г. Москва. Он приехал в 5 ч. утра. Почему?", 3),
        ("El Sr. García llegó. ¿Quién es?", 2),
        ("", 0),
    ],
)
def test_sentences_by_the_rules_of_the_script(text: str, count: int) -> None:
    assert len(sentences(text)) == count


def test_detection_is_the_same_every_time() -> None:
    mixed = "La maison is a casa"
    first = detect_language(mixed)
    for _ in range(5):
        detect_language.cache_clear()
        assert detect_language(mixed) == first


def test_loose_forgives_a_first_line_a_last_line_and_asterisks() -> None:
    for text in ('Sure:\n"a"', '"a"\nBye', '*"a"*', 'Sure:\n**"a"**\nBye'):
        assert not follows_strictly("startend:quotation", {}, text)
        assert follows_loosely("startend:quotation", {}, text)
    assert not follows_loosely("startend:quotation", {}, "Sure: 'a'")
    assert not follows_loosely("punctuation:no_comma", {}, " \n")


def test_unknown_instructions_and_arguments_are_named() -> None:
    with pytest.raises(
        UsageError, match="unknown instruction `punctuation:no_coma`; the nearest known is `punctuation:no_comma`"
    ):
        check_arguments("punctuation:no_coma", {})
    with pytest.raises(UsageError, match=r"`keywords:existence` does not take .*words"):
        check_arguments("keywords:existence", {"words": ["a"]})
    with pytest.raises(UsageError, match="unknown relation `about`; known: at least, less than"):
        check_arguments("length_constraints:number_words", {"num_words": 3, "relation": "about"})


ALPHABETS = "ab \n\n.*#\"'[]<>«»¿?¡!-1()_@/:的。，「」『』《》（）あかカー漢हि।्\u093cกาๆж\u0301\u200d❤{}"


@settings(max_examples=60, deadline=None)
@given(st.one_of(st.text(max_size=300), st.text(alphabet=ALPHABETS, max_size=300)))
def test_no_checker_raises_on_any_text(text: str) -> None:
    for name, arguments, _, _ in CASES:
        assert follows_loosely(name, arguments, text) in (True, False)


# Each is repeated to the whole length: what a pattern could try again from every place.
HOSTILE = "\n|*|[|<<|##|¿|「|『x|《|漢|漢（あ）|*a|1.|p.|第1|a.|हि|กา|ก|เ|กรรม|，|\u0301|a@b.|http://a|'|A. |- "
HOSTILE += '|word | |"|[[{|。|!”|न्|1'


@pytest.mark.timed
@pytest.mark.parametrize("size", [3_000, pytest.param(150_000, marks=pytest.mark.slow)])
def test_no_text_takes_long(size: int) -> None:
    rng = random.Random(0)
    texts = [unit * (size // len(unit)) for unit in HOSTILE.split("|")]
    texts += ["".join(rng.choices(ALPHABETS, k=size)), "漢" * (size - 3) + "（あ）"]
    for text in texts:
        for name, arguments, _, _ in CASES:
            started = time.perf_counter()
            follows_strictly(name, arguments, text)
            assert time.perf_counter() - started < 1 + size / 15_000, (name, text[:4])
