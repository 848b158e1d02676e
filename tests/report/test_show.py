"""`cotree show`: the list of a run's trees, and one tree with its thoughts, verdicts, values and chosen chains."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from tests.report.conftest import APPLES, apples_tree, make_run, record_of, thought
from tests.support.trees import random_tree, tree_of

from cotree.base.errors import UsageError
from cotree.base.numbers import counted
from cotree.base.progress import Output
from cotree.base.run_folder import RunFolder
from cotree.report.show import show_run
from cotree.report.tree_view import Block, TreeView, trees_to_show, views_of
from cotree.search.store import TreeStore


def shown(run: RunFolder, question: str | None = None, trees: str | None = None, width: int = 100) -> str:
    out = io.StringIO()
    Console(file=out, width=width).print(show_run(run, trees, question))
    return out.getvalue()


def words(text: str) -> str:
    """The text without guides and line ends."""
    return " ".join(re.sub("[│├└─]", " ", text).split())


def test_the_list_has_a_row_for_each_tree(run: RunFolder) -> None:
    lines = [re.split(r"\s{2,}", line.strip()) for line in shown(run).splitlines()]
    assert ["bags-12", "arithmetic", "9", "2", "1", "1", "5", "402", "control, pairs, pairs_long, sft"] in lines
    with TreeStore(run.path / "trees/train/trees.db") as store:
        for tree in store.trees():
            counts = [sum(node.verdict == kind for node in tree.nodes) for kind in ("correct", "wrong", "no_answer")]
            expected = [tree.question_id, tree.task, str(len(tree.nodes) - 1), *map(str, counts), str(tree.rollouts)]
            assert any(line[:7] == expected for line in lines)
    rows = [line[0] for line in lines if line[0].startswith(("q-", "bags"))]
    assert rows == ["bags-12", "q-5", "q-7", "q-9", "q-6", "q-8", "q-10"], "by task, then by number"
    assert "trees/train 7 trees, 1 with chains in datasets" in words(shown(run))


def test_a_tree_shows_each_thought_with_its_value_and_what_became_of_its_chain(run: RunFolder) -> None:
    text = words(shown(run, "bags-12", width=140))
    assert APPLES in text and "gold 32" in text
    for line in (
        "9 thoughts · chains: 2 correct, 1 wrong, 1 no answer · 5 rollouts, ended after the last rollout · 402 tokens",
        "sub_task Firstly, I need to break down this task. find the apples in the bags, then add. small 0.50 4",
        "answer ✓ The answer is: \\boxed{32} small 1.00 1 → chosen in pairs: shortest correct of 2, 41 tokens",
        "answer ✗ The answer is: \\boxed{23} small 0.00 1 → rejected in pairs: shares 12 tokens with the chosen one, "
        "the only wrong one, 30 tokens",
        "reflection Wait! something is wrong... the bags have 6 each. reflector 1.00 1",
        "→ chosen in pairs_long: longest correct of 2, 51 tokens",
        "→ SFT row in sft: longest correct of 2, 51 tokens, length rank 3",
        "→ SFT row in control: drawn, right or wrong, 51 tokens, length rank 3",
        "thinking ∅ 6 6 6 6 6 6 6 (cut by max_tokens)",
    ):
        assert line in text


def test_branches_are_indented_and_what_follows_without_a_branch_is_not(run: RunFolder) -> None:
    text = shown(run, "bags-12", width=120)
    columns = {kind: re.search(rf"^(.*?){kind}", text, re.MULTILINE) for kind in ("sub_task", "answer ✓", "reflection")}
    depths = {kind: len(found[1]) for kind, found in columns.items() if found is not None}
    assert depths == {"sub_task": 0, "answer ✓": 4, "reflection": 8}


@given(st.integers(0, 300))
def test_every_thought_is_in_exactly_one_block_in_the_trees_order(seed: int) -> None:
    tree = random_tree(seed)
    drawn: list[int] = []

    def collect(block: Block) -> None:
        for upper, lower in zip(block.thoughts, block.thoughts[1:], strict=False):
            assert lower.node.parent_id == upper.node.node_id
        drawn.extend(shown.node.node_id for shown in block.thoughts)
        for branch in block.branches:
            assert branch.thoughts[0].node.parent_id == block.thoughts[-1].node.node_id
            collect(branch)

    for block in TreeView("t", tree, [], {}).blocks():
        collect(block)
    assert sorted(drawn) == [node.node_id for node in tree.nodes if node.parent_id is not None]


@settings(deadline=None, max_examples=40)
@given(st.text(st.sampled_from("ab \x1b\x07\x9b\r\n\t\u202e\ud800[red]é日"), max_size=30), st.integers(40, 120))
def test_no_text_of_a_model_drives_the_terminal_and_no_word_is_lost(
    tmp_path_factory: pytest.TempPathFactory, text: str, width: int
) -> None:
    path = tmp_path_factory.mktemp("run")
    nodes = [thought(0, None, None), thought(1, 0, text or "own", f"{text}END", model=f"m{text}"),
             thought(2, 1, "answer", f"{text}END", "wrong")]  # fmt: skip
    run = RunFolder(path)
    (path / "recipe.yaml").write_text("name: x\ntrees: {t: {}}\n")
    record_of(run.node("trees/t"), "f", base="c")
    safe = text.encode("utf-8", "replace").decode()
    tree = replace(tree_of("t", nodes), question_id=f"q{safe}", config="c",
                   messages=[{"role": "user", "content": text}])  # fmt: skip
    tree = replace(tree, nodes=[replace(node, text=node.text.encode("utf-8", "replace").decode(),
                                        type=node.type and node.type.encode("utf-8", "replace").decode(),
                                        model=node.model.encode("utf-8", "replace").decode())
                                for node in tree.nodes])  # fmt: skip
    with TreeStore(path / "trees/t/trees.db") as store:
        store.put(tree)
    for page in (shown(run, f"q{safe}", width=width), shown(run, width=width)):
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", page)
    assert shown(run, f"q{safe}", width=500).count("END") == 2


def test_the_reason_of_a_verdict_is_shown_where_it_says_something(run: RunFolder) -> None:
    nodes = [thought(0, None, None)]
    for verdict in ("correct", "wrong", "undecided"):
        answer = thought(len(nodes), 0, "answer", f"The answer is {verdict}.", verdict)
        nodes.append(replace(answer, detail=f"why\n{verdict}\x1b[31m"))
    with TreeStore(run.path / "trees/train/trees.db") as store:
        store.put(replace(apples_tree(), tree_id="c" * 16, question_id="judged", nodes=nodes))
    page = shown(run, "judged")
    assert "(why wrong [31m)" in page and "(why undecided [31m)" in page and "why correct" not in page


def test_nothing_is_cut_where_output_is_no_terminal(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    long = "word " * 60 + "END"
    with TreeStore(run.path / "trees/train/trees.db") as store:
        store.put(replace(apples_tree(hostile=f" {long}"), tree_id="b" * 16, question_id="long"))
    Output().print(show_run(run, None, "long"))
    text = words(capsys.readouterr().out)
    assert text.count("END") == 3, "in the question and in two thoughts"
    assert text.count("word") == 180


def test_the_turns_of_a_conversation_are_shown_together(run: RunFolder) -> None:
    with TreeStore(run.path / "trees/train/trees.db") as store:
        store.put(replace(apples_tree(), tree_id="b" * 16, turn=1))
    text = shown(run, "bags-12")
    assert text.index("bags-12  ") < text.index("bags-12, turn 2")


def test_trees_of_older_settings_are_not_shown(run: RunFolder) -> None:
    with TreeStore(run.path / "trees/train/trees.db") as store:
        store.put(replace(apples_tree(), tree_id="b" * 16, question_id="old", config="older"))
    assert "old" not in shown(run)
    with pytest.raises(UsageError, match="no tree of question `old`"):
        shown(run, "old")


@pytest.mark.parametrize(
    ("question", "trees", "message"),
    [
        ("bags-13", None, r"no tree of question `bags-13`; did you mean `bags-12`\?"),
        ("bags-12", "trian", r"has no trees `trian`; did you mean `train`\?"),
        ("bags-12", "sampled", "no tree of question `bags-12`"),
        (None, "x", "has no trees `x`; known: train, sampled"),
    ],
)
def test_an_unknown_name_is_one_line(run: RunFolder, question: str | None, trees: str | None, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        show_run(run, trees, question)


def test_a_run_without_trees_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("name: early")
    with pytest.raises(UsageError, match="has no trees yet"):
        show_run(RunFolder(tmp_path))


def test_the_reasons_follow_the_datasets_settings(run: RunFolder) -> None:
    """Several rows of a tree, a choice by value, a mixture of lengths, longer correct chains, cut ones, and steps."""

    def use_of(content: list[dict[str, object]], **parts: object) -> dict[int, tuple[str, str]]:
        folder = run.node("datasets/sft")
        record = folder.record()
        assert record is not None
        folder.write(replace(record, parts=parts))
        pq.write_table(pa.Table.from_pylist(content), folder.path / "train.parquet")
        (view,) = views_of(run, ["train"], question="bags-12")
        return {leaf: (use.role, use.why) for leaf, uses in view.uses.items() for use in uses if use.dataset == "sft"}

    def sft(leaf: int, tokens: int) -> dict[str, object]:
        return {"tree_id": "a" * 16, "leaf_id": leaf, "length_tokens": tokens, "length_rank": 1, "value": 0.5}

    def pair(**more: object) -> dict[str, object]:
        return {"tree_id": "a" * 16, "chosen_leaf": 3, "rejected_leaf": 5, "prefix_tokens": 2, "chosen_tokens": 4,
                "rejected_tokens": 6, "rejected_finished": True, **more}  # fmt: skip

    both = use_of([sft(3, 41), sft(8, 51)], rows="sft")
    assert both[8][1].startswith("longest correct of 2, 51 tokens")
    assert both[3][1].startswith("2. longest correct of 2, 41 tokens")
    assert use_of([sft(3, 41)], rows="sft", select="value")[3][1].startswith("best value, correct of 2")
    assert use_of([sft(3, 41)], rows="sft", **{"length.longest": 1})[3][1].startswith("by length (a mixture)")
    longer = use_of([pair(rejected_leaf=8)], rows="dpo", rejected="longer_correct")
    assert longer[3] == ("chosen", "shortest correct of 2, 4 tokens")
    assert longer[8] == (
        "rejected",
        "shares 2 tokens with the chosen one, the fewest of the longer correct ones, 6 tokens",
    )
    assert "was cut off" in use_of([pair(rejected_leaf=9, rejected_finished=False)], rows="dpo")[9][1]
    steps = use_of([pair(step_type="thinking", chosen_value=1.0, rejected_value=0.5)], rows="step_pairs")
    assert steps[5] == ("rejected", "two siblings of type thinking, v/n 1.00 against 0.50")
    assert (
        use_of([{"tree_id": "a" * 16, "leaf_id": 5, "labels": [True]}], rows="stepwise")[5][0] == "process-reward row"
    )
    assert use_of([{"prompt": "of a file"}], rows="sft") == {}


def test_the_trees_of_the_report_are_those_that_datasets_took_and_one_of_each_task(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    views = trees_to_show(run, ["train", "sampled", "none"], 3)
    assert views[0].tree.question_id == "bags-12"
    assert [view.tree.task for view in views] == ["arithmetic", "letters", "arithmetic"]
    assert trees_to_show(run, [], 3) == []


def test_the_tree_that_shows_most_is_drawn_without_its_name(run: RunFolder) -> None:
    out = io.StringIO()
    Console(file=out, width=100).print(show_run(run, best=True))
    assert out.getvalue() == shown(run, "bags-12"), "the only one with chains in datasets"


def test_one_of_a_thing_is_no_plural() -> None:
    assert [counted(n, "rollout") for n in (0, 1, 2, 1500)] == [
        "0 rollouts", "1 rollout", "2 rollouts", "1,500 rollouts",
    ]  # fmt: skip
