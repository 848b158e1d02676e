"""Monte Carlo tree search over thoughts: select, expand, roll out, back up. Pure: no I/O, no clock, no global random.

An ask-and-tell interface: `ask(k)` selects up to k places to grow, with virtual loss so that they differ. Each is a
`Rollout` whose `pending` request is answered with `feed` until it has reached a judged leaf, and `tell` merges the
rollouts of a round in the order in which they were asked. So completions may arrive in any order and at any time, and
the tree stays the same. A request is seeded by its place in the tree, never by the budget, C or the order of rollouts.

Invariants: a node's `visits` is the number of judged leaves at or below it and `value` the sum of their rewards; a leaf
is judged once and never selected again; after every tell no virtual loss of that rollout is left; no `answer` exists
without a reward. All operations cost O(depth x branching), `set_rewards` the size of the tree.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cotree.search.settings import Search
from cotree.search.store import StoredNode
from cotree.search.thoughts import PREFIXES, Pattern, draw_prefix


@dataclass(slots=True)
class Slot:
    """Children of a node, `n` samples of one type in one request. `taken`: a rollout writes or has written them."""

    type: str
    n: int
    index: int
    taken: bool = False


@dataclass(slots=True, eq=False, repr=False)
class Node(StoredNode):
    """A thought while its tree grows: the row that will be stored, and what the search needs beside it.

    path: its place ("0.1/2.0/": slot.sample at each depth), which seeds whatever grows below it.
    logprob: the mean over the thought's tokens, 0 where it was not asked for.
    virtual_visits: rollouts under way at or below the node. free_slots: slots at or below it that nobody has taken.
    """

    parent: Node | None = None
    path: str = ""
    logprob: float = 0.0
    children: list[Node] = field(default_factory=list)
    slots: list[Slot] = field(default_factory=list)
    free_slots: int = 0
    virtual_visits: int = 0

    def chain(self) -> list[Node]:
        """The thoughts from the first below the root down to this one."""
        nodes: list[Node] = []
        node: Node = self
        while node.parent is not None:
            nodes.append(node)
            node = node.parent
        return nodes[::-1]


@dataclass(frozen=True, slots=True)
class ThoughtRequest:
    """A request for `n` thoughts of one type that follow `node`'s chain; `place` is the index of their slot."""

    node: Node
    type: str
    n: int
    place: int
    prefix: str
    seed_key: str

    def thought(self, sample: int, text: str) -> Node:
        """A node for one sample. It joins the tree when `tell` merges its rollout."""
        above, path = self.node, f"{self.node.path}{self.place}.{sample}/"
        return Node(-1, None, self.type, text, self.prefix, depth=above.depth + 1, parent=above, path=path)


def distinct_thoughts(thoughts: Sequence[Node]) -> list[Node]:
    """The first thought of each text; one without words is left out."""
    found: dict[str, Node] = {}
    for thought in thoughts:
        if thought.text:
            found.setdefault(thought.text, thought)
    return list(found.values())


class Rollout:
    """One descent from a selected node to a judged leaf. Holds the nodes that it wrote until `tell` merges them."""

    def __init__(self, search: TreeSearch, node: Node, slot: Slot) -> None:
        self._search, self.start = search, node
        self.written: list[Node] = []
        self._take(node, slot)

    def _take(self, node: Node, slot: Slot) -> None:
        """Make the thoughts of a slot the next that are asked for."""
        slot.taken = True
        self._slot = slot
        self.pending: ThoughtRequest | None = self._search.thought_request(node, slot)

    def feed(self, thoughts: Sequence[Node]) -> None:
        """Take the thoughts that `pending` asked for; `pending` is then the next request, or None at a judged leaf.

        A thought that ends its chain (an answer, a cut text) comes with its reward, any other without. Where the model
        wrote nothing, an answer is asked for in its place, so that every rollout ends at a judged leaf.
        """
        assert self.pending is not None, "this rollout has already reached a judged leaf"
        new = distinct_thoughts(thoughts)
        if not new and self.pending.type != "answer":
            self._slot.type, self._slot.n = "answer", 1
            self._take(self.pending.node, self._slot)
            return
        self.written.extend(new)
        unfinished = [node for node in new if node.reward is None]
        for node in unfinished:
            node.slots = self._search.child_slots(node)
        self.pending = None
        if unfinished and len(unfinished) == len(new):
            self._take(unfinished[0], unfinished[0].slots[0])


class TreeSearch:
    """The search tree of one question.

    rollouts_left: how many may still be asked; whoever drives the search may lower or raise it. rollouts: how many were
    asked. nodes: in the order of their ids, parents before children. leaves: the judged ones, as they joined the tree.
    """

    def __init__(
        self, pattern: Pattern, seed: str, settings: Search, prefixes: Mapping[str, Sequence[str]] = PREFIXES
    ) -> None:
        self.pattern, self.seed, self.settings, self.prefixes = pattern, seed, settings, prefixes
        self.rollouts_left, self.reflections_left = settings.rollouts, settings.max_reflections
        self.rollouts = 0
        self.root = Node(0, None, None, "")
        self.nodes = [self.root]
        self.leaves: list[Node] = []
        self.expand_root()

    @property
    def exhausted(self) -> bool:
        """Whether no slot is left to grow."""
        return self.root.free_slots == 0

    @property
    def done(self) -> bool:
        """Whether the budget is spent or nothing is left to grow."""
        return self.rollouts_left == 0 or self.exhausted

    def expand_root(self) -> None:
        """Give the root its child slots; once more where a tree has budget left and nothing to grow."""
        new = self.child_slots(self.root)
        self.root.slots += new
        self.root.free_slots += len(new)

    def child_slots(self, node: Node) -> list[Slot]:
        """New slots for the children that the pattern gives a node; near `max_depth` only for an answer."""
        last = node.depth + 1 >= self.settings.max_depth
        following = {"answer": 1} if last else self.pattern[node.type or "root"]
        return [Slot(child, n, index) for index, (child, n) in enumerate(following.items(), start=len(node.slots))]

    def thought_request(self, node: Node, slot: Slot) -> ThoughtRequest:
        """The request for the thoughts of a slot of a node."""
        key = f"{self.seed}/{node.path}/{slot.index}:{slot.type}"
        # A mini-step that broke off inside a line is continued word by word, so no prefix comes between.
        continues = node.is_open and slot.type == node.type
        prefix = "" if continues else draw_prefix(self.prefixes[slot.type], key)
        return ThoughtRequest(node, slot.type, n=slot.n, place=slot.index, prefix=prefix, seed_key=key)

    def ask(self, k: int = 1) -> list[Rollout]:
        """Up to `k` rollouts from different places (fewer when the tree or the budget has no more)."""
        asked: list[Rollout] = []
        while len(asked) < k and not self.done:
            node = self._select()
            asked.append(Rollout(self, node, next(slot for slot in node.slots if not slot.taken)))
            self._add_upwards(node, free_slots=-1, virtual_visits=1)
            self.rollouts_left -= 1
            self.rollouts += 1
        return asked

    def tell(self, rollout: Rollout) -> None:
        """Merge a finished rollout: its nodes join the tree, its judged leaves count once, its virtual loss goes."""
        assert rollout.pending is None, "tell needs a rollout that has reached a judged leaf"
        self._add_upwards(rollout.start, virtual_visits=-1)
        for node in rollout.written:
            self._join(node)

    def add_leaf(self, leaf: Node) -> None:
        """Let a judged leaf that no rollout wrote join the tree: a whole chain that was sampled by itself."""
        self.rollouts += 1
        self._join(leaf)

    def set_rewards(self, rewards: Sequence[float]) -> None:
        """Give the `leaves` new rewards, in their order, and back them up anew."""
        for leaf, reward in zip(self.leaves, rewards, strict=True):
            leaf.reward = reward
        for node in self.nodes:
            node.value = node.reward or 0.0
        # Parents come before their children.
        for node in reversed(self.nodes):
            if node.parent is not None:
                node.parent.value += node.value

    def add_reflection(self, answer: Node) -> None:
        """Let a reflection follow the parent of an answer that seems wrong, as the answer's sibling.

        The chain that goes on thus keeps the thinking but not the answer. A parent gets one reflection, and only where
        thinking and an answer still fit below `max_depth`.
        """
        parent = answer.parent
        assert parent is not None
        there = any(slot.type == "reflection" for slot in parent.slots)
        if there or self.reflections_left == 0 or parent.depth + 3 > self.settings.max_depth:
            return
        self.reflections_left -= 1
        parent.slots.insert(0, Slot("reflection", 1, index=len(parent.slots)))
        self._add_upwards(parent, free_slots=1)

    def _select(self) -> Node:
        """Walk down by UCB to a node with a free slot: unvisited children first, then slots, then the best child."""
        node = self.root
        while True:
            growable = [child for child in node.children if child.free_slots > 0]
            fresh = next((child for child in growable if child.visits + child.virtual_visits == 0), None)
            if fresh is not None:
                node = fresh
            elif any(not slot.taken for slot in node.slots):
                return node
            else:
                parent_visits = node.visits + node.virtual_visits
                node = max(growable, key=lambda child: self.ucb(child, parent_visits))

    def ucb(self, node: Node, parent_visits: int) -> float:
        """v/n + C sqrt(ln N / n), the paper's UCB; a virtual loss counts as a visit without reward."""
        visits = node.visits + node.virtual_visits
        return node.value / visits + self.settings.exploration * math.sqrt(math.log(max(parent_visits, 1)) / visits)

    def _join(self, node: Node) -> None:
        """Append a node to its parent; a leaf's reward is backed up."""
        assert node.parent is not None
        node.node_id, node.parent_id = len(self.nodes), node.parent.node_id
        self.nodes.append(node)
        node.parent.children.append(node)
        self._add_upwards(node, free_slots=sum(not slot.taken for slot in node.slots))
        if node.reward is not None:
            self.leaves.append(node)
            self._add_upwards(node, visits=1, value=node.reward)

    @staticmethod
    def _add_upwards(
        node: Node, *, visits: int = 0, value: float = 0.0, virtual_visits: int = 0, free_slots: int = 0
    ) -> None:
        """Add to the counts of a node and of all its ancestors."""
        step: Node | None = node
        while step is not None:
            step.visits += visits
            step.value += value
            step.virtual_visits += virtual_visits
            step.free_slots += free_slots
            step = step.parent
