"""Rollouts of others become trees: every known form is read, nothing is lost, and tokens are shared."""

from __future__ import annotations

import json
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.tiny_student import tiny_tokenizer

from cotree.base.errors import UsageError
from cotree.base.rows import write_jsonl
from cotree.data.rollouts import Rollout, Rollouts, RolloutTask, read_rollouts
from cotree.data.shared_tokens import tree_of_rollouts
from cotree.search.store import StoredTree
from cotree.search.thoughts import chain_text
from cotree.tasks import Question

ASKED = {"role": "user", "content": "What is 2 + 3?"}
RIGHT, WRONG = "Add them.\n\nThe answer is: \\boxed{5}", "Add them.\n\nThe answer is: \\boxed{6}"


def reply(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def write(path: Path, *rows: Mapping[str, Any]) -> Path:
    write_jsonl(path, map(dict, rows))
    return path


def eval_log(path: Path, *samples: Mapping[str, Any], compression: str = "zstd") -> Path:
    """A log as inspect writes it; Python writes no Zstandard, so the kind of compression is put in afterwards."""
    contents = {"header.json": {"eval": {"task": "sums", "model": "openai/gpt"}}}
    contents |= {f"samples/{each['id']}_epoch_{n}.json": dict(each) for n, each in enumerate(samples)}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if compression == "deflate" else zipfile.ZIP_STORED) as log:
        for name, content in contents.items():
            text = json.dumps(content).encode()
            log.writestr(name, pa.compress(text, "zstd", asbytes=True) if compression == "zstd" else text)
    if compression == "zstd":
        written = path.read_bytes()
        for sign, place in ((b"PK\3\4", 8), (b"PK\1\2", 10)):
            at = written.find(sign)
            while at >= 0:
                written = written[: at + place] + struct.pack("<H", 93) + written[at + place + 2 :]
                at = written.find(sign, at + 4)
        path.write_bytes(written)
    return path


def sample(id_: str, text: Any, grade: Any, stop: str = "stop") -> dict[str, Any]:
    turns = [{"role": "system", "content": "Be brief."}, ASKED, reply(text)]
    output = {"choices": [{"stop_reason": stop}]}
    return {"id": id_, "input": "x", "target": ["5", "five"], "messages": turns, "output": output,
            "scores": {"match": {"value": grade}}}  # fmt: skip


def tree(read: Rollouts, **more: Any) -> StoredTree:
    ((task, question),) = read.asked
    assert isinstance(task, RolloutTask)
    given = {"tokenizer": tiny_tokenizer(), "config": "c", "correct_at": 1.0, **more}
    return tree_of_rollouts(task, question, read.of[question.task, question.id], **given)


def verdicts(made: StoredTree) -> list[tuple[str, float | None]]:
    return [(str(node.verdict), node.reward) for node in made.nodes if node.verdict]


def test_prompts_with_n_completions_and_rewards(tmp_path: Path) -> None:
    row = {"prompt": ASKED["content"], "completions": [RIGHT, WRONG, RIGHT], "rewards": [1, 0.25, 1.0], "answer": 5}
    read = read_rollouts(write(tmp_path / "x.jsonl", row | {"id": 7, "note": "n"}))
    columns = "columns that are not kept, and how many rows have them: note 1"
    assert read.lines() == ["3 rollouts of 1 question; left out: nothing", columns]
    made = tree(read)
    assert (made.task, made.question_id, made.gold, made.rollouts) == ("x", "7", "5", 3)
    assert sorted(verdicts(made)) == [("correct", 1.0), ("correct", 1.0), ("wrong", 0.25)]
    assert made.nodes[0].visits == 3 and made.nodes[0].value == 2.25
    assert made.nodes[1].text.strip() == "Add them." and made.nodes[1].visits == 3, "what is shared comes once"
    assert sorted(verdicts(tree(read, correct_at=0.25))) == [("correct", 1.0)] * 3


@pytest.mark.parametrize("form", ["verifiers", "traces", "eval", "deflated", "lm-eval", "records", "rows"])
def test_each_form_gives_the_same_tree(tmp_path: Path, form: str) -> None:
    path, texts = tmp_path / "file", [(RIGHT, 1.0), (WRONG, 0.0)]
    if form == "verifiers":
        write(path, *({"example_id": 3, "prompt": [ASKED], "completion": [reply(text)], "reward": worth, "task": "sums",
                       "answer": "5", "metrics": {}, "timing": {"total": 1}} for text, worth in texts))  # fmt: skip
    elif form == "traces":
        write(path, *({"traces": [{"task": {"type": "sums", "data": {"id": "3", "answer": "5"}},
                       "nodes": [{"message": ASKED}, {"message": reply(text), "sampled": True}],
                       "rewards": {"a": {"score": worth, "weight": 0.5}, "b": {"score": worth, "weight": 0.5}},
                       "calls": [{"finish_reason": "stop"}]}]} for text, worth in texts))  # fmt: skip
    elif form in ("eval", "deflated"):
        graded = [sample("3", [{"type": "text", "text": RIGHT}], "C"), sample("3", WRONG, "I")]
        eval_log(path, *graded, compression="zstd" if form == "eval" else "deflate")
    elif form == "lm-eval":
        line = {"doc_id": 3, "doc": {"id": "3", "task": "sums"}, "target": "5", "filter": "strict-match",
                "arguments": {"gen_args_0": {"arg_0": json.dumps([ASKED]), "arg_1": {}}}, "resps": [[RIGHT, WRONG]],
                "filtered_resps": ["5"], "metrics": ["exact_match"], "exact_match": 0.5,
                "cotree": {"verdicts": ["correct", "wrong"], "finish_reasons": ["stop", "stop"]}}  # fmt: skip
        write(path, line, line | {"filter": "flexible-extract"})
    elif form == "records":
        write(path, {"prompt": [ASKED], "answer": "5", "id": "3", "task": "sums",
                     "responses": [{"text": text, "reward": worth} for text, worth in texts]})  # fmt: skip
    else:
        write(path, *({"prompt": [ASKED], "response": t, "score": worth, "gold": "5", "id": "3", "task": "sums"}
                      for t, worth in texts))  # fmt: skip
    read = read_rollouts(path)
    made = tree(read)
    assert (made.task, made.question_id, made.gold) == ("sums", "3", "5")
    assert made.messages[-1] == ASKED and len(made.messages) == (2 if form in ("eval", "deflated") else 1)
    assert verdicts(made) == [("correct", 1.0), ("wrong", 0.0)]
    assert [chain_text(made.chain(node.node_id)) for node in made.nodes if node.verdict] == [RIGHT, WRONG]
    assert read.left_out == ({"under another filter of lm-eval": 2} if form == "lm-eval" else {})


def test_what_is_no_single_reply_or_has_no_reward_is_counted(tmp_path: Path) -> None:
    tools = reply("", tool_calls=[{"id": "1"}])
    rows: list[dict[str, Any]] = [
        {"prompt": [ASKED], "completion": [tools, {"role": "tool", "content": "5"}, reply(RIGHT)], "reward": 1},
        {"prompt": [ASKED], "completion": "  ", "reward": 1},
        {"prompt": [ASKED], "completions": [RIGHT], "rewards": [1, 0]},
        {"question": "?"},
        {"prompt": [ASKED], "completions": [{"thought": RIGHT}]},
        {"prompt": [ASKED], "completion": RIGHT, "reward": float("nan")},
        {"prompt": [ASKED], "completion": RIGHT, "reward": 10**400},
        {"prompt": [ASKED], "completion": RIGHT, "is_truncated": True, "reward": 0},
        {"prompt": [ASKED], "completion": WRONG},
    ]
    path = write(tmp_path / "x.jsonl", *rows)
    with path.open("a") as file:
        file.write('{"prompt": "?", "completion": "\\ud800"}\n{"prompt": "\\ud800", "completion": "5"}\n')
    read = read_rollouts(path)
    assert read.left_out == {"of no known form": 8, "empty": 1}
    made = tree(read)
    assert verdicts(made) == [("no_answer", 0.0), ("undecided", 0.0)]
    assert made.nodes[0].visits == 1 and [node.is_cut for node in made.nodes if node.verdict] == [True, False]
    with pytest.raises(UsageError, match=r"holds no rollouts .*row 0: .*an .eval log of inspect"):
        read_rollouts(write(tmp_path / "y.jsonl", rows[0]))
    with pytest.raises(UsageError, match=r"holds no rollouts .all of them are empty"):
        read_rollouts(write(tmp_path / "y.jsonl", rows[1]))
    zipfile.ZipFile(tmp_path / "z.eval", "w").close()
    with pytest.raises(UsageError, match="no log of inspect: it has no header"):
        read_rollouts(tmp_path / "z.eval")
    damaged = eval_log(tmp_path / "d.eval", sample("3", RIGHT, "C"))
    damaged.write_bytes(damaged.read_bytes().replace(b"\x28\xb5\x2f\xfd", b"\0\0\0\0"))
    with pytest.raises(UsageError, match="is damaged"):
        read_rollouts(damaged)


def test_a_task_judges_instead_of_rewards(tmp_path: Path) -> None:
    row = {"prompt": ASKED["content"], "completions": [RIGHT, WRONG], "rewards": [0, 1], "answer": "5"}
    read = read_rollouts(write(tmp_path / "x.jsonl", row), task="arithmetic")
    assert verdicts(tree(read)) == [("correct", 1.0), ("wrong", 0.0)]
    ((task, question),) = read.asked
    assert task.judge(question, WRONG).kind == "wrong" and task.name == "arithmetic"
    ((unjudged, _),) = read_rollouts(tmp_path / "x.jsonl").asked
    assert unjudged.judge(question, RIGHT).kind == "undecided"


def test_more_rollouts_make_another_question_and_others_stay(tmp_path: Path) -> None:
    rows = [{"prompt": f"{n}?", "completions": ["1", "2"], "rewards": [1, 0], "id": n} for n in range(3)]
    before = read_rollouts(write(tmp_path / "x.jsonl", *rows)).asked
    after = read_rollouts(write(tmp_path / "x.jsonl", *rows, {"prompt": "1?", "completion": "3", "reward": 0})).asked
    assert [a == b for (_, a), (_, b) in zip(before, after, strict=True)] == [True, False, True]


PIECES = ["Add them", "add", " 日本語 naïve", "🙂 x", "\n", "\n\n", "The sum is", " 5", "."]
LINES = st.lists(st.sampled_from(PIECES), min_size=1, max_size=8)


@settings(max_examples=150, deadline=None)
@given(st.lists(LINES.map("".join).filter(str.strip), min_size=1, max_size=7))
def test_every_rollout_is_a_chain_letter_by_letter(texts: list[str]) -> None:
    rollouts = [Rollout(text, float(n % 2)) for n, text in enumerate(texts)]
    question = Question("q", "x", (ASKED,), "")
    made = tree_of_rollouts(RolloutTask("x"), question, rollouts, tokenizer=tiny_tokenizer(), config="c", correct_at=1)
    chains = sorted(chain_text(made.chain(node.node_id)) for node in made.nodes if node.verdict is not None)
    assert chains == sorted(text.lstrip("\n") for text in texts)
    assert all(node.parent_id < node.node_id for node in made.nodes[1:] if node.parent_id is not None)
    assert made.nodes[0].visits == len(texts) and made.nodes[0].value == sum(each.reward or 0 for each in rollouts)
    leaves = {node.node_id for node in made.nodes if node.verdict is not None}
    assert leaves == {n.node_id for n in made.nodes} - {n.parent_id for n in made.nodes}, "each has a leaf of its own"
    assert sum(node.tokens for node in made.nodes) <= made.completion_tokens
