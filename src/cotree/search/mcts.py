"""Monte Carlo tree search over thoughts: select, expand, roll out, back up. Pure: no I/O, no clock, no global random.

An ask-and-tell interface: `ask(k)` selects up to k places to grow, with virtual loss so that they differ. Each is a
`Rollout` whose `pending` request is answered with `feed` until it has reached a judged leaf, and `tell` merges the
rollouts of a round in the order in which they were asked. So completions may arrive in any order and at any time, and
the tree stays the same. A request is seeded by its place in the tree, never by the budget, C or the order of rollouts.

Invariants: a node's `visits` is the number of judged leaves at or below it and `value` the sum of their rewards; a leaf
is judged once and never selected again; after every tell or fail no virtual loss of that rollout is left; no `answer`
exists without a reward. All operations cost O(depth x branching), `set_rewards` the size of the tree.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cotree.search.settings import Search
from cotree.search.thoughts import PREFIXES, Pattern, draw_prefix
from cotree.tasks.base import Verdict


@dataclass(slots=True)
class Slot:
    """Children of a node that are still to be written: `n` samples of one type, in one request."""

    kind: str
    n: int
    index: int
    in_flight: bool = False


@dataclass(slots=True, eq=False)
class Node:
    """One thought. `path` is its place ("0.1/2.0": slot.sample at each depth) and seeds whatever grows below it.

    `reward` is a leaf's, in [0, 1]; None where the chain goes on. `verdict` is the verifier's, None where nobody
    verified. `logprob` is the mean over the thought's tokens, 0 where it was not asked for. `visits` is the number of
    judged leaves at or below the node and `value` the sum of their rewards.
    """

    parent: Node | None
    kind: str | None
    text: str
    path: str
    depth: int
    prefix: str = ""
    model: str = ""
    tokens: int = 0
    finish_reason: str = "stop"
    seed: int = 0
    seconds: float = 0.0
    verdict: Verdict | None = None
    reward: float | None = None
    logprob: float = 0.0
    id: int = -1
    visits: int = 0
    value: float = 0.0
    virtual: int = 0
    slots: list[Slot] = field(default_factory=list)
    slots_made: int = 0
    open_below: int = 0
    children: list[Node] = field(default_factory=list)

    @property
    def is_open(self) -> bool:
        """Whether its line goes on: a mini-step that ended by its token count and not by itself."""
        return self.finish_reason == "length" and self.reward is None

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
    kind: str
    n: int
    place: int
    prefix: str
    seed_key: str

    def thought(self, sample: int, text: str) -> Node:
        """The node of one sample, `text` with its prefix. It joins the tree when `tell` merges its rollout."""
        parent, path = self.node, f"{self.node.path}{self.place}.{sample}/"
        return Node(parent, self.kind, text, path, depth=parent.depth + 1, prefix=self.prefix)


def distinct_thoughts(thoughts: Sequence[Node]) -> list[Node]:
    """The first thought of each text; one without words is left out."""
    found: dict[str, Node] = {}
    for thought in thoughts:
        if thought.text:
            found.setdefault(thought.text, thought)
    return list(found.values())


class Rollout:
    """One descent from a selected place to a judged leaf. Holds what it wrote until `tell` merges it."""

    def __init__(self, search: TreeSearch, node: Node, slot: Slot) -> None:
        self._search = search
        self.start, self.slot = node, slot
        self.written: list[Node] = []
        self.pending: ThoughtRequest | None = search.thought_request(node, slot)

    def feed(self, thoughts: Sequence[Node]) -> None:
        """Take the thoughts that `pending` asked for; `pending` is then the next request, or None at a judged leaf.

        A thought that ends its chain (an answer, a cut text) comes with its reward, any other without. Where the model
        wrote nothing, an answer is asked for in its place, so that every rollout ends at a judged leaf.
        """
        assert self.pending is not None, "this rollout has already reached a judged leaf"
        new = distinct_thoughts(thoughts)
        if not new and self.pending.kind != "answer":
            self.pending = self._search.thought_request(self.pending.node, Slot("answer", 1, self.pending.place))
            return
        self.written.extend(new)
        live = [node for node in new if node.reward is None]
        for node in live:
            node.slots = self._search.child_slots(node)
            node.slots_made = len(node.slots)
        reached = not live or len(live) < len(new)
        self.pending = None if reached else self._search.thought_request(live[0], live[0].slots.pop(0))


class TreeSearch:
    """The search tree of one question.

    rollouts_left: how many may still be asked; whoever drives the search may lower or raise it. rollouts: how many were
    asked and have not failed.
    """

    def __init__(
        self, pattern: Pattern, seed: str, settings: Search, prefixes: Mapping[str, Sequence[str]] = PREFIXES
    ) -> None:
        self.pattern, self.seed, self.settings, self.prefixes = pattern, seed, settings, prefixes
        self.rollouts_left, self.reflections_left = settings.rollouts, settings.max_reflections
        self.rollouts = 0
        self.root = Node(None, None, "", "", depth=0, id=0)
        self.root.slots = self.child_slots(self.root)
        self.root.slots_made = len(self.root.slots)
        self.root.open_below = len(self.root.slots)
        self.nodes = [self.root]

    @property
    def done(self) -> bool:
        """Whether no rollout is under way, and the budget is spent or nothing is left to grow."""
        return self.root.virtual == 0 and (self.rollouts_left == 0 or self.root.open_below == 0)

    def child_slots(self, node: Node) -> list[Slot]:
        """The children that the pattern gives a node, still to be written; near `max_depth` only an answer."""
        if node.depth + 1 >= self.settings.max_depth:
            return [Slot("answer", 1, 0)]
        following = self.pattern[node.kind or "root"]
        return [Slot(kind, n, i) for i, (kind, n) in enumerate(following.items())]

    def thought_request(self, node: Node, slot: Slot) -> ThoughtRequest:
        """The request for the thoughts of a slot of a node."""
        key = f"{self.seed}/{node.path}/{slot.index}:{slot.kind}"
        # A mini-step that broke off inside a line is continued word by word, so no prefix comes between.
        prefix = "" if node.is_open and slot.kind == node.kind else draw_prefix(slot.kind, key, self.prefixes)
        return ThoughtRequest(node, slot.kind, n=slot.n, place=slot.index, prefix=prefix, seed_key=key)

    def ask(self, k: int = 1) -> list[Rollout]:
        """Up to `k` rollouts from different places (fewer when the tree or the budget has no more)."""
        asked: list[Rollout] = []
        while len(asked) < k and self.rollouts_left > 0 and self.root.open_below > 0:
            node = self._select()
            slot = next(slot for slot in node.slots if not slot.in_flight)
            slot.in_flight = True
            self._add(node, open_below=-1, virtual=1)
            self.rollouts_left -= 1
            self.rollouts += 1
            asked.append(Rollout(self, node, slot))
        return asked

    def tell(self, rollout: Rollout) -> None:
        """Merge a finished rollout: its nodes join the tree, its judged leaves count once, its virtual loss goes."""
        assert rollout.pending is None, "tell needs a rollout that has reached a judged leaf; fail is for another"
        rollout.start.slots.remove(rollout.slot)
        self._add(rollout.start, virtual=-1)
        for node in rollout.written:
            self._join(node)

    def fail(self, rollout: Rollout) -> None:
        """Forget a rollout whose request failed: it counts as nothing and its place can be asked again."""
        rollout.slot.in_flight = False
        self._add(rollout.start, open_below=1, virtual=-1)
        self.rollouts_left += 1
        self.rollouts -= 1

    def add_leaf(self, leaf: Node) -> None:
        """Let a judged leaf that no rollout wrote join the tree: a whole chain that was sampled by itself."""
        self.rollouts += 1
        self._join(leaf)

    @property
    def leaves(self) -> list[Node]:
        """The judged leaves in the order in which they joined the tree."""
        return [node for node in self.nodes if node.reward is not None]

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

    def expand_root_again(self) -> None:
        """Give the root its child slots once more, for a tree that has budget left and nothing to grow."""
        for slot in self.child_slots(self.root):
            self.root.slots.append(Slot(slot.kind, slot.n, self.root.slots_made))
            self.root.slots_made += 1
            self._add(self.root, open_below=1)

    def add_reflection(self, answer: Node) -> None:
        """Let a reflection follow the parent of an answer that seems wrong, as the answer's sibling.

        The chain that goes on thus keeps the thinking but not the answer. A parent gets one reflection, and only where
        thinking and an answer still fit below `max_depth`.
        """
        parent = answer.parent
        assert parent is not None
        there = [child.kind for child in parent.children] + [slot.kind for slot in parent.slots]
        if "reflection" in there or self.reflections_left == 0 or parent.depth + 3 > self.settings.max_depth:
            return
        self.reflections_left -= 1
        parent.slots.insert(0, Slot("reflection", 1, parent.slots_made))
        parent.slots_made += 1
        self._add(parent, open_below=1)

    def _select(self) -> Node:
        """Walk down by UCB to a node with a free slot: unvisited children first, then slots, then the best child."""
        node = self.root
        while True:
            growable = [child for child in node.children if child.open_below > 0]
            fresh = next((child for child in growable if child.visits + child.virtual == 0), None)
            if fresh is not None:
                node = fresh
            elif any(not slot.in_flight for slot in node.slots):
                return node
            else:
                parent_visits = node.visits + node.virtual
                node = max(growable, key=lambda child: self.ucb(child, parent_visits))

    def ucb(self, node: Node, parent_visits: int) -> float:
        """v/n + C sqrt(ln N / n), the paper's UCB; a virtual loss counts as a visit without reward."""
        visits = node.visits + node.virtual
        return node.value / visits + self.settings.exploration * math.sqrt(math.log(max(parent_visits, 1)) / visits)

    def _join(self, node: Node) -> None:
        """Append a node to its parent; a leaf's reward is backed up."""
        assert node.parent is not None
        node.id = len(self.nodes)
        self.nodes.append(node)
        node.parent.children.append(node)
        self._add(node, open_below=len(node.slots))
        if node.reward is not None:
            self._add(node, visits=1, value=node.reward)

    @staticmethod
    def _add(node: Node, *, visits: int = 0, value: float = 0.0, virtual: int = 0, open_below: int = 0) -> None:
        """Add to a node and all its ancestors."""
        step: Node | None = node
        while step is not None:
            step.visits += visits
            step.value += value
            step.virtual += virtual
            step.open_below += open_below
            step = step.parent
