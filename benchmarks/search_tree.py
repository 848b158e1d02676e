"""What select, expand and backpropagate cost a thought in trees of growing size, and the memory a thought.

Only the tree works here: the texts are ready before it asks. CPU time, so a busy machine does not count.
"""

from __future__ import annotations

import gc
import time
import tracemalloc
from collections.abc import Iterator, Sequence
from itertools import count

from cotree.search.mcts import TreeSearch
from cotree.search.settings import Search
from cotree.search.thoughts import draw

# Answers come early and thinking goes on for ever, so that the tree can have any size.
ENDLESS = {"root": {"thinking": 4}, "thinking": {"answer": 1, "thinking": 4}, "reflection": {"thinking": 1}}
TEXT = "a thought of some hundred characters, as long as a small model's are when it counts letters in a word "
THOUGHTS_TIMED = 20_000


def new_tree(seed: int) -> TreeSearch:
    """An empty endless tree."""
    return TreeSearch(ENDLESS, f"{seed}", Search(rollouts=10**9, max_depth=40, max_reflections=10**9))


def grow(search: TreeSearch, size: int, leaves: int = 4) -> None:
    """Rounds of `leaves` rollouts until the tree has `size` thoughts; half of the answers are right."""
    number: Iterator[int] = count(len(search.nodes))
    while len(search.nodes) <= size:
        rollouts = search.ask(leaves)
        for rollout in rollouts:
            while (request := rollout.pending) is not None:
                thoughts = [request.thought(i, f"{TEXT}{next(number)}") for i in range(request.n)]
                right = draw(request.seed_key, 2)
                for thought in thoughts if request.type == "answer" else ():
                    thought.verdict = "correct" if right else "wrong"
                    thought.reward = float(right)
                rollout.feed([[thought] for thought in thoughts])
        for rollout in rollouts:
            search.tell(rollout)
            for node in rollout.written:
                if node.verdict == "wrong":
                    search.add_reflection(node)


def milliseconds(sizes: Sequence[int], seed: int) -> dict[int, float]:
    """CPU ms a thought while trees grow from half of each size to the size; small trees are grown many times."""
    grow(new_tree(seed), 1000)
    found: dict[int, float] = {}
    for size in sizes:
        seconds, thoughts = 0.0, 0
        for repeat in range(max(1, 2 * THOUGHTS_TIMED // size)):
            search = new_tree(seed + repeat)
            grow(search, size // 2)
            before, started = len(search.nodes), time.process_time()
            grow(search, size)
            seconds += time.process_time() - started
            thoughts += len(search.nodes) - before
        found[size] = 1000 * seconds / thoughts
    return found


def bytes_a_thought(size: int, seed: int) -> float:
    """Memory a thought of a tree with `size` thoughts, its text of 100 characters included."""
    gc.collect()
    tracemalloc.start()
    search = new_tree(seed)
    grow(search, size)
    gc.collect()
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    return held / len(search.nodes)
