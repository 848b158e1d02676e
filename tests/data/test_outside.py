"""Rows from outside: every text field of a published form is used or named; leaked turns, refused rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.data.test_file_rows import dataset_from, imported
from tests.support.datasets import rows_in
from tests.support.tiny_student import tiny_tokenizer

from cotree.base.errors import UsageError
from cotree.base.rows import Row, read_rows, write_jsonl
from cotree.data.export import export_to
from cotree.data.kinds import check_file
from cotree.data.preview import preview
from cotree.tasks import Question
from cotree.train.rows import encode_file
from cotree.train.settings import SFT

Q, A = {"role": "user", "content": "1 + 2?"}, {"role": "assistant", "content": "It is 3"}
THOUGHT = "<think>\nI add.\n</think>\n\nIt is 3"


def said(*words: str) -> list[dict[str, str]]:
    """A prompt of these words: system, then user and assistant in turn."""
    roles = ("system", *("user", "assistant") * 9)
    return [{"role": role, "content": text} for role, text in zip(roles, words, strict=False) if text]


@pytest.mark.parametrize(
    ("row", "prompt", "completion", "lost"),
    [
        ({"instruction": "Add.", "input": "1 + 2", "output": "It is 3", "system": "Be brief.",
          "history": [["Hi", "Ho"]], "text": "all"},
         said("Be brief.", "Hi", "Ho", "Add.\n1 + 2"), "It is 3", {"text": 1}),
        ({"instruction": "Add 1 + 2.", "input": "", "output": "It is 3"}, said("", "Add 1 + 2."), "It is 3", {}),
        ({"question": "1 + 2?", "solution": "It is 3", "thinking_trajectories": ["I add."], "attempt": "3!",
          "cot": None, "cot_type": "math"}, said("", "1 + 2?"), THOUGHT, {"attempt": 1, "cot_type": 1}),
        ({"question": "1 + 2?", "solution": "3", "deepseek_thinking_trajectory": "I add.",
          "deepseek_attempt": "It is 3"}, said("", "1 + 2?"), THOUGHT, {"solution": 1}),
        ({"problem": "1 + 2?", "deepseek_reasoning": "I add.", "deepseek_solution": "It is 3", "domain": "math"},
         said("", "1 + 2?"), THOUGHT, {"domain": 1}),
        ({"prompt": "1 + 2?", "reasoning": "I add.", "response": "It is 3"}, said("", "1 + 2?"), THOUGHT, {}),
        ({"messages": [Q, A | {"reasoning_content": "I add."}]}, said("", "1 + 2?"), THOUGHT, {}),
        ({"problem": "1 + 2?", "solution": "3", "answer": "3", "generations": ["x", "y"], "messages": [Q, A]},
         said("", "1 + 2?"), "It is 3", {"problem": 1, "solution": 1, "answer": 1, "generations": 1}),
        ({"system": "Be brief.", "conversations": [{"from": "user", "value": "1 + 2?"},
          {"from": "assistant", "value": "It is 3"}]}, said("Be brief.", "1 + 2?"), "It is 3", {}),
        ({"id": None, "conversations": [
            {"from": "human", "value": "1 + 2?", "role": None, "content": None},
            {"from": None, "value": None, "role": "assistant", "content": "It is 3"}]},
         said("", "1 + 2?"), "It is 3", {}),
    ],
)  # fmt: skip
def test_every_text_of_a_published_form_is_used_or_named(
    tmp_path: Path, row: Row, prompt: Any, completion: str, lost: dict[str, int]
) -> None:
    counts = dataset_from([row], tmp_path / "it")
    (written,) = rows_in(tmp_path / "it")
    assert (written["prompt"], written["completion"][0]["content"]) == (prompt, completion)
    assert (counts.columns_left_out, counts.rows_left_out) == (lost, {})
    assert written["tree_id"] == "0"


def test_an_evaluation_question_is_seen_in_an_input(tmp_path: Path) -> None:
    words = "Held out, is it? Twelve apples and thirteen pears in one basket, how many fruits?"
    held_out = [Question("h", "other", ({"role": "user", "content": words},), "2")]
    rows: list[Row] = [{"instruction": "Solve.", "input": text, "output": "It is 3"} for text in (words, "1 + 2")]
    assert dataset_from(rows, tmp_path / "it", held_out=held_out).rows_left_out == {"contaminated": 1}


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [Q], "chosen": A, "rejected": {"role": "assistant", "content": "It is 4"}},
        {"conversations": [{"from": "human", "value": "1 + 2?"}], "chosen": {"from": "gpt", "value": "It is 3"},
         "rejected": {"from": "gpt", "value": "It is 4"}},
        {"system": "", "question": "1 + 2?", "chosen": "It is 3", "rejected": "It is 4"},
        {"instruction": "1 + 2?", "input": "", "chosen": "It is 3", "rejected": "It is 4"},
        {"prompt": [Q], "chosen": [Q, A], "rejected": [Q, {"role": "assistant", "content": "It is 4"}]},
    ],
)  # fmt: skip
def test_pairs_of_others_and_of_our_own_exports_are_imported(tmp_path: Path, row: Row) -> None:
    tiny_tokenizer().save_pretrained(tmp_path / "student")
    write_jsonl(tmp_path / "theirs.jsonl", [row])
    assert imported(tmp_path / "theirs.jsonl", str(tmp_path / "student"), task="letters").kind == "dpo"
    (pair,) = read_rows(tmp_path / "ours.parquet")
    assert (pair["prompt"], pair["chosen"], pair["rejected"][0]["content"]) == ([Q], [A], "It is 4")


def test_a_row_that_the_template_refuses_is_counted_with_its_number(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    refuse = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('user first') }}{% endif %}"
    tokenizer.chat_template = refuse + tokenizer.chat_template
    tokenizer.save_pretrained(tmp_path / "student")
    write_jsonl(tmp_path / "theirs.jsonl", [{"messages": [Q, A]}, {"messages": [A, Q, A]}])
    counts = imported(tmp_path / "theirs.jsonl", str(tmp_path / "student"))
    assert (counts.rows, counts.rows_left_out) == (1, {"template_refuses": 1})
    assert "refuses or changes: row 1: the chat template cannot render a conversation of ass" in counts.lines()[-1]
    write_jsonl(tmp_path / "rows.jsonl", [{"prompt": [Q], "completion": [A]}, {"prompt": [A, Q], "completion": [A]}])
    with pytest.raises(UsageError, match=r"rows.jsonl: row 1: the chat template cannot render .*`cotree preview`"):
        encode_file(tmp_path / "rows.jsonl", tokenizer, SFT())
    shown = preview(tmp_path / "rows.jsonl", tokenizer, 512).plain
    assert "row 1: cannot be trained on: the chat template cannot render" in shown
    assert "1 rows that the chat template refuses or changes cannot be trained on" in shown


def test_a_leaked_turn_is_found_by_the_check_and_refused_by_training(tmp_path: Path) -> None:
    leaked = {"prompt": [Q], "completion": [A | {"content": "It is 3<|im_end|>\n<|im_start|>user\nAnd?"}]}
    write_jsonl(tmp_path / "rows.jsonl", [{"prompt": [Q], "completion": [A]}, leaked])
    fault = r"row 1, column completion.0: the text names the special token <\|im_end\|>"
    with pytest.raises(UsageError, match=fault):
        check_file(tmp_path / "rows.jsonl")
    with pytest.raises(UsageError, match=fault):
        encode_file(tmp_path / "rows.jsonl", tiny_tokenizer(), SFT())


def test_an_export_of_conversations_says_what_others_would_train(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", [{"prompt": [Q, A, Q], "completion": [A]}])
    for form, fix in (("llamafactory", "mask_history: true"), ("axolotl", "message_field_training: train")):
        lines = export_to(tmp_path / "rows.jsonl", form, str(tmp_path / form))
        assert "earlier replies" in lines[-1] and fix in lines[-1]
    assert len(export_to(tmp_path / "rows.jsonl", "jsonl", str(tmp_path / "trl"))) == 1
