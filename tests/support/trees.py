"""Random trees as a search leaves them: thoughts of every type, right, wrong and cut answers, reflections."""

from __future__ import annotations

import random
from dataclasses import replace

from cotree.search.store import StoredNode, StoredTree
from cotree.search.thoughts import PREFIXES

WORDS = ["add", "the", "two", "numbers", "then", "carry", "one", "apple", "box", "sum", "less", "more", "3", "4", "12"]


def node(i: int, parent: int | None, kind: str | None, text: str = "", verdict: str | None = None) -> StoredNode:
    reward = None if verdict is None else float(verdict == "correct")
    return StoredNode(i, parent, kind, text, "", "m", 1, 0, 0.0, verdict, reward, None, 1, "stop", 0, 0.0)


def tree_of(name: str, nodes: list[StoredNode], task: str = "arithmetic", pattern: str = "plain") -> StoredTree:
    """A tree whose visits and values are added up from its judged leaves."""
    counted = list(nodes)
    for leaf in nodes:
        step: int | None = leaf.node_id if leaf.verdict is not None else None
        while step is not None:
            kept = counted[step]
            counted[step] = replace(kept, visits=kept.visits + 1, value=kept.value + float(leaf.reward or 0.0))
            step = kept.parent_id
    prompt = [{"role": "user", "content": f"What is {name}?"}]
    return StoredTree(name, task, name, 0, "c", "sum", prompt, "3", pattern, 4, "rollouts", 1, 1, 0, 1, counted)


def random_tree(seed: int, name: str | None = None, task: str = "arithmetic") -> StoredTree:
    rng = random.Random(seed)
    nodes = [node(0, None, None)]

    def add(parent: int, kind: str, text: str, verdict: str | None = None) -> int:
        nodes.append(node(len(nodes), parent, kind, text, verdict))
        return len(nodes) - 1

    def say(kind: str) -> str:
        return f"{PREFIXES[kind][0]} {' '.join(rng.choices(WORDS, k=rng.randint(1, 9)))}.".strip()

    def answer(parent: int) -> None:
        verdict = rng.choice(["correct", "wrong", "wrong", "no_answer"])
        box = {"correct": "3}", "wrong": f"{rng.randint(4, 6)}}}", "no_answer": "1"}[verdict]
        leaf = add(parent, "answer", f"The answer is: \\boxed{{{box}", verdict)
        if nodes[leaf].verdict == "wrong" and rng.random() < 0.3:
            answer(add(add(parent, "reflection", say("reflection")), "thinking", say("thinking")))

    for _ in range(rng.randint(1, 2)):
        sub_task = add(0, "sub_task", say("sub_task"))
        for _ in range(rng.randint(1, 4)):
            thinking = add(sub_task, "thinking", say("thinking"))
            for _ in range(rng.randint(1, 2)):
                answer(thinking)
    return tree_of(name or f"t{seed:08}", nodes, task)
