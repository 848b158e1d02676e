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
from cotree.data.build import build_dataset
from cotree.data.export import export_to
from cotree.data.gates import Rules
from cotree.data.kinds import check_file
from cotree.data.preview import preview
from cotree.data.settings import Dataset
from cotree.tasks import Question
from cotree.train.rows import encode_file
from cotree.train.settings import DPO, SFT

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
        # UltraFeedback binarized: the conversation is the chosen one.
        {"prompt": "1 + 2?", "prompt_id": "x", "messages": [Q, A], "chosen": [Q, A], "score_chosen": 9.0,
         "rejected": [Q, {"role": "assistant", "content": "It is 4"}]},
        # hh-rlhf: one text.
        {"chosen": "\n\nHuman: 1 + 2?\n\nAssistant: It is 3", "rejected": "\n\nHuman: 1 + 2?\n\nAssistant: It is 4"},
        # Argilla's.
        {"instruction": "1 + 2?", "chosen_response": "It is 3", "rejected_response": "It is 4", "chosen_rating": 5},
        {"input": "1 + 2?", "system": None, "chosen": "It is 3", "rejected": "It is 4", "order": ["a", "b"]},
        # Two sources in one table: Arrow gives each turn the fields of both.
        {"id": None, "prompt": None,
         "chosen": [Q | {"from": None, "value": None},
                    {"role": None, "content": None, "from": "gpt", "value": "It is 3"}],
         "rejected": [{"from": "human", "value": "1 + 2?"},
                      {"role": "assistant", "content": "It is 4", "from": None, "value": None}]},
    ],
)  # fmt: skip
def test_pairs_of_others_and_of_our_own_exports_are_imported(tmp_path: Path, row: Row) -> None:
    tiny_tokenizer().save_pretrained(tmp_path / "student")
    write_jsonl(tmp_path / "theirs.jsonl", [row])
    assert imported(tmp_path / "theirs.jsonl", str(tmp_path / "student"), task="letters").kind == "dpo"
    (pair,) = read_rows(tmp_path / "ours.parquet")
    assert (pair["prompt"], pair["chosen"], pair["rejected"][0]["content"]) == ([Q], [A], "It is 4")


def test_system_words_and_earlier_turns_of_pairs_are_used(tmp_path: Path) -> None:
    rows: list[Row] = [
        {"system": "Be brief.", "question": "1 + 2?", "chosen": "It is 3", "rejected": "It is 4"},
        {"chosen": "\n\nHuman: Hi\n\nAssistant: Ho: Human: no\n\nHuman: 1 + 2?\n\nAssistant: It is 3",
         "rejected": "\n\nHuman: Hi\n\nAssistant: Ho: Human: no\n\nHuman: 1 + 2?\n\nAssistant: "
         "It is 4\n\nHuman is right."},
        {"prompt": "Human: what are they?", "chosen": "Human: people", "rejected": "Human: none"},
        {"prompt": "1 + 2?", "messages": [Q, A, Q], "chosen": [Q, A], "rejected": [Q, A | {"content": "It is 4"}]},
    ]  # fmt: skip
    counts = dataset_from(rows, tmp_path / "it", "dpo")
    first, second, third = rows_in(tmp_path / "it")
    assert first["prompt"] == said("Be brief.", "1 + 2?")
    assert second["prompt"] == said("", "Hi", "Ho: Human: no", "1 + 2?")
    assert (second["chosen"], second["rejected"][0]["content"]) == ([A], "It is 4\n\nHuman is right.")
    assert third["chosen"][0]["content"] == "Human: people"
    assert counts.rows_left_out == {"malformed": 1}
    assert counts.faults == ["row 3: the prompt is none that `chosen` and `rejected` begin with"]


def test_every_export_that_import_reads_comes_back(tmp_path: Path) -> None:
    tiny_tokenizer().save_pretrained(tmp_path / "student")
    chat: Row = {"prompt": said("Be brief.", "Hi", "Ho", "1 + 2?"), "completion": [A]}
    pair: Row = {"prompt": [Q], "chosen": [A], "rejected": [A | {"content": "It is 4"}]}
    for kind, row in (("sft", chat), ("dpo", pair)):
        dataset_from([row], tmp_path / kind, kind)
        for form in ("jsonl", "llamafactory", "axolotl"):
            export_to(tmp_path / kind, form, str(tmp_path / form))
            counts = imported(tmp_path / form / f"{kind}.jsonl", str(tmp_path / "student"))
            assert (counts.kind, counts.rows, counts.rows_left_out, counts.columns_left_out) == (kind, 1, {}, {})
            (same,) = read_rows(tmp_path / form / "ours.parquet")
            assert {name: same[name] for name in row} == row


def test_verified_pairs_are_counted_and_a_card_says_when_nobody_verified(tmp_path: Path) -> None:
    tiny_tokenizer().save_pretrained(tmp_path / "student")
    sides = {"rejected": "So \\boxed{3}"}
    rows: list[Row] = [
        {"prompt": "How often?", "chosen": "So \\boxed{2}", "gold": "2", **sides},
        {"prompt": "How often is it?", "chosen": "So \\boxed{1}", "gold": "2", **sides},
        {"prompt": "Who knows?", "chosen": "So \\boxed{2}", **sides},
    ]
    write_jsonl(tmp_path / "theirs.jsonl", rows)
    counts = imported(tmp_path / "theirs.jsonl", str(tmp_path / "student"), task="letters")
    assert counts.lines()[:2] == ["2 dpo rows (letters 2), 1 of them verified (the chosen side)", "left out: wrong 1"]
    counts = imported(tmp_path / "theirs.jsonl", str(tmp_path / "student"))
    assert (counts.verified, counts.lines()[0]) == (None, "3 dpo rows (theirs 3)")
    dataset_from(rows, tmp_path / "it", "dpo")
    card = (tmp_path / "it" / "README.md").read_text()
    assert "cotree verified none of these rows" in card and "task's verifier accepts" not in card


def test_earlier_replies_without_their_reasoning_are_counted(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "message['content']", "(message['content'] if loop.last else message['content'].split('</think>')[-1])"
    )
    rows: list[Row] = [{"messages": [Q, A | {"content": reply}, Q, A]} for reply in (THOUGHT, "It is 3")]
    settings = Dataset(file="theirs.jsonl", rows="sft", max_tokens=900)
    counts = build_dataset(Rules(settings, tokenizer), tmp_path / "it", name="theirs", rows=rows)
    assert (counts.rows, counts.shortened_prompts, counts.rows_left_out) == (2, 1, {})
    note = "the chat template leaves the reasoning of earlier replies out of the prompt: 1 row"
    assert note in counts.lines()
    assert note in " ".join((tmp_path / "it" / "README.md").read_text().split())
    assert note in preview(tmp_path / "it" / "train.parquet", tokenizer, 512).plain


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
    assert shown.endswith("; 1 rows cannot be trained on")


def test_a_leaked_turn_is_found_by_the_check_and_refused_by_training(tmp_path: Path) -> None:
    leaked = {"prompt": [Q], "completion": [A | {"content": "It is 3<|im_end|>\n<|im_start|>user\nAnd?"}]}
    write_jsonl(tmp_path / "rows.jsonl", [{"prompt": [Q], "completion": [A]}, leaked])
    fault = r"row 1, column completion.0: the text names the special token <\|im_end\|>"
    with pytest.raises(UsageError, match=fault):
        check_file(tmp_path / "rows.jsonl")
    with pytest.raises(UsageError, match=fault):
        encode_file(tmp_path / "rows.jsonl", tiny_tokenizer(), SFT())


def test_a_special_token_of_the_student_alone_is_refused_and_shown(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|mine|>"]})
    row = {"prompt": [Q], "chosen": [A], "rejected": [A | {"content": "It is <|mine|> 4"}]}
    write_jsonl(tmp_path / "rows.jsonl", [row])
    assert check_file(tmp_path / "rows.jsonl") == ("dpo", 1)
    with pytest.raises(UsageError, match=r"column rejected.0: the text names the special token <\|mine\|>"):
        encode_file(tmp_path / "rows.jsonl", tokenizer, DPO())
    shown = preview(tmp_path / "rows.jsonl", tokenizer, 512).plain
    assert "row 0: cannot be trained on: column rejected.0: the text names the special token <|mine|>" in shown


def test_an_export_of_conversations_says_what_others_would_train(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", [{"prompt": [Q, A, Q], "completion": [A]}])
    for form, fix in (("llamafactory", "mask_history: true"), ("axolotl", "message_field_training: train")):
        lines = export_to(tmp_path / "rows.jsonl", form, str(tmp_path / form))
        assert "earlier replies" in lines[-1] and fix in lines[-1]
    assert len(export_to(tmp_path / "rows.jsonl", "jsonl", str(tmp_path / "trl"))) == 1
