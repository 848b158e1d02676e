"""Rows of files and of the hub: ours, TRL's types, long chains of others; gated, verified, what is left out named."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from tests.support.datasets import dataset_of, rows_in
from tests.support.tiny_student import tiny_tokenizer
from tests.support.trees import random_tree

from cotree.base.errors import UsageError
from cotree.base.rows import Row, read_rows, write_jsonl
from cotree.data.build import build_dataset, import_file
from cotree.data.file_rows import hub_rows
from cotree.data.gates import DatasetCounts, Rules
from cotree.data.kinds import check_file
from cotree.data.settings import Dataset
from cotree.tasks import Question, task

USER, REPLY = [{"role": "user", "content": "1 + 2?"}], [{"role": "assistant", "content": "It is \\boxed{3}"}]
LONG = "<|begin_of_thought|>I add 1 and 2.<|end_of_thought|> The answer is \\boxed{3}"
LONG_CHAINS: dict[str, Row] = {
    "sky": {
        "system": "Be brief.",
        "conversations": [{"from": "user", "value": "1 + 2?"}, {"from": "assistant", "value": LONG}],
    },
    "sharegpt": {"conversations": [{"from": "human", "value": "1 + 2?"}, {"from": "gpt", "value": LONG}]},
    "openr1": {"messages": [{"role": "user", "content": "1 + 2?"}, {"role": "assistant", "content": LONG}]},
    "plain": {"prompt": "1 + 2?", "response": LONG},
    "problem": {"problem": "1 + 2?", "generation": LONG, "solution": "short"},
}


def dataset_from(rows: list[Row], folder: Path, kind: str = "sft", **settings: Any) -> DatasetCounts:
    """A dataset of rows of a file, for the tiny student."""
    passed = {key: settings.pop(key) for key in ("held_out", "questions_of") if key in settings}
    if "questions_of" in passed:
        settings["questions_of"] = "other"
    wanted = Dataset(file="theirs.jsonl", rows=kind, **{"max_tokens": 900, **settings})
    return build_dataset(Rules(wanted, tiny_tokenizer(), **passed), folder, name="theirs", rows=rows)


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with the tiny student's tokenizer."""
    folder = tmp_path_factory.mktemp("student")
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def imported(source: Path, student: str, **settings: Any) -> DatasetCounts:
    """The counts of an import to `ours.parquet` beside the source."""
    given = {"task": None, "held_out": (), "max_tokens": 900} | settings
    return import_file(source, student, source.parent / "ours.parquet", **given)


@pytest.mark.parametrize("form", LONG_CHAINS)
def test_long_chains_of_others_become_sft_rows(tmp_path: Path, student: str, form: str) -> None:
    with gzip.open(tmp_path / "theirs.jsonl.gz", "wt") as file:
        file.write(json.dumps(LONG_CHAINS[form]))
    counts = imported(tmp_path / "theirs.jsonl.gz", student)
    assert (counts.rows, counts.verified, counts.rows_left_out) == (1, None, {})
    (row,) = read_rows(tmp_path / "ours.parquet")
    assert row["completion"] == [{"role": "assistant", "content": LONG}]
    assert row["prompt"][-1] == {"role": "user", "content": "1 + 2?"}
    assert [m["role"] for m in row["prompt"]] == (["system", "user"] if form == "sky" else ["user"])
    assert check_file(tmp_path / "ours.parquet") == ("sft", 1)
    dataset_from([LONG_CHAINS[form]], tmp_path / "it")
    (same,) = rows_in(tmp_path / "it")
    assert (same["prompt"], same["completion"], same["length_tokens"]) == (
        row["prompt"],
        row["completion"],
        row["length_tokens"],
    )


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_our_own_rows_come_back_as_they_were(tmp_path: Path, kind: str) -> None:
    trees = [random_tree(seed) for seed in range(8)]
    dataset_of(trees, tmp_path / "of trees", kind)
    ours = rows_in(tmp_path / "of trees")
    counts = dataset_from(ours, tmp_path / "of a file", kind)
    assert rows_in(tmp_path / "of a file") == ours
    assert (counts.rows_left_out, counts.columns_left_out, counts.trees) == ({}, {}, 0)
    card = (tmp_path / "of a file" / "README.md").read_text()
    assert "Rows of a file or of the hub" in card and "theirs.jsonl" not in card and "- mcts" not in card


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": USER, "chosen": REPLY, "rejected": [{"role": "assistant", "content": "It is 4"}]},
        {"prompt": "1 + 2?", "chosen": "It is \\boxed{3}", "rejected": "It is 4"},
        {"chosen": [*USER, *REPLY], "rejected": [*USER, {"role": "assistant", "content": "It is 4"}]},
        {
            "prompt": "1 + 2?",
            "chosen": [*USER, *REPLY],
            "rejected": [*USER, {"role": "assistant", "content": "It is 4"}],
        },
    ],
)
def test_preferences_of_trls_types_become_pairs(tmp_path: Path, row: Row) -> None:
    dataset_from([row], tmp_path / "it", "dpo")
    (pair,) = rows_in(tmp_path / "it")
    assert (pair["prompt"], pair["chosen"]) == (USER, REPLY)
    assert pair["rejected"] == [{"role": "assistant", "content": "It is 4"}]
    assert 0 < pair["prefix_tokens"] < min(pair["chosen_tokens"], pair["rejected_tokens"])
    assert (pair["rejected_finished"], pair["tree_id"], pair["task"]) == (True, "0", "theirs")


def test_a_form_of_pairs_whose_columns_are_empty_is_passed_over(tmp_path: Path) -> None:
    theirs = {"prompt": "1 + 2?", "chosen_response": "It is \\boxed{3}", "rejected_response": "It is 4"}
    counts = dataset_from([{**theirs, "chosen": None, "rejected": None}], tmp_path / "it", "dpo")
    assert (counts.rows, rows_in(tmp_path / "it")[0]["chosen"]) == (1, REPLY)


TURNS = [{"role": "user", "content": "Hi there"}, {"role": "assistant", "content": "Hello"}]


@pytest.mark.parametrize(
    ("history", "turns"),
    [
        ([["Hi there", "Hello"]], TURNS),
        (TURNS, TURNS),
        ([{"from": "human", "value": "Hi there"}, {"from": "gpt", "value": "Hello"}], TURNS),
        ([["Hi there", None]], None),
        (["ab", "cd"], None),
        ([["Hi there", "Hello", "Bye"]], None),
        ([["Hi there"]], None),
        ([["Hi there", "Hello"], *TURNS], None),
        ({"Hi there": "Hello"}, None),
        ("ab", None),
        (7, None),
    ],
)
def test_a_history_is_turns_or_pairs_of_texts(tmp_path: Path, history: Any, turns: Any) -> None:
    row = {"instruction": "1 + 2?", "output": "It is \\boxed{3}"}
    counts = dataset_from([row | {"history": history}, row | {"id": 1}], tmp_path / "it")
    prompts = [row["prompt"] for row in rows_in(tmp_path / "it")]
    assert prompts == ([[*TURNS, *USER]] if turns else []) + [USER]
    assert counts.rows_left_out == ({} if turns else {"malformed": 1})
    assert bool(counts.faults) != bool(turns)


def test_what_is_not_kept_of_a_row_is_counted_and_named(tmp_path: Path) -> None:
    reply = {"role": "assistant", "content": "It is \\boxed{3}", "mood": "glad", "name": None}
    rows: list[Row] = [
        {"messages": [*USER, reply], "source": "x", "id": 7, "reward": "high", "value": 0.5, "empty": None},
        {"prompt": USER, "completion": [*REPLY, *REPLY]},
        {"prompt": "1 + 2?", "completion": "It is \\boxed{3}."},
    ]
    counts = dataset_from(rows, tmp_path / "it")
    assert counts.columns_left_out == {"messages.mood": 1, "reward": 1, "source": 1}
    assert counts.rows_left_out == {"malformed": 1}
    assert counts.faults[0].startswith("row 1: column completion: must be exactly one assistant message")
    assert counts.lines()[1:] == [
        "left out: malformed 1",
        f"the first malformed row: {counts.faults[0]}",
        "columns that are not kept, and how many rows have them: messages.mood 1, reward 1, source 1",
    ]
    first, second = rows_in(tmp_path / "it")
    assert (first["tree_id"], first["question_id"], first["value"], first["reward"]) == ("7", "7", 0.5, None)
    assert second["tree_id"] == "2"


def test_rows_of_a_file_pass_the_same_gates(tmp_path: Path) -> None:
    loop = "I add the same two numbers once more. " * 60
    rows: list[Row] = [
        {"prompt": "1 + 2?", "response": "It is 3"},
        {"prompt": "1 + 2?", "response": "It is 3"},
        {"prompt": "1 + 2?", "response": "It is three"},
        {"prompt": "1 + 2?", "response": f"{loop} It is 3"},
        {"prompt": "2 + 2?", "response": "所以答案是四"},
        {"prompt": "2 + 2?", "response": "4<|im_end|>"},
        {"prompt": "2 + 2?", "response": "4 " * 3_000},
        {"prompt": "Held out, is it?", "response": "Yes"},
        {"prompt": "3 + 2?", "response": "It is 5"},
        {"prompt": "3 + 2?", "response": ""},
    ]
    held_out = [Question("h", "other", ({"role": "user", "content": "Held out, is it?"},), "2")]
    gates = {"rows_per_question": 1}
    counts = dataset_from(rows, tmp_path / "it", gates=gates, held_out=held_out, max_tokens=5_000)
    assert counts.rows_left_out == {"contaminated": 1, "duplicate": 1, "language": 1, "loop": 1, "no_answer": 1,
                                    "rows_per_question": 1, "special_tokens": 1, "too_long": 1}  # fmt: skip
    assert [row["prompt"][0]["content"] for row in rows_in(tmp_path / "it")] == ["1 + 2?", "3 + 2?"]
    opened = {"loops": False, "language": False, "contamination": False, "duplicates": False}
    counts = dataset_from(rows, tmp_path / "open", gates=opened, held_out=held_out, max_tokens=5_000)
    assert counts.rows_left_out == {"no_answer": 1, "special_tokens": 1, "too_long": 1}
    counts = dataset_from(rows, tmp_path / "of", questions_of=tmp_path / "it" / "train.parquet", max_tokens=5_000)
    assert {row["prompt"][0]["content"] for row in rows_in(tmp_path / "of")} == {"1 + 2?", "3 + 2?"}
    assert counts.rows_left_out["questions_of"] == 4


def test_a_rejected_side_that_was_cut_off_may_loop(tmp_path: Path) -> None:
    loop = "I add the same two numbers once more. " * 60
    pair = {"prompt": USER, "chosen": REPLY, "rejected": [{"role": "assistant", "content": loop}]}
    counts = dataset_from(
        [pair | {"rejected_finished": False, "id": 1}, pair], tmp_path / "it", "dpo", max_tokens=5_000
    )
    assert counts.rows_left_out == {"loop": 1}
    assert [row["tree_id"] for row in rows_in(tmp_path / "it")] == ["1"]


def test_a_file_without_a_usable_row_says_why(tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"no rows: of the file's rows, 2 are of no known form .the first: row 0: no `con"
    ):
        dataset_from([{"words": "x"}, {"words": "y"}], tmp_path / "it")
    with pytest.raises(UsageError, match="no `prompt`, and `chosen` and `rejected` share none"):
        dataset_from([{"chosen": "x", "rejected": "y"}], tmp_path / "it", "dpo")
    with pytest.raises(UsageError, match="row 0: column rejected: is the same as chosen"):
        dataset_from([{"prompt": USER, "chosen": "x", "rejected": "x"}], tmp_path / "it", "dpo")
    cut = {"prompt": USER, "chosen": "x y", "rejected": "x", "rejected_finished": False}
    with pytest.raises(UsageError, match="row 0: chosen begins with all of rejected's tokens"):
        dataset_from([cut], tmp_path / "it", "dpo")
    assert not (tmp_path / "it").exists()


def test_rows_of_the_hub_are_read_from_its_layout(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    write_jsonl(tmp_path / "data" / "train.jsonl", [LONG_CHAINS["plain"]] * 2)
    assert list(hub_rows(str(tmp_path / "data"))) == [LONG_CHAINS["plain"]] * 2
    with pytest.raises(UsageError, match="cannot load nobody/nothing@main from the hub: "):
        hub_rows("nobody/nothing@main")


def test_an_import_is_gated_and_verified_where_the_gold_is_known(tmp_path: Path, student: str) -> None:
    known, held_out = (task(name).questions(limit=1)[0] for name in ("letters", "arithmetic"))
    right = f"So \\boxed{{{known.gold}}}"
    rows: list[Row] = [
        {"prompt": known.messages[-1]["content"], "response": right},
        {"prompt": known.messages[-1]["content"], "response": right},
        {"prompt": known.messages[-1]["content"], "response": "So \\boxed{9}"},
        {"prompt": "How often?", "response": "So \\boxed{2}", "gold": "2"},
        {"prompt": "How often?", "response": "So \\boxed{1}", "gold": 2},
        {"prompt": "Who knows?", "response": "I say 5."},
        {"prompt": "Who knows?", "response": "<think>I wonder"},
        {"prompt": "Who knows?", "response": "所以答案是五"},
        {"prompt": "Who knows?", "response": "I wonder about it. " * 200},
        {"prompt": held_out.messages[-1]["content"], "response": "So \\boxed{2}"},
        {"prompt": "Who knows?", "response": "I do.<|im_end|>\n<|im_start|>user\nNo: \\boxed{2}"},
        {"prompt": "Who <|im_end|> knows?", "response": "I do: \\boxed{2}"},
        {"prompt": "Who knows?", "response": ""},
        {"prompt": "Who knows?", "response": " "},
        {"words": "no conversation"},
    ]
    write_jsonl(tmp_path / "theirs.jsonl", rows)
    counts = imported(tmp_path / "theirs.jsonl", student, task="letters", held_out=["arithmetic"], max_tokens=9_000)
    assert (counts.rows, counts.verified) == (3, 2)
    assert counts.rows_left_out == {"contaminated": 1, "duplicate": 1, "language": 1, "malformed": 1, "no_answer": 4,
                                    "special_tokens": 2, "wrong": 2}  # fmt: skip
    assert counts.faults == ["row 14: no `conversations`, no `messages`, and no prompt with a response; it has words"]
    assert [row["reward"] for row in read_rows(tmp_path / "ours.parquet")] == [1.0, 1.0, None]
    assert counts.columns_left_out == {"gold": 2}
    assert counts.lines()[0] == "3 sft rows (letters 3), 2 of them verified"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "no prompt"}, "row 0: no `conversations`, no `messages`, and no prompt with a response; it has text"),
        ({"messages": [{"role": "user", "content": "x"}]}, "row 0: column prompt: List should have at least 1 item"),
        ({"conversations": [{"who": "x"}]}, "a turn is no"),
        ({"conversations": 5}, "a turn is no"),
        ({"messages": [*USER, {"role": "tool", "content": "5"}, *REPLY]}, "a known role"),
        ({"prompt": "x", "response": "<think>"}, "no rows: of the file's rows, 1 have no closed answer"),
        ([1], "line 1: no JSON row .a row must be an object with columns"),
        ({"prompt": " ", "response": "x"}, "row 0: column prompt.0.content: String should have at least 1 character"),
        ({"prompt": "x", "response": "\ud800"}, "row 0: column completion.0.content: Input should be a valid string"),
        (
            {"messages": [{"role": "user", "content": None}, *REPLY]},
            "column prompt.0.content: Input should be a valid string, not 'None'",
        ),
        ({"messages": REPLY * 2}, "row 0: column prompt: must not end with the assistant"),
        (
            {"system": 5, "conversations": USER + REPLY},
            "column prompt.0.content: Input should be a valid string, not '5'",
        ),
    ],
)
def test_what_cannot_be_imported_is_named(tmp_path: Path, student: str, row: Any, message: str) -> None:
    (tmp_path / "theirs.jsonl").write_text(json.dumps(row))
    (tmp_path / "ours.parquet").write_text("of an import before")
    with pytest.raises(UsageError, match=message):
        imported(tmp_path / "theirs.jsonl", student)
    assert (tmp_path / "ours.parquet").read_text() == "of an import before"
    assert len(list(tmp_path.iterdir())) == 2
