"""IFEval, Multi-IF and M-IFEval: rows of each shape, verdicts by turn, scores, and the published verdicts as oracle."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from tests.support.benchmark_data import benchmark_rows

from cotree.base.errors import UsageError
from cotree.tasks import Question, task
from cotree.tasks.ifeval import instruction_spec
from cotree.tasks.instructions import InstructionResults, follows_strictly, instruction_results

NO_COMMA, QUOTED, TITLE = "punctuation:no_comma", "startend:quotation", "detectable_format:title"


def data(name: str) -> Path:
    folder = os.environ.get("COTREE_DATA")
    if not folder or not (Path(folder) / name).is_file():
        assert not folder, f"{name} is not in the folder that COTREE_DATA names"
        pytest.skip(f"benchmark data not found: {name} (set COTREE_DATA to run this test)")
    return Path(folder) / name


def written(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


IFEVAL_HUB = {
    "key": 7,
    "prompt": "Describe a quay. Quote it.",
    "instruction_id_list": [QUOTED, "keywords:existence"],
    "kwargs": [{"keywords": None, "num_words": None}, {"keywords": ["quay"], "num_words": None}],
}
TURNS: list[tuple[str, list[str], list[dict[str, Any]]]] = [
    ("Describe a quay.", [NO_COMMA], [{}]),
    ("Quote it.", [NO_COMMA, QUOTED], [{}, {}]),
    ("Title it.", [NO_COMMA, QUOTED, TITLE], [{}, {}, {}]),
]
MULTI_LOCAL = {
    "id": "7:1:fr",
    "language": "French",
    "turns": [{"prompt": p, "instruction_id_list": ids, "kwargs": kwargs} for p, ids, kwargs in TURNS],
}
MULTI_HUB = {"key": "7:1:fr", "language": "French", "turns": "[]", "responses": ""} | {
    f"turn_{n}_{part}": value
    for n, (prompt, ids, kwargs) in enumerate(TURNS, 1)
    for part, value in (
        ("prompt", json.dumps({"role": "user", "content": prompt})),
        ("instruction_id_list", json.dumps(ids)),
        ("kwargs", json.dumps([json.dumps(one) for one in kwargs])),
    )
}


def test_rows_of_the_hub_and_of_a_file_are_the_same_questions(tmp_path: Path) -> None:
    (question,) = task("ifeval", written(tmp_path / "hub.jsonl", IFEVAL_HUB)).questions()
    assert (question.id, question.family, question.gold) == ("7", "English", f"{QUOTED}, keywords:existence")
    assert question.spec["instructions"] == ((QUOTED, {}), ("keywords:existence", {"keywords": ["quay"]}))
    local = task("multi_if", written(tmp_path / "local.jsonl", MULTI_LOCAL)).questions()
    assert task("multi_if", written(tmp_path / "flat.jsonl", MULTI_HUB)).questions() == local
    assert [turn.text for turn in local[0].later] == ["Quote it.", "Title it."]
    two = MULTI_HUB | {"turn_3_prompt": "None", "turn_3_instruction_id_list": "None", "turn_3_kwargs": "None"}
    (short,) = task("multi_if", written(tmp_path / "two.jsonl", two)).questions()
    assert len(short.later) == 1
    row = {"key": "a", "prompt": "p", "instruction_id_list": [f"ja:{NO_COMMA}"], "kwargs": [{}]}
    (japanese,) = task("m_ifeval", written(tmp_path / "m.jsonl", row)).questions()
    assert japanese.family == "ja"


def test_a_row_that_nobody_can_judge_is_named_before_work(tmp_path: Path) -> None:
    row = IFEVAL_HUB | {"instruction_id_list": ["startend:quotations", NO_COMMA]}
    with pytest.raises(UsageError, match="unknown instruction `startend:quotations`; the nearest known is"):
        task("ifeval", written(tmp_path / "x.jsonl", row)).questions()
    # Nothing asked would be followed by any answer.
    nothing = IFEVAL_HUB | {"instruction_id_list": [], "kwargs": []}
    with pytest.raises(UsageError, match=r"ifeval, row 1: instructions: 0 .*, kwargs: 0; name one or more"):
        task("ifeval", written(tmp_path / "w.jsonl", nothing)).questions()
    with pytest.raises(UsageError, match=r"instructions: 2 .*, kwargs: 1;"):
        task("ifeval", written(tmp_path / "y.jsonl", IFEVAL_HUB | {"kwargs": [{}]})).questions()
    with pytest.raises(UsageError, match=r"multi_if, row 1: not a row of facebook/Multi-IF \(JSONDecodeError"):
        task("multi_if", written(tmp_path / "z.jsonl", MULTI_HUB | {"turn_1_prompt": "Describe."})).questions()


def conversation(tmp_path: Path) -> Question:
    return task("multi_if", written(tmp_path / "c.jsonl", MULTI_LOCAL)).questions()[0]


@pytest.mark.parametrize(
    ("completion", "finish", "kind", "reward", "detail"),
    [
        ('"<<Quay>> stone"', "stop", "correct", 1.0, ""),
        ('<think>a, b</think>\n\n"<<Quay>> stone"', "stop", "correct", 1.0, ""),
        ('I quote, then title.\nThe answer is:\n"<<Quay>>\nstone"', "stop", "correct", 1.0, ""),
        ('"<<Quay>> stone, wet"', "stop", "wrong", 2 / 3, f"not followed: {NO_COMMA}"),
        ("stone, wet", "stop", "wrong", 0.0, f"not followed: {NO_COMMA}, {QUOTED}, {TITLE}"),
        ('"<<Quay>> stone"', "length", "no_answer", 0.0, "cut by length"),
        ('<think>"<<Quay>> stone"', "stop", "no_answer", 0.0, "no closed answer"),
        (" \n", "stop", "no_answer", 0.0, "no closed answer"),
    ],
)
def test_a_verdict_says_what_was_not_followed(
    tmp_path: Path, completion: str, finish: str, kind: str, reward: float, detail: str
) -> None:
    second = conversation(tmp_path).follow_up("a quay")
    third = second.follow_up("b") if second else None
    assert third is not None
    verdict = task("multi_if").judge(third, completion, finish)
    assert (verdict.kind, verdict.detail) == (kind, detail)
    assert verdict.reward == pytest.approx(reward)
    results = instruction_results(third, completion, finish)
    assert (results.group, results.turn) == ("IF(Other)", 3)
    assert all(results.strict) == (kind == "correct")
    assert sum(results.strict) / 3 == pytest.approx(reward)


def test_each_turn_has_its_own_instructions_and_sees_the_replies(tmp_path: Path) -> None:
    first = conversation(tmp_path)
    second = first.follow_up("a quay")
    assert second is not None
    assert [len(q.spec["instructions"]) for q in (first, second)] == [1, 2]
    assert [m["content"] for m in second.messages] == ["Describe a quay.", "a quay", "Quote it."]
    assert task("multi_if").judge(first, "stone").kind == "correct"
    assert task("multi_if").judge(second, "stone").kind == "wrong"


@pytest.mark.parametrize("name", ["ifeval", "multi_if", "m_ifeval"])
def test_worked_examples_follow_what_they_ask(name: str) -> None:
    bullets, quoted = task(name).worked_examples(Question("x", name, (), ""))
    asked = (
        (bullets, ["detectable_format:number_bullet_lists", NO_COMMA], [{"num_bullets": 3}, {}]),
        (quoted, ["length_constraints:number_words", QUOTED], [{"num_words": 20, "relation": "less than"}, {}]),
    )
    for example, names, arguments in asked:
        question = Question("x", name, (), "", spec=instruction_spec(names, arguments, "English"))
        assert task(name).judge(question, example.answer).kind == "correct"
        assert all("\n" not in step for step in example.steps.values())


Published = tuple[Question, dict[str, Any]]


def published() -> Iterator[Published]:
    """Each response of the oracle with its question."""
    questions = {question.id: question for question in task("ifeval", data("ifeval.jsonl")).questions()}
    for row in benchmark_rows("ifeval_oracle.jsonl.gz"):
        yield questions[str(row["id"])], row


def test_verdicts_equal_the_published_ones() -> None:
    equal, others = 0, Counter[tuple[str, Any]]()
    for question, row in published():
        found = instruction_results(question, row["response"])
        for got, wanted in ((found.strict, row["strict"]), (found.loose, row["loose"])):
            for (name, arguments), mine, theirs in zip(question.spec["instructions"], got, wanted, strict=True):
                equal += mine == theirs
                if mine != theirs:
                    others[name, arguments.get("letter")] += 1
    # IFEval checks letters from a to z. Asked for `#` or `!` it draws one of them, anew for each verdict: strict says
    # yes and loose no to the same text. What is no letter passes here.
    assert others.keys() <= {("keywords:letter_frequency", "#"), ("keywords:letter_frequency", "!")}
    assert others.total() <= 4
    assert equal >= 4112


def test_all_english_and_chinese_conversations_are_judged_offline() -> None:
    texts = [row["response"] for _, row in published()][:40]
    english = task("multi_if", data("multi_if_en.jsonl.gz")).questions()
    chinese = task("multi_if", data("multi_if_zh_sample.jsonl")).questions()
    assert {q.family for q in english} == {"English"}
    seen: list[InstructionResults] = []
    for i, first in enumerate(english + chinese):
        question: Question | None = first
        while question is not None:
            seen.append(instruction_results(question, texts[i % len(texts)]))
            question = question.follow_up("ok")
    assert len(seen) == sum(1 + len(q.later) for q in english + chinese)
    assert {(each.group, each.turn) for each in seen} == set(product(("IF(En)", "IF(Zh)"), (1, 2, 3)))
    assert {name for s in seen for name in s.instructions} >= {NO_COMMA, QUOTED, TITLE}


def test_the_chinese_conversation_can_be_followed() -> None:
    (question,) = task("multi_if", data("multi_if_zh_sample.jsonl")).questions()
    body = "*一*。*二*。*三*。" + "这是一段简短的概述。" * 40
    assert task("multi_if").judge(question, body).kind == "correct"
    assert task("multi_if").judge(question, body[:150]).detail == "not followed: length_constraints:number_words"
    assert task("multi_if").judge(question, body.replace("简短", "，简短")).detail == f"not followed: {NO_COMMA}"


def test_spanish_french_and_japanese_rows_are_judged_offline() -> None:
    questions = task("m_ifeval", data("mifeval_es_fr_ja.jsonl.gz")).questions()
    assert Counter(q.family for q in questions).keys() == {"es", "fr", "ja"}
    for question in questions:
        for text in ("El puerto está tranquilo.", "Le port est très calme.", "港は静かです。夜の海。"):
            assert len(instruction_results(question, text).loose) == len(question.spec["instructions"])


@pytest.mark.timed
def test_verdicts_are_fast() -> None:
    rows = list(published())[:300]
    for warm in (False, True):
        started = time.perf_counter()
        verdicts = [task("ifeval").judge(question, row["response"]) for question, row in rows]
        if warm:
            assert len(verdicts) / (time.perf_counter() - started) > 50


def test_verdicts_equal_those_of_lm_eval() -> None:
    module = "lm_eval.tasks.ifeval.instructions_registry"
    registry = pytest.importorskip(module, reason="lm_eval is not installed")
    different = Counter[str]()
    for question, row in published():
        for name, arguments in question.spec["instructions"]:
            theirs = registry.INSTRUCTION_DICT[name](name)
            theirs.build_description(**arguments)
            if "prompt" in (theirs.get_instruction_args() or {}):
                theirs.build_description(prompt=question.messages[0]["content"])
            response = row["response"]
            try:
                follows = bool(response.strip()) and theirs.check_following(response)
            except LookupError:
                pytest.skip("lm_eval needs nltk's model punkt_tab, which is not installed")
            different[name] += follows_strictly(name, arguments, response) != follows
    # It draws letters by chance too; see above.
    assert (+different).keys() <= {"keywords:letter_frequency"}
