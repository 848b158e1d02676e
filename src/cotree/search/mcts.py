"""Monte Carlo tree search over thoughts: select, expand, roll out, back up. Pure: no I/O, no clock, no global random.

An ask-and-tell interface: `ask(k)` selects up to k nodes to grow, spread by virtual loss, as `Rollout`s. The caller
answers a rollout's `pending` request with `feed` until it reaches a judged leaf, then merges the rollouts of a round
with `tell` in the order of `ask`. So the tree does not depend on the order in which completions arrive. A request's
seed depends on its place in the tree only, never on the budget, C or the order of rollouts.

Invariants: a node's `visits` counts the judged leaves at or below it and `value` sums their rewards, both without
undecided leaves; a leaf is judged once and never selected again; `tell` removes all virtual loss of its rollout; every
`answer` has a reward. Operations cost O(depth x branching), `set_rewards` O(tree size).
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
    """Children to be sampled below a node: `n` of one type in one request. `taken`: a rollout has claimed it.

    written: children of this slot that already came with the node, because its request wrote several thoughts.
    is_more: children beyond the pattern's row (`Search.widen`).
    """

    type: str
    n: int
    index: int
    taken: bool = False
    written: int = 0
    is_more: bool = False


@dataclass(slots=True, eq=False, repr=False)
class Node(StoredNode):
    """A thought during the search: the columns to store, plus the state of the search.

    path: its place in the tree ("0.1/2.0/": slot.sample at each depth); seeds all requests below it.
    logprob: mean over the thought's tokens; 0 if not requested.
    ended: the model ended its turn here without an answer, so the next thought is an answer.
    fresh_leaves: judged leaves of the rollouts that claimed a slot of this node.
    asking: unfinished rollouts that started at this node. virtual_visits: those at or below it.
    undecided: leaves at or below it that could not be judged. free_slots: unclaimed slots at or below it.
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
        """Visits including undecided leaves and unfinished rollouts: the n and N of UCB's exploration term."""
        return self.visits + self.virtual_visits + self.undecided

    def chain(self) -> list[Node]:
        """The path from below the root to this node."""
        nodes: list[Node] = []
        node: Node = self
        while node.parent is not None:
            nodes.append(node)
            node = node.parent
        return nodes[::-1]


@dataclass(frozen=True, slots=True)
class ThoughtRequest:
    """A request for `n` thoughts of one type below `node`: samples `first` and on of slot number `place`."""

    node: Node
    type: str
    n: int
    place: int
    prefix: str
    seed_key: str
    first: int = 0

    def thought(self, sample: int, text: str) -> Node:
        """Create the node of one sample; `tell` adds it to the tree."""
        above, path = self.node, f"{self.node.path}{self.place}.{self.first + sample}/"
        return Node(-1, None, self.type, text, self.prefix, depth=above.depth + 1, parent=above, path=path)


def next_thought(thought: Node, thought_type: str, text: str) -> Node:
    """Create the node of the text after `thought` in the same completion: sample 0 of the thought's first slot."""
    path, depth = f"{thought.path}0.0/", thought.depth + 1
    return Node(-1, None, thought_type, text, model=thought.model, depth=depth, parent=thought, path=path)


def distinct_thoughts(samples: Sequence[Sequence[Node]]) -> list[Node]:
    """Deduplicate sampled thoughts, each sample a chain of one or more; parents before children.

    Equal siblings are merged with their children; empty thoughts are dropped.
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
    """One rollout from a selected node to a judged leaf; holds its new nodes until `tell` adds them to the tree."""

    def __init__(self, search: TreeSearch, node: Node, slot: Slot) -> None:
        self._search, self.start = search, node
        self.written: list[Node] = []
        self._take(node, slot)

    def _take(self, node: Node, slot: Slot) -> None:
        """Claim a slot and make it the pending request."""
        self._search.take(node, slot)
        self._slot = slot
        self.pending: ThoughtRequest | None = self._search.thought_request(node, slot)

    def feed(self, samples: Sequence[Sequence[Node]]) -> None:
        """Give the samples of the `pending` request; `pending` is then the next request, or None at a judged leaf.

        A sample is one or more consecutive thoughts. The last has a reward if it ends its chain (an answer, or a text
        cut by max_tokens). If all samples are empty, an answer is requested instead, so every rollout ends at a leaf.
        """
        assert self.pending is not None, "this rollout has already reached a judged leaf"
        new = distinct_thoughts(samples)
        if not new and self.pending.type != "answer":
            self._slot.type, self._slot.n = "answer", 1
            self._take(self.pending.node, self._slot)
            return
        self.written.extend(new)
        written_on: dict[int, int] = {}
        for node in new:
            written_on[id(node.parent)] = written_on.get(id(node.parent), 0) + 1
        for node in new:
            if node.reward is None:
                node.slots = self._search.child_slots(node)
                first = node.slots[0]
                first.written = min(written_on.get(id(node), 0), first.n)
                first.n -= first.written
                if first.n == 0:
                    self._search.take(node, first)
        self.pending = None
        if new and not any(node.reward is not None for node in new):
            last = next(node for node in new if id(node) not in written_on)
            self._take(last, last.slots[0])


class TreeSearch:
    """The search tree of one question.

    rollouts_left: remaining budget, which the caller may change. rollouts: started so far.
    nodes: ordered by id, parents before children. leaves: judged leaves in the order in which they were added.
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
        """Whether no unclaimed slot is left in the tree."""
        return self.root.free_slots == 0

    @property
    def done(self) -> bool:
        """Whether the budget is spent or the tree exhausted."""
        return self.rollouts_left == 0 or self.exhausted

    def expand_root(self) -> None:
        """Add the pattern's child slots to the root; a repeated call lets an exhausted tree grow on."""
        new = self.child_slots(self.root)
        self.root.slots += new
        self.root.free_slots += len(new)

    def child_slots(self, node: Node) -> list[Slot]:
        """The child slots of a node by the pattern; one answer near `max_depth` or after the end of a turn."""
        last = node.ended or node.depth + 1 >= self.settings.max_depth
        following = {"answer": 1} if last else self.pattern[node.type or "root"]
        return [Slot(child, n, index) for index, (child, n) in enumerate(following.items(), start=len(node.slots))]

    def thought_request(self, node: Node, slot: Slot) -> ThoughtRequest:
        """Build the request for a slot of a node: its prefix, seed key and n."""
        key = f"{self.seed}/{node.path}/{slot.index}:{slot.type}"
        # The next mini-step continues an unfinished line, so it has no prefix.
        continues = node.is_open and slot.type == node.type
        prefix = "" if continues else draw_prefix(self.prefixes[slot.type], key)
        ends = self.settings.ends if slot.type == "answer" else self.settings.ends_of(slot.type)
        if node.parent is not None and ends in ("paragraph", "open"):
            prefix = f"\n\n{prefix}"
        return ThoughtRequest(
            node, slot.type, n=slot.n, place=slot.index, prefix=prefix, seed_key=key, first=slot.written
        )

    def ask(self, k: int = 1) -> list[Rollout]:
        """Select up to `k` rollouts with different slots (fewer if the tree or the budget has no more)."""
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
        """Claim a slot; with `widen` and more than one child in the pattern's row, also open a further slot."""
        slot.taken = True
        n = self.pattern.get(node.type or "root", {}).get(slot.type, 1)
        if self.settings.widen and n > 1:
            node.slots.append(Slot(slot.type, n, len(node.slots), is_more=True))

    def tell(self, rollout: Rollout) -> None:
        """Merge a finished rollout: add its nodes, back up its leaves, remove its virtual loss.

        A thought with the type and text of an existing sibling is merged with it. Leaves never are: each has a vote.
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
        """Add an independently sampled whole chain as a judged leaf."""
        self.rollouts += 1
        self._join(leaf)

    def set_rewards(self, rewards: Sequence[float]) -> None:
        """Replace the rewards of `leaves`, in their order, and recompute all values."""
        for leaf, reward in zip(self.leaves, rewards, strict=True):
            leaf.reward = reward
        for node in self.nodes:
            node.value = (node.reward or 0.0) if node.verdict != "undecided" else 0.0
        # Parents come before their children.
        for node in reversed(self.nodes):
            if node.parent is not None:
                node.parent.value += node.value

    def add_reflection(self, answer: Node) -> None:
        """Open a reflection slot beside an answer that seems wrong.

        As a sibling it continues the chain with the thinking but without the answer. At most one per parent, never at
        the root, and only if thinking and an answer still fit above `max_depth`.
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
        """Descend by UCB to a node with a free slot: unvisited children first, then slots, then the best child.

        With `widen`, adding children competes with descending (`_ucb_of_more`).
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
        """UCB of adding children to a node, from rewards of rollouts that started there; unfinished ones count 0."""
        rewards = [leaf.reward or 0.0 for leaf in node.fresh_leaves if leaf.verdict != "undecided"]
        tries = max(1, len(node.fresh_leaves) + node.asking)
        return self._ucb(sum(rewards), len(rewards) + node.asking, tries, node.tries)

    def ucb(self, node: Node, parent_tries: int) -> float:
        """v/n + C sqrt(ln N / n), the paper's UCB; a virtual loss counts as a visit with reward 0.

        Undecided leaves count in the exploration term only, so the search leaves nodes where nothing can be judged.
        """
        return self._ucb(node.value, node.visits + node.virtual_visits, node.tries, parent_tries)

    def _ucb(self, value: float, visits: int, tries: int, parent_tries: int) -> float:
        mean = value / max(visits, 1)
        if self.settings.seek == "pairs":
            # Add one visit with the tree's mean reward (a prior), else a single correct leaf would look certain.
            usual = self.root.value / max(self.root.visits, 1)
            mean = (value + usual) / (visits + 1)
            mean = 2 * min(mean, 1 - mean)
        return mean + self.settings.exploration * math.sqrt(math.log(max(parent_tries, 1)) / tries)

    def _join(self, node: Node) -> None:
        """Append a node to its parent and back up its reward, if it is a judged leaf."""
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
        """Add to the counts of a node and all its ancestors."""
        step: Node | None = node
        while step is not None:
            step.visits += visits
            step.value += value
            step.virtual_visits += virtual_visits
            step.undecided += undecided
            step.free_slots += free_slots
            step = step.parent
