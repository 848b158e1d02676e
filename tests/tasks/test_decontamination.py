"""Planted repetitions are found through any formatting, shared prompts are not taken for them."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from cotree.tasks import Question, task
from cotree.tasks.decontamination import contaminated

PROMPT = "Please reason step by step, and put your final answer within \\boxed{}."


def ask(name: str, *texts: str, prompt: str = PROMPT) -> list[Question]:
    return [
        Question(f"{name}-{i}", name, ({"role": "user", "content": f"{text}\n{prompt}"},), "1")
        for i, text in enumerate(texts)
    ]


def words(letter: str, *counts: int) -> list[str]:
    return [" ".join(f"{letter}{count}x{i}" for i in range(count)) for count in counts]


@given(st.integers(13, 30), st.integers(0, 17), st.randoms(use_true_random=False))
def test_thirteen_words_in_a_row_are_found_and_twelve_are_not(length: int, at: int, rng: random.Random) -> None:
    target = [f"e{i}" for i in range(30)]
    at = min(at, 30 - length)
    run = [
        rng.choice((str.upper, str.title, str))(f"{rng.choice(('', '$', '**'))}{word},")
        for word in target[at:][:length]
    ]
    train = ask("math", f"t1 t2 {' '.join(run)} t3", f"u1 {' '.join(run[:12])} u2")
    held_out = ask("math500", *words("a", 20), " ".join(target), "b c")
    assert contaminated(train, held_out) == {"math-0": "math500-1"}
    assert contaminated(train, held_out, generated=["math"]) == {}


@given(st.lists(st.text(max_size=40), min_size=1, max_size=8))
def test_every_question_repeats_itself_and_foreign_words_repeat_nothing(texts: list[str]) -> None:
    held_out = ask("eval", *texts)
    assert contaminated(held_out, held_out, generated=["eval"]).keys() == {q.id for q in held_out}
    assert contaminated(ask("train", "zq zx", "zy zw " * 20), ask("eval", *(f"a{i} b" for i in range(9)))) == {}


def test_the_prompt_around_a_question_is_no_part_of_it() -> None:
    # The prompt has 12 words: with the last word of the question it would be a 13-gram.
    train = ask("math", "How much is the rest in dollars?", "Name the largest prime below forty")
    held_out = ask("math500", "Tell me Ann's wage in dollars?", "Say the smallest of all primes", "Count sheep")
    assert contaminated(train, held_out) == {}
    again = ask("other", "Count sheep!", "Draw cows", prompt="Answer with a number.")
    assert contaminated(again, held_out) == {"other-0": "math500-2"}


def test_a_question_inside_another_text_is_found_without_spaces_between_words() -> None:
    target = "小明有三个苹果，他又买了五个苹果，然后吃掉了两个，现在一共有多少个？"
    train = ask("mine", f"请回答下面的问题。{target}谢谢。", "小红有三支铅笔，送给别人两支，还剩几支？")
    assert contaminated(train, ask("eval", target, "另一个问题")) == {"mine-0": "eval-0"}


def test_generated_splits_share_templates_and_not_questions() -> None:
    for name in ("arithmetic", "letters"):
        train, test = task(name).questions("train"), task(name).questions("test")
        assert contaminated(train, test, generated=[name]) == {}
        assert len(contaminated(train, train, generated=[name])) == len(train)
