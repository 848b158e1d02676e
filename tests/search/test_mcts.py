"""The pure search core: hypothesis drives it with random completions, orders and failures, and holds its invariants."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cotree.search.mcts import Node, Rollout, TreeSearch, next_thought
from cotree.search.settings import Search
from cotree.search.thoughts import DEFAULT_PATTERNS, PATTERNS, PREFIXES, THOUGHT_TYPES, draw, draw_pattern, draw_prefix
from cotree.tasks.base import VerdictKind


def leaf(thought: Node, kind: VerdictKind) -> Node:
    """A thought as the end of its chain."""
    thought.verdict, thought.reward = kind, float(kind == "correct")
    return thought


def write(rollout: Rollout, noise: int) -> None:
    """Feed a rollout to its end; the texts are a pure function of what was asked, so order cannot matter."""
    while (wanted := rollout.pending) is not None:
        own = random.Random(f"{wanted.seed_key}-{noise}")
        thoughts = []
        for i in range(wanted.n):
            roll = own.random()
            if wanted.type == "answer":
                wrong: VerdictKind = "wrong" if roll < 0.7 else "no_answer" if roll < 0.85 else "undecided"
                kind: VerdictKind = "correct" if roll < 0.3 else wrong
                thoughts.append(leaf(wanted.thought(i, f"answer {own.randint(0, 3)}"), kind))
            elif roll < 0.05 or own.random() < 0.1:
                thoughts.append(wanted.thought(i, ""))
            elif roll < 0.1:
                thoughts.append(leaf(wanted.thought(i, f"cut {i}"), "no_answer"))
            else:
                thoughts.append(wanted.thought(i, f"{wanted.type} {own.randint(0, 5)}"))
        rollout.feed([write_on(thought, own) for thought in thoughts])


def write_on(thought: Node, own: random.Random) -> list[Node]:
    """A thought, and after some of them what the same sample went on to write, down to an end of its chain."""
    sample = [thought]
    if thought.text and thought.reward is None and own.random() < 0.2:
        while sample[-1].depth < 6 and own.random() < 0.6:
            sample.append(next_thought(sample[-1], "thinking", f"then {own.randint(0, 2)}"))
        sample.append(leaf(next_thought(sample[-1], "answer", f"own answer {own.randint(0, 3)}"), "wrong"))
    return sample


def tell(search: TreeSearch, rollout: Rollout) -> None:
    """Merge a rollout; its wrong answers earn reflections."""
    search.tell(rollout)
    for node in rollout.written:
        if node.verdict == "wrong":
            search.add_reflection(node)


def below(node: Node) -> list[Node]:
    return [node, *(n for child in node.children for n in below(child))]


def shape(search: TreeSearch) -> list[tuple[object, ...]]:
    return [(n.node_id, n.parent_id, n.type, n.text, n.path, n.visits, n.value) for n in search.nodes]


def new_search(pattern: str, seed: int, rollouts: int = 12) -> TreeSearch:
    search = Search(rollouts=rollouts, max_depth=8, max_reflections=3, widen=seed % 2 == 1)
    return TreeSearch(PATTERNS[pattern], str(seed), search)


@given(
    pattern=st.sampled_from(list(PATTERNS)),
    seed=st.integers(0, 10_000),
    rollouts=st.integers(1, 25),
    k=st.integers(1, 6),
)
@settings(max_examples=150, deadline=None)
def test_invariants_hold_whatever_comes(pattern: str, seed: int, rollouts: int, k: int) -> None:
    search, told = new_search(pattern, seed, rollouts), 0
    while not search.done:
        batch = search.ask(k)
        assert 0 < len(batch) <= k
        places = {(r.pending.node.path, r.pending.place) for r in batch if r.pending is not None}
        assert len(places) == len(batch), "two rollouts of a round grow one place"
        assert search.root.virtual_visits == len(batch)
        for rollout in batch:
            write(rollout, seed)
            assert any(n.verdict is not None for n in rollout.written), "a rollout ends at a judged leaf"
            tell(search, rollout)
            told += 1
    assert told <= rollouts
    assert search.rollouts == told
    assert all(node.text for node in search.nodes[1:])
    for node in search.nodes:
        judged = [n for n in below(node) if n.verdict not in (None, "undecided")]
        assert node.visits == len(judged)
        assert node.tries == sum(n.verdict is not None for n in below(node))
        assert node.value == pytest.approx(sum(n.reward or 0.0 for n in judged))
        assert 0 <= node.value <= node.visits
        assert node.virtual_visits == 0
        assert node.free_slots == sum(not slot.taken for n in below(node) for slot in n.slots)
        assert not (node.type == "answer" and node.verdict is None)
        assert node.depth <= 8
        assert sum(child.type == "reflection" for child in node.children) <= 1
    assert sum(n.type == "reflection" for n in search.nodes) <= 3
    assert told == rollouts or search.exhausted
    assert [n.node_id for n in search.nodes] == list(range(len(search.nodes)))
    rewards = [random.Random(f"{seed}-{leaf.node_id}").random() for leaf in search.leaves]
    search.set_rewards(rewards)
    leaves = zip(search.leaves, rewards, strict=True)
    rewarded = {leaf.node_id: reward for leaf, reward in leaves if leaf.verdict != "undecided"}
    for node in search.nodes:
        assert node.visits == sum(n.node_id in rewarded for n in below(node)), "another value is no other visit"
        assert node.value == pytest.approx(sum(rewarded.get(n.node_id, 0.0) for n in below(node)))


@given(pattern=st.sampled_from(list(PATTERNS)), seed=st.integers(0, 10_000), k=st.integers(1, 6), data=st.data())
@settings(max_examples=60, deadline=None)
def test_the_tree_does_not_depend_on_the_order_of_completions(
    pattern: str, seed: int, k: int, data: st.DataObject
) -> None:
    trees = []
    for shuffled in (False, True):
        search = new_search(pattern, seed)
        while not search.done:
            batch = search.ask(k)
            order = list(batch)
            if shuffled:
                order = data.draw(st.permutations(order))
            for rollout in order:
                write(rollout, seed)
            for rollout in batch:
                tell(search, rollout)
        trees.append(shape(search))
    assert trees[0] == trees[1]


def test_a_tree_with_nothing_to_grow_begins_anew_beside_what_it_has() -> None:
    search = TreeSearch(
        {"root": {"thinking": 2}, "thinking": {"answer": 1}}, "s", Search(rollouts=9, max_reflections=0)
    )
    places = []
    while search.rollouts_left:
        if search.exhausted:
            before = shape(search)
            search.expand_root()
            assert shape(search) == before
        for rollout in search.ask(2):
            write(rollout, 2)
            search.tell(rollout)
            places += [node.path for node in rollout.written if node.depth == 1]
    assert search.rollouts == 9
    assert len(set(places)) == len(places) > 2, "every place has a seed of its own"


def grown(widen: bool, kind: Callable[[Node], VerdictKind], **changes: Any) -> TreeSearch:
    """A tree of 12 rollouts, two answers below each of its thoughts; no two texts are alike."""
    pattern = {"root": {"thinking": 2}, "thinking": {"answer": 2}}
    given = {"rollouts": 12, "max_reflections": 0, "exploration": 0.5, "widen": widen, "patterns": {"p": pattern}}
    search = TreeSearch(pattern, "s", Search.model_validate(given | changes))
    while not search.done:
        for rollout in search.ask(1):
            while (wanted := rollout.pending) is not None:
                new = [wanted.thought(i, f"{wanted.seed_key} {i}") for i in range(wanted.n)]
                rollout.feed([[leaf(t, kind(t)) if wanted.type == "answer" else t] for t in new])
            search.tell(rollout)
    return search


def test_a_node_is_widened_or_deepened_by_what_its_children_brought() -> None:
    narrow = grown(False, lambda node: "wrong")
    assert narrow.exhausted
    assert narrow.rollouts == 2
    assert [len(narrow.root.children), *(len(child.children) for child in narrow.root.children)] == [2, 2, 2]
    # Where a thought leads to right answers it gets more of them; where none does the root gets more thoughts.
    deep = grown(True, lambda node: "correct" if node.path.startswith("0.0/") else "wrong")
    wide = grown(True, lambda node: "wrong")
    assert deep.rollouts == wide.rollouts == 12
    assert len(deep.root.children[0].children) > 8
    assert len(wide.root.children) == 4
    assert max(child.visits for child in wide.root.children) <= 8


def test_the_search_seeks_right_chains_or_where_right_and_wrong_ones_part() -> None:
    def kind(node: Node) -> VerdictKind:
        """Below the first thought all are right, below the second every other one."""
        return "correct" if node.path.startswith("0.0/") or node.path.endswith("0/") else "wrong"

    visits = {}
    for seek in ("correct", "pairs"):
        first, second = grown(True, kind, seek=seek, exploration=0.2, rollouts=20).root.children[:2]
        visits[seek] = first.visits > second.visits
    assert visits == {"correct": True, "pairs": False}


def test_ucb_is_the_papers() -> None:
    search = new_search("plain", 1)
    node = Node(1, 0, "thinking", "t", visits=4, value=3.0)
    assert search.ucb(node, 9) == pytest.approx(3 / 4 + 1.0 * (2.1972245773362196 / 4) ** 0.5)
    node.undecided = 5
    assert search.ucb(node, 9) == pytest.approx(3 / 4 + 1.0 * (2.1972245773362196 / 9) ** 0.5)


@pytest.mark.parametrize("place", ["0.0/", "0.1/"])
def test_where_nothing_can_be_judged_the_search_does_not_stay(place: str) -> None:
    search = grown(True, lambda node: "undecided" if node.path.startswith(place) else "correct")
    unsure = next(child for child in search.root.children if child.path == place)
    assert (unsure.visits, unsure.value, unsure.undecided) == (0, 0.0, len(unsure.children))
    assert unsure.undecided < search.root.visits == search.root.value
    nothing = grown(True, lambda node: "undecided")
    assert nothing.root.undecided == len(nothing.leaves) and nothing.rollouts == 12
    assert max(child.undecided for child in nothing.root.children) <= 8


def test_a_wrong_answer_earns_its_parent_one_reflection_without_the_answer() -> None:
    search = TreeSearch(PATTERNS["plain"], "s", Search(rollouts=30, max_reflections=1))
    while not search.done:
        for rollout in search.ask(1):
            while (wanted := rollout.pending) is not None:
                thoughts = [wanted.thought(i, f"{wanted.seed_key} {i}") for i in range(wanted.n)]
                rollout.feed([[leaf(t, "wrong") if wanted.type == "answer" else t] for t in thoughts])
            tell(search, rollout)
    (reflection,) = (n for n in search.nodes if n.type == "reflection")
    assert reflection.parent is not None
    assert {child.type for child in reflection.parent.children} == {"answer", "reflection"}
    below_it = [node for node in search.nodes if reflection in node.chain()]
    assert any(node.type == "answer" for node in below_it)
    assert all(step.type != "answer" for node in below_it for step in node.chain()[:-1])


def test_patterns_reach_an_answer_from_every_type_and_use_every_thought_type() -> None:
    used = {"reflection"}
    for pattern in (PATTERNS[name] for name in DEFAULT_PATTERNS["line"]):
        for row in pattern.values():
            used |= set(row)
            assert row
            assert all(kind == "answer" or kind in pattern for kind in row)
        seen, frontier = set(), {"root", "reflection"}
        while frontier:
            kind = frontier.pop()
            seen.add(kind)
            frontier |= {following for following in pattern.get(kind, {}) if following not in seen}
        assert "answer" in seen
    assert used == set(THOUGHT_TYPES)


def test_prefixes_are_drawn_by_seed_and_the_first_is_the_papers() -> None:
    assert PREFIXES["sub_task"][0] == "Firstly, I need to break down this task."
    assert {draw_prefix(PREFIXES["sub_task"], str(i)) for i in range(50)} == set(PREFIXES["sub_task"])
    assert draw_prefix(["a", "b"], "x") == draw_prefix(["a", "b"], "x")
    assert draw("a", 1000) == 250  # pinned: a change would silently change every tree


def test_a_pattern_is_drawn_by_seed_whatever_the_order_and_a_new_one_takes_only_its_share() -> None:
    seeds = [str(i) for i in range(300)]
    two = {seed: draw_pattern(["plain", "hypothesis"], seed) for seed in seeds}
    assert two == {seed: draw_pattern(["hypothesis", "plain"], seed) for seed in seeds}
    three = {seed: draw_pattern(["plain", "hypothesis", "own"], seed) for seed in seeds}
    assert {three[seed] for seed in seeds if three[seed] != two[seed]} == {"own"}
    for found, patterns in ((two, 2), (three, 3)):
        for name in set(found.values()):
            assert list(found.values()).count(name) == pytest.approx(300 / patterns, abs=40)


@given(
    pattern=st.sampled_from(list(PATTERNS)),
    seed=st.integers(0, 10_000),
    rollouts=st.integers(1, 12),
    more=st.integers(1, 12),
    leaves=st.integers(1, 3),
)
@settings(max_examples=100, deadline=None)
def test_a_tree_is_the_beginning_of_the_tree_of_more_rollouts(
    pattern: str, seed: int, rollouts: int, more: int, leaves: int
) -> None:
    def grow(count: int) -> tuple[TreeSearch, set[str]]:
        search, keys = new_search(pattern, seed, count), set()
        while not search.done:
            batch = search.ask(leaves)
            for rollout in batch:
                start = rollout.pending
                assert start is not None
                keys.add(start.seed_key)
                write(rollout, seed)
            for rollout in batch:
                tell(search, rollout)
        return search, keys

    (few, few_keys), (many, many_keys) = grow(rollouts), grow(rollouts + more)
    assert few_keys <= many_keys, "every request of the smaller budget is one of the larger"
    kept = {(n.path, n.type, n.text) for n in many.nodes}
    assert {(n.path, n.type, n.text) for n in few.nodes} <= kept
