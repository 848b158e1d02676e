"""Messages to tokens: one rendering, a prompt that is a prefix, an end of turn that is learnt, nothing cut."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.tiny_student import TEMPLATE, dpo_row, message, sft_row, tiny_tokenizer
from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerFast

from cotree.base.errors import UsageError
from cotree.models.encode import (
    EncodedChain,
    RowError,
    encode_chains,
    encode_dpo,
    encode_each,
    encode_sft,
    prefix_tokens,
    render_prompt,
    shortens_replies,
    template_hash,
)

END = 2  # <|im_end|>


def test_a_chain_is_the_templates_rendering_through_the_end_of_turn(tokenizer: PreTrainedTokenizerFast) -> None:
    prompt = [*message("system", "Be brief."), *message("user", "1 + 1?")]
    (chain,) = encode_chains(tokenizer, [(prompt, message("assistant", "It is 2."))])
    assert tokenizer.decode(chain.prompt) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n1 + 1?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.decode(chain.completion) == "It is 2.<|im_end|>"
    assert chain.completion[-1] == END
    whole = tokenizer.apply_chat_template([*prompt, *message("assistant", "It is 2.")], return_dict=False)
    assert chain.prompt + chain.completion == whole[:-1]  # all but the newline after the end of turn
    assert chain.tokens == chain.longest_sequence == len(whole) - 1


def test_a_template_with_nothing_after_the_end_of_turn_is_kept_whole() -> None:
    tokenizer = tiny_tokenizer(newline=False)
    (chain,) = encode_chains(tokenizer, [(message("user", "a"), message("assistant", "b"))])
    whole = tokenizer.apply_chat_template([*message("user", "a"), *message("assistant", "b")], return_dict=False)
    assert chain.prompt + chain.completion == whole


def broken(template: str) -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    ("template", "fault"),
    [
        (
            "{{ messages | length }}{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}",
            "row 0: under this chat template the prompt's tokens are not a prefix",
        ),
        (
            "{% for m in messages %}<|im_start|>{{ m['content'] }}{% endfor %}",
            "does not end an assistant turn with a special token",
        ),
        ("{% for m in messages %}{{ m['content'] }}\n{% endfor %}", "does not end an assistant turn"),
    ],
)
def test_templates_that_would_train_something_else_are_refused(template: str, fault: str) -> None:
    with pytest.raises(UsageError, match=fault):
        encode_chains(broken(template), [(message("user", "a"), message("assistant", "b"))])


@pytest.mark.parametrize("completion", [[], message("user", "b"), message("assistant", "b") * 2])
def test_a_completion_is_one_assistant_message(
    completion: list[dict[str, str]], tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(UsageError, match="row 0: a completion must be one assistant message"):
        encode_chains(tokenizer, [(message("user", "a"), completion)])


def test_long_rows_are_left_out_and_counted_never_cut(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [sft_row(index) for index in range(9)]
    every = encode_sft(tokenizer, rows, 10_000)
    assert (len(every.rows), every.too_long) == (9, 0)
    limit = sorted(chain.tokens for chain in every.rows)[4]
    some = encode_sft(tokenizer, rows, limit)
    assert some.rows == [chain for chain in every.rows if chain.tokens <= limit]
    assert some.too_long == 9 - len(some.rows) > 0

    pairs = [dpo_row(index) for index in range(9)]
    all_pairs = encode_dpo(tokenizer, pairs, 10_000)
    limit = sorted(pair.longest_sequence for pair in all_pairs.rows)[4]
    kept = encode_dpo(tokenizer, pairs, limit)
    assert kept.rows == [
        pair for pair in all_pairs.rows if len(pair.prompt) + max(len(pair.chosen), len(pair.rejected)) <= limit
    ]
    assert kept.too_long == 9 - len(kept.rows) > 0


def test_pairs_know_their_shared_prefix(tokenizer: PreTrainedTokenizerFast) -> None:
    (pair,) = encode_dpo(tokenizer, [dpo_row(2)], 512).rows
    assert pair.chosen[: pair.prefix] == pair.rejected[: pair.prefix]
    assert pair.chosen[pair.prefix] != pair.rejected[pair.prefix]
    assert tokenizer.decode(pair.chosen[: pair.prefix]).startswith("Firstly, I need to break down this task. So So")
    assert pair.tokens == 2 * len(pair.prompt) + len(pair.chosen) + len(pair.rejected)
    same: dict[str, Any] = dpo_row(2) | {"rejected": dpo_row(2)["chosen"]}
    with pytest.raises(UsageError, match="row 1: chosen begins with all of rejected's tokens"):
        encode_dpo(tokenizer, [dpo_row(1), same], 512)


@given(st.lists(st.integers(0, 2)), st.lists(st.integers(0, 2)), st.lists(st.integers(0, 2)))
def test_prefix_tokens(shared: list[int], left: list[int], right: list[int]) -> None:
    count = prefix_tokens(shared + left, shared + right)
    assert count >= len(shared)
    assert (shared + left)[:count] == (shared + right)[:count]
    assert (shared + left)[: count + 1] != (shared + right)[: count + 1] or left == right
    assert prefix_tokens(left, left) == len(left)


def test_the_template_hash_tells_tokenizers_apart(tokenizer: PreTrainedTokenizerFast) -> None:
    assert template_hash(tokenizer) == template_hash(tiny_tokenizer())
    same_size = tiny_tokenizer()
    same_size.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split("1", "isolated")
    others = [tiny_tokenizer(newline=False), tiny_tokenizer(ascii_only=True), same_size]
    assert len({template_hash(each) for each in [tokenizer, *others]}) == 4


def test_counting_tokens_needs_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, cotree.models.encode; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize(
    ("template", "text", "kept"),
    [
        (TEMPLATE.replace("NEWLINE", "''").replace("message['content']", "message['content'] | trim"), " 7\n", True),
        (TEMPLATE.replace("NEWLINE", "''").replace("message['content']", "message['content'] | upper"), "So 7", False),
        (TEMPLATE.replace("NEWLINE", "''").replace("message['content']", "'Hm. ' + message['content']"), "7", False),
    ],
)
def test_a_row_that_the_template_would_change_is_none(template: str, text: str, kept: bool) -> None:
    (chain,) = encode_each(broken(template), [(message("user", "3 + 4?"), message("assistant", text))])
    assert isinstance(chain, EncodedChain) == kept
    if isinstance(chain, RowError):
        assert chain.reason == "template_changes" and "would be trained as" in str(chain)


def published(name: str) -> PreTrainedTokenizerFast:
    """The tiny tokenizer with a published chat template, of which TRL has copies, and its special tokens."""
    (folder,) = find_spec("trl").submodule_search_locations  # type: ignore[union-attr, misc]
    tokenizer = broken((Path(folder) / "chat_templates" / f"{name}.jinja").read_text("utf-8"))
    marks = ("start_header_id|>", "end_header_id|>", "eot_id|>", "｜User｜>", "｜Assistant｜>", "｜end▁of▁sentence｜>")
    named = ["<" + mark if mark.startswith("｜") else "<|" + mark for mark in marks]
    tokenizer.add_special_tokens({"additional_special_tokens": named})
    return tokenizer


REPLIES = {
    "plain": "The answer is 7.",
    "reasoned": "<think>\nidea\n</think>\n\nThe answer is 7.",
    "late": "Let me see. <think>\nidea\n</think>\n\nThe answer is 7.",
    "twice": "<think>\na\n</think>\n\nSo <think>\nb\n</think>\n\n7",
    "unfinished": "<think>\nunfinished",
}


@pytest.mark.parametrize("reply", REPLIES)
@pytest.mark.parametrize(
    "name", ["qwen3", "qwen3_instruct_2507", "qwen3_5_think", "qwen3_8", "deepseek_r1_distill", "llama3_2"]
)
def test_published_templates_train_what_the_student_is_asked_for_in_the_rows_own_words(name: str, reply: str) -> None:
    tokenizer, text = published(name), REPLIES[reply]
    prompt = message("user", "3 + 4?")
    (chain,) = encode_each(tokenizer, [(prompt, message("assistant", text))])
    asked = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True, date_string="26 Jul 2024")
    opens = asked.endswith("<think>\n")
    if opens and reply == "plain":
        assert isinstance(chain, RowError) and "opens <think>, which the completion does not close" in str(chain)
        return
    assert isinstance(chain, EncodedChain)
    own = tokenizer.decode(chain.completion[:-1])
    assert tokenizer.decode(chain.prompt) == asked
    assert own == (text.removeprefix("<think>\n") if opens else text)
    assert tokenizer.decode(chain.completion[-1:]) in ("<|im_end|>", "<|eot_id|>", "<｜end▁of▁sentence｜>")


def test_a_pair_may_have_a_side_with_and_one_without_reasoning() -> None:
    row = {"prompt": message("user", "3 + 4?"), "chosen": message("assistant", REPLIES["plain"]),
           "rejected": message("assistant", REPLIES["unfinished"]), "rejected_finished": False}  # fmt: skip
    tokenizer = published("qwen3")
    (pair,) = encode_dpo(tokenizer, [row], 512).rows
    assert tokenizer.decode(pair.prompt).endswith("<|im_start|>assistant\n")
    assert tokenizer.decode(pair.chosen) == "The answer is 7.<|im_end|>"
    assert tokenizer.decode(pair.rejected) == "<think>\nunfinished"


def test_earlier_replies_may_lose_their_reasoning_and_nothing_else() -> None:
    prompt = [*message("user", "1 + 2?"), *message("assistant", "<think>\nI add.\n</think>\n\nIt is 3.")]
    prompt += message("user", "And 4?")
    assert shortens_replies(published("qwen3"), prompt)
    assert not shortens_replies(published("qwen3_instruct_2507"), prompt)
    assert not shortens_replies(published("qwen3"), prompt[:1])
    (chain,) = encode_each(published("qwen3"), [(prompt, message("assistant", "7"))])
    assert isinstance(chain, EncodedChain)
    drops = "{% set earlier = messages[:-1] | rejectattr('role', 'equalto', 'assistant') | list %}"
    drops += "{% set messages = earlier + messages[-1:] %}"
    (chain,) = encode_each(broken(drops + TEMPLATE.replace("NEWLINE", "''")), [(prompt, message("assistant", "7"))])
    assert isinstance(chain, RowError) and "does not print the assistant's message" in str(chain)


def test_a_question_that_the_template_does_not_print_is_no_row() -> None:
    prompt = [*message("system", "Be brief."), *message("user", "3 + 4?")]
    drops = "{% set messages = messages | rejectattr('role', 'equalto', 'system') | list %}"
    (chain,) = encode_each(broken(drops + TEMPLATE.replace("NEWLINE", "''")), [(prompt, message("assistant", "7"))])
    assert isinstance(chain, RowError) and "does not print the system's message" in str(chain)


@pytest.mark.parametrize(
    "printed",
    [
        "{{ strftime_now('%d %b %Y') }}",
        "{% set form = '%d %b %Y' %}{{ strftime_now(form) }}",
        "{% macro day(form) %}{{ strftime_now(form + ' %Y') }}{% endmacro %}{{ day('%d %b') }}",
        "{{ strftime_now(format='%-d') ~ ' ' ~ strftime_now('%b') + ' ' + (strftime_now('%Y') | int) | string }}",
    ],
)
def test_todays_date_is_the_same_in_every_row_and_run(printed: str) -> None:
    dated = broken(printed + TEMPLATE.replace("NEWLINE", "''"))
    (chain,) = encode_chains(dated, [(message("user", "a"), message("assistant", "b"))])
    assert dated.decode(chain.prompt).startswith("26 Jul 2024<|im_start|>user")
    assert template_hash(dated) == template_hash(dated)
    other = broken(printed.replace("%b", "%m") + TEMPLATE.replace("NEWLINE", "''"))
    assert template_hash(dated) != template_hash(other)


@pytest.mark.parametrize("name", ["llama3_1", "llama3_2"])
def test_llamas_templates_print_the_date_that_they_have_for_an_unknown_day(name: str) -> None:
    assert "Today Date: 26 Jul 2024\n\n" in render_prompt(published(name), message("user", "a"))


@pytest.mark.parametrize("start", ["\n", "  {% if true %}x{% endif %}", ""])
def test_a_fixed_date_changes_no_white_space(start: str) -> None:
    plain = broken(start + TEMPLATE.replace("NEWLINE", "''"))
    dated = broken(f"{start}{plain.chat_template.removeprefix(start)}{{# strftime_now #}}")
    assert render_prompt(dated, message("user", "a")) == render_prompt(plain, message("user", "a"))
