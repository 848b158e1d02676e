"""Diagnosis: real good texts raise no alarm, real loops do, whatever the script, and nothing raises or takes long."""

from __future__ import annotations

import gzip
import json
import os
import random
import time
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import cotree
from cotree.tasks.diagnosis import MARKERS, Diagnosis, diagnose


def rows(name: str) -> list[dict[str, Any]]:
    folder = os.environ.get("COTREE_DATA")
    if folder is None:
        pytest.skip(f"benchmark data not found: {name} (set COTREE_DATA to run this test)")
    path = Path(folder) / name
    content = path.read_bytes()
    text = gzip.decompress(content) if name.endswith(".gz") else content
    return [json.loads(line) for line in text.decode().splitlines() if line]


GOOD = {
    "gsm8k_test.jsonl": "solution",
    "gsm8k_train_500.jsonl": "solution",
    "math500.jsonl": "solution",
    "math_train_500.jsonl": "solution",
    "aime_2024.jsonl": "solution",
    "marco_o1_v1_cot_demo.jsonl.gz": "response",
}


def flags(found: Diagnosis) -> list[str]:
    return [name for name in ("loop", "over_reflection", "instruction_failure", "no_answer") if getattr(found, name)]


@pytest.mark.parametrize(("name", "field"), GOOD.items())
def test_no_false_alarm_on_real_solutions(name: str, field: str) -> None:
    texts = [row[field] for row in rows(name)]
    assert texts
    assert [(text[:80], flags(diagnose(text))) for text in texts if flags(diagnose(text))] == []
    assert not any(diagnose(text, finish_reason="length", answered=True).loop for text in texts)


def test_real_long_chains_that_never_answer_are_loops() -> None:
    chains = rows("sky_t1_long_cot.jsonl.gz")
    unboxed = [r["response"] for r in chains if not r["correct"] and "\\boxed" not in r["response"]]
    assert sum(diagnose(text).loop for text in unboxed) >= 47
    others = [r["response"] for r in chains if r["correct"] or "\\boxed" in r["response"]]
    assert [text[:80] for text in others if diagnose(text).loop] == []


ENGLISH = "Let me count the apples again, because the number of apples that are left should not change. "
CHINESE = "让我们再数一遍苹果，因为剩下的苹果数量不应该改变。"
JAPANESE = "もう一度りんごを数えます。残りのりんごの数は変わらないはずです。"
THAI = "ลองนับแอปเปิลอีกครั้งเพราะจำนวนที่เหลือไม่ควรเปลี่ยน"


@pytest.mark.parametrize("sentence", [ENGLISH, CHINESE, JAPANESE, THAI, "ab", "!"])
def test_a_sentence_without_end_is_a_loop_in_every_script(sentence: str) -> None:
    assert diagnose(sentence * (2_000 // len(sentence) + 1)).loop
    # A short text loops only if it was cut while it did, and mid-sentence is no way out.
    short = sentence * max(12, 60 // len(sentence))
    assert diagnose(short, finish_reason="length").loop
    assert diagnose(short[: -len(sentence) // 3 - 1], finish_reason="length").loop
    assert not diagnose(short).loop
    assert not diagnose(sentence * 3, finish_reason="length").loop
    assert not diagnose("It is 10000000", finish_reason="length").loop


@pytest.mark.parametrize("first", [0x4E00, 0x3041, 0x0E01])
def test_words_without_spaces_are_not_one_token(first: int) -> None:
    """Varied text is no loop, and its repetition shows at the level of characters."""
    rng = random.Random(0)
    words = ["".join(chr(first + rng.randrange(40)) for _ in range(3)) for _ in range(900)]
    assert not diagnose("".join(words)).loop
    assert diagnose("".join(words[:200] + words[:200] * 4)).loop


def test_over_reflection_needs_doubts_and_no_answer() -> None:
    doubts = " ".join(f"Wait, maybe {n} is wrong. Alternatively {n + 1} apples." for n in range(9))
    assert flags(diagnose(doubts)) == ["over_reflection", "instruction_failure", "no_answer"]
    assert flags(diagnose(f"{doubts} The answer is: \\boxed{{4}}")) == []
    assert flags(diagnose(doubts, answered=True)) == []
    assert flags(diagnose("The waiter waits. " * 20, answered=False)) == ["instruction_failure", "no_answer"]


@pytest.mark.parametrize("language", MARKERS)
def test_every_language_has_its_markers(language: str) -> None:
    marker = MARKERS[language][0]
    text = "。".join(f"{marker} {n}" for n in range(8)) if language in ("zh", "ja") else f"{marker}, so. " * 8
    assert diagnose(text, answered=False).over_reflection


@pytest.mark.parametrize(
    ("text", "finish_reason", "expected"),
    [
        ("Bonjour le monde", "stop", []),
        ("", "stop", ["instruction_failure", "no_answer"]),
        ("<think>I add", "stop", ["instruction_failure", "no_answer"]),
        ("<think>I add</think> ", "stop", ["instruction_failure", "no_answer"]),
        ("<think>I add</think> Bonjour", "stop", []),
        ("I add 3 and", "length", ["instruction_failure", "no_answer"]),
        ("I add. The answer is \\boxed{7} and", "length", []),
    ],
)
def test_instruction_failure(text: str, finish_reason: str, expected: list[str]) -> None:
    assert flags(diagnose(text, finish_reason=finish_reason)) == expected


@given(
    st.text(max_size=60), st.integers(1, 80), st.sampled_from(["stop", "length", "?"]), st.sampled_from([None, True])
)
def test_no_text_raises(text: str, times: int, finish_reason: str, answered: bool | None) -> None:
    found = diagnose(text * times, finish_reason=finish_reason, answered=answered)
    assert found.instruction_failure or not found.no_answer
    assert not found.over_reflection or found.no_answer
    diagnose("\ud800" + text)


@pytest.mark.timed
@pytest.mark.parametrize("kind", ["words", "characters", "one word", "loop"])
def test_150_kb_take_no_longer_than_counting_pairs_of_letters_twice(kind: str) -> None:
    """The goal is 20 ms on an idle machine, to which a test on a shared one cannot hold it."""
    rng = random.Random(0)
    vocabulary = ["".join(rng.choices("abcdefghij", k=rng.randint(2, 9))) for _ in range(4_000)]
    words = " ".join(rng.choices(vocabulary, k=30_000))[:150_000]
    text = {
        "words": words,
        "characters": "".join(chr(0x4E00 + rng.randrange(2_000)) for _ in range(50_000)),
        "one word": "a" * 150_000,
        "loop": (ENGLISH * 2_000)[:150_000],
    }[kind]
    assert len(text.encode()) == 150_000
    # Side by side, because how fast a shared machine is changes from second to second.
    pairs = [(cpu(lambda: diagnose(text)), cpu(lambda: Counter(pairwise(words)))) for _ in range(15)]
    diagnosed, counted = map(min, zip(*pairs, strict=True))
    assert diagnosed < 2 * counted


def cpu(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def test_it_is_public_and_loads_when_asked_for() -> None:
    assert cotree.diagnose is diagnose
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = cotree.nothing  # type: ignore[attr-defined]
