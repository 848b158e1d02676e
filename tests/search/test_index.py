"""The index of a store says of every tree what the tree says, whatever happened to either file."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.trees import node, random_tree, tree_of

from cotree.base.errors import CotreeError
from cotree.search.index import TreeIndex, TreeQuery
from cotree.search.store import StoredTree, TreeStore


def trees() -> list[StoredTree]:
    """40 trees of two tasks with ids that sort as numbers, and one of another config."""
    found = [
        replace(
            random_tree(n), question_id=f"q-{n}", task=["arithmetic", "letters"][n % 2], completion_tokens=n * 7 % 11
        )
        for n in range(40)
    ]
    return [*found, replace(random_tree(40), config="older")]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TreeStore:
    store = TreeStore(tmp_path_factory.mktemp("index") / "trees.db")
    for each in trees():
        store.put(each)
    return store


def listed(store: TreeStore, query: TreeQuery, annotated: tuple[str, ...] = (), **page: Any) -> list[str]:
    with TreeIndex(store) as index:
        index.fill()
        total, rows = index.list("c", query, annotated, **page)
    assert page or total == len(rows)
    return [row["tree"] for row in rows]


def as_read(query: TreeQuery, annotated: tuple[str, ...]) -> list[str]:
    """What the list must be, from the trees themselves."""

    def numbers(tree: StoredTree) -> Counter[str]:
        return Counter(str(each.verdict) for each in tree.nodes)

    def share(tree: StoredTree) -> float:
        found = numbers(tree)
        return found["correct"] / (found["correct"] + found["wrong"] + found["no_answer"])

    def reflected(tree: StoredTree) -> str | None:
        if not any(each.type == "reflection" for each in tree.nodes):
            return None
        chains = [tree.chain(each.node_id) for each in tree.nodes if each.verdict == "correct"]
        return "helped" if any(each.type == "reflection" for chain in chains for each in chain) else "failed"

    def mix(tree: StoredTree) -> str:
        found = numbers(tree)
        if not found["correct"] + found["wrong"]:
            return "no_answer"
        if found["correct"]:
            return "mixed" if found["wrong"] + found["no_answer"] else "all_correct"
        return "all_wrong"

    def fits(tree: StoredTree) -> bool:
        words = " ".join(each.text for each in tree.nodes).lower()
        return (
            tree.config == "c"
            and query.task in (None, tree.task)
            and query.verdicts in (None, mix(tree))
            and query.reflected in (None, reflected(tree))
            and query.annotated in (None, tree.tree_id in annotated)
            and all(word in words for word in query.words.split())
        )

    def key(tree: StoredTree) -> Any:
        value: dict[str, Any] = {
            "question": 0, "tokens": tree.completion_tokens, "thoughts": len(tree.nodes), "hard": share(tree),
            "correct_share": share(tree),
        }  # fmt: skip
        return value[query.sort]

    found = sorted(filter(fits, trees()), key=lambda tree: (tree.task, int(tree.question_id[2:])))
    if query.sort == "question":
        return [tree.tree_id for tree in (found[::-1] if query.descending else found)]
    found.sort(key=key, reverse=query.descending)
    if query.sort == "hard":
        found.sort(key=lambda tree: tree.tree_id in annotated)
    return [tree.tree_id for tree in found]


QUERIES = st.builds(
    TreeQuery,
    task=st.sampled_from([None, "letters"]),
    verdicts=st.sampled_from([None, "mixed", "all_correct", "all_wrong", "no_answer"]),
    reflected=st.sampled_from([None, "helped", "failed"]),
    annotated=st.sampled_from([None, True, False]),
    words=st.sampled_from(["", "apple", "carry  one", "absent"]),
    sort=st.sampled_from(["question", "tokens", "thoughts", "correct_share", "hard"]),
    descending=st.booleans(),
)


@settings(max_examples=60, deadline=None)
@given(QUERIES, st.lists(st.integers(0, 39), max_size=20, unique=True))
def test_a_list_is_what_reading_every_tree_would_give(store: TreeStore, query: TreeQuery, marked: list[int]) -> None:
    annotated = tuple(f"t{n:08}" for n in marked)
    found = listed(store, query, annotated)
    assert found == as_read(query, annotated)
    assert listed(store, query, annotated, offset=3, limit=4) == found[3:7]


def test_flags_and_depth_are_those_of_the_chains(tmp_path: Path) -> None:
    round_and_round = " ".join(["so we add the two numbers and carry one"] * 60)
    loops = tree_of("loops", [node(0, None, None), node(1, 0, "thinking", round_and_round),
                              node(2, 1, "answer", "The answer is: \\boxed{4}", "wrong")])  # fmt: skip
    forced = tree_of("forced", [node(0, None, None), replace(node(1, 0, "answer", "The answer is: \\boxed{4}", "wrong"),
                                                             prefix="The answer is: \\boxed{", depth=4)])  # fmt: skip
    with TreeStore(tmp_path / "trees.db") as store, TreeIndex(store) as index:
        for each in (loops, forced):
            store.put(each)
            index.add([each])
        assert [row["tree"] for row in index.list("c", TreeQuery(looped=True))[1]] == ["loops"]
        assert [row["tree"] for row in index.list("c", TreeQuery(forced=True))[1]] == ["forced"]
        assert [row["tree"] for row in index.list("c", TreeQuery(min_depth=2))[1]] == ["forced"]
        assert index.looping("loops") == [2] and index.looping("forced") == []
        assert index.totals("c") == {"arithmetic": {"trees": 2, "thoughts": 3}}


@pytest.mark.parametrize("words", ['"', "a* OR b", "NEAR(x)", "col:x", "(", "\0", "-apple", "'; DROP TABLE trees"])
def test_no_words_are_read_as_a_language(store: TreeStore, words: str) -> None:
    assert isinstance(listed(store, TreeQuery(words=words)), list)
    assert len(listed(store, TreeQuery())) == 40


def test_a_tree_that_was_lost_and_grown_again_is_indexed_anew(tmp_path: Path) -> None:
    before, path = random_tree(1), tmp_path / "trees.db"
    with TreeStore(path) as store, TreeIndex(store) as index:
        store.put(before)
        store.put(random_tree(2))
        assert index.fill() == 2 and index.fill() == 0
        changes = index.changes()
    path.unlink()
    after = replace(before, nodes=[*before.nodes[:1], node(1, 0, "answer", "quite otherwise", "wrong")])
    with TreeStore(path) as store, TreeIndex(store) as index:
        store.put(after)
        assert index.fill() == 1 and index.changes() > changes
        total, rows = index.list("c", TreeQuery())
        assert total == 1 and (rows[0]["thoughts"], rows[0]["wrong"], rows[0]["correct"]) == (1, 1, 0)
        assert index.list("c", TreeQuery(words="otherwise"))[0] == 1
        assert index.list("c", TreeQuery(words="carry"))[0] == 0


@pytest.mark.parametrize("content", [b"", b"not a database", b"SQLite format 3\0" + b"x" * 4096])
def test_a_damaged_index_is_made_anew(tmp_path: Path, content: bytes) -> None:
    with TreeStore(tmp_path / "trees.db") as store:
        store.put(random_tree(1))
        (tmp_path / "trees_index.db").write_bytes(content)
        assert listed(store, TreeQuery()) == ["t00000001"]


def test_an_index_is_filled_after_its_store_could_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreadable(*_: object) -> Iterator[tuple[str, int | None]]:
        yield "t", 1
        raise CotreeError("database is locked")

    with TreeStore(tmp_path / "trees.db") as store, TreeIndex(store) as index:
        store.put(random_tree(0))
        with monkeypatch.context() as patch:
            patch.setattr(store, "checksums", unreadable)
            with pytest.raises(CotreeError, match="is locked"):
                index.fill()
        assert index.fill() == 1


def test_an_index_of_another_version_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with TreeStore(tmp_path / "trees.db") as store:
        store.put(random_tree(1))
        assert listed(store, TreeQuery()) == ["t00000001"]
        monkeypatch.setattr("cotree.search.index._VERSION", 2)
        monkeypatch.setattr("cotree.search.index._SCHEMA", ("CREATE TABLE trees (x)", "PRAGMA user_version = 2"))
        with pytest.raises(CotreeError, match="no such column"), TreeIndex(store) as index:
            index.changes()


def test_where_nothing_can_be_written_the_index_is_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with TreeStore(tmp_path / "trees.db") as store:
        store.put(random_tree(1))
    before = sorted(os.listdir(tmp_path))
    monkeypatch.setattr(os, "access", lambda *_: False)
    with TreeStore(tmp_path / "trees.db", reading=True) as reading:
        assert listed(reading, TreeQuery()) == ["t00000001"]
    assert sorted(os.listdir(tmp_path)) == before
