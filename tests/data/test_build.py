"""Datasets from stored trees: TRL's types, the same bytes every time, nothing cut, everything counted."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.datasets import dataset_of, rows_in
from tests.support.tiny_student import tiny_tokenizer
from tests.support.trees import node, random_tree, tree_of

from cotree.base.errors import CotreeError, UsageError
from cotree.base.rows import read_metadata
from cotree.data.gates import foreign_share
from cotree.data.kinds import COLUMNS, check_file, check_template
from cotree.data.settings import RowKind, TextForm
from cotree.models.encode import encode_chains, encode_dpo, template_hash
from cotree.search.store import StoredTree, TreeStore

KINDS: tuple[RowKind, ...] = get_args(RowKind)


def tree(name: str, answers: list[tuple[str, str]], task: str = "arithmetic") -> StoredTree:
    """A root, one thought, and answers (text, verdict) below it."""
    nodes = [node(0, None, None), node(1, 0, "thinking", f"I add {name}.")]
    return tree_of(name, nodes + [node(i + 2, 1, "answer", *answer) for i, answer in enumerate(answers)], task)


TREES = [
    tree("a", [("The answer is 3", "correct"), ("The answer is three, 3", "correct"), ("It is 4", "wrong")]),
    tree("b", [("The answer is 3", "correct"), ("cut", "no_answer")]),
    tree("c", [("It is 5", "wrong")]),
]


def test_rows_are_trls_types_and_follow_the_verdicts(tmp_path: Path) -> None:
    counts = dataset_of(TREES, tmp_path / "sft")
    sft = rows_in(tmp_path / "sft")
    assert [row["completion"] for row in sft] == [
        [{"role": "assistant", "content": "I add a.\nThe answer is three, 3"}],
        [{"role": "assistant", "content": "I add b.\nThe answer is 3"}],
    ]
    assert [row["length_rank"] for row in sft] == [3, 1]
    assert all(row["prompt"] == [{"role": "user", "content": f"What is {row['tree_id']}?"}] for row in sft)
    assert (counts.rows, counts.tasks, counts.trees, counts.chains) == (2, {"arithmetic": 2}, 3, 6)
    assert counts.completion_tokens == sum(row["length_tokens"] for row in sft)
    assert counts.chains_left_out == {"no_answer": 1, "not_chosen": 1, "wrong": 2}
    assert counts.lines() == ["2 sft rows (arithmetic 2)", "left out: wrong 2, not_chosen 1, no_answer 1"]
    counts = dataset_of(TREES, tmp_path / "dpo", "dpo")
    (pair,) = rows_in(tmp_path / "dpo")
    assert pair["chosen"][0]["content"] == "I add a.\nThe answer is 3"
    assert pair["rejected"][0]["content"] == "I add a.\nIt is 4"
    assert pair["prefix_tokens"] > 0
    assert counts.rows == 1
    assert counts.chains_left_out == {"no_answer": 1, "no_correct": 1, "no_wrong": 1, "not_chosen": 1}
    assert json.loads(json.dumps(asdict(counts)))["mean_tokens"]["prefix"] == pair["prefix_tokens"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_trees_give_the_same_bytes(tmp_path: Path, kind: RowKind) -> None:
    steps: dict[str, Any] = {"min_visits": 1, "min_gap": 0.3} if kind == "step_pairs" else {}
    for name in ("one", "two"):
        dataset_of([*TREES, random_tree(3)], tmp_path / name / "it", kind, **steps)
    one, two = (
        {file.relative_to(tmp_path / name): file.read_bytes() for file in (tmp_path / name).rglob("*.*")}
        for name in ("one", "two")
    )
    assert one == two
    assert len(one) > 2


# Digests of the rows that one build of all kinds at once wrote of random_tree(0..39), before datasets were nodes.
SEVERAL: dict[str, dict[str, Any]] = {"sft": {"length": "shortest"}, "dpo": {"length": "longest", "unanswered": True},
           "step_pairs": {"min_visits": 1, "min_gap": 0.3}, "stepwise": {"label_above": 0.25}}  # fmt: skip
BALANCED: dict[str, Any] = {"gates": {"balance": ["difficulty"], "at_most": 1.5, "rows_per_question": 2}}
BEFORE: list[tuple[RowKind, dict[str, Any], tuple[str, str]]] = [
    ("sft", {}, ("9031b0d45ca2246a", "9031b0d45ca2246a")),
    ("dpo", {}, ("2f2a2854b4947309", "72bea2c3cdb3e1b0")),
    ("step_pairs", {}, ("51135e0029ab80ad", "3aead1ffb280b8e1")),
    ("stepwise", {"per_tree": 2}, ("5d420e2f6513c77c", "e6d60339089f41c2")),
    ("sft", {"per_tree": 3, **SEVERAL["sft"]}, ("e9e4a51efcc4a661", "e9e4a51efcc4a661")),
    ("dpo", {"per_tree": 3, **SEVERAL["dpo"]}, ("5f9f12d14c2411ab", "c8a8a4c1944b17c8")),
    ("step_pairs", {"per_tree": 3, **SEVERAL["step_pairs"]}, ("3965e1030cec8adb", "f1c4eb06bccaa904")),
    ("stepwise", {"per_tree": 3, **SEVERAL["stepwise"]}, ("11321780dffdf7c6", "40bd891d25779e80")),
    ("sft", {"length": "medium", "per_tree": 2, "text": "think", "max_tokens": 140},
     ("fee2b2b5861e86fa", "fee2b2b5861e86fa")),
    ("dpo", {"length": "medium", "per_tree": 2, "text": "think", "max_tokens": 140},
     ("71ff486ffb205bbb", "bea0978dc2791bc0")),
    ("sft", {"select": "value", "per_tree": 2, "text": "tags"}, ("bd3fc23d5d8212e2", "57f77e8f776d695d")),
    ("dpo", {"text": "tags"}, ("c6d2130984c603fc", "5b7769982a9b605d")),
    ("sft", {"per_tree": 3, **BALANCED}, ("8b119d966088359c", "27335d47faf42b87")),
    ("dpo", BALANCED, ("0897fcdfda82b417", "5ff4be8a4a59bdc1")),
    ("sft", {"per_tree": 3, "leave_out": ["sub_task"]}, ("a202ea31f007a9a7", "a202ea31f007a9a7")),
    ("dpo", {"leave_out": ["sub_task"]}, ("7d0af76694db07a4", "c72bde8fdafa4b68")),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "given", "digests"), BEFORE)
def test_rows_are_those_that_were_selected_before(
    tmp_path: Path, kind: RowKind, given: dict[str, Any], digests: tuple[str, str]
) -> None:
    trees = [random_tree(seed) for seed in range(40)]
    for seed, digest in zip((0, 7), digests, strict=True):
        counts = dataset_of(trees, tmp_path / str(seed), kind, seed=seed, **given)
        rows = rows_in(tmp_path / str(seed))
        assert hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()[:16] == digest
        assert counts.rows == len(rows)


@given(
    st.lists(st.integers(0, 500), min_size=3, max_size=8, unique=True),
    st.integers(0, 9),
    st.sampled_from(KINDS),
    st.integers(1, 3),
)
@settings(max_examples=40, deadline=None)
def test_every_chain_of_random_trees_is_in_a_row_or_counted(
    seeds: list[int], seed: int, kind: RowKind, per_tree: int
) -> None:
    """Verdicts, prefixes and lengths against the trees; nothing twice; the card states the file's own numbers."""
    trees = {tree.tree_id: tree for tree in map(random_tree, seeds)}
    steps: dict[str, Any] = {"min_visits": 1, "min_gap": 0.3} if kind == "step_pairs" else {}
    with TemporaryDirectory() as name:
        folder = Path(name) / "it"
        try:
            counts = dataset_of(trees.values(), folder, kind, seed=seed, per_tree=per_tree, **steps)
        except CotreeError:
            assert not folder.exists()
            return
        rows, card = rows_in(folder), (folder / "README.md").read_text()
        assert check_file(folder / "train.parquet")[1] == counts.rows == len(rows)
        assert list(rows[0]) == list(COLUMNS[kind])
        sides = ("leaf_id",) if kind in ("sft", "stepwise") else ("chosen_leaf", "rejected_leaf")
        used = [(row["tree_id"], row[side]) for row in rows for side in sides]
        assert len(set(used)) == len(used)
        left_out = sum(counts.chains_left_out.values()) + len(sides) * sum(counts.rows_left_out.values())
        assert len(used) + left_out == counts.chains
        assert counts.chains == sum(node.verdict is not None for tree in trees.values() for node in tree.nodes)
        assert max(list(map(str, (row["tree_id"] for row in rows))).count(tree_id) for tree_id in trees) <= per_tree
        for row in rows:
            nodes = trees[row["tree_id"]].nodes
            if kind == "sft":
                assert nodes[row["leaf_id"]].verdict == "correct"
            if len(sides) == 2:
                assert [nodes[row[side]].verdict for side in sides] == ["correct", "wrong"]
                shared = row["prefix_tokens"]
                (good, bad) = encode_chains(
                    tiny_tokenizer(), [(row["prompt"], row[side]) for side in ("chosen", "rejected")]
                )
                assert (row["chosen_tokens"], row["rejected_tokens"]) == (len(good.completion), len(bad.completion))
                assert good.completion[:shared] == bad.completion[:shared]
                assert good.completion[shared : shared + 1] != bad.completion[shared : shared + 1]
        if len(sides) == 2:
            gap = sum(row["chosen_tokens"] - row["rejected_tokens"] for row in rows) / len(rows)
            assert f"(chosen minus rejected {gap:+.1f})" in card
        for reason, number in {**counts.chains_left_out, **counts.rows_left_out}.items():
            assert f"| {reason} | {number} |" in card


def test_chains_over_the_limit_are_left_out_and_counted(tmp_path: Path) -> None:
    left_out = []
    for limit in range(20, 120, 2):
        try:
            counts = dataset_of(TREES, tmp_path / "it", "dpo", max_tokens=limit)
        except CotreeError:
            continue
        left_out.append(counts.chains_left_out.get("too_long", 0))
    assert left_out == sorted(left_out, reverse=True)
    assert left_out[0] > 0
    assert left_out[-1] == 0
    with pytest.raises(
        CotreeError, match="no rows: of 6 chains in 3 trees, 5 are over the dataset's max_tokens, 1 have"
    ):
        dataset_of(TREES, tmp_path / "x", max_tokens=8)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("trees", "kind", "message"),
    [
        (TREES[1:2], "dpo", "of 2 chains in 1 trees, 1 have no closed answer, 1 are of trees without a wrong chain"),
        (TREES[2:], "sft", "of 1 chains in 1 trees, 1 are wrong; raise the trees' rollouts"),
        (TREES[2:], "dpo", "1 are of trees without a correct chain; raise the trees' rollouts"),
        ([], "sft", "nothing to choose from: no tree and no row was read"),
        ([tree("e", [])], "sft", "nothing to choose from: 1 trees with no judged chain"),
    ],
)
def test_a_dataset_without_rows_says_by_reason_where_the_chains_went(
    tmp_path: Path, trees: list[StoredTree], kind: RowKind, message: str
) -> None:
    with pytest.raises(CotreeError, match=message):
        dataset_of(trees, tmp_path / "x", kind)
    assert list(tmp_path.iterdir()) == []


def test_more_rollouts_are_not_advised_where_something_else_took_the_chains(tmp_path: Path) -> None:
    cut = replace(node(2, 1, "thinking", "and and", "no_answer"), finish_reason="length")
    cuts = tree_of("one", [node(0, None, None), node(1, 0, "sub_task", "I add."), cut])
    with pytest.raises(CotreeError, match="1 end in a thought that max_tokens cut off; raise the trees' max_thought"):
        dataset_of([cuts], tmp_path / "x")
    with pytest.raises(
        CotreeError, match="5 repeat a question that an evaluation asks, 1 are wrong; take other training"
    ):
        dataset_of(TREES, tmp_path / "x", passed={"contaminated": {("arithmetic", "a"), ("arithmetic", "b")}})


def test_a_path_that_was_cut_off_is_rejected_where_it_is_asked_for_and_its_turn_has_no_end(tmp_path: Path) -> None:
    cut = replace(node(2, 1, "thinking", "I add and I add and", "no_answer"), finish_reason="length")
    begins = replace(node(3, 1, "thinking", "So it", "no_answer"), finish_reason="length")
    right = [node(4, 1, "thinking", "So it is 3."), node(5, 4, "answer", "The answer is: \\boxed{3}", "correct")]
    one = tree_of("one", [node(0, None, None), node(1, 0, "sub_task", "I add."), cut, begins, *right])
    with pytest.raises(CotreeError, match="are of trees without a wrong chain"):
        dataset_of([one], tmp_path / "off", "dpo")
    dataset_of([one], tmp_path / "on", "dpo", unanswered=True)
    (row,) = rows_in(tmp_path / "on")
    assert (row["rejected_leaf"], row["rejected_finished"]) == (2, False), "a mere beginning of chosen is not rejected"
    (pair,) = encode_dpo(tiny_tokenizer(), [row], 512).rows
    (closed,) = encode_dpo(tiny_tokenizer(), [row | {"rejected_finished": True}], 512).rows
    assert pair.rejected == closed.rejected[:-1]
    assert (len(pair.rejected), pair.prefix) == (row["rejected_tokens"], row["prefix_tokens"])
    beginning = {"rejected": [{"role": "assistant", "content": "I add.\nSo it"}], "rejected_finished": False}
    with pytest.raises(UsageError, match="chosen begins with all of rejected's tokens"):
        encode_dpo(tiny_tokenizer(), [row | beginning], 512)
    dataset_of([one], tmp_path / "control", verified=False)
    assert [row["leaf_id"] for row in rows_in(tmp_path / "control")] == [5]


def test_steps_follow_what_the_student_sees(tmp_path: Path) -> None:
    trees = [random_tree(seed) for seed in range(30)]
    dataset_of(trees, tmp_path / "it", "step_pairs", min_visits=1, max_tokens=60, leave_out=["sub_task"])
    for row in rows_in(tmp_path / "it"):
        assert row["chosen"][0]["content"].startswith((row["prefix"] + "\n").lstrip() + row["chosen_step"])


def test_the_settings_alone_say_how_chains_are_read(tmp_path: Path) -> None:
    dataset_of(TREES, tmp_path / "it", text="think")
    assert all(row["completion"][0]["content"].startswith("<think>") for row in rows_in(tmp_path / "it"))
    settings: list[tuple[str, dict[str, Any]]] = [("judge", {"reflections": "cut"}), ("size_of", {"size_of": "x"})]
    for needed, setting in settings:
        with pytest.raises(UsageError, match=f"the settings of the dataset need {needed}=: pass it"):
            dataset_of(TREES, tmp_path / "it", **setting)


@pytest.mark.parametrize(("text", "words"), [("think", "<think>\nI add.\nand and"),
                                             ("tags", "<sub-task>I add.</sub-task>\n<thinking>and and")])  # fmt: skip
def test_a_path_that_was_cut_off_never_closed_its_last_tag(tmp_path: Path, text: TextForm, words: str) -> None:
    cut = replace(node(2, 1, "thinking", "and and", "no_answer"), finish_reason="length")
    right = node(3, 1, "answer", "The answer is: \\boxed{3}", "correct")
    one = tree_of("one", [node(0, None, None), node(1, 0, "sub_task", "I add."), cut, right])
    dataset_of([one], tmp_path / "it", "dpo", text=text, unanswered=True)
    assert rows_in(tmp_path / "it")[0]["rejected"][0]["content"] == words


def test_four_combinations_from_one_store(tmp_path: Path) -> None:
    means = {}
    with TreeStore(tmp_path / "trees.db") as store:
        for seed in range(12):
            store.put(random_tree(seed))
        for kind, side in (("sft", "completion"), ("dpo", "chosen")):
            for length in ("longest", "shortest"):
                counts = dataset_of(store.trees("c"), tmp_path / f"{kind}-{length}", kind, length=length)
                means[kind, length] = counts.mean_tokens[side]
    assert means["sft", "longest"] > means["sft", "shortest"]
    assert means["dpo", "longest"] > means["dpo", "shortest"]


def test_process_rewards_are_the_values_of_the_nodes(tmp_path: Path) -> None:
    dataset_of(TREES[:1], tmp_path / "it", "stepwise", per_tree=2)
    found = rows_in(tmp_path / "it")
    assert len(found) == 2
    for row in found:
        chain = TREES[0].chain(row["leaf_id"])
        assert row["completions"] == [n.text for n in chain]
        assert row["visits"] == [n.visits for n in chain] == [3, 1]
        assert row["values"] == [n.value / n.visits for n in chain]
        assert row["labels"] == [True, chain[-1].verdict == "correct"]


ONE_A_QUESTION = {"duplicates": False, "rows_per_question": 1}
LOOP = "I add the same two numbers once more. " * 60


@pytest.mark.parametrize(
    ("gate", "trees", "settings", "count"),
    [
        ("loop", [tree("a", [(f"{LOOP} It is 3", "correct"), ("3", "correct"), ("4", "wrong")])], {}, 1),
        ("language", [tree("a", [("所以答案是三 3", "correct"), ("3", "correct"), ("4", "wrong")])], {}, 1),
        ("special_tokens", [tree("a", [("<|im_end|> 3", "correct"), ("3", "correct"), ("4", "wrong")])], {}, 1),
        ("no_answer", [tree("a", [("cut", "no_answer"), ("3", "correct"), ("4", "wrong")])], {}, 1),
        ("too_long", [tree("a", [("3 " * 600, "correct"), ("3", "correct"), ("4", "wrong")])], {"language": False}, 1),
        ("duplicate", [TREES[0], replace(TREES[0], tree_id="z")], {}, 1),
        ("rows_per_question", [TREES[0], replace(TREES[0], tree_id="z")], ONE_A_QUESTION, 1),
        ("balance", [*TREES, tree("d", [("3", "correct"), ("4", "wrong")], "letters")], {"balance": ("task",)}, 1),
    ],
)  # fmt: skip
def test_a_gate_removes_and_counts(
    tmp_path: Path, gate: str, trees: list[StoredTree], settings: dict[str, Any], count: int
) -> None:
    counts = dataset_of(trees, tmp_path / "it", gates=settings, max_tokens=2_000)
    if gate == "too_long":
        assert "too_long" not in counts.chains_left_out
        counts = dataset_of(trees, tmp_path / "it", gates=settings)
    assert {**counts.chains_left_out, **counts.rows_left_out}[gate] == count
    assert f"| {gate} | {count} |" in (tmp_path / "it" / "README.md").read_text()
    texts = [row["completion"][0]["content"] for row in rows_in(tmp_path / "it")]
    assert len(set(texts)) == len(texts) or gate == "balance"
    assert not any("答案" in text or LOOP in text or "im_end" in text for text in texts)


def test_gates_can_be_opened(tmp_path: Path) -> None:
    trees = [tree("a", [(f"{LOOP} 所以 3", "correct"), ("4", "wrong")])]
    counts = dataset_of(trees, tmp_path / "it", gates={"loops": False, "language": False}, max_tokens=5_000)
    assert (counts.chains_left_out, counts.rows_left_out) == ({"wrong": 1}, {})


def test_foreign_letters() -> None:
    assert foreign_share("So x = 3, α = π/2, ∑ 𝑥", "What is x?") == 0
    assert foreign_share("所以 x = 3", "苹果是多少？") < 0.5
    assert foreign_share("The answer is 3", "苹果是多少？") == 1
    assert foreign_share("答えは三です", "苹果是多少？") == 0
    assert foreign_share("Итак, три", "What is it?") == 1


def test_balance_is_by_seed_and_never_starves_a_group(tmp_path: Path) -> None:
    trees = [random_tree(i) for i in range(20)] + [random_tree(i + 20, task="letters") for i in range(8)]
    even = {"balance": ("task", "difficulty"), "at_most": 2.0}
    counts = dataset_of(trees, tmp_path / "a", gates=even)
    groups: dict[tuple[str, int], int] = {}
    for row in rows_in(tmp_path / "a"):
        key = (row["task"], min(int(row["pass_rate"] * 3), 2))
        groups[key] = groups.get(key, 0) + 1
    assert max(groups.values()) <= 2 * min(groups.values())
    assert counts.rows_left_out["balance"] > 0
    dataset_of(trees, tmp_path / "b", seed=1, gates=even)
    assert rows_in(tmp_path / "a") != rows_in(tmp_path / "b")


def test_a_file_names_its_template_and_training_can_refuse_another(tmp_path: Path) -> None:
    dataset_of(TREES, tmp_path / "it")
    path = tmp_path / "it" / "train.parquet"
    assert read_metadata(path)["template"] == template_hash(tiny_tokenizer())
    check_template(path, tiny_tokenizer())
    other = tiny_tokenizer(newline=False)
    with pytest.raises(UsageError, match=f"this student's is {template_hash(other)}"):
        check_template(path, other)


def test_trees_of_a_held_out_question_give_no_rows(tmp_path: Path) -> None:
    trees = [random_tree(seed, name=f"q{seed}") for seed in (3, 5, 9)]
    everything = dataset_of(trees, tmp_path / "all")
    left = dataset_of(trees, tmp_path / "left", passed={"contaminated": {("arithmetic", "q3")}})
    judged = sum(node.verdict is not None for node in trees[0].nodes)
    assert left.chains == everything.chains
    assert left.chains_left_out["contaminated"] == judged > 0
    assert {row["question_id"] for row in rows_in(tmp_path / "all")} - {"q3"} == {
        row["question_id"] for row in rows_in(tmp_path / "left")
    }


@given(st.floats(0, 1), st.floats(0, 1))
@settings(max_examples=20, deadline=None)
def test_only_trees_of_a_solve_rate(first: float, second: float) -> None:
    low, high = sorted((first, second))
    trees = [random_tree(seed) for seed in range(12)]
    with TemporaryDirectory() as name:
        dataset_of(trees, Path(name) / "all")
        wanted = [row for row in rows_in(Path(name) / "all") if low <= row["pass_rate"] <= high]
        if wanted:
            counts = dataset_of(trees, Path(name) / "some", solve_rate=(low, high))
            assert rows_in(Path(name) / "some") == wanted
            assert counts.rows == len(wanted)
        else:
            with pytest.raises(CotreeError):
                dataset_of(trees, Path(name) / "some", solve_rate=(low, high))


def test_only_questions_that_another_dataset_has(tmp_path: Path) -> None:
    trees = [random_tree(seed) for seed in range(12)]
    dataset_of(trees, tmp_path / "pairs", "dpo", gates={"balance": ["difficulty"]})
    passed = {"questions_of": tmp_path / "pairs" / "train.parquet"}
    counts = dataset_of(trees, tmp_path / "it", questions_of="pairs", passed=passed)
    questions = {row["question_id"] for row in rows_in(tmp_path / "pairs")}
    assert {row["question_id"] for row in rows_in(tmp_path / "it")} == questions
    assert counts.chains_left_out["questions_of"] > 0
