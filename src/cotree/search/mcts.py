"""Monte Carlo tree search over thoughts: select, expand, roll out, back up. Pure: no I/O, no clock, no global random.

An ask-and-tell interface: `ask(k)` selects up to k places to grow, with virtual loss so that they differ. Each is a
`Rollout` whose `pending` request is answered with `feed` until it has reached a judged leaf, and `tell` merges the
rollouts of a round in the order in which they were asked. So completions may arrive in any order and at any time, and
the tree stays the same. A request is seeded by its place in the tree, never by the budget, C or the order of rollouts.

Invariants: a node's `visits` is the number of judged leaves at or below it and `value` the sum of their rewards, and an
undecided leaf is in neither; a leaf is judged once and never selected again; after every tell no virtual loss of that
rollout is left; no `answer` exists without a reward. All operations cost O(depth x branching), `set_rewards` the size
of the tree.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cotree.search.settings import Search
from cotree.search.store import StoredNode
from cotree.search.thoughts import PREFIXES, Pattern, draw_prefix


@dataclass(slots=True)
class Slot:
    """Children of a node, `n` samples of one type in one request. `taken`: a rollout writes or has written them.

    written: further samples, which the request that wrote the node itself went on to write.
    is_more: children beyond the pattern's row, which compete with the node's children (`widen`).
    """

    type: str
    n: int
    index: int
    taken: bool = False
    written: int = 0
    is_more: bool = False


@dataclass(slots=True, eq=False, repr=False)
class Node(StoredNode):
    """A thought while its tree grows: the row that will be stored, and what the search needs beside it.

    path: its place ("0.1/2.0/": slot.sample at each depth), which seeds whatever grows below it.
    logprob: the mean over the thought's tokens, 0 where it was not asked for.
    ended: the model ended its turn with it and gave no answer, so an answer is asked for next.
    fresh_leaves: the judged leaves at which the rollouts ended that took a slot of the node. asking: those under way
    that started at the node.
    virtual_visits: rollouts under way at or below the node. undecided: leaves at or below it that could not be judged.
    free_slots: slots at or below it that nobody has taken.
    """

    parent: Node | None = None
    path: str = ""
    logprob: float = 0.0
    ended: bool = False
    children: list[Node] = field(default_factory=list)
    slots: list[Slot] = field(default_factory=list)
    free_slots: int = 0
    virtual_visits: int = 0
    undecided: int = 0
    fresh_leaves: list[Node] = field(default_factory=list)
    asking: int = 0

    @property
    def tries(self) -> int:
        """How often the search came here: leaves at or below, also undecided ones, and rollouts under way."""
        return self.visits + self.virtual_visits + self.undecided

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
    """A request for `n` thoughts of one type that follow `node`'s chain; `place` is the index of their slot, and the
    first of them is its sample number `first`."""

    node: Node
    type: str
    n: int
    place: int
    prefix: str
    seed_key: str
    first: int = 0

    def thought(self, sample: int, text: str) -> Node:
        """A node for one sample. It joins the tree when `tell` merges its rollout."""
        above, path = self.node, f"{self.node.path}{self.place}.{self.first + sample}/"
        return Node(-1, None, self.type, text, self.prefix, depth=above.depth + 1, parent=above, path=path)


def next_thought(thought: Node, thought_type: str, text: str) -> Node:
    """A node for what the same sample went on to write after a thought: sample 0 of the thought's first slot."""
    path, depth = f"{thought.path}0.0/", thought.depth + 1
    return Node(-1, None, thought_type, text, model=thought.model, depth=depth, parent=thought, path=path)


def distinct_thoughts(samples: Sequence[Sequence[Node]]) -> list[Node]:
    """The thoughts of some samples, each one or several that follow each other, parents before children.

    Of equal siblings the first is kept, and gets the children of the others; one without words is left out.
    """
    found: dict[tuple[int, str, bool], Node] = {}
    for sample in samples:
        above = sample[0].parent if sample else None
        for thought in sample:
            if not thought.text:
                break
            thought.parent = above
            above = found.setdefault((id(above), thought.text, thought.reward is None), thought)
    return list(found.values())


class Rollout:
    """One descent from a selected node to a judged leaf. Holds the nodes that it wrote until `tell` merges them."""

    def __init__(self, search: TreeSearch, node: Node, slot: Slot) -> None:
        self._search, self.start = search, node
        self.written: list[Node] = []
        self._take(node, slot)

    def _take(self, node: Node, slot: Slot) -> None:
        """Make the thoughts of a slot the next that are asked for."""
        self._search.take(node, slot)
        self._slot = slot
        self.pending: ThoughtRequest | None = self._search.thought_request(node, slot)

    def feed(self, samples: Sequence[Sequence[Node]]) -> None:
        """Take what `pending` asked for; `pending` is then the next request, or None at a judged leaf.

        A sample is a thought, or several that follow each other where the model wrote on. One that ends its chain (an
        answer, a cut text) comes with its reward, any other without. Where the model wrote nothing, an answer is asked
        for in its place, so that every rollout ends at a judged leaf.
        """
        assert self.pending is not None, "this rollout has already reached a judged leaf"
        new = distinct_thoughts(samples)
        if not new and self.pending.type != "answer":
            self._slot.type, self._slot.n = "answer", 1
            self._take(self.pending.node, self._slot)
            return
        self.written.extend(new)
        written_on = Counter(id(node.parent) for node in new)
        for node in new:
            if node.reward is None:
                node.slots = self._search.child_slots(node)
                first = node.slots[0]
                first.written = min(written_on[id(node)], first.n)
                first.n -= first.written
                if first.n == 0:
                    self._search.take(node, first)
        self.pending = None
        if new and not any(node.reward is not None for node in new):
            last = next(node for node in new if not written_on[id(node)])
            self._take(last, last.slots[0])


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
        """New slots for the children that the pattern gives a node; near `max_depth` or at a turn's end an answer."""
        last = node.ended or node.depth + 1 >= self.settings.max_depth
        following = {"answer": 1} if last else self.pattern[node.type or "root"]
        return [Slot(child, n, index) for index, (child, n) in enumerate(following.items(), start=len(node.slots))]

    def thought_request(self, node: Node, slot: Slot) -> ThoughtRequest:
        """The request for the thoughts of a slot of a node."""
        key = f"{self.seed}/{node.path}/{slot.index}:{slot.type}"
        # A mini-step that broke off inside a line is continued word by word, so no prefix comes between.
        continues = node.is_open and slot.type == node.type
        prefix = "" if continues else draw_prefix(self.prefixes[slot.type], key)
        ends = self.settings.ends if slot.type == "answer" else self.settings.ends_of(slot.type)
        if node.parent is not None and ends in ("paragraph", "open"):
            prefix = f"\n\n{prefix}"
        return ThoughtRequest(
            node, slot.type, n=slot.n, place=slot.index, prefix=prefix, seed_key=key, first=slot.written
        )

    def ask(self, k: int = 1) -> list[Rollout]:
        """Up to `k` rollouts from different places (fewer when the tree or the budget has no more)."""
        asked: list[Rollout] = []
        while len(asked) < k and not self.done:
            node = self._select()
            free = sum(not slot.taken for slot in node.slots)
            asked.append(Rollout(self, node, next(slot for slot in node.slots if not slot.taken)))
            node.asking += 1
            more = sum(not slot.taken for slot in node.slots) - free
            self._add_upwards(node, free_slots=more, virtual_visits=1)
            self.rollouts_left -= 1
            self.rollouts += 1
        return asked

    def take(self, node: Node, slot: Slot) -> None:
        """Mark a slot as taken; with `widen`, where the pattern branches, one of as many children again is opened."""
        slot.taken = True
        n = self.pattern.get(node.type or "root", {}).get(slot.type, 1)
        if self.settings.widen and n > 1:
            node.slots.append(Slot(slot.type, n, len(node.slots), is_more=True))

    def tell(self, rollout: Rollout) -> None:
        """Merge a finished rollout: its nodes join the tree, its judged leaves count once, its virtual loss goes.

        A thought that the tree has at this place is not added again, and what follows it goes below the one that is
        there. Leaves are: each has a vote.
        """
        assert rollout.pending is None, "tell needs a rollout that has reached a judged leaf"
        self._add_upwards(rollout.start, virtual_visits=-1)
        there: dict[int, Node] = {}
        for node in rollout.written:
            assert node.parent is not None
            node.parent = there.get(id(node.parent), node.parent)
            same = [child for child in node.parent.children if (child.type, child.text) == (node.type, node.text)]
            twin = next((child for child in same if child.reward is None), None) if node.reward is None else None
            if twin is None:
                self._join(node)
            else:
                there[id(node)] = twin
        rollout.start.asking -= 1
        for leaf in rollout.written:
            above = leaf.parent if leaf.reward is not None else None
            while above is not None:
                above.fresh_leaves.append(leaf)
                above = above.parent if above is not rollout.start else None

    def add_leaf(self, leaf: Node) -> None:
        """Let a judged leaf that no rollout wrote join the tree: a whole chain that was sampled by itself."""
        self.rollouts += 1
        self._join(leaf)

    def set_rewards(self, rewards: Sequence[float]) -> None:
        """Give the `leaves` new rewards, in their order, and back them up anew."""
        for leaf, reward in zip(self.leaves, rewards, strict=True):
            leaf.reward = reward
        for node in self.nodes:
            node.value = (node.reward or 0.0) if node.verdict != "undecided" else 0.0
        # Parents come before their children.
        for node in reversed(self.nodes):
            if node.parent is not None:
                node.parent.value += node.value

    def add_reflection(self, answer: Node) -> None:
        """Let a reflection follow the parent of an answer that seems wrong, as the answer's sibling.

        The chain that goes on thus keeps the thinking but not the answer. A parent gets one reflection, and only where
        thinking and an answer still fit below `max_depth`; the root gets none, since no thought is there to look at.
        """
        parent = answer.parent
        assert parent is not None
        there = any(slot.type == "reflection" for slot in parent.slots)
        if parent is self.root or there or self.reflections_left == 0 or parent.depth + 3 > self.settings.max_depth:
            return
        self.reflections_left -= 1
        parent.slots.insert(0, Slot("reflection", 1, index=len(parent.slots)))
        self._add_upwards(parent, free_slots=1)

    def _select(self) -> Node:
        """Walk down by UCB to a node with a free slot: unvisited children first, then slots, then the best child.

        With `widen` more children of a node compete with those that it has, by UCB over what fresh ones there brought.
        """
        node = self.root
        while True:
            growable = [child for child in node.children if child.free_slots > 0]
            fresh = next((child for child in growable if child.tries == 0), None)
            free = [slot for slot in node.slots if not slot.taken]
            if fresh is not None:
                node = fresh
            elif any(not slot.is_more for slot in free) or not growable:
                return node
            else:
                tries = node.tries
                best = max(growable, key=lambda child: self.ucb(child, tries))
                if free and self._ucb_of_more(node) > self.ucb(best, tries):
                    return node
                node = best

    def _ucb_of_more(self, node: Node) -> float:
        """UCB of one more request at a node, over what its earlier ones brought; those under way count as worth 0."""
        rewards = [leaf.reward or 0.0 for leaf in node.fresh_leaves if leaf.verdict != "undecided"]
        tries = max(1, len(node.fresh_leaves) + node.asking)
        return self._ucb(sum(rewards), len(rewards) + node.asking, tries, node.tries)

    def ucb(self, node: Node, parent_tries: int) -> float:
        """v/n + C sqrt(ln N / n), the paper's UCB; a virtual loss counts as a visit without reward.

        Undecided leaves are not in v/n, but in the N and n of the other term: where nothing can be judged the search
        does not stay for ever.
        """
        return self._ucb(node.value, node.visits + node.virtual_visits, node.tries, parent_tries)

    def _ucb(self, value: float, visits: int, tries: int, parent_tries: int) -> float:
        mean = value / max(visits, 1)
        if self.settings.seek == "pairs":
            # One leaf more that is right as often as the tree's are, else a single right one would look like certainty.
            usual = self.root.value / max(self.root.visits, 1)
            mean = (value + usual) / (visits + 1)
            mean = 2 * min(mean, 1 - mean)
        return mean + self.settings.exploration * math.sqrt(math.log(max(parent_tries, 1)) / tries)

    def _join(self, node: Node) -> None:
        """Append a node to its parent; a leaf's reward is backed up, if it could be judged."""
        assert node.parent is not None
        node.node_id, node.parent_id = len(self.nodes), node.parent.node_id
        self.nodes.append(node)
        node.parent.children.append(node)
        self._add_upwards(node, free_slots=sum(not slot.taken for slot in node.slots))
        if node.reward is not None:
            self.leaves.append(node)
            if node.verdict == "undecided":
                self._add_upwards(node, undecided=1)
            else:
                self._add_upwards(node, visits=1, value=node.reward)

    @staticmethod
    def _add_upwards(
        node: Node,
        *,
        visits: int = 0,
        value: float = 0.0,
        virtual_visits: int = 0,
        undecided: int = 0,
        free_slots: int = 0,
    ) -> None:
        """Add to the counts of a node and of all its ancestors."""
        step: Node | None = node
        while step is not None:
            step.visits += visits
            step.value += value
            step.virtual_visits += virtual_visits
            step.undecided += undecided
            step.free_slots += free_slots
            step = step.parent
