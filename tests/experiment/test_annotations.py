"""From the viewer to a dataset and back: what annotators say decides rows, fingerprints and plans, and is exported."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.support.fake_server import FakeServerThread

from cotree.base.errors import UsageError
from cotree.base.progress import Output
from cotree.base.rows import read_rows
from cotree.base.run_folder import RunFolder
from cotree.data.annotations import FILE, Annotation, Annotations, ConflictError, agreement, annotate, chain_annotations
from cotree.data.export import export_to
from cotree.experiment.plan import plan
from cotree.experiment.recipe import build_recipe
from cotree.experiment.run import run
from cotree.search.store import StoredTree, TreeStore
from cotree.search.thoughts import chain_text

MODES = ("require_accept", "drop_rejected", "use_fixed")


@pytest.fixture
def grown(server: FakeServerThread, student: Path, tmp_path: Path) -> tuple[dict[str, Any], Path]:
    """A written recipe with a dataset for each mode, and the folder of runs in which its trees are grown."""
    data = {"trees": "train", "per_tree": 99, "gates": {"contamination": False}}
    written = {
        "name": "notes",
        "models": {"far": {"url": server.url, "model": "fake", "mode": "chat"}, "tiny": {"weights": str(student)}},
        "trees": {"train": {"questions": {"letters": 3}, "roles": {"thinker": "far"}, "rollouts": 8}},
        "datasets": {
            "plain": {**data, "rows": "sft"},
            **{mode: {**data, "rows": "sft", "annotations": mode} for mode in MODES},
            "pairs": {**data, "rows": "dpo", "annotations": "drop_rejected", "text": "think"},
        },
    }
    run(build_recipe(written), tmp_path / "runs", only="trees", output=Output(quiet=True))
    return written, tmp_path / "runs"


def trees(runs: Path) -> list[StoredTree]:
    with TreeStore(runs / "notes/trees/train/trees.db", reading=True) as store:
        return list(store.trees())


def correct_leaves(runs: Path) -> list[tuple[StoredTree, int]]:
    """One for each distinct text, as a dataset has them."""
    found = {
        (tree.tree_id, chain_text(tree.chain(node.node_id))): (tree, node.node_id)
        for tree in trees(runs)
        for node in reversed(tree.nodes)
        if node.verdict == "correct"
    }
    return list(found.values())


def say(runs: Path, tree: StoredTree, leaf: int, verdict: str, **more: Any) -> None:
    with Annotations(runs / "notes" / FILE) as annotations:
        annotations.save(annotate(tree, leaf, "train", annotator="anna", verdict=verdict, **more), None)


def build(written: dict[str, Any], runs: Path) -> None:
    run(build_recipe(written), runs, output=Output(quiet=True))


def rows_of(runs: Path, name: str) -> dict[tuple[str, int], str]:
    path = runs / f"notes/datasets/{name}/train.parquet"
    return {(row["tree_id"], row["leaf_id"]): row["completion"][0]["content"] for row in read_rows(path)}


def planned(written: dict[str, Any], runs: Path) -> dict[str, tuple[str, list[str]]]:
    return {each.name.partition("/")[2]: (each.state, each.why) for each in plan(build_recipe(written), runs)}


def test_annotations_decide_rows_and_fingerprints(grown: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    written, runs = grown
    leaves = correct_leaves(runs)
    accepted, rejected, fixed, spoilt, *_ = leaves
    say(runs, *accepted, "accept")
    say(runs, *rejected, "reject", note="the second step does not follow")
    box = f"\\boxed{{{fixed[0].gold}}}"
    say(runs, *fixed, "fix", text=f"Count them one by one.\nThe answer is: {box}")
    say(runs, *spoilt, "fix", text="The answer is: \\boxed{7919}")
    build(written, runs)

    keys = [(tree.tree_id, leaf) for tree, leaf in (accepted, rejected, fixed, spoilt)]
    plain = rows_of(runs, "plain")
    assert {*keys} <= plain.keys() and len(plain) == len(leaves)
    assert rows_of(runs, "require_accept") == {keys[0]: plain[keys[0]]}
    assert rows_of(runs, "drop_rejected") == {key: text for key, text in plain.items() if key != keys[1]}
    use_fixed = rows_of(runs, "use_fixed")
    assert use_fixed.keys() == plain.keys() - {keys[1], keys[3]}
    assert use_fixed[keys[2]] == f"Count them one by one.\nThe answer is: {box}"
    pairs = list(read_rows(runs / "notes/datasets/pairs/train.parquet"))
    assert keys[1] not in {(row["tree_id"], row["chosen_leaf"]) for row in pairs} and pairs

    counts = {name: record.result["counts"] for name, record in RunFolder(runs / "notes").nodes().items()}
    assert counts["datasets/plain"]["annotated"] is None
    assert counts["datasets/require_accept"]["annotated"] == {"accepted": 1, "rejected": 1, "fixed": 0, "not_used": 2}
    assert counts["datasets/use_fixed"]["annotated"] == {"accepted": 0, "rejected": 1, "fixed": 2, "not_used": 1}
    assert counts["datasets/use_fixed"]["chains_left_out"]["fix_not_correct"] == 1
    card = (runs / "notes/datasets/use_fixed/README.md").read_text()
    assert "annotated chains: 1 rejected, 2 fixed, 1 not used" in card and "were rejected by an annotator" in card

    before = planned(written, runs)
    assert before["drop_rejected"] == ("done", ["annotated chains: 1 rejected, 3 not used"])
    assert {state for state, _ in before.values()} == {"done"}
    say(runs, *leaves[4], "reject")
    after = planned(written, runs)
    assert after["plain"] == before["plain"] and after["train"][0] == "done"
    for name in (*MODES, "pairs"):
        assert after[name] == ("changed", ["annotations.made", "annotated chains: 5 by now"])
    again = tmp_path / "again"
    build(written, runs)
    assert len(rows_of(runs, "drop_rejected")) == len(plain) - 2
    run(build_recipe(written), again, source=runs / "notes", output=Output(quiet=True))
    assert rows_of(again, "drop_rejected") == rows_of(runs, "drop_rejected"), "annotations come along with --from"
    assert {state for state, _ in planned(written, again).values()} == {"done"}


def test_a_corrected_text_is_thinking_and_an_answer(grown: tuple[dict[str, Any], Path]) -> None:
    written, runs = grown
    written["datasets"] = {"use_fixed": {**written["datasets"]["use_fixed"], "text": "think"}}
    tree, leaf = correct_leaves(runs)[0]
    say(runs, tree, leaf, "fix", text=f"One by one.\n\nSo it is {tree.gold}:\n\\boxed{{{tree.gold}}}")
    build(written, runs)
    text = rows_of(runs, "use_fixed")[tree.tree_id, leaf]
    assert text == f"<think>\nOne by one.\n\nSo it is {tree.gold}:\n</think>\n\n\\boxed{{{tree.gold}}}"


def test_annotations_are_exported_with_the_words_of_their_chains(
    grown: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    _, runs = grown
    out = tmp_path / "notes.jsonl"
    with pytest.raises(UsageError, match="has no annotations; make some with `cotree view"):
        export_to(runs / "notes", "annotations", str(out))
    tree, leaf = correct_leaves(runs)[0]
    say(runs, tree, leaf, "reject", note="a | b\nc")
    assert export_to(runs / "notes", "annotations", str(out)) == [f"{out}: 1 annotations"]
    (row,) = map(json.loads, out.read_text().splitlines())
    assert row["completion"] == chain_text(tree.chain(leaf)) and row["prompt"] == tree.messages
    assert (row["annotator"], row["verdict"], row["note"], row["judged"]) == ("anna", "reject", "a | b\nc", "correct")


def test_what_was_said_of_other_words_counts_for_nothing(grown: tuple[dict[str, Any], Path]) -> None:
    written, runs = grown
    tree, leaf = correct_leaves(runs)[0]
    other = replace(tree, nodes=[replace(node) for node in tree.nodes])
    other.nodes[leaf].text += " and more"
    say(runs, other, leaf, "reject")
    written["datasets"] = {"drop_rejected": written["datasets"]["drop_rejected"]}
    build(written, runs)
    assert (tree.tree_id, leaf) in rows_of(runs, "drop_rejected")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"annotations": "use_fixed", "text": "tags"}, "needs text: plain or think"),
        ({"annotations": "use_fixed", "rows": "stepwise"}, "needs rows: sft or dpo"),
        ({"annotations": "use_fixed", "leave_out": ["sub_task"]}, "needs no `leave_out`"),
        ({"annotations": "use_fixed", "reflections": "cut"}, "needs reflections: keep"),
        ({"annotations": "accept"}, "annotations"),
        ({"annotations": "drop_rejected", "trees": None, "file": "x.jsonl"}, "rows of a file are taken as they are"),
    ],
)
def test_settings_that_cannot_be_honoured_are_refused(settings: dict[str, Any], words: str) -> None:
    entry = {key: value for key, value in ({"trees": "train", "rows": "sft"} | settings).items() if value}
    written = {
        "name": "x",
        "models": {"far": {"url": "http://127.0.0.1:9", "model": "m", "tokenizer": "some/tokenizer"}},
        "trees": {"train": {"questions": {"letters": 1}, "roles": {"thinker": "far"}}},
        "datasets": {"chains": entry},
    }
    with pytest.raises(UsageError, match=words):
        build_recipe(written)


def note(annotator: str, leaf: int, verdict: Any, **more: Any) -> Annotation:
    about: dict[str, Any] = {"node": "train", "config": "c", "tree": "t", "chain": "h", "leaf": leaf}
    return Annotation(**about, annotator=annotator, verdict=verdict, **more)


def test_agreement_is_cohens_kappa() -> None:
    # The example of Cohen's kappa in every textbook: 50 items, 20 and 15 of them alike, 5 and 10 otherwise.
    answers = [("accept", "accept")] * 20 + [("accept", "reject")] * 5 + [("reject", "accept")] * 10
    answers += [("reject", "reject")] * 15
    said = [note(name, leaf, verdict) for leaf, pair in enumerate(answers) for name, verdict in zip("ab", pair)]  # noqa: B905
    found = agreement([*said, note("c", 999, "accept")])
    assert (found["pairs"], found["equal"]) == (50, 35) and found["kappa"] == pytest.approx(0.4)
    assert agreement(said[:1]) == {"pairs": 0, "equal": 0, "kappa": None}
    assert agreement([note("a", 1, "accept"), note("b", 1, "accept")])["kappa"] is None, "chance alone agrees"


def test_concurrent_saves_lose_nothing_and_a_damaged_file_keeps_the_rest(tmp_path: Path) -> None:
    path = tmp_path / FILE
    with Annotations(path):
        pass

    def work(name: str) -> None:
        with Annotations(path) as annotations:
            for leaf in range(15):
                annotations.save(note(name, leaf, "accept", note="words " * 40), None)

    threads = [threading.Thread(target=work, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with Annotations(path) as annotations:
        found = annotations.all()
        assert sorted(each.version for each in found) == list(range(1, 61))
        with pytest.raises(ConflictError):
            annotations.save(note("a", 3, "reject"), None)
        mine = next(each for each in found if (each.annotator, each.leaf) == ("a", 3))
        annotations.save(note("a", 3, "reject"), mine.version)
        annotations.save(note("b", 3, None), next(e.version for e in found if (e.annotator, e.leaf) == ("b", 3)))
        assert len(annotations.all()) == 59 and annotations.saves() == 62
    together = chain_annotations(tmp_path, ["c"])
    assert together["t", 3].rejected and together["t", 3].accepted and not together["t", 4].rejected
    assert chain_annotations(tmp_path, ["another"]) == {}
    content = bytearray(path.read_bytes())
    at = content.rfind(b"words words")
    content[at : at + 5] = b"WORDS"
    path.write_bytes(content)
    with Annotations(path) as annotations:
        assert "annotations are kept" in annotations.rescued and len(annotations.all()) in (58, 59)
