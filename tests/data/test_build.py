"""Datasets from stored trees: TRL's types, the same bytes every time, nothing cut, everything counted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.tiny_student import tiny_tokenizer
from tests.support.trees import node, random_tree, tree_of

from cotree.base.errors import CotreeError, UsageError
from cotree.base.rows import read_metadata
from cotree.data.build import build, build_dpo, build_sft
from cotree.data.chains import Reading
from cotree.data.gates import foreign_share
from cotree.data.kinds import COLUMNS, check_file, check_template
from cotree.experiment.recipe import Build, BuildDPO, BuildSFT, BuildStepPairs, BuildStepwise, Gates, TextForm
from cotree.models.encode import encode_chains, encode_dpo, template_hash
from cotree.search.store import StoredTree, TreeStore


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
    built = build(TREES, tiny_tokenizer(), Build(), tmp_path, seed=0, control=True)
    sft = pq.read_table(tmp_path / "sft" / "train.parquet").to_pylist()
    assert [row["completion"] for row in sft] == [
        [{"role": "assistant", "content": "I add a.\nThe answer is three, 3"}],
        [{"role": "assistant", "content": "I add b.\nThe answer is 3"}],
    ]
    assert [row["length_rank"] for row in sft] == [3, 1]
    assert all(row["prompt"] == [{"role": "user", "content": f"What is {row['tree_id']}?"}] for row in sft)
    (pair,) = pq.read_table(tmp_path / "dpo" / "train.parquet").to_pylist()
    assert pair["chosen"][0]["content"] == "I add a.\nThe answer is 3"
    assert pair["rejected"][0]["content"] == "I add a.\nIt is 4"
    assert pair["prefix_tokens"] > 0
    assert (built.counts["sft_rows"], built.counts["control_rows"], built.counts["dpo_pairs"]) == (2, 2, 1)
    assert len(pq.read_table(tmp_path / "control" / "train.parquet")) == 2


def test_the_same_store_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        build([*TREES, random_tree(3)], tiny_tokenizer(), EVERYTHING, tmp_path / name, seed=0, control=True)
    one, two = ({f.relative_to(tmp_path / name): f.read_bytes() for f in (tmp_path / name).rglob("*.*")}
                for name in ("one", "two"))  # fmt: skip
    assert one == two
    assert len(one) > 10


def test_chains_over_the_limit_are_left_out_and_counted(tmp_path: Path) -> None:
    left_out = []
    for limit in range(20, 120, 2):
        try:
            counts = build(TREES, tiny_tokenizer(), Build(max_tokens=limit), tmp_path, seed=0, control=False).counts
        except CotreeError:
            continue
        assert counts["removed"].get("too_long", 0) + counts["chains"] == 5
        left_out.append(counts["removed"].get("too_long", 0))
    assert left_out == sorted(left_out, reverse=True)
    assert left_out[0] > 0
    assert left_out[-1] == 0
    with pytest.raises(CotreeError, match="no tree has"):
        build(TREES, tiny_tokenizer(), Build(max_tokens=8), tmp_path / "x", seed=0, control=False)
    assert not (tmp_path / "x").exists()


def test_trees_that_cannot_make_pairs_are_an_error_that_says_so(tmp_path: Path) -> None:
    with pytest.raises(CotreeError, match="no tree has both a correct and a wrong chain"):
        build(TREES[1:2], tiny_tokenizer(), Build(), tmp_path, seed=0, control=False)
    with pytest.raises(CotreeError, match="no tree has a correct chain"):
        build(TREES[2:], tiny_tokenizer(), Build(), tmp_path, seed=0, control=False)
    assert list(tmp_path.iterdir()) == []


EVERYTHING = Build(step_pairs=BuildStepPairs(min_visits=1, min_gap=0.3), stepwise=BuildStepwise())


def rows(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = pq.read_table(path / "train.parquet").to_pylist()
    return found


@given(st.lists(st.integers(0, 500), min_size=3, max_size=8, unique=True), st.integers(0, 9))
@settings(max_examples=15, deadline=None)
def test_every_row_of_random_trees_is_what_its_file_promises(seeds: list[int], seed: int) -> None:
    """Verdicts, prefixes and lengths against the trees; nothing twice; the card states the files' own numbers."""
    trees = {tree.tree_id: tree for tree in map(random_tree, seeds)}
    with TemporaryDirectory() as name:
        folder = Path(name)
        try:
            built = build(trees.values(), tiny_tokenizer(), EVERYTHING, folder, seed=seed, control=True)
        except CotreeError:
            return
        sft, dpo = rows(folder / "sft"), rows(folder / "dpo")
        assert len({(r["tree_id"], r["leaf_id"]) for r in sft}) == len(sft) == built.counts["sft_rows"]
        assert len({(r["tree_id"], r["chosen_leaf"], r["rejected_leaf"]) for r in dpo}) == len(dpo)
        for row in sft:
            assert trees[row["tree_id"]].nodes[row["leaf_id"]].verdict == "correct"
        for row in dpo:
            nodes = trees[row["tree_id"]].nodes
            assert (nodes[row["chosen_leaf"]].verdict, nodes[row["rejected_leaf"]].verdict) == ("correct", "wrong")
            shared = row["prefix_tokens"]
            (good, bad) = encode_chains(
                tiny_tokenizer(), [(row["prompt"], row[side]) for side in ("chosen", "rejected")]
            )
            assert (row["chosen_tokens"], row["rejected_tokens"]) == (len(good.completion), len(bad.completion))
            assert good.completion[:shared] == bad.completion[:shared]
            assert good.completion[shared : shared + 1] != bad.completion[shared : shared + 1]
        gap = sum(row["chosen_tokens"] - row["rejected_tokens"] for row in dpo) / len(dpo)
        assert f"(chosen minus rejected {gap:+.1f})" in (folder / "README.md").read_text()
        assert len(rows(folder / "control")) <= len(sft)
        for kind in ("sft", "dpo", "control", "step_pairs", "stepwise"):
            if (folder / kind).exists():
                assert check_file(folder / kind / "train.parquet")[1] == len(rows(folder / kind))
                assert list(rows(folder / kind)[0]) == list(COLUMNS[kind])


def test_a_path_that_was_cut_off_is_rejected_where_it_is_asked_for_and_its_turn_has_no_end(tmp_path: Path) -> None:
    cut = replace(node(2, 1, "thinking", "I add and I add and", "no_answer"), finish_reason="length")
    begins = replace(node(3, 1, "thinking", "So it", "no_answer"), finish_reason="length")
    right = [node(4, 1, "thinking", "So it is 3."), node(5, 4, "answer", "The answer is: \\boxed{3}", "correct")]
    one = tree_of("one", [node(0, None, None), node(1, 0, "sub_task", "I add."), cut, begins, *right])
    with pytest.raises(CotreeError, match="no tree has both"):
        build([one], tiny_tokenizer(), Build(), tmp_path / "off", seed=0)
    asked = Build(dpo=BuildDPO(unanswered=True))
    built = build([one], tiny_tokenizer(), asked, tmp_path / "on", seed=0, control=True)
    (row,) = rows(tmp_path / "on" / "dpo")
    assert (row["rejected_leaf"], row["rejected_finished"]) == (2, False), "a mere beginning of chosen is not rejected"
    assert (built.counts["sft_rows"], built.counts["control_rows"]) == (1, 1)
    assert rows(tmp_path / "on" / "control")[0]["leaf_id"] == 5
    (pair,) = encode_dpo(tiny_tokenizer(), [row], 512).rows
    (closed,) = encode_dpo(tiny_tokenizer(), [row | {"rejected_finished": True}], 512).rows
    assert pair.rejected == closed.rejected[:-1]
    assert (len(pair.rejected), pair.prefix) == (row["rejected_tokens"], row["prefix_tokens"])
    beginning = {"rejected": [{"role": "assistant", "content": "I add.\nSo it"}], "rejected_finished": False}
    with pytest.raises(UsageError, match="chosen begins with all of rejected's tokens"):
        encode_dpo(tiny_tokenizer(), [row | beginning], 512)


def test_rows_of_an_earlier_build_do_not_stay_under_another_card(tmp_path: Path) -> None:
    build(TREES, tiny_tokenizer(), Build(stepwise=BuildStepwise()), tmp_path, seed=0)
    assert (tmp_path / "stepwise" / "train.parquet").is_file()
    build(TREES, tiny_tokenizer(), Build(), tmp_path, seed=0)
    assert not (tmp_path / "stepwise" / "train.parquet").exists()
    assert "config_name: stepwise" not in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("unanswered", [True, False])
def test_every_judged_leaf_is_a_chain_or_counted_and_steps_follow_what_the_student_sees(
    tmp_path: Path, unanswered: bool
) -> None:
    trees = [random_tree(seed) for seed in range(30)]
    settings = Build(dpo=BuildDPO(unanswered=unanswered), step_pairs=BuildStepPairs(min_visits=1), max_tokens=60)
    reading = Reading(left_out={"sub_task"})
    counts = build(trees, tiny_tokenizer(), settings, tmp_path, seed=0, reading=reading).counts
    gates = ("no_answer", "too_long", "loop", "language", "special_tokens", "repeated_in_tree")
    judged = sum(node.verdict is not None for tree in trees for node in tree.nodes)
    assert counts["removed"]["repeated_in_tree"]
    assert counts["chains"] + sum(counts["removed"].get(gate, 0) for gate in gates) == judged
    for row in rows(tmp_path / "step_pairs"):
        assert row["chosen"][0]["content"].startswith((row["prefix"] + "\n").lstrip() + row["chosen_step"])


def test_the_settings_alone_say_how_chains_are_read(tmp_path: Path) -> None:
    build_sft(TREES, tiny_tokenizer(), tmp_path, Build(text="think"))
    assert all(row["completion"][0]["content"].startswith("<think>") for row in rows(tmp_path / "sft"))
    with pytest.raises(UsageError, match="needs a judge"):
        build_sft(TREES, tiny_tokenizer(), tmp_path, Build(reflections="cut"))


@pytest.mark.parametrize(("text", "words"), [("think", "<think>\nI add.\nand and"),
                                             ("tags", "<sub-task>I add.</sub-task>\n<thinking>and and")])  # fmt: skip
def test_a_path_that_was_cut_off_never_closed_its_last_tag(tmp_path: Path, text: TextForm, words: str) -> None:
    cut = replace(node(2, 1, "thinking", "and and", "no_answer"), finish_reason="length")
    right = node(3, 1, "answer", "The answer is: \\boxed{3}", "correct")
    one = tree_of("one", [node(0, None, None), node(1, 0, "sub_task", "I add."), cut, right])
    build_dpo([one], tiny_tokenizer(), tmp_path, Build(text=text, dpo=BuildDPO(unanswered=True)))
    assert rows(tmp_path / "dpo")[0]["rejected"][0]["content"] == words


def test_four_combinations_from_one_store(tmp_path: Path) -> None:
    with TreeStore(tmp_path / "trees.db") as store:
        for seed in range(12):
            store.put(random_tree(seed))
        means = {}
        for sft in ("longest", "shortest"):
            for dpo in ("longest", "shortest"):
                wanted = Build(sft=BuildSFT(length=sft), dpo=BuildDPO(length=dpo))
                folder = tmp_path / f"{sft}-{dpo}"
                counts = build(store.trees("c"), tiny_tokenizer(), wanted, folder, seed=0).counts
                means[sft, dpo] = (counts["mean_sft_tokens"], counts["mean_chosen_tokens"])
    assert means["longest", "shortest"][0] > means["shortest", "shortest"][0]
    assert means["longest", "longest"][1] > means["longest", "shortest"][1]
    assert means["longest", "longest"][0] == means["longest", "shortest"][0]


def test_one_dataset_alone(tmp_path: Path) -> None:
    assert build_sft(TREES, tiny_tokenizer(), tmp_path / "a", Build()).counts["sft_rows"] == 2
    assert build_dpo(TREES, tiny_tokenizer(), tmp_path / "b", Build()).counts["dpo_pairs"] == 1
    assert not (tmp_path / "a" / "dpo").exists()
    assert not (tmp_path / "b" / "sft").exists()


def test_process_rewards_are_the_values_of_the_nodes(tmp_path: Path) -> None:
    build(TREES[:1], tiny_tokenizer(), EVERYTHING, tmp_path, seed=0)
    found = rows(tmp_path / "stepwise")
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
        ("duplicate", [TREES[0], replace(TREES[0], tree_id="z")], {}, 2),
        ("rows_per_question", [TREES[0], replace(TREES[0], tree_id="z")], ONE_A_QUESTION, 2),
        ("balance", [*TREES, tree("d", [("3", "correct"), ("4", "wrong")], "letters")], {"balance": ("task",)}, 1),
    ],
)  # fmt: skip
def test_a_gate_removes_and_counts(
    tmp_path: Path, gate: str, trees: list[StoredTree], settings: dict[str, Any], count: int
) -> None:
    built = build(trees, tiny_tokenizer(), Build(gates=Gates(**settings), max_tokens=2_000), tmp_path, seed=0)
    if gate == "too_long":
        assert "too_long" not in built.counts["removed"]
        built = build(trees, tiny_tokenizer(), Build(gates=Gates(**settings)), tmp_path, seed=0)
    assert built.counts["removed"][gate] == count
    assert f"| {gate} | {count} |" in (tmp_path / "README.md").read_text()
    texts = [row["completion"][0]["content"] for row in rows(tmp_path / "sft")]
    assert len(set(texts)) == len(texts) or gate in ("duplicate", "balance")
    assert not any("答案" in text or LOOP in text or "im_end" in text for text in texts)


def test_gates_can_be_opened(tmp_path: Path) -> None:
    trees = [tree("a", [(f"{LOOP} 所以 3", "correct"), ("4", "wrong")])]
    opened = Build(gates=Gates(loops=False, language=False), max_tokens=5_000)
    assert build(trees, tiny_tokenizer(), opened, tmp_path, seed=0).counts["removed"] == {}


def test_foreign_letters() -> None:
    assert foreign_share("So x = 3, α = π/2, ∑ 𝑥", "What is x?") == 0
    assert foreign_share("所以 x = 3", "苹果是多少？") < 0.5
    assert foreign_share("The answer is 3", "苹果是多少？") == 1
    assert foreign_share("答えは三です", "苹果是多少？") == 0
    assert foreign_share("Итак, три", "What is it?") == 1


def test_balance_is_by_seed_and_never_starves_a_group(tmp_path: Path) -> None:
    trees = [random_tree(i) for i in range(20)] + [random_tree(i + 20, task="letters") for i in range(8)]
    even = Build(gates=Gates(balance=("task", "difficulty"), at_most=2.0))
    built = build(trees, tiny_tokenizer(), even, tmp_path / "a", seed=0)
    groups: dict[tuple[str, int], int] = {}
    for row in rows(tmp_path / "a" / "sft"):
        key = (row["task"], min(int(row["pass_rate"] * 3), 2))
        groups[key] = groups.get(key, 0) + 1
    assert max(groups.values()) <= 2 * min(groups.values())
    assert built.counts["removed"]["balance"] > 0
    build(trees, tiny_tokenizer(), even, tmp_path / "b", seed=1)
    assert rows(tmp_path / "a" / "sft") != rows(tmp_path / "b" / "sft")


def test_a_file_names_its_template_and_training_can_refuse_another(tmp_path: Path) -> None:
    build(TREES, tiny_tokenizer(), Build(), tmp_path, seed=0)
    path = tmp_path / "sft" / "train.parquet"
    assert read_metadata(path)["template"] == template_hash(tiny_tokenizer())
    check_template(path, tiny_tokenizer())
    other = tiny_tokenizer(newline=False)
    with pytest.raises(UsageError, match=f"this student's is {template_hash(other)}"):
        check_template(path, other)


def test_a_control_has_one_chain_of_each_tree_in_turn_right_or_wrong(tmp_path: Path) -> None:
    built = build(TREES, tiny_tokenizer(), Build(sft=BuildSFT(chains_per_tree=2)), tmp_path, seed=0, control=True)
    assert [row["tree_id"] for row in rows(tmp_path / "sft")] == ["a", "a", "b"]
    assert [row["tree_id"] for row in rows(tmp_path / "control")] == ["a", "b", "c"]
    assert built.counts["control_rows"] == 3 > sum(row["reward"] for row in rows(tmp_path / "control"))
