"""Monte Carlo tree search over thoughts: select, expand, roll out, back up. Pure: no I/O, no clock, no global random.

Ask and tell: `ask(k)` selects up to k places to grow, with virtual loss so that they differ; each is a `Rollout` that
says what text it wants (`wanted`) and is fed what came (`feed`) until it has reached a judged leaf; `tell` merges a
round's rollouts in the order in which they were asked. Completions may thus arrive in any order and at any time, and
the tree stays the same.

Invariants: a node's `visits` is the number of judged leaves at or below it and `value` the sum of their rewards; a leaf
is judged once and never selected again; after every tell or fail no virtual loss of that rollout is left; no `answer`
exists without a reward. All operations cost O(depth x branching), `revalue` the size of the tree.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cotree.experiment.recipe import Search
from cotree.search.thoughts import PREFIXES, Pattern, prefix_of
from cotree.tasks.base import Verdict


@dataclass(slots=True)
class Slot:
    """A child type of a node that is still to be written: `n` samples in one request."""

    kind: str
    n: int
    index: int
    in_flight: bool = False


@dataclass(slots=True, eq=False)
class Node:
    """One thought. `path` is its place ("0.1/2.0": slot.sample at each depth) and seeds whatever grows below it.

    `reward` is what a leaf is worth, None where the chain goes on. `verdict` is the verifier's, None where nobody
    verified. `logprob` is the mean over the thought's tokens, 0 where it was not asked for.
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
class Wanted:
    """A request for text: `n` thoughts of one type that follow `node`'s chain, in its slot `place`."""

    node: Node
    kind: str
    n: int
    place: int
    prefix: str
    seed_key: str

    def thought(self, sample: int, text: str) -> Node:
        """What came for one sample: the whole text with its prefix. It joins the tree when its rollout is told."""
        parent = self.node
        return Node(parent, self.kind, text, f"{parent.path}{self.place}.{sample}/", parent.depth + 1, self.prefix)


def distinct(thoughts: Sequence[Node]) -> list[Node]:
    """Equal texts are one thought, and a text without words is none."""
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
        self.wanted: Wanted | None = search.want(node, slot)

    def feed(self, thoughts: Sequence[Node]) -> None:
        """Take the thoughts that `wanted` asked for; `wanted` is then the next request, or None at a judged leaf.

        A thought that ends its chain (an answer, a cut text) comes with its reward, another one with none. Where
        nothing came, an answer is asked for in its place, so that every rollout ends at a judged leaf.
        """
        assert self.wanted is not None, "this rollout has already reached a judged leaf"
        new = distinct(thoughts)
        if not new and self.wanted.kind != "answer":
            self.wanted = self._search.want(self.wanted.node, Slot("answer", 1, self.wanted.place))
            return
        self.written.extend(new)
        live = [node for node in new if node.reward is None]
        for node in live:
            node.slots = self._search.row(node)
            node.slots_made = len(node.slots)
        reached = not live or len(live) < len(new)
        self.wanted = None if reached else self._search.want(live[0], live[0].slots.pop(0))


class TreeSearch:
    """One question's tree, as the recipe's `settings` want it.

    `rollouts_left` is what may still be asked, for whoever drives the search to lower or to raise; `rollouts` is what
    was asked and has not failed.
    """

    def __init__(
        self, pattern: Pattern, seed: str, settings: Search, prefixes: Mapping[str, Sequence[str]] = PREFIXES
    ) -> None:
        self.pattern, self.seed, self.settings, self.prefixes = pattern, seed, settings, prefixes
        self.rollouts_left, self.reflections_left = settings.rollouts, settings.max_reflections
        self.rollouts = 0
        self.root = Node(None, None, "", "", 0, id=0)
        self.root.slots = self.row(self.root)
        self.root.slots_made = len(self.root.slots)
        self.root.open_below = len(self.root.slots)
        self.nodes = [self.root]

    @property
    def done(self) -> bool:
        """No rollout is under way, and the budget is spent or nothing is left to grow."""
        return self.root.virtual == 0 and (self.rollouts_left == 0 or self.root.open_below == 0)

    def row(self, node: Node) -> list[Slot]:
        """What may follow a node by the pattern; near `max_depth` only an answer."""
        if node.depth + 1 >= self.settings.max_depth:
            return [Slot("answer", 1, 0)]
        following = self.pattern[node.kind or "root"]
        return [Slot(kind, n, i) for i, (kind, n) in enumerate(following.items())]

    def want(self, node: Node, slot: Slot) -> Wanted:
        """The request for what stands in a slot of a node."""
        key = f"{self.seed}/{node.path}/{slot.index}:{slot.kind}"
        # A mini-step that broke off inside a line is continued word by word, so no prefix comes between.
        prefix = "" if node.is_open and slot.kind == node.kind else prefix_of(slot.kind, key, self.prefixes)
        return Wanted(node, slot.kind, slot.n, slot.index, prefix, key)

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
        assert rollout.wanted is None, "tell needs a rollout that has reached a judged leaf; fail is for another"
        rollout.start.slots.remove(rollout.slot)
        self._add(rollout.start, virtual=-1)
        for node in rollout.written:
            assert node.parent is not None
            node.id = len(self.nodes)
            self.nodes.append(node)
            node.parent.children.append(node)
            self._add(node, open_below=len(node.slots))
            if node.reward is not None:
                self._add(node, visits=1, value=node.reward)

    def fail(self, rollout: Rollout) -> None:
        """Forget a rollout whose request failed: it counts as nothing and its place can be asked again."""
        rollout.slot.in_flight = False
        self._add(rollout.start, open_below=1, virtual=-1)
        self.rollouts_left += 1
        self.rollouts -= 1

    @property
    def leaves(self) -> list[Node]:
        """The judged leaves in the order in which they were told."""
        return [node for node in self.nodes if node.reward is not None]

    def revalue(self, rewards: Sequence[float]) -> None:
        """Give the `leaves` other rewards; every value is again the sum of those at or below it."""
        for leaf, reward in zip(self.leaves, rewards, strict=True):
            leaf.reward = reward
        for node in self.nodes:
            node.value = node.reward or 0.0
        # Parents come before their children.
        for node in reversed(self.nodes):
            if node.parent is not None:
                node.parent.value += node.value

    def widen(self) -> None:
        """Let the root be followed once more by its row, for a tree that has budget left and nothing to grow."""
        for slot in self.row(self.root):
            self.root.slots.append(Slot(slot.kind, slot.n, self.root.slots_made))
            self.root.slots_made += 1
            self._add(self.root, open_below=1)

    def reflect(self, answer: Node) -> None:
        """A doubted answer earns its parent one reflection, the answer's sibling: the chain that goes on keeps the
        thinking but not the answer. Only where thinking and an answer still fit below `max_depth`."""
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
